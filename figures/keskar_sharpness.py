"""Small against large batches: sharpness of the minima, and the loss on the way from one to the other.

    python figures/keskar_sharpness.py [--out figures/keskar_sharpness.png] [--seeds 5] [--loss 0.01]

The same network is trained from the same seeds with SGD at one learning rate, with batches of 16 and with all
1438 digits at once, to the same training loss: sharpness shrinks as the loss does. Measured on the training data
are Keskar's sharpness at ε = 1e-3 and 5e-4, in the full space and in a random subspace of 100 dimensions (columns
from N(0, 1)). After Keskar, Mudigere, Nocedal, Smelyanskiy & Tang 2017 (arXiv 1609.04836), whose large-batch minima
are sharper by one to two orders. Prints a table like theirs, means ± standard deviations over seeds, and draws
the loss along the straight path (1 − α) θ_s + α θ_l and the curved one cos(πα/2) θ_s + sin(πα/2) θ_l.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import landscape
from landscape.metrics import Sharpness
from landscape.seeds import generator
from landscape.testbeds import mlp, split
from landscape.testbeds.digits import SIZES, digits

SMALL, LARGE = 16, 1438
LEARNING_RATE, MOMENTUM, MOST_UPDATES, LOOK_EVERY = 0.05, 0.9, 20_000, 5
EPSILON = (5e-4, 1e-3)
ALPHA = np.linspace(-1.0, 2.0, 61)
BLUE, VERMILLION = "#0072B2", "#D55E00"

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Minimum:
    """What one trained network shows: sharpness at each ε, accuracies, the training loss."""

    theta: Tensor
    full: np.ndarray
    subspace: np.ndarray
    accuracy: dict[str, float]
    loss: float


@dataclass(frozen=True)
class Way:
    """Loss and accuracy of both parts of the data along a path."""

    loss: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]


def minimum(size: int, seed: int, target: float, parts: dict[str, Data]) -> Minimum:
    """Train with batches of this size and measure."""
    model = mlp(SIZES, seed=seed)
    trained(model, *parts["train"], size, seed, target)
    problem = landscape.Problem(model, nn.CrossEntropyLoss(), [parts["train"]])
    full, subspace = (
        landscape.measure(Sharpness(epsilon=EPSILON, subspace=p), problem)["sharpness"].values
        for p in (None, 100)
    )
    shares = {name: share_right(model, part) for name, part in parts.items()}
    return Minimum(problem.parameters_vector(), full, subspace, shares, float(problem.value()))


def trained(model: nn.Module, inputs: Tensor, targets: Tensor, size: int, seed: int, target: float) -> None:
    """Train in place until the loss of all training data, seen every few updates, is at most the target."""
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    order, updates = generator(seed, "keskar_sharpness", 0), 0
    while updates < MOST_UPDATES:
        for chosen in torch.randperm(len(inputs), generator=order).split(size):
            optimizer.zero_grad()
            loss(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
            updates += 1
            if updates % LOOK_EVERY == 0:
                with torch.no_grad():
                    if float(loss(model(inputs), targets)) <= target:
                        return
    raise SystemExit(
        f"batch size {size}: training did not reach a loss of {target} in {MOST_UPDATES} updates"
    )


def share_right(model: nn.Module, part: Data) -> float:
    """Return the accuracy."""
    with torch.no_grad():
        return float((model(part[0]).argmax(1) == part[1]).double().mean())


def along(small: Tensor, large: Tensor, parts: dict[str, Data], *, curved: bool) -> Way:
    """Return loss and accuracy at each α of the path from the small batch's minimum (0) to the large one's (1)."""
    model = mlp(SIZES)
    problems = {n: landscape.Problem(model, nn.CrossEntropyLoss(), [part]) for n, part in parts.items()}
    loss: dict[str, list[float]] = {name: [] for name in parts}
    accuracy: dict[str, list[float]] = {name: [] for name in parts}
    for alpha in ALPHA:
        weights = (
            (math.cos(math.pi * alpha / 2), math.sin(math.pi * alpha / 2)) if curved else (1 - alpha, alpha)
        )
        theta = weights[0] * small + weights[1] * large
        torch.nn.utils.vector_to_parameters(theta, model.parameters())
        for name, part in parts.items():
            loss[name].append(float(problems[name].value()))
            accuracy[name].append(share_right(model, part))
    return Way({n: np.array(v) for n, v in loss.items()}, {n: np.array(v) for n, v in accuracy.items()})


def table(found: dict[int, list[Minimum]]) -> str:
    """Return a line for each batch size: means and standard deviations over seeds."""
    lines = [
        "batch   full 1e-3        full 5e-4        p=100 1e-3       p=100 5e-4       "
        "accuracy train      test          loss"
    ]
    for size, runs in found.items():
        cells = []
        for key in ("full", "subspace"):
            values = np.array([getattr(run, key) for run in runs])
            cells += [spread(values[:, 1]), spread(values[:, 0])]
        shares = [spread(100 * np.array([run.accuracy[part] for run in runs])) for part in ("train", "test")]
        lines.append(
            f"{size:5d}   {''.join(cell.ljust(17) for cell in cells)}{''.join(s.ljust(19) for s in shares)}"
            f"{np.mean([run.loss for run in runs]):.4f}"
        )
    return "\n".join(lines)


def spread(values: np.ndarray) -> str:
    """Return mean ± standard deviation."""
    return f"{values.mean():.2f} ± {values.std(ddof=min(1, len(values) - 1)):.2f}"


def draw(figure: Figure, paths: dict[str, Way]) -> None:
    """Draw loss and accuracy along each path."""
    left = None
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, path) in zip(panels, paths.items(), strict=True):
        other = axes.twinx()
        for part, dashes in (("train", "-"), ("test", "--")):
            axes.plot(ALPHA, path.loss[part], dashes, color=BLUE, linewidth=1.3, label=f"loss, {part}")
            other.plot(
                ALPHA,
                100 * path.accuracy[part],
                dashes,
                color=VERMILLION,
                linewidth=1.0,
                label=f"accuracy, {part}",
            )
        for at, name in ((0.0, f"batch {SMALL}"), (1.0, f"batch {LARGE}")):
            axes.axvline(at, color="#555555", linewidth=0.6, zorder=0)
            axes.annotate(name, (at, 1.0), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                          ha="center", va="bottom", fontsize=7)  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel(f"α along the {title} path", fontsize=8)
        axes.tick_params(labelsize=7)
        other.set_ylim(0, 105)
        other.tick_params(labelsize=7, colors=VERMILLION)
        for one in (axes, other):
            one.spines["top"].set_visible(False)
        left = left or (axes, other)
    panels[0].set_ylabel("mean cross-entropy", fontsize=8, color=BLUE)
    other.set_ylabel("accuracy (%)", fontsize=8, color=VERMILLION)
    assert left
    lines = [line for one in left for line in one.lines if not line.get_label().startswith("_")]
    figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=4, fontsize=7,
                  frameon=False)  # fmt: skip


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--loss", type=float, default=0.01)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = dict(zip(("train", "test"), split(*digits()), strict=True))
    found = {
        size: [minimum(size, seed, arguments.loss, parts) for seed in range(arguments.seeds)]
        for size in (SMALL, LARGE)
    }
    print(table(found))
    small, large = (found[size][0].theta for size in (SMALL, LARGE))
    paths = {name: along(small, large, parts, curved=name == "curved") for name in ("straight", "curved")}
    figure = Figure(figsize=(7.0, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, paths)
    title = f"Digits, network {'-'.join(map(str, SIZES))}, SGD to a training loss of {arguments.loss}; seed 0"
    figure.suptitle(title, fontsize=8)
    figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
