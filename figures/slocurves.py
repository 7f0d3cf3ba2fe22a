"""Coresets of low curvature on the digits: which examples they are, and what can be learned from them.

    python figures/slocurves.py [--out figures/slocurves.png] [--seeds 5]

Curv(X) of every training example is measured on three networks that were trained on all of them. Coresets of
growing size, the examples of lowest curvature of each class by the first network, train new networks: with the
curvature penalty, without it, and from random examples of each class for comparison. At the largest size but
one, networks of the other kinds are trained on the same coresets. After Garg & Roy 2023 (arXiv 2205.15943),
whose networks are ResNet-18 on CIFAR. Prints tables: means and standard errors over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import landscape
from landscape import training
from landscape.metrics import InputCurvature
from landscape.seeds import generator
from landscape.testbeds import mlp, split
from landscape.testbeds.digits import digits
from landscape.testbeds.nets import own_stream

STEPS, BATCH, LEARNING_RATE, DECAY = 600, 64, 0.05, 5e-4
SIZES = (1, 2, 5, 10, 20, 40)  # examples of each class
PENALTY, STEP = 0.5, 0.25  # weight of Curv(X); h, in grey levels of [0, 1]: 8/255 for each of 64
SHOWN = 10
COLOURS = {"lowest + penalty": "#0072B2", "lowest": "#009E73", "random": "#D55E00"}
KINDS_COLOURS = ("#0072B2", "#D55E00", "#009E73")


def small_mlp(seed: int) -> nn.Module:
    """64-128-10, ReLU."""
    return mlp((64, 128, 10), seed=seed)


def deep_mlp(seed: int) -> nn.Module:
    """64-64-64-64-10, Tanh."""
    return mlp((64, 64, 64, 64, 10), nn.Tanh, seed=seed)


def convolutional(seed: int) -> nn.Module:
    """Two convolutions and a linear layer."""
    with own_stream(seed, "slocurves"):
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(), nn.Flatten(), nn.Linear(288, 10),
        )  # fmt: skip


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "MLP": small_mlp, "deep tanh MLP": deep_mlp, "convolutional": convolutional,
}  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, seed: int, penalty: float = 0.0) -> nn.Module:
    """Train for a fixed number of steps of SGD, whatever the number of examples; the rate falls to zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=DECAY)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order, left = generator(seed, "slocurves", 0), torch.zeros(0, dtype=torch.long)
    for _ in range(STEPS):
        if len(left) < min(BATCH, len(x)):
            left = torch.cat([left, torch.randperm(len(x), generator=order)])
        chosen, left = left[:BATCH], left[BATCH:]
        inputs, targets = x[chosen], y[chosen]
        optimizer.zero_grad()
        value = F.cross_entropy(model(inputs), targets)
        if penalty:
            value = value + penalty * training.curvature_penalty(
                lambda at, wanted=targets: F.cross_entropy(model(at), wanted, reduction="none"), inputs, STEP
            )
        value.backward()
        optimizer.step()
        fall.step()
    return model.eval()


def measured(kind: str, x: Tensor, y: Tensor) -> Any:
    """Curv(X) of all training examples on a network of a kind."""
    model = train(KINDS[kind](0), x, y, 0)
    problem = landscape.Problem(model, nn.CrossEntropyLoss(), [(x, y)])
    return landscape.measure(InputCurvature(step=STEP, probes=0, image=(8, 8)), problem)


def random_examples(y: Tensor, per_class: int, seed: int) -> np.ndarray:
    """Random examples of each class."""
    order = torch.randperm(len(y), generator=generator(seed, "slocurves/random", 0))
    found = [order[y[order] == label][:per_class] for label in range(10)]
    return np.asarray(torch.cat(found))


def accuracies(curved: Any, kind: str, sizes: tuple[int, ...], seeds: int) -> dict[str, np.ndarray]:
    """Test accuracy (%) of networks trained on coresets, (sizes, seeds) for each way to choose them."""
    (x, y), (test_x, test_y) = split(*digits())
    found = {way: np.zeros((len(sizes), seeds)) for way in COLOURS}
    for row, per_class in enumerate(sizes):
        lowest = training.select_coreset(curved, per_class=per_class)
        for seed in range(seeds):
            for way in COLOURS:
                chosen = torch.as_tensor(random_examples(y, per_class, seed) if way == "random" else lowest)
                penalty = PENALTY if way.endswith("penalty") else 0.0
                model = train(KINDS[kind](seed + 1), x[chosen], y[chosen], seed + 1, penalty)
                with torch.no_grad():
                    right = (model(test_x).argmax(1) == test_y).double().mean()
                found[way][row, seed] = 100 * float(right)
    return found


def stderr(values: np.ndarray) -> np.ndarray:
    """Standard errors over seeds."""
    return values.std(axis=1, ddof=1) / np.sqrt(values.shape[1])


def table(found: dict[str, np.ndarray], names: list[str]) -> str:
    """Return a line for each row: means and standard errors."""
    lines = [f"{'':16}" + "".join(f"{way:>20}" for way in found)]
    for row, name in enumerate(names):
        cells = (f"{v[row].mean():.1f} ± {stderr(v)[row]:.1f}" for v in found.values())
        lines.append(f"{name:16}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def draw(figure: Figure, curved: dict[str, Any], found: dict[str, np.ndarray]) -> None:
    """Draw the histograms, the accuracy against the size, and the extreme examples."""
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.0, 0.62))
    left, right = upper.subplots(1, 2)
    every = np.concatenate([ds["curvature"].values for ds in curved.values()])
    edges = np.geomspace(every[every > 0].min(), every.max() * 1.1, 41)
    for (kind, ds), colour in zip(curved.items(), KINDS_COLOURS, strict=True):
        counts = np.histogram(ds["curvature"].values, edges)[0] / ds.sizes["example"]
        left.stairs(counts, edges, color=colour, linewidth=1.1, label=kind)
    left.set_xscale("log")
    left.set_xlabel("Curv(X) of an example", fontsize=8)
    left.set_ylabel("share of the training examples", fontsize=8)
    for way, values in found.items():
        right.errorbar(SIZES, values.mean(axis=1), yerr=stderr(values), color=COLOURS[way], marker="o",
                       markersize=3, linewidth=1.1, elinewidth=0.8, capsize=2, label=way)  # fmt: skip
    right.set_xscale("log")
    right.set_xticks(SIZES, [str(size) for size in SIZES])
    right.minorticks_off()
    right.set_xlabel("training examples of each class", fontsize=8)
    right.set_ylabel("test accuracy (%)", fontsize=8)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    first = next(iter(curved.values()))
    order = np.argsort(first["curvature"].values)
    grid = lower.subplots(2, SHOWN)
    for row, chosen, name in zip(
        grid, (order[:SHOWN], order[::-1][:SHOWN]), ("lowest", "highest"), strict=True
    ):
        for axes, index in zip(row, chosen, strict=True):
            axes.imshow(first["image"][int(index)], cmap="gray", vmin=0, vmax=1)
            axes.set_title(int(first["label"][int(index)]), fontsize=7, pad=2)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(f"{name} Curv", fontsize=7)


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (x, y), _ = split(*digits())
    curved = {kind: measured(kind, x, y) for kind in KINDS}
    first = next(iter(KINDS))
    found = accuracies(curved[first], first, SIZES, arguments.seeds)
    print(
        f"{first}, test accuracy (%) against the examples of each class\n{table(found, [str(s) for s in SIZES])}\n"
    )
    others = {
        kind: accuracies(curved[first], kind, SIZES[-2:-1], arguments.seeds)
        for kind in KINDS
        if kind != first
    }
    for kind, values in others.items():
        print(f"{kind}, on the coresets that the {first} chose\n{table(values, [str(SIZES[-2])])}\n")
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, curved, found)
    title = f"Coresets of low curvature on the digits; {arguments.seeds} seeds, bars are standard errors"
    figure.suptitle(title, fontsize=8)
    figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
