"""Measures of flatness along the α-orbit of one network: which notice what the function does not?

    python figures/dinh_alpha_scale.py [--out figures/dinh_alpha_scale.png]

The small network of the README, its first layer multiplied by α and its second by 1/α: no output changes. Trace,
spectral norm, ε-sharpness (a ball) and the volume of the set of low loss are numbers of the parameters, and go
where α takes them; measures that were proposed as an answer stay. After Dinh et al. 2017 (arXiv 1703.04933,
section 4). Prints the table, with the accuracy on test data at each α.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import landscape
from landscape import testbeds, transforms
from landscape.metrics import Reparametrization
from landscape.results import Record
from landscape.testbeds.digits import digits

ALPHA = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
BROKEN = {
    "trace": "trace",
    "spectral_norm": "spectral norm",
    "sharpness:definition=ball:epsilon=0.01:second_order=False": "sharpness, ball of ε = 0.01",
    "volume:rays=8:epsilon=0.1": "star-shaped volume",
}
PROPOSED = {
    "adaptive_trace": "adaptive trace",
    "adaptive_spectral_norm": "adaptive spectral norm",
    "fisher_rao": "Fisher-Rao norm",
    "path_norm": "path norm",
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = "osD^"


def accuracies(problem: landscape.Problem) -> list[float]:
    """Return the accuracy on test data at each α."""
    inputs, targets = testbeds.split(*digits())[1]
    found = transforms.find(problem)
    shares = []
    for alpha in ALPHA:
        there = found.scale(alpha).problem.on([(inputs, targets)])
        wrong = there.replace(loss=lambda f, y: (f.argmax(1) != y).double().mean())
        shares.append(1 - float(wrong.value()))
    return shares


def table(record: Record, shares: list[float]) -> str:
    """Return a line for each α, and the verdicts."""
    names = {**BROKEN, **PROPOSED}
    values = [record["value"][i] for i in range(len(names))]
    lines = ["   alpha  test acc.  change of f  " + "  ".join(f"{m.split(':')[0]:>22s}" for m in names)]
    for j, alpha in enumerate(ALPHA):
        numbers = "  ".join(f"{v[j]:22.5g}" for v in values)
        lines.append(f"{alpha:8g} {100 * shares[j]:8.2f} % {record['function_change'][j]:12.1e}  {numbers}")
    lines.append(" " * 34 + "  ".join(f"{v!s:>22s}" for v in record["verdict"]))
    return "\n".join(lines)


def draw(figure: Figure, record: Record, shares: list[float]) -> None:
    """Draw the measures that go with α, those that stay, and the accuracy."""
    left, right, third = figure.subplots(1, 3, width_ratios=(1, 1, 0.75))
    count = len(BROKEN)
    volume = list(BROKEN).index("volume:rays=8:epsilon=0.1")
    reference = record["reference"]
    for i, name in enumerate({**BROKEN, **PROPOSED}.values()):
        axes = left if i < count else right
        style = {"color": COLORS[i % count], "marker": MARKERS[i % count], "markersize": 4, "linewidth": 1.2}
        if i != volume:
            axes.plot(ALPHA, record["value"][i] / reference[i], label=name, **style)
    style = {"color": COLORS[volume], "marker": MARKERS[volume], "markersize": 4, "linewidth": 1.2}
    third.plot(ALPHA, record["value"][volume] - reference[volume], label="8 rays, a lower bound", **style)
    third.plot(ALPHA, np.zeros(len(ALPHA)), color="#555555", linewidth=0.6)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylim(0.3, 1e4)
    for axes, title in (
        (left, "measures that change"),
        (right, "measures that stay"),
        (third, "volume"),
    ):
        dress(axes, title)
    left.set_ylabel("value / value at α = 1", fontsize=8)
    third.set_ylabel("ln volume − that at α = 1 (nats)", fontsize=8)
    beside = right.twinx()
    beside.plot(ALPHA, 100 * np.array(shares), color="#000000", linestyle=":", linewidth=1.2)
    beside.set_ylim(0, 105)
    beside.set_ylabel("test accuracy (%), dotted", fontsize=8)
    beside.tick_params(labelsize=7)
    beside.spines["top"].set_visible(False)


def dress(axes: Axes, title: str) -> None:
    """Give axes small text and a title."""
    axes.set_xscale("log")
    axes.set_xlabel("α", fontsize=8)
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6.5, frameon=False, loc="lower center" if title == "volume" else "upper center")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, loss, batches, _ = testbeds.load_default()
    problem = landscape.Problem(model, loss, batches)
    record = landscape.evaluate(Reparametrization(measures=(*BROKEN, *PROPOSED), alpha=ALPHA), problem)
    shares = accuracies(problem)
    print(table(record, shares))
    figure = Figure(figsize=(7.0, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, record, shares)
    figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
