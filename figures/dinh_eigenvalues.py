"""All but min_k n_k of the Hessian's eigenvalues made arbitrarily large, in a network that computes the same.

    python figures/dinh_eigenvalues.py [--out figures/dinh_eigenvalues.png]

A deep rectifier network without biases, trained on digits. Its layers are scaled by 1/β, but the smallest one,
of n weights, by β^(K-1): the function stays, and of r positive eigenvalues of the Hessian at least r - n grow
beyond any bound, as β², by interlacing. After Dinh et al. 2017 (arXiv 1703.04933), theorem 5, which is about minima,
where r is the rank. Prints the counts, from all eigenvalues.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import landscape
from landscape import transforms
from landscape.seeds import generator
from landscape.testbeds import split
from landscape.testbeds.digits import digits
from landscape.testbeds.train import train

POOLED = 4  # images of 8 x 8 as 4 x 4: the dense Hessian stays small
SIZES = (16, 12, 12, 10)
BETAS = (1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
POSITIVE = 1e-10  # of the largest eigenvalue: below it is rounding
COLORS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#d8b400")


@dataclass(frozen=True)
class Point:
    """The network at one β.

    Attributes:
        beta: factor.
        eigenvalues: of the Hessian, descending.
        change: the largest relative change of the outputs.
    """

    beta: float
    eigenvalues: np.ndarray
    change: float


def network() -> tuple[nn.Sequential, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Train the network, in float64."""
    inputs, targets = split(*digits())[0]
    pooled = nn.functional.avg_pool2d(inputs.reshape(-1, 1, 8, 8), 8 // POOLED).flatten(1).double()
    start = generator(0, "dinh_eigenvalues", 0)
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(itertools.pairwise(SIZES)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(wide, narrow, bias=False, dtype=torch.float64)]
        with torch.no_grad():
            draws = torch.randn(narrow, wide, generator=start, dtype=torch.float64)
            layers[-1].weight.copy_(draws * (2 / wide) ** 0.5)
    model = nn.Sequential(*layers)
    train(
        model,
        nn.CrossEntropyLoss(),
        [(pooled[:128], targets[:128]), (pooled[128:], targets[128:])],
        epochs=40,
        lr=0.01,
    )
    return model, [(pooled, targets)]


def points(problem: landscape.Problem) -> list[Point]:
    """Compute all eigenvalues along β."""
    found = transforms.find(problem)
    layers = len(SIZES) - 1
    eye = torch.eye(problem.size, dtype=torch.float64)
    result = []
    for beta in BETAS:
        factors = torch.ones(len(found.nodes), dtype=torch.float64)
        # Group k lies between layers k and k + 1, so that layer k is scaled by α_k / α_(k-1).
        for k in range(layers - 1):
            factors[list(found.groups[k].nodes)] = beta ** -(k + 1.0)
        there = found.at(factors, name=f"β = {beta:g}")
        values = torch.linalg.eigvalsh(there.problem.hvp(eye)).flip(0).numpy()
        result.append(Point(beta, values, there.function_change))
    return result


def table(found: list[Point], rank: int, smallest: int) -> str:
    """Return a line for each β."""
    lines = [
        f"{rank} positive eigenvalues, smallest layer {smallest} weights: at least {rank - smallest} grow",
        "    beta   change of outputs    eigenvalue number r - n   number > the largest at beta = 1",
    ]
    top = found[0].eigenvalues[0]
    lines += [
        f"{p.beta:8g} {p.change:14.1e} {p.eigenvalues[rank - smallest - 1]:22.4g} {(p.eigenvalues > top).sum():20d}"
        for p in found
    ]
    return "\n".join(lines)


def draw(figure: Figure, found: list[Point], rank: int, smallest: int) -> None:
    """Draw the positive eigenvalues in order at each β, and up to where all must grow."""
    axes = figure.subplots()
    for point, color in zip(found, COLORS, strict=True):
        values = point.eigenvalues[:rank]  # the others are rounding, or negative
        axes.plot(np.arange(1, rank + 1), np.where(values > 0, values, np.nan), color=color, linewidth=1.3,
                  label=f"β = {point.beta:g}")  # fmt: skip
    axes.axvline(rank - smallest, color="#555555", linewidth=0.8, linestyle="--")
    axes.annotate(
        f"r − n = {rank} − {smallest}", (rank - smallest, 0.97), (4, 0), xycoords=axes.get_xaxis_transform(),
        textcoords="offset points", va="top", fontsize=7,
    )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("number of the eigenvalue, largest first", fontsize=8)
    axes.set_ylabel("Hessian eigenvalue\n(loss / parameter²)", fontsize=8)
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, data = network()
    problem = landscape.Problem(model, nn.CrossEntropyLoss(), data)
    found = points(problem)
    values = found[0].eigenvalues
    rank = int((values > POSITIVE * values[0]).sum())
    smallest = min(p.numel() for p in model.parameters())
    print(table(found, rank, smallest))
    figure = Figure(figsize=(7.0, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, found, rank, smallest)
    sizes = "-".join(map(str, SIZES))
    figure.suptitle(
        f"Network {sizes} on digits, {problem.size} weights; outputs change by at most "
        f"{max(p.change for p in found):.0e}", fontsize=8,
    )  # fmt: skip
    figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
