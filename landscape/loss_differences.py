"""vᵀHv from losses alone: central second differences along lines, with a step chosen and an error estimated.

D(h) = [L(θ + hv) − 2 L(θ) + L(θ − hv)] / h² = vᵀHv + O(h²). What is returned is (4 D(h) − D(2h)) / 3, which is
off by O(h⁴), and as its error |D(h) − D(2h)| / 3, the size of what was taken away, plus the rounding of losses.

*The step.* Rounding scatters about zero, and averages out over directions; truncation and kinks do not. So the
step is the smallest at which rounding stays below `_SHARE` of a typical D: not the one of least total error.
A loss with kinks (ReLU) makes this matter: a kink that jumps by J within reach adds up to J/h to D, and in the
mean over directions as much at each h. Only a step so small that it hardly meets one sees the curvature of the
smooth pieces, which products see; the few differences that do meet one disagree with themselves at 2h, and are
made again with a smaller step.

*Rounding* is measured: differences of order k of nine nearby losses are noise of variance (2k)!/(k!)² σ²
(Hamming's table; Moré & Wild 2011, doi 10.1137/100786125). The largest σ of three such tables is taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from landscape.problem import Problem

# Rounding of a second difference that is allowed, beside a typical one.
_SHARE = 1e-3
# Of losses for the table: many enough for differences of order 6.
_POINTS, _ORDERS = 9, (3, 4, 5, 6)
# Displacements over 1 + ‖θ‖: of the table (eps to this power), and the range of steps.
_TABLE_EXPONENT, _LEAST_EXPONENT, _LARGEST = 0.8, 0.5, 0.1
# Tables are made along as many directions; one alone may fall where a loss rounds with luck.
_SPACINGS = (1, 4, 16)
# A loss is rounded to its dtype at least: to eps |L| / 4 on average, where measured rounding is less by chance.
_ROUNDED = 0.25
_ITERATIONS = 4
# Three directions at 60° determine a quadratic form, all its entries with equal errors.
_ANGLES = np.arange(3) * np.pi / 3
# Steps disagree where they differ by more than this share of a typical difference; then a smaller one is tried.
_DISAGREE, _SMALLER = 0.02, 0.25
# From 8h to h the change of a smooth loss' differences falls by 16; at kinks it grows.
_SETTLES = 0.5
# Of the loss at θ, whose rounding is the same in all differences: |(4 · 2 − 2 / 4) / 3|.
CENTRE_WEIGHT = 2.5
# Standard deviation of (4 D(h) − D(2h)) / 3 by the rounding of its five losses, times h² / σ.
_NOISE_WEIGHT = math.sqrt(2 * (16 + 1 / 16) + 7.5**2) / 3


@dataclass(frozen=True)
class Step:
    """How second differences are made.

    Attributes:
        size: h, in units of the direction.
        noise: σ, the rounding of one loss.
        scale: a typical |vᵀHv|, root mean square over the pilot's directions.
        settled: whether differences come to rest as the step shrinks; not so at kinks that rounding hides.
    """

    size: float
    noise: float
    scale: float
    settled: bool = True

    @property
    def rounding(self) -> float:
        """Standard deviation of a returned value by the rounding of losses."""
        return _NOISE_WEIGHT * self.noise / self.size**2


@dataclass(frozen=True)
class Difference:
    """A second difference.

    Attributes:
        value: an estimate of vᵀHv.
        error: |shift| and two standard deviations of the rounding.
        shift: (D(h) − D(2h)) / 3, signed: what was added to D(h).
    """

    value: float
    error: float
    shift: float


@dataclass(frozen=True)
class PlaneDifference:
    """A projected Hessian by second differences.

    Attributes:
        form: [[A, B], [B, C]].
        error: what its eigenvalues may be off by.
        shift: as of a difference, that of (A + C)/2.
    """

    form: np.ndarray
    error: float
    shift: float


class Losses:
    """The loss as a function of the displacement from θ.

    Args:
        problem: at θ, in session.
        precision: "float64" evaluates in it where the model runs in it; "working" in the problem's dtype.
    """

    def __init__(self, problem: Problem, precision: Literal["float64", "working"] = "float64"):
        self._counted = problem
        wide = problem.in_float64() if precision == "float64" and problem.dtype != torch.float64 else problem
        self.problem = wide or problem
        self.theta = self.problem.parameters_vector()
        self.reach = 1 + float(torch.linalg.vector_norm(self.theta, dtype=torch.float64))
        self.eps = torch.finfo(self.problem.dtype).eps

    @property
    def dtype(self) -> torch.dtype:
        """In which losses are evaluated; their sums are made in float64."""
        return self.problem.dtype

    def at(self, displacement: Tensor) -> float:
        """L(θ + displacement), for a float64 vector (n,)."""
        if self.problem is not self._counted:
            self._counted.cost.values += 1
        moved = self.theta + displacement.to(self.theta)
        return float(self.problem.at(moved).value())

    def centre(self) -> float:
        """L(θ)."""
        return self.at(torch.zeros_like(self.theta))


def choose(losses: Losses, centre: float, directions: Sequence[Tensor], size: float | None = None) -> Step:
    """Measure the rounding of losses, and choose a step for directions of this length.

    Args:
        losses: at θ.
        centre: L(θ).
        directions: float64 vectors (n,), of the lengths that will be used.
        size: the step, where it is given.
    """
    unit = losses.reach / float(np.mean([float(v.norm()) for v in directions]))
    spacing = losses.eps**_TABLE_EXPONENT * unit
    tables = [_noise(losses, v, f * spacing) for v, f in zip(directions, _SPACINGS, strict=False)]
    noise = max(*tables, _ROUNDED * losses.eps * abs(centre))
    if size is not None:
        return _judged(losses, centre, directions, Step(size, noise, 0.0))
    least, largest = losses.eps**_LEAST_EXPONENT * unit, _LARGEST * unit
    size = math.sqrt(least * largest)
    for _ in range(_ITERATIONS):
        scale = _rms(_seconds(losses, centre, directions, size))
        wanted = math.sqrt(_NOISE_WEIGHT * noise / (_SHARE * scale)) if scale > 0 else largest
        wanted = wanted if math.isfinite(scale) else least  # beyond reach: nearer
        size = min(max(wanted, least), largest)
    return _judged(losses, centre, directions, Step(size, noise, 0.0))


def along(losses: Losses, centre: float, v: Tensor, step: Step) -> Difference:
    """Estimate vᵀHv by the step, and by a smaller one where that disagrees with itself.

    Args:
        losses: at θ.
        centre: L(θ).
        v: a float64 vector (n,).
        step: what `choose` returned.
    """
    found = _extrapolated(losses, centre, v, step)
    if abs(found.shift) <= _DISAGREE * step.scale + 4 * step.rounding:
        return found
    smaller = Step(step.size * _SMALLER, step.noise, step.scale)
    again = _extrapolated(losses, centre, v, smaller)
    return again if not found.error <= again.error else found  # also where the first is not a number


def projected_hessian(losses: Losses, centre: float, plane: Tensor, step: Step) -> PlaneDifference:
    """Estimate the Hessian along two directions, [[A, B], [B, C]] = PᵀHP.

    Args:
        losses: at θ.
        centre: L(θ).
        plane: P, two columns of float64, (n, 2), of one length or nearly.
        step: what `choose` returned.
    """
    turned = (math.cos(angle) * plane[:, 0] + math.sin(angle) * plane[:, 1] for angle in _ANGLES)
    found = [along(losses, centre, v, step) for v in turned]
    values = np.array([d.value for d in found])
    half, mixed = (2 / 3 * (values @ part) for part in (np.cos(2 * _ANGLES), np.sin(2 * _ANGLES)))
    form = values.mean() * np.eye(2) + np.array([[half, mixed], [mixed, -half]])
    return PlaneDifference(form, sum(d.error for d in found), sum(d.shift for d in found) / len(found))


def _extrapolated(losses: Losses, centre: float, v: Tensor, step: Step) -> Difference:
    near, far = (_second(losses, centre, v, h) for h in (step.size, 2 * step.size))
    shift = (near - far) / 3
    return Difference(near + shift, abs(shift) + 2 * step.rounding, shift)


def _second(losses: Losses, centre: float, v: Tensor, h: float) -> float:
    # The difference of differences: where losses nearly agree, these are exact.
    return ((losses.at(h * v) - centre) + (losses.at(-h * v) - centre)) / h**2


def _judged(losses: Losses, centre: float, directions: Sequence[Tensor], step: Step) -> Step:
    """The step with its scale, and whether differences settle: between h and 2h less than between 4h and 8h."""
    ladder = [_seconds(losses, centre, directions, step.size * 2**i) for i in range(4)]
    with np.errstate(invalid="ignore"):  # losses that are infinite within reach do not settle
        inner, outer = (float(np.median(np.abs(ladder[i] - ladder[i + 1]))) for i in (0, 2))
    settled = inner / 3 <= 4 * step.rounding or inner <= _SETTLES * outer
    return dataclasses.replace(step, scale=_rms(ladder[0]), settled=settled)


def _seconds(losses: Losses, centre: float, directions: Sequence[Tensor], h: float) -> np.ndarray:
    return np.array([_second(losses, centre, v, h) for v in directions])


def _rms(values: np.ndarray) -> float:
    return math.sqrt(float(np.mean(values**2)))


def _noise(losses: Losses, v: Tensor, spacing: float) -> float:
    """σ from the table of differences; the median over its orders."""
    values = np.array([losses.at(i * spacing * v) for i in range(_POINTS)])
    found = []
    for k in _ORDERS:
        weight = math.factorial(k) ** 2 / math.factorial(2 * k)
        found.append(math.sqrt(weight * float(np.mean(np.diff(values, k) ** 2))))
    return float(np.median(found))
