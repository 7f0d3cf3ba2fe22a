"""The invariance table: every registered measure against changes of parameters that leave the function alone.

    python figures/invariance_table.py [--out figures/invariance_table.png] [--metric trace ...]

Each measure is taken at one point and at points with the same function: layers, single units and (by a change of
coordinates) single weights in other scales, hidden units permuted, the layer before a BatchNorm scaled, the
directions of weight normalization scaled, and in smooth other coordinates. The network of BatchNorm is measured
in evaluation mode, where its buffers move along. A tick: the number (of several the root of their mean square)
stays, to 2 % or four standard errors; a dash: it is not defined there, or no standard error can be given. A
metric that is added adds its line. After Dinh et al. 2017 (arXiv 1703.04933). Prints the table, and writes it
as .csv beside the picture.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

import landscape
from landscape import transforms
from landscape.metrics import registry
from landscape.metrics.reparametrization import headline, is_logarithm, measure_of
from landscape.seeds import generator
from landscape.testbeds.train import train
from landscape.transforms.verdicts import judge

TOLERANCE = 0.02
# A surface is a picture along drawn directions, a class structure takes eigenvalues apart; neither is a number.
NOT_MEASURES = {"class_structure", "reparametrization", "surface"}
# What keeps the table to minutes, and measures defined; all else is a metric's default.
SETTINGS = {
    "projected_curvature": "projected_curvature:planes=512:method=products",
    "volume": "volume:rays=16",
    "sharpness": "sharpness:definition=ball:epsilon=0.05",
    "density": "density:probes=2:steps=30",
    "robustness": "robustness:steps=5",
}
SAME, OTHER, UNDEFINED = "✓", "✗", "–"
COLORS = {SAME: "#d5ead9", OTHER: "#f6d7cb", UNDEFINED: "#eeeeee"}

Points = Callable[[], Iterator[landscape.Problem]]


def classified(*layers: nn.Module, images: bool = False) -> landscape.Problem:
    """Train a small network, in float64, on three classes of Gaussian points; the loss ends above zero."""
    draws = generator(0, "invariance_table", 0)
    shape = (90, 1, 4, 4) if images else (90, 6)
    inputs = torch.randn(shape, generator=draws, dtype=torch.float64)
    targets = torch.randint(0, 3, (90,), generator=draws)
    inputs += targets.double().reshape(-1, *[1] * (inputs.ndim - 1)) - 1
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.ndim > 1:
                p.copy_(
                    torch.randn(p.shape, generator=draws, dtype=torch.float64) * (2 / p[0].numel()) ** 0.5
                )
    train(model, nn.CrossEntropyLoss(), [(inputs[:45], targets[:45]), (inputs[45:], targets[45:])],
          epochs=20, lr=0.01)  # fmt: skip
    return landscape.Problem(model, nn.CrossEntropyLoss(), [(inputs, targets)])


def mlp() -> landscape.Problem:
    """Three layers of weights without biases."""
    return classified(
        nn.Linear(6, 8, bias=False),
        nn.ReLU(),
        nn.Linear(8, 7, bias=False),
        nn.ReLU(),
        nn.Linear(7, 3, bias=False),
    )


def columns() -> dict[str, Points]:
    """Return, for each kind of change, what yields the point itself and then others with the same function."""

    def layer() -> Iterator[landscape.Problem]:
        found = transforms.find(mlp())
        return (found.scale(alpha).problem for alpha in (1.0, 0.2, 5.0))

    def node() -> Iterator[landscape.Problem]:
        found = transforms.find(mlp())
        points = [found.problem, *(found.random(1.5, index=i).problem for i in range(2))]
        return iter(points)

    def element() -> Iterator[landscape.Problem]:
        problem = mlp()
        draws = generator(0, "invariance_table/element", 0)
        yield problem
        for _ in range(2):
            factors = torch.randn(problem.size, generator=draws, dtype=torch.float64).exp()
            yield transforms.elementwise(problem, factors).problem

    def permutation() -> Iterator[landscape.Problem]:
        problem = mlp()
        found = transforms.permutations(problem)
        return iter([problem, *(found.random(index=i).problem for i in range(2))])

    def batch_norm() -> Iterator[landscape.Problem]:
        problem = classified(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3), images=True
        )
        found = transforms.find(problem)
        groups = [g.index for g in found.groups if g.buffers]
        return (found.scale(alpha, groups).problem for alpha in (1.0, 0.2, 5.0))

    def weight_norm() -> Iterator[landscape.Problem]:
        found = transforms.find(transforms.weight_normalized(mlp()).problem)
        groups = [g.index for g in found.groups if all(n.endswith("_direction") for n in g.parameters)]
        return (found.scale(alpha, groups).problem for alpha in (1.0, 0.2, 5.0))

    def smooth() -> Iterator[landscape.Problem]:
        problem = mlp()
        center = torch.zeros(problem.size, dtype=torch.float64)
        return iter([problem, *(transforms.radial(problem, a, 1.0, center).problem for a in (0.3, -0.3))])

    return {
        "layer scale": layer, "node scale": node, "element scale": element, "permutation": permutation,
        "BatchNorm scale": batch_norm, "weight-norm scale": weight_norm, "smooth map": smooth,
    }  # fmt: skip


def cell(spec: str, points: list[landscape.Problem]) -> tuple[str, float]:
    """Return the mark of a measure, and the largest value over the smallest."""
    values, errors = [], []
    for problem in points:
        try:
            record = landscape.evaluate(measure_of(spec), problem)
        except landscape.Refused:
            return UNDEFINED, np.nan
        value, error = headline(spec, record)
        whole = np.asarray(record[measure_of(spec).headline], dtype=float)
        values.append(value if whole.size == 1 else float(np.sqrt(np.nanmean(whole**2))))
        errors.append(error if whole.size == 1 else 0.0)
    places = np.arange(1.0, len(points) + 1)
    found = judge(places, values, errors, TOLERANCE, logarithmic=is_logarithm(spec))
    if found.verdict == "undefined":
        return UNDEFINED, np.nan
    return (SAME if found.verdict == "invariant" else OTHER), found.factor


def draw(figure: Figure, table: dict[str, dict[str, tuple[str, float]]]) -> None:
    """Draw the table: a mark in each cell, and below a cross by what factor the value changes."""
    axes = figure.subplots()
    names = list(next(iter(table.values())))
    for row, (measure, cells) in enumerate(table.items()):
        for column, name in enumerate(names):
            mark, factor = cells[name]
            axes.add_patch(_box(column, row, COLORS[mark]))
            times = f"× {factor:.3g}" if factor < 1e5 else f"× $10^{{{np.log10(factor):.0f}}}$"
            text = f"{mark}  {times}" if mark == OTHER and np.isfinite(factor) else mark
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7)
        said = registry.load(measure).headline
        label = measure if said == measure else f"{measure}: {said}"
        axes.text(-0.08, row + 0.5, label.replace("_", " "), ha="right", va="center", fontsize=7)
    for column, name in enumerate(names):
        axes.text(column + 0.5, -0.15, name.replace(" ", "\n"), ha="center", va="bottom", fontsize=7)
    axes.set_xlim(-2.9, len(names))
    axes.set_ylim(len(table), -1)
    axes.axis("off")


def _box(column: int, row: int, color: str) -> Rectangle:
    return Rectangle((column + 0.03, row + 0.06), 0.94, 0.88, facecolor=color, edgecolor="none")


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--metric", action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measures = arguments.metric or sorted(set(registry.registered()) - NOT_MEASURES)
    points = {name: list(made()) for name, made in columns().items()}
    table = {}
    for measure in measures:
        table[measure] = {name: cell(SETTINGS.get(measure, measure), made) for name, made in points.items()}
        print(f"{measure:24s}" + "".join(f"{m} {f:<12.4g}" for m, f in table[measure].values()), flush=True)
    with arguments.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["measure", *points, *(f"factor, {name}" for name in points)])
        for measure, cells in table.items():
            writer.writerow(
                [measure, *(m for m, _ in cells.values()), *(f"{f:.4g}" for _, f in cells.values())]
            )
    figure = Figure(figsize=(7.0, 0.55 + 0.27 * len(table)), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, table)
    figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
