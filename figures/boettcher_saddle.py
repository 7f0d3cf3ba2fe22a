"""Saddles of which random planes show a bowl: surfaces, principal curvatures, and the share of saddles.

    python figures/boettcher_saddle.py [--out figures/boettcher_saddle.png] [--planes 10000]

L(w) = (Σ_{i <= p} w_i² − Σ_{i > p} w_i²) / 2 in 1000 dimensions has p eigenvalues +1 and 1000 − p of −1, so that
all is known: the plane of two eigenvectors has the curvatures +1 and −1; random planes, directions of length
√1000, the expected curvatures t ± √(π/2) F, and the probability exp(−t²/4F²)/√2 of being a saddle, with t the
trace and F² = 1000 (limits of large n). After the synthetic losses of Böttcher & Wheeler 2022 (arXiv 2208.13219);
p is ours. Prints a table: measured, from losses alone, against these.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import landscape
from landscape.estimators.planes import saddle_probability
from landscape.estimators.probes import draw
from landscape.metrics import ProjectedCurvature
from landscape.seeds import generator
from landscape.testbeds import saddle

SIZE, POSITIVE = 1000, (500, 520, 550, 800)
POINTS = 41
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#555555"


@dataclass(frozen=True)
class Found:
    """What is measured of one saddle, and what is known.

    Attributes:
        positive: p.
        kappa: principal curvatures of the planes, (planes, 2).
        share: of planes that are saddles, and its 95 % interval, (3,).
        hessian: curvatures in the plane of the extremal eigenvectors, (2,).
        surfaces: losses over the first random plane and over that of the Hessian, each (y, x).
    """

    positive: int
    kappa: np.ndarray
    share: np.ndarray
    hessian: np.ndarray
    surfaces: tuple[np.ndarray, np.ndarray]

    @property
    def expected(self) -> np.ndarray:
        """Means of κ₋ and κ₊ for large n, (2,)."""
        return self.trace + np.sqrt(np.pi / 2 * SIZE) * np.array([-1.0, 1.0])

    @property
    def trace(self) -> int:
        """The trace, which is exact."""
        return 2 * self.positive - SIZE

    @property
    def probability(self) -> float:
        """Of a saddle, for large n."""
        return saddle_probability(self.trace, SIZE**0.5)


def measured(positive: int, planes: int) -> Found:
    """Measure curvatures from losses alone, and two surfaces."""
    problem = landscape.Problem(*saddle(positive, SIZE - positive))
    metric = ProjectedCurvature(planes=planes, hessian_plane=True)
    ds = landscape.measure(metric, problem)
    first = (
        draw(generator(0, metric.name, 0), SIZE, 2, "gaussian") / SIZE**0.5
    )  # its first plane, length about 1
    hessian = torch.from_numpy(ds["hessian_directions"].values.T.copy())
    names = ("saddle_fraction", "saddle_fraction_low", "saddle_fraction_high")
    return Found(
        positive,
        ds["kappa"].values,
        np.array([float(ds[name]) for name in names]),
        ds["hessian_kappa"].values,
        (surface(problem, first / first.norm(dim=0)), surface(problem, hessian)),
    )


def places() -> np.ndarray:
    """Displacements along each direction."""
    return np.linspace(-1, 1, POINTS)


def surface(problem: landscape.Problem, plane: Tensor) -> np.ndarray:
    """Losses at θ + x d₁ + y d₂ for the columns d of a plane, (y, x)."""
    theta = problem.parameters_vector()
    with problem.session():
        return np.array([
            [float(problem.at(theta + x * plane[:, 0] + y * plane[:, 1]).value()) for x in places()]
            for y in places()
        ])  # fmt: skip


def table(every: list[Found]) -> str:
    """Return a line for each saddle: curvatures and share, measured and in the limit."""
    lines = [
        "up   down  mean of κ₋ (limit)    mean of κ₊ (limit)    saddles (95 % interval; limit)    Hessian plane"
    ]
    for found in every:
        minus, plus = found.kappa.mean(axis=0)
        low, high = found.expected
        share, below, above = found.share
        lines.append(
            f"{found.positive:3d}  {SIZE - found.positive:3d}   {minus:8.2f} ({low:8.2f})   {plus:8.2f} ({high:8.2f})"
            f"   {share:.4f} ({below:.4f} to {above:.4f}; {found.probability:.4f})"
            f"   {found.hessian[0]:+.15f} {found.hessian[1]:+.15f}"
        )
    return "\n".join(lines)


def draw_surface(axes: Axes, losses: np.ndarray) -> None:
    """Draw filled contours; L = 0, the level of the critical point, is black."""
    axes.contourf(places(), places(), losses, levels=18, cmap="viridis")
    axes.contour(places(), places(), losses, levels=[0.0], colors="black", linewidths=0.9)
    axes.plot([0], [0], "o", color="white", markeredgecolor="black", markersize=3)
    axes.set_aspect("equal")
    axes.set_xticks([-1, 0, 1])
    axes.set_yticks([-1, 0, 1])
    low, high = losses.min(), losses.max()
    axes.text(
        0.97, 0.04, f"L from {low:.2g} to {high:.2g}".replace("-", "−"), transform=axes.transAxes, ha="right",
        fontsize=7, bbox={"color": "white", "alpha": 0.85, "pad": 1.2},
    )  # fmt: skip


def draw_histograms(axes: Axes, found: Found) -> None:
    """Draw histograms of κ₋ and κ₊ with their means in the limit, and tell the share of saddles."""
    bins = np.linspace(found.trace - 160, found.trace + 160, 49)
    for side, (name, color) in enumerate((("κ₋", BLUE), ("κ₊", VERMILLION))):
        axes.hist(found.kappa[:, side], bins=list(bins), color=color, alpha=0.6, linewidth=0, label=name)
        axes.axvline(found.expected[side], color="black", linestyle="--", linewidth=0.9)
    if bins[0] < 0 < bins[-1]:
        axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlim(bins[0], bins[-1])
    axes.set_ylim(0, axes.get_ylim()[1] * 1.45)
    axes.set_yticks([])
    limit = f"{100 * found.probability:.1f} %" if found.probability > 1e-4 else "0"
    axes.text(
        0.5, 0.97, f"saddles: {100 * found.share[0]:.1f} %, limit {limit}", transform=axes.transAxes, ha="center",
        va="top", fontsize=7, bbox={"color": "white", "pad": 1.2},
    )  # fmt: skip


def draw_all(figure: Figure, every: list[Found]) -> None:
    """Draw a row for each saddle: random plane, plane of the Hessian, histograms."""
    grid = figure.subplots(len(every), 3, squeeze=False, gridspec_kw={"width_ratios": [1, 1, 1.5]})
    for row, found in zip(grid, every, strict=True):
        for axes, losses in zip(row, found.surfaces, strict=False):
            draw_surface(axes, losses)
        draw_histograms(row[2], found)
        row[0].set_ylabel(
            f"{found.positive} up, {SIZE - found.positive} down\ntrace {found.trace}", fontsize=8
        )
        for axes in row:
            axes.tick_params(labelsize=7, width=0.6, length=2.5)
        row[2].spines[["top", "right", "left"]].set_visible(False)
    titles = ("a random plane", "plane of two eigenvectors", "principal curvatures of random planes")
    labels = ("displacement", "displacement", "curvature, directions of length √n")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=8)
    for axes, label in zip(grid[-1], labels, strict=True):
        axes.set_xlabel(label, fontsize=8)
    grid[0][2].legend(fontsize=7, frameon=False, loc="center right", handlelength=1)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--planes", type=int, default=10_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    every = [measured(positive, arguments.planes) for positive in POSITIVE]
    print(table(every))
    figure = Figure(figsize=(7.0, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    draw_all(figure, every)
    figure.suptitle(
        f"Quadratic saddles in {SIZE} dimensions, {arguments.planes} random planes; dashed: t ± √(π/2) F",
        fontsize=8.5,
    )
    figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
