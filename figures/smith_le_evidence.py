"""Evidence of a model that learnt true labels and of one that learnt random labels, against the prior.

    python figures/smith_le_evidence.py [--out figures/smith_le_evidence.png]

Softmax regression on the digits, 10 classes of 64 weights and no bias, with a Gaussian prior of precision λ on
the weights: the cost C = Σ cross-entropy + λ‖w‖²/2, minimised by Newton steps, and its Laplace log-evidence
from all eigenvalues. A null model gives each of the N labels the probability 1/10, so its log-evidence is
-N ln 10. After Smith & Le 2018 (arXiv 1710.06451, figures 1 and 2), who find that the evidence of a model that
fits random labels is below that of the null model. Prints a table; test data have their true labels.
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
from landscape.metrics import Evidence
from landscape.seeds import generator
from landscape.testbeds import split
from landscape.testbeds.digits import digits

CLASSES, FEATURES = 10, 64
PRECISIONS = np.logspace(-2, 5, 15)
GRADIENT, MOST_STEPS = 1e-6, 200
BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"


@dataclass(frozen=True)
class Outcome:
    """The minimum of the cost at one prior precision.

    Attributes:
        precision: λ of the prior.
        gain: log-evidence over that of the null model, in nats per training example.
        occam: log of the Occam factor, in nats per training example.
        train_accuracy: share of the training labels that are right.
        test_accuracy: of the true labels of the test data.
        test_loss: mean cross-entropy there, in nats.
    """

    precision: float
    gain: float
    occam: float
    train_accuracy: float
    test_accuracy: float
    test_loss: float


def outcomes(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> list[Outcome]:
    """Minimise and measure at each prior precision, from the narrowest prior on, each from the last minimum."""
    weights = torch.zeros(CLASSES, FEATURES, dtype=torch.float64)
    found = []
    for precision in PRECISIONS[::-1]:
        weights = minimum(weights, *train, float(precision))
        found.append(outcome(weights, train, test, float(precision)))
    return found[::-1]


def outcome(
    weights: Tensor, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], precision: float
) -> Outcome:
    """Measure the evidence at the minimum."""
    model = nn.Linear(FEATURES, CLASSES, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(weights)
    problem = landscape.Problem(model, nn.CrossEntropyLoss(), [train])
    measured = landscape.measure(Evidence(prior_precision=precision), problem)
    if float(measured["gradient_norm"]) > GRADIENT:
        raise SystemExit(f"λ = {precision:g}: ‖∇C‖ is {float(measured['gradient_norm']):.1e}")
    examples, scores = len(train[1]), test[0] @ weights.T
    return Outcome(
        precision=precision,
        gain=float(measured["log_evidence"]) / examples + math.log(CLASSES),
        occam=float(measured["log_occam_factor"]) / examples,
        train_accuracy=share_right(train[0] @ weights.T, train[1]),
        test_accuracy=share_right(scores, test[1]),
        test_loss=float(nn.functional.cross_entropy(scores, test[1])),
    )


def minimum(weights: Tensor, inputs: Tensor, targets: Tensor, precision: float) -> Tensor:
    """Return the weights of least cost: Newton steps, halved until the cost falls."""
    for _ in range(MOST_STEPS):
        value, gradient, matrix = cost(weights, inputs, targets, precision)
        if float(gradient.norm()) <= GRADIENT / 10:
            return weights
        step = torch.linalg.solve(matrix, gradient.flatten()).view_as(weights)
        decrease, length = float((gradient * step).sum()), 1.0
        # near the minimum the decrease is lost in the rounding of the cost
        while length > 1e-6 and cost(weights - length * step, inputs, targets, precision)[
            0
        ] > value - 1e-4 * length * decrease + 1e-12 * abs(value):
            length /= 2
        weights = weights - length * step
    raise SystemExit(f"λ = {precision:g}: no minimum in {MOST_STEPS} Newton steps")


def cost(weights: Tensor, inputs: Tensor, targets: Tensor, precision: float) -> tuple[float, Tensor, Tensor]:
    """Return C, its gradient (10, 64) and its Hessian (640, 640), of the formulas of softmax regression."""
    scores = inputs @ weights.T
    shares = scores.softmax(1)
    value = (
        nn.functional.cross_entropy(scores, targets, reduction="sum") + precision / 2 * weights.square().sum()
    )
    gradient = (shares - nn.functional.one_hot(targets, CLASSES)).T @ inputs + precision * weights
    matrix = torch.zeros(CLASSES, FEATURES, CLASSES, FEATURES, dtype=torch.float64)
    for a in range(CLASSES):
        for b in range(CLASSES):
            curvature = shares[:, a] * (float(a == b) - shares[:, b])
            matrix[a, :, b] = inputs.T @ (curvature[:, None] * inputs)
    matrix = matrix.view(weights.numel(), weights.numel())
    return float(value), gradient, matrix + precision * torch.eye(len(matrix), dtype=torch.float64)


def share_right(scores: Tensor, targets: Tensor) -> float:
    """Return the accuracy."""
    return float((scores.argmax(1) == targets).double().mean())


def table(found: dict[str, list[Outcome]]) -> str:
    """Return a line for each kind of labels and each prior precision."""
    lines = [
        "labels    lambda   ln evidence - null (nats / example)   train accuracy   test accuracy   test loss"
    ]
    for labels, runs in found.items():
        lines += [
            f"{labels:7s} {run.precision:8.3g} {run.gain:22.4f}               {100 * run.train_accuracy:10.2f} %"
            f" {100 * run.test_accuracy:13.2f} % {run.test_loss:13.4f}"
            for run in runs
        ]
    return "\n".join(lines)


def draw(figure: Figure, found: dict[str, list[Outcome]]) -> None:
    """Draw the evidence of both kinds of labels, and what the true ones teach, against the precision."""
    left, right = figure.subplots(1, 2)
    precisions = [run.precision for run in found["true"]]
    for (labels, runs), colour, marker in zip(found.items(), (BLUE, VERMILLION), "os", strict=True):
        gains = [run.gain for run in runs]
        left.plot(
            precisions,
            gains,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            label=f"{labels} labels",
        )
    left.axhline(0, color=GREY, linewidth=0.8, linestyle="--", label="null model")
    left.set_ylabel("log evidence above the null model\n(nats per training example)", fontsize=8)
    best = max(found["true"], key=lambda run: run.gain)
    losses = right.twinx()
    accuracy = [100 * run.test_accuracy for run in found["true"]]
    lines = right.plot(
        precisions, accuracy, color=BLUE, marker="o", markersize=4, linewidth=1.2, label="accuracy"
    )
    lines += losses.plot(
        precisions, [run.test_loss for run in found["true"]], color=GREEN, marker="D", markersize=3.5,
        linewidth=1.2, label="cross-entropy",
    )  # fmt: skip
    lines.append(
        right.axvline(best.precision, color=GREY, linewidth=0.8, linestyle=":", label="highest evidence")
    )
    right.set_ylabel("test accuracy (%)", fontsize=8, color=BLUE)
    losses.set_ylabel("test cross-entropy (nats)", fontsize=8, color=GREEN)
    losses.set_ylim(0, None)
    for axes in (left, right, losses):
        axes.set_xscale("log")
        axes.set_xticks(10.0 ** np.arange(-2, 6))
        axes.minorticks_off()
        axes.tick_params(labelsize=7)
        axes.spines["top"].set_visible(False)
    left.spines["right"].set_visible(False)
    for axes in (left, right):
        axes.set_xlabel("precision λ of the prior", fontsize=8)
    left.legend(fontsize=7, frameon=False, loc="lower right")
    right.legend(handles=lines, fontsize=7, frameon=False, loc="center left")


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, test = ((inputs.double(), targets) for inputs, targets in split(*digits()))
    order = generator(0, "smith_le_evidence", 0)
    labels = {"true": train[1], "random": torch.randint(CLASSES, train[1].shape, generator=order)}
    found = {kind: outcomes((train[0], targets), test) for kind, targets in labels.items()}
    print(table(found))
    figure = Figure(figsize=(7.0, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, found)
    size = f"{CLASSES * FEATURES} weights, {len(train[1])} examples"
    figure.suptitle(f"Softmax regression on digits ({size}); right: true labels", fontsize=8)
    figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
