"""One loss in three coordinates: a minimum is as sharp or as flat as the coordinate makes it.

    python figures/dinh_reparametrization.py [--out figures/dinh_reparametrization.png]

A loss of one parameter with two minima of equal depth, and the same loss as a function of
η = (|θ - θ̂|² + b)^a (θ - θ̂), a bijection for a > -1/2: at θ̂ its second derivative is L''(θ̂) b^(-2a). After Dinh et
al. 2017 (arXiv 1703.04933, section 5.1 and figure 5). Prints second derivatives, by autograd and by this formula.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import landscape
from landscape import transforms

MINIMA = (-1.0, 1.0)  # θ̂ is the first
B = 0.1
EXPONENTS = {"as it is": 0.0, "θ̂ made sharp": 0.6, "θ̂ made flat": -0.4}
REACH = 1.8
POINTS = 601
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#555555"


@dataclass(frozen=True)
class Curve:
    """The loss in one coordinate.

    Attributes:
        a: exponent of the map.
        eta: places, (POINTS,).
        loss: there.
        minima: η of both minima of θ.
        curvature: second derivative at both, by autograd.
        expected: that at θ̂, by the formula.
    """

    a: float
    eta: np.ndarray
    loss: np.ndarray
    minima: tuple[float, float]
    curvature: tuple[float, float]
    expected: float


def loss(theta: Tensor) -> Tensor:
    """Both minima have the value 0 and the second derivative 2."""
    return ((theta - MINIMA[0]) * (theta - MINIMA[1])).square() / 4


def problem_at(theta: float) -> landscape.Problem:
    """Return the loss as a problem of one parameter."""
    data = [(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))]
    start = {"theta": torch.tensor([theta], dtype=torch.float64)}
    return landscape.Problem(
        lambda params, x: params["theta"] + x[:, 0], lambda f, _: loss(f).mean(), data, parameters=start
    )


def curve(a: float) -> Curve:
    """Draw the loss over η, and differentiate it twice at both minima."""
    center = torch.tensor([MINIMA[0]], dtype=torch.float64)
    theta = np.linspace(MINIMA[0] - REACH / 2, MINIMA[1] + REACH / 2, POINTS)
    offset = theta - MINIMA[0]
    curvature, places = [], []
    for minimum in MINIMA:
        there = transforms.radial(problem_at(minimum), a, B, center).problem
        curvature.append(float(there.hvp(torch.ones(1, dtype=torch.float64))))
        places.append(float(there.parameters_vector()))
    original = float(problem_at(MINIMA[0]).hvp(torch.ones(1, dtype=torch.float64)))
    return Curve(
        a=a,
        eta=(offset**2 + B) ** a * offset,
        loss=loss(torch.from_numpy(theta)).numpy(),
        minima=(places[0], places[1]),
        curvature=(curvature[0], curvature[1]),
        expected=original * B ** (-2 * a),
    )


def draw(figure: Figure, curves: dict[str, Curve]) -> None:
    """Draw the same loss over three coordinates, with the second derivatives at both minima."""
    every = figure.subplots(1, len(curves), sharey=True)
    for axes, (name, found) in zip(every, curves.items(), strict=True):
        axes.plot(found.eta, found.loss, color=BLUE, linewidth=1.3)
        for place, bend, label in zip(found.minima, found.curvature, ("θ̂", "the other"), strict=True):
            axes.plot(place, 0, "o", color=VERMILLION if label == "θ̂" else GREY, markersize=4.5)
            axes.annotate(
                f"{label}:\nL″ = {bend:.3g}", (place, 0), (0, -8), textcoords="offset points", ha="center",
                va="top", fontsize=7, color=VERMILLION if label == "θ̂" else GREY,
            )  # fmt: skip
        axes.set_title(f"{name} (a = {found.a:g})", fontsize=8)
        axes.set_xlabel("η", fontsize=8)
        axes.set_ylim(-0.32, 0.75)
        axes.set_yticks([0, 0.25, 0.5, 0.75])
        axes.tick_params(labelsize=7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    every[0].set_ylabel("loss", fontsize=8)


def main() -> None:
    """Differentiate, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()
    curves = {name: curve(a) for name, a in EXPONENTS.items()}
    print("coordinate          a   L'' at θ̂    L'' b^(-2a)   L'' at the other minimum")
    for name, found in curves.items():
        print(
            f"{name:15s} {found.a:5.2f} {found.curvature[0]:10.6g} {found.expected:14.6g} {found.curvature[1]:14.6g}"
        )
    figure = Figure(figsize=(7.0, 2.5), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, curves)
    figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
