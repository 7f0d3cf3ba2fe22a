"""The class structure of the Hessian over training, on the digits: how many outliers, and whether G1 explains them.

    python figures/papyan.py [--out figures/papyan.png] [--structure figures/class_structure.png] [--epochs 100]

Two networks, an MLP and a CNN with BatchNorm, are trained with SGD on the training part. At five epochs the metric
`class_structure` is measured on the first 13, 51 and 136 examples of each class. Drawn are the largest eigenvalues of G
in order, and against the epoch the overlap of its leading eigenvectors with those of G1, and by how much the
eigenvalues of the two differ. Below stand two t-SNEs, early and late. The second picture is that of `landscape plot` of
the trained MLP. After Papyan 2019 (arXiv 1901.08244) and 2020 (JMLR 21, 252). Prints a table, and tests whether the
number of outliers is that of classes: where the widest relative gap of the 15 largest eigenvalues of G is, and whether
that after the 9th is the widest from the 5th on (few large eigenvalues of hard examples come before it late).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import landscape
from landscape import plots
from landscape.metrics import ClassStructure
from landscape.plots import class_panels, class_structure
from landscape.results import read
from landscape.seeds import generator
from landscape.testbeds import batches, mlp, split
from landscape.testbeds.digits import digits
from landscape.testbeds.nets import own_stream

CLASSES = 10
PER_CLASS = (13, 51, 136)
EPOCHS = (0, 1, 5, 20, 100)
BATCH, LEARNING_RATE, MOMENTUM = 64, 0.05, 0.9
SETTINGS = {"spectra": (), "k": 15, "attribution": False}
TAIL = 5  # from which eigenvalue on gaps are compared
COLORS = {13: "#56B4E9", 51: "#0072B2", 136: "#000000"}


def cnn() -> nn.Module:
    """Two convolutions with BatchNorm for images of 8 by 8."""
    with own_stream(0, "papyan"):
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 24, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, CLASSES),
        )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MLP": lambda: mlp((64, 48, 48, CLASSES)), "CNN": cnn}


@dataclass(frozen=True)
class Outcome:
    """What the class structure of a network says at an epoch."""

    eigenvalues: np.ndarray  # the largest of G
    overlap: float
    ratio: float
    accuracy: float

    def widest(self, first: int = 1) -> int:
        """After which eigenvalue the widest relative gap is, from the first-th on."""
        return first + int((self.eigenvalues[first - 1 : -1] / self.eigenvalues[first:]).argmax())


def trained(model: nn.Module, epochs: int) -> Iterator[int]:
    """Train in place; yield the epochs that are measured, the network in evaluation mode."""
    (inputs, targets), _ = split(*digits())
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for epoch in range(epochs + 1):
        if epoch in EPOCHS:
            yield epoch
        if epoch == epochs:
            return
        model.train()
        order = torch.randperm(len(inputs), generator=generator(0, "papyan", epoch))
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
        model.eval()


def problem_of(model: nn.Module) -> landscape.Problem:
    """The cross-entropy of the training part."""
    (inputs, targets), _ = split(*digits())
    return landscape.Problem(model.eval(), nn.CrossEntropyLoss(), batches(inputs, targets, 512))


def outcome(ds: xarray.Dataset, model: nn.Module) -> Outcome:
    """Read off one measurement what is drawn."""
    G, G1 = (ds[f"eigenvalues_{name}"].values for name in ("G", "G1"))
    count = CLASSES - 1
    inputs, targets = digits()
    with torch.no_grad():
        right = float((model(inputs).argmax(1) == targets).double().mean())
    return Outcome(
        eigenvalues=G,
        overlap=float(ds["overlap_G_G1"][count - 1]),
        ratio=float(np.exp(np.log(G[:count] / G1[:count]).mean())),
        accuracy=right,
    )


def study(epochs: int, folder: Path) -> dict[tuple[str, int, int], Outcome]:
    """Train and measure: by network, examples per class and epoch. Measurements to be drawn stay in the folder."""
    found = {}
    for name, make in NETWORKS.items():
        model = make()
        for epoch in trained(model, epochs):
            for per_class in PER_CLASS:
                metric = ClassStructure(per_class=per_class, **SETTINGS)
                last = per_class == PER_CLASS[-1]
                out = folder / f"{name}-{epoch}" if last else None
                ds = landscape.measure(metric, problem_of(model), out=out)
                found[name, per_class, epoch] = outcome(ds, model)
                print(line(name, per_class, epoch, found[name, per_class, epoch]), flush=True)
        if name == "MLP":
            metric = ClassStructure(per_class=PER_CLASS[-1], attribution=False)
            landscape.measure(metric, problem_of(model), out=folder / name)
    return found


def line(name: str, per_class: int, epoch: int, one: Outcome) -> str:
    """A row of the table."""
    gap = one.eigenvalues[CLASSES - 2] / one.eigenvalues[CLASSES - 1]
    return (
        f"{name:5}{per_class:10}{epoch:7}{100 * one.accuracy:9.1f} %{one.widest():12}{one.widest(TAIL):14}"
        f"{gap:10.2f}{one.overlap:10.3f}{one.ratio:11.2f}"
    )


def verdict(found: dict[tuple[str, int, int], Outcome]) -> str:
    """How often the number of outliers is that of classes, or one less, in words."""
    after = [one for key, one in found.items() if key[2] > 0]
    near = {CLASSES - 1, CLASSES}
    whole, tail = (sum(one.widest(first) in near for one in after) for first in (1, TAIL))
    overlaps = [one.overlap for one in after]
    return (
        f"of {len(after)} measurements of trained networks, the widest gap of G is after eigenvalue {CLASSES - 1} or "
        f"{CLASSES} in {whole}, and in {tail} where gaps count from eigenvalue {TAIL} on; overlap of the leading "
        f"{CLASSES - 1} of G and G1: {min(overlaps):.2f} to {max(overlaps):.2f}"
    )


def draw(figure: Figure, found: dict[tuple[str, int, int], Outcome], folder: Path) -> None:
    """Draw counts, overlap and ratio against the epoch, and below the t-SNE early and late."""
    above, below = figure.subfigures(2, 1, height_ratios=[1.0, 0.95])
    scree, overlap, ratio = above.subplots(1, 3)
    epochs = sorted({key[2] for key in found})
    for name, style in (("MLP", "-"), ("CNN", "--")):
        for per_class in PER_CLASS:
            runs = [found[name, per_class, epoch] for epoch in epochs]
            look = {
                "color": COLORS[per_class],
                "linestyle": style,
                "linewidth": 1.1,
                "marker": "o",
                "markersize": 3,
            }
            values = runs[-1].eigenvalues
            scree.plot(
                range(1, len(values) + 1), values / values[0], label=f"{name}, {per_class} a class", **look
            )
            overlap.plot(range(len(epochs)), [one.overlap for one in runs], **look)
            ratio.plot(range(len(epochs)), [one.ratio for one in runs], **look)
    scree.axvline(CLASSES - 0.5, color="#555555", linewidth=0.7, linestyle=":")
    scree.set_ylabel("eigenvalue of G over the largest", fontsize=8)
    scree.set_xlabel(f"index, after {epochs[-1]} epochs", fontsize=8)
    scree.set_yscale("log")
    scree.set_xticks([1, 5, 9, 15])
    overlap.set_ylabel("overlap of the leading 9 of G and G₁", fontsize=8)
    overlap.set_ylim(0, 1.02)
    ratio.set_ylabel("eigenvalues of G / those of G₁", fontsize=8)
    ratio.set_yscale("log")
    for axes in (overlap, ratio):
        axes.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs])
        axes.set_xlabel("epochs of SGD", fontsize=8)
    for axes in (scree, overlap, ratio):
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    above.legend(
        loc="outside lower center", ncols=6, fontsize=7, frameon=False, handlelength=2.4, columnspacing=1.0
    )
    for axes, epoch in zip(below.subplots(1, 2), (epochs[1], epochs[-1]), strict=True):
        _embedding(axes, folder / f"MLP-{epoch}" / "class_structure.h5")
        axes.set_title(f"MLP after {epoch} epoch{'s' if epoch > 1 else ''}: t-SNE", fontsize=8)


def _embedding(axes: Axes, path: Path) -> None:
    class_panels.draw_points(axes, class_structure.prepare(read(path)))


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__)
    parser.add_argument("--out", type=Path, default=here.with_suffix(".png"))
    parser.add_argument("--structure", type=Path, default=here.with_name("class_structure.png"))
    parser.add_argument("--epochs", type=int, default=EPOCHS[-1])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("net  per class  epoch  accuracy  widest gap  from 5th on  9th/10th   overlap  G over G1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = study(arguments.epochs, folder)
        print(verdict(found))
        plots.plot(folder / "MLP" / "class_structure.h5", arguments.structure)
        figure = Figure(figsize=(7.0, 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, found, folder)
        figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
