"""The same network over a random plane and over that of its Hessian, and its trace from losses alone.

    python figures/boettcher_network.py [--out figures/boettcher_network.png] [--planes 256]

The small network trained on digits, over all of them. Two panels show its loss on one scale of colours: over a
random plane, and over the plane of the eigenvectors of the smallest and the largest eigenvalue of its Hessian,
where the loss goes down. Coordinates are displacements, directions have length 1; the random plane is drawn
farther, or it would be blank. The third panel shows the trace estimated from losses in random planes, with its
95 % band, against the exact one. After Böttcher & Wheeler 2022 (arXiv 2208.13219). Prints a table; its last line
shows what losses in float32 see, which cannot be told apart close enough to pass between the kinks of ReLU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

import landscape
from landscape import testbeds
from landscape.estimators.planes import estimate
from landscape.estimators.probes import draw
from landscape.metrics import ProjectedCurvature, Trace
from landscape.seeds import generator

POINTS = 51
RANDOM_REACH, HESSIAN_REACH = (12.0, 12.0), (1.0, 0.2)
LEVELS = np.geomspace(0.03, 1, 19)
COUNTS = (8, 16, 32, 64, 128, 256)
BLUE, VERMILLION = "#0072B2", "#D55E00"


def surface(problem: landscape.Problem, plane: Tensor, reach: tuple[float, float]) -> np.ndarray:
    """Losses at θ + x d₁ + y d₂ for the columns d of a plane, (y, x)."""
    theta = problem.parameters_vector()
    xs, ys = (np.linspace(-end, end, POINTS) for end in reach)
    with problem.session():
        return np.array([
            [float(problem.at(theta + float(x) * plane[:, 0] + float(y) * plane[:, 1]).value()) for x in xs]
            for y in ys
        ])  # fmt: skip


def table(runs: dict[str, Any], exact: float) -> str:
    """Return a line for each way to the trace."""
    lines = [
        f"exact trace {exact:.3f}",
        "way                    trace ± stderr   saddles   participation   seconds",
    ]
    for name, ds in runs.items():
        lines.append(
            f"{name:20s} {float(ds['trace']):8.3f} ± {float(ds['trace_stderr']):.3f}"
            f"   {float(ds['saddle_fraction']):7.3f}   {float(ds['participation']):13.1f}"
            f"   {float(ds['wall_seconds']):7.1f}"
        )
        if ds.attrs["warning"]:
            lines.append(f"  {ds.attrs['warning']}")
    return "\n".join(lines)


def draw_surface(axes: Axes, losses: np.ndarray, reach: tuple[float, float], centre: float) -> Any:
    """Draw filled contours on the scale of both panels, and the level of the centre."""
    xs, ys = (np.linspace(-end, end, POINTS) for end in reach)
    filled = axes.contourf(xs, ys, losses, levels=LEVELS, norm=LogNorm(), cmap="viridis", extend="both")
    axes.contour(xs, ys, losses, levels=[centre], colors="white", linewidths=0.9)
    axes.plot([0], [0], "o", color="white", markeredgecolor="black", markersize=3)
    return filled


def draw_trace(axes: Axes, forms: np.ndarray, order: int, exact: float) -> None:
    """Draw the estimate against the number of planes, and the exact value."""
    counts = [count for count in COUNTS if count <= len(forms)]
    found = [estimate(forms[:count], order) for count in counts]
    values, errors = (np.array([getattr(f, key) for f in found]) for key in ("trace", "trace_stderr"))
    axes.fill_between(
        counts, values - 1.96 * errors, values + 1.96 * errors, color=BLUE, alpha=0.18, linewidth=0
    )
    axes.plot(counts, values, "o-", color=BLUE, markersize=3.5, linewidth=1.2, label="from losses, 95 % band")
    axes.axhline(exact, color=VERMILLION, linestyle="--", linewidth=1, label="exact")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("random planes", fontsize=8)
    axes.set_title("trace of the Hessian", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)


def number(value: float) -> str:
    """Return a curvature in words."""
    return f"{value:.2g}".replace("-", "−")


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--planes", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problem = landscape.Problem(*testbeds.load_default()[:3])
    exact = float(landscape.measure(Trace(method="exact"), problem)["trace"])
    metric = ProjectedCurvature(planes=arguments.planes, hessian_plane=True)
    runs = {
        "losses, float64": landscape.measure(metric, problem),
        "products": landscape.measure(
            ProjectedCurvature(planes=arguments.planes, method="products"), problem
        ),
        "losses, float32": landscape.measure(
            ProjectedCurvature(planes=arguments.planes, precision="working"), problem
        ),
    }
    print(table(runs, exact))
    ds = next(iter(runs.values()))
    first = draw(generator(0, metric.name, 0), problem.size, 2, "gaussian", dtype=problem.dtype)
    planes = {
        "a random plane": (first / first.norm(dim=0), ds["kappa"][0].values / problem.size, RANDOM_REACH),
        "plane of two eigenvectors": (
            torch.from_numpy(ds["hessian_directions"].values.T.copy()).to(problem.dtype),
            ds["hessian_kappa"].values,
            HESSIAN_REACH,
        ),
    }
    figure = Figure(figsize=(7.0, 2.65), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1, 1, 1.1]})
    for axes, (name, (plane, kappa, reach)) in zip(panels, planes.items(), strict=False):
        filled = draw_surface(axes, surface(problem, plane, reach), reach, float(ds["loss"]))
        axes.set_title(f"{name}\nκ = {number(kappa[0])}, {number(kappa[1])}", fontsize=8)
    for axes, words in zip(panels, (("", ""), (" along u, smallest λ", " along u, largest λ")), strict=False):
        axes.set_xlabel(f"displacement{words[0]}", fontsize=8)
        axes.set_ylabel(f"displacement{words[1]}", fontsize=8)
    bar = figure.colorbar(filled, ax=panels[:2], ticks=[0.03, 0.05, 0.1, 0.2, 0.5, 1], format="%g", pad=0.02)
    bar.ax.yaxis.set_minor_locator(LogLocator(subs=()))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_label("loss", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    draw_trace(panels[2], ds["projected_hessian"].values, problem.size, exact)
    for axes in panels:
        axes.tick_params(labelsize=7, width=0.6, length=2.5)
    figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
