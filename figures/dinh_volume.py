"""The infinite volume of rectifier networks (Dinh et al. 2017, arXiv 1703.04933, Theorem 2).

T_α multiplies the first layer of a bias-free one-hidden-layer rectifier network by α and divides the second by α: the
function stays, and the set {L < L(θ) + ε} is mapped onto itself. What a small ball around θ shares with the set
is therefore carried along the orbit T_α θ, with volume α^(n1 - n2) for n1 and n2 weights. Two networks are trained on
scikit-learn's digits: for one n1 > n2, and that volume, a lower bound of the set's, grows without limit; for the other
n1 = n2, and the images of the ball under steps of α = 2 (‖θ1‖∞ + R) / (‖θ1‖∞ - R) are disjoint, so that their number
times the volume is a lower bound. The same ball taken around T_α θ, not carried along, is bounded.

python figures/dinh_volume.py [--out figures/dinh_volume.png]        about 20 seconds

Each volume is measured by rays of its own from T_α θ, bent by T_α, on the network as it stands there. Prints a
table; volumes are natural logarithms.
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
from landscape.estimators.log_mean import log_mean
from landscape.estimators.radial import log_ball_volume
from landscape.estimators.radius import first_crossings
from landscape.metrics import Volume
from landscape.seeds import generator
from landscape.testbeds.digits import digits

EPSILON, RAYS, HIDDEN = 0.1, 64, 16
ALPHAS = 10.0 ** np.arange(-2, 2.5, 0.5)
COUNTS = np.array([1, 2, 4, 8, 16, 32, 64, 128])  # of disjoint images
TOLERANCE = 1e-3  # nats that the radii may add
BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"


@dataclass(frozen=True)
class Orbit:
    """A trained network, which is moved along its orbit.

    Attributes:
        model: at θ.
        inputs: of the data.
        targets: of the data.
        radius: R of the ball.
    """

    model: nn.Sequential
    inputs: Tensor
    targets: Tensor
    radius: float

    @property
    def sizes(self) -> tuple[int, int]:
        """n1 and n2."""
        first, second = (p.numel() for p in self.model.parameters())
        return first, second

    def factors(self, alpha: float) -> Tensor:
        """The diagonal of T_α."""
        first, second = self.sizes
        ones = torch.ones(first + second, dtype=torch.float64)
        return torch.cat([ones[:first] * alpha, ones[first:] / alpha])

    def at(self, alpha: float) -> landscape.Problem:
        """The problem at T_α θ."""
        problem = landscape.Problem(self.model, nn.CrossEntropyLoss(), [(self.inputs, self.targets)])
        return problem.at(self.factors(alpha) * problem.parameters_vector())


@dataclass(frozen=True)
class Point:
    """What is measured at T_α θ.

    Attributes:
        alpha: α.
        carried: ln volume of the image of the ball's share of the set.
        stderr: of `carried`.
        ball: ln volume of what the ball of radius R around T_α θ shares with the set; NaN if not asked for.
        change: largest change of an output, relative to the largest output.
        accuracy: share of the digits that are right.
    """

    alpha: float
    carried: float
    stderr: float
    ball: float
    change: float
    accuracy: float


def trained(features: int) -> Orbit:
    """Train a network on the first principal components of all digits, and find a ball for it."""
    inputs, targets = digits(torch.float64)
    inputs = inputs - inputs.mean(0)
    inputs = inputs @ torch.linalg.svd(inputs, full_matrices=False).Vh[:features].T
    inputs = inputs / inputs.std()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(features, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, 10, bias=False)
        ).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    widest = float(model[0].weight.detach().abs().max()) / 2
    orbit = Orbit(model, inputs, targets, widest)
    # So small that nearly every ray reaches it: few rays cannot carry the sum.
    return Orbit(model, inputs, targets, float(np.quantile(radii(orbit, 1.0, "dinh/pilot"), 0.1)))


def radii(orbit: Orbit, alpha: float, name: str) -> np.ndarray:
    """Return how far random rays from T_α θ, bent by T_α, stay in the set, at most R before bending."""
    problem = orbit.at(alpha)
    theta, factors, base = problem.parameters_vector(), orbit.factors(alpha), float(problem.value())
    found = []
    with problem.session():
        for ray in range(RAYS):
            u = torch.randn(len(theta), generator=generator(0, name, ray), dtype=torch.float64)
            bent = factors * u / u.norm()

            def excess(radius: float, bent: Tensor = bent) -> float:
                return float(problem.at(theta + radius * bent).value()) - base

            limit, rtol = orbit.radius, TOLERANCE / len(theta)
            found.append(first_crossings(excess, [EPSILON], start=limit / 8, limit=limit, rtol=rtol).radii[0])
    return np.array(found)


def measured(orbit: Orbit, alpha: float, *, ball: bool) -> Point:
    """Measure volumes and outputs at T_α θ."""
    first, second = orbit.sizes
    size = first + second
    logs = log_ball_volume(size) + size * np.log(radii(orbit, alpha, f"dinh/{alpha:.3g}"))
    found = log_mean(logs)
    if found.reason:
        raise SystemExit(f"α = {alpha:g}: {found.reason}")
    problem = orbit.at(alpha)
    truncated = math.nan
    if ball:
        units = orbit.radius / (1 + float(problem.parameters_vector().norm()))
        metric = Volume(epsilon=(EPSILON,), rays=RAYS, truncation=units, tolerance=TOLERANCE)
        truncated = float(landscape.measure(metric, problem)["log_volume"][0])
    with torch.no_grad():
        before = orbit.model(orbit.inputs)
        with problem.filled(problem.leaves()):
            after = orbit.model(orbit.inputs)
    return Point(
        alpha=alpha,
        carried=found.value + (first - second) * math.log(alpha),
        stderr=math.hypot(found.stderr, TOLERANCE),
        ball=truncated,
        change=float((after - before).abs().max() / before.abs().max()),
        accuracy=float((after.argmax(1) == orbit.targets).double().mean()),
    )


def disjoint_step(orbit: Orbit) -> float:
    """Return α such that the images of the ball under T_α, T_α², ... share no point.

    Within the ball the largest weight of the first layer lies within R of ‖θ1‖∞.
    """
    largest = float(orbit.model[0].weight.detach().abs().max())
    return 2 * (largest + orbit.radius) / (largest - orbit.radius)


def table(orbit: Orbit, points: list[Point]) -> str:
    """Return a line for each point of an orbit."""
    first, second = orbit.sizes
    lines = [
        f"n1 = {first}, n2 = {second}, R = {orbit.radius:.3g}",
        "     alpha   ln volume carried   +-        ln volume of the ball   change of outputs   accuracy",
    ]
    lines += [
        f"{p.alpha:10.3g} {p.carried:18.3f}   {p.stderr:.3f} {p.ball:22.3f} {p.change:19.1e} {100 * p.accuracy:10.2f} %"
        for p in points
    ]
    return "\n".join(lines)


def draw(
    figure: Figure, wide: Orbit, walk: list[Point], square: Orbit, images: list[Point], step: float
) -> None:
    """Draw the carried volume along the orbit, the number of disjoint images, and the change of the outputs."""
    left, middle, right = figure.subplots(1, 3)
    alphas = [p.alpha for p in walk]
    start = next(p for p in walk if p.alpha == 1.0)
    first, second = wide.sizes
    left.plot(
        alphas, [start.carried + (first - second) * math.log(a) for a in alphas], color=GREY, linewidth=0.8,
        linestyle="--", label=f"slope {first} − {second}",
    )  # fmt: skip
    left.errorbar(alphas, [p.carried for p in walk], yerr=[1.96 * p.stderr for p in walk], color=BLUE, fmt="o",
                  markersize=4, elinewidth=0.9, label="carried along")  # fmt: skip
    left.plot(alphas, [p.ball for p in walk], color=VERMILLION, marker="s", markersize=3.5, linewidth=1,
              label="ball of radius R around T$_α$θ")  # fmt: skip
    left.set_title(f"n₁ = {first} > n₂ = {second}", fontsize=8)
    left.set_ylabel("ln volume, lower bound", fontsize=8)
    logs = np.array([p.carried for p in images])
    one = logs[0] + np.log(np.mean(np.exp(logs - logs[0])))
    middle.plot(COUNTS, np.log(COUNTS), color=GREY, linewidth=0.8, linestyle="--", label="ln of their number")
    middle.errorbar(COUNTS, np.log(COUNTS) + logs - one, yerr=[1.96 * p.stderr for p in images], color=BLUE,
                    fmt="o", markersize=4, elinewidth=0.9, label="number × volume of the last")  # fmt: skip
    middle.set_title(f"n₁ = n₂ = {square.sizes[0]}", fontsize=8)
    middle.set_ylabel("ln volume above one image's", fontsize=8)
    middle.set_xlabel(f"disjoint images, α = {step:.2f}, {step:.2f}², …", fontsize=8)
    middle.set_xscale("log", base=2)
    middle.set_xticks(COUNTS, [str(count) for count in COUNTS])
    middle.set_ylim(-0.4, 7.5)
    left.set_ylim(top=6500)
    for orbit, points, colour, marker in ((wide, walk, BLUE, "o"), (square, images, GREEN, "D")):
        n1, n2 = orbit.sizes
        moved = [p for p in points if p.alpha != 1.0]
        right.plot([p.alpha for p in moved], [p.change for p in moved], color=colour, marker=marker,
                   markersize=3.5, linewidth=1, label=f"{n1} + {n2} weights")  # fmt: skip
    right.axhline(np.finfo(float).eps, color=GREY, linewidth=0.8, linestyle="--", label="rounding unit")
    right.set_yscale("log")
    right.set_ylim(1e-17, 1e-12)
    right.set_title("the function stays", fontsize=8)
    right.set_ylabel("largest relative change of outputs", fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("α", fontsize=8)
    right.set_xticks([1, 1e20, 1e40, 1e60])
    for axes in (left, middle, right):
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7, frameon=False, loc="upper left")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wide, square = trained(64), trained(10)
    walk = [measured(wide, float(alpha), ball=True) for alpha in ALPHAS]
    step = disjoint_step(square)
    images = [measured(square, step ** int(count - 1), ball=False) for count in COUNTS]
    print(table(wide, walk))
    print(table(square, images))
    figure = Figure(figsize=(7.0, 2.7), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, wide, walk, square, images, step)
    figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
