"""Batch size against the curvature of the minimum that SGD finds, on the digits.

    python figures/yao_batch_size.py [--out figures/yao_batch_size.png] [--seeds 3] [--loss 0.02]

The same network is trained from the same seeds with SGD at one learning rate and batches of growing size, all
to the same training loss: the Hessian shrinks as the loss does, so a fixed number of epochs would compare
how long each was trained. There the largest eigenvalue of the Hessian, and Keskar's sharpness at ε = 1e-3, are
measured on the training and on the test data. After Yao, Gholami, Lei, Keutzer & Mahoney 2018 (arXiv
1802.08241), who find that large batches end in sharper places. Prints a table: means and ranges over seeds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import landscape
from landscape.metrics import Sharpness, SpectralNorm
from landscape.seeds import generator
from landscape.testbeds import batches, mlp, split
from landscape.testbeds.digits import SIZES, digits

BATCHES = (8, 16, 32, 64, 128, 256, 512, 1438)
LEARNING_RATE, MOMENTUM, MOST_EPOCHS = 0.05, 0.9, 4000
CURVATURE_TICKS = (0.2, 0.5, 1, 2, 5, 10)
SHARPNESS_TICKS = (0.2, 0.5, 1, 2, 5, 10)
EPSILON = 1e-3
BLUE, VERMILLION = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Outcome:
    """What one trained network shows."""

    curvature: dict[str, float]
    sharpness: dict[str, float]
    accuracy: dict[str, float]
    epochs: int


def outcome(size: int, seed: int, target: float) -> Outcome:
    """Train with batches of this size, and measure on both parts of the data."""
    parts = dict(zip(("train", "test"), split(*digits()), strict=True))
    model = mlp(SIZES, seed=seed)
    epochs = trained(model, *parts["train"], size, seed, target)
    curvature, sharpness, accuracy = {}, {}, {}
    for name, (inputs, targets) in parts.items():
        problem = landscape.Problem(model, nn.CrossEntropyLoss(), batches(inputs, targets, 512))
        curvature[name] = float(landscape.measure(SpectralNorm(), problem)["eigenvalue_max"])
        sharpness[name] = float(landscape.measure(Sharpness(epsilon=(EPSILON,)), problem)["sharpness"][0])
        accuracy[name] = share_right(model, inputs, targets)
    return Outcome(curvature, sharpness, accuracy, epochs)


def trained(model: nn.Module, inputs: Tensor, targets: Tensor, size: int, seed: int, target: float) -> int:
    """Train in place until the loss of all training data is at most the target; return the epochs."""
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    order = generator(seed, "yao_batch_size", 0)
    for epoch in range(1, MOST_EPOCHS + 1):
        for chosen in torch.randperm(len(inputs), generator=order).split(size):
            optimizer.zero_grad()
            loss(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
        with torch.no_grad():
            if float(loss(model(inputs), targets)) <= target:
                return epoch
    raise SystemExit(f"batch size {size}: training did not reach a loss of {target} in {MOST_EPOCHS} epochs")


def share_right(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the accuracy."""
    with torch.no_grad():
        return float((model(inputs).argmax(1) == targets).double().mean())


def table(found: dict[int, list[Outcome]]) -> str:
    """Return a line for each batch size: means over seeds, and the range of the curvature."""
    lines = [
        "batch   lambda_1 train (range)        lambda_1 test (range)       sharpness train   test   "
        "accuracy train   test     epochs"
    ]
    for size, runs in found.items():
        cells = []
        for part in ("train", "test"):
            values = np.array([run.curvature[part] for run in runs])
            cells.append(f"{values.mean():10.4f} ({values.min():.4f}-{values.max():.4f})".ljust(28))
        sharp = [np.mean([run.sharpness[part] for run in runs]) for part in ("train", "test")]
        shares = [np.mean([run.accuracy[part] for run in runs]) for part in ("train", "test")]
        lines.append(
            f"{size:5d}  {cells[0]}{cells[1]} {sharp[0]:10.2f} {sharp[1]:8.2f}   {100 * shares[0]:8.2f} %"
            f" {100 * shares[1]:8.2f} %"
            f"  {np.mean([run.epochs for run in runs]):8.1f}"
        )
    return "\n".join(lines)


def draw(figure: Figure, found: dict[int, list[Outcome]]) -> None:
    """Draw curvature, sharpness and accuracy against the batch size; bars reach over all seeds."""
    left, middle, right = figure.subplots(1, 3)
    sizes = np.array(list(found))
    for part, colour, marker in (("train", BLUE, "o"), ("test", VERMILLION, "s")):
        curvature = np.array([[run.curvature[part] for run in runs] for runs in found.values()])
        sharpness = np.array([[run.sharpness[part] for run in runs] for runs in found.values()])
        accuracy = 100 * np.array([[run.accuracy[part] for run in runs] for runs in found.values()])
        for axes, values in ((left, curvature), (middle, sharpness), (right, accuracy)):
            mean = values.mean(axis=1)
            bars = np.abs(np.stack([values.min(axis=1), values.max(axis=1)]) - mean)
            axes.errorbar(
                sizes, mean, yerr=bars, color=colour, marker=marker, markersize=4, linewidth=1.2,
                elinewidth=0.8, capsize=2, label=f"{part}ing data" if part == "train" else "test data",
            )  # fmt: skip
    left.set_yscale("log")
    left.set_yticks(CURVATURE_TICKS, [f"{tick:g}" for tick in CURVATURE_TICKS])
    left.set_ylim(0.2, 12)
    middle.set_yscale("log")
    middle.set_yticks(SHARPNESS_TICKS, [f"{tick:g}" for tick in SHARPNESS_TICKS])
    middle.set_ylabel(f"Keskar's sharpness, ε = {EPSILON:g}", fontsize=8)
    left.set_ylabel("largest Hessian eigenvalue\n(loss / parameter²)", fontsize=8)
    right.set_ylabel("accuracy (%)", fontsize=8)
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(
            sizes, [str(size) if i % 2 == 0 or i == len(sizes) - 1 else "" for i, size in enumerate(sizes)]
        )
        axes.minorticks_off()
        axes.set_xlabel("batch size of SGD", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=7, frameon=False)


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--loss", type=float, default=0.02)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        size: [outcome(size, seed, arguments.loss) for seed in range(arguments.seeds)] for size in BATCHES
    }
    print(table(found))
    figure = Figure(figsize=(7.0, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, found)
    runs = f"SGD (rate {LEARNING_RATE}, momentum {MOMENTUM}) to a training loss of {arguments.loss}"
    title = f"Digits, network {'-'.join(map(str, SIZES))}, {runs}; {arguments.seeds} seeds, bars over all"
    figure.suptitle(title, fontsize=8)
    figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
