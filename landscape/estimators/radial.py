"""Integrals over a ray: of volume, and of a Gaussian's mass, both as logarithms and in any dimension."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import gammaln, logsumexp

# The integrand is left out where it has fallen by so many nats below its largest value: e^-60 of the whole.
_DEPTH = 60.0
# Of the Gauss-Legendre rule on what is left; a Gaussian and an exponential are then exact to rounding.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_BISECTIONS = 100


def log_ball_volume(dimension: int) -> float:
    """Return ln V_D = (D/2) ln π - ln Γ(D/2 + 1), of the unit ball in D dimensions.

    >>> round(math.exp(log_ball_volume(3)), 6)  # 4π/3
    4.18879
    """
    return dimension / 2 * math.log(math.pi) - float(gammaln(dimension / 2 + 1))


def log_gaussian_mass(
    radii: np.ndarray, along: np.ndarray, distance: float, sigma: float, dimension: int
) -> np.ndarray:
    """Return the log of the mass that a Gaussian has in a cone of directions around each ray, per its share.

    ln [S_{D-1} ∫₀^r x^{D-1} (2πσ²)^{-D/2} exp(-(x² + 2 x b + ‖θ‖²) / 2σ²) dx], S_{D-1} = D V_D: the mean of
    its exponential over uniform directions u is the mass of N(0, σ²I) in a star-shaped set around θ.

    Args:
        radii: r >= 0 of each ray, (S,).
        along: b = u·θ of each, (S,).
        distance: ‖θ‖, from the Gaussian's centre.
        sigma: σ > 0.
        dimension: D >= 1.

    Returns:
        (S,); -inf where r is 0.
    """
    reach, slope = np.asarray(radii, float) / sigma, np.asarray(along, float) / sigma
    inside = np.full(reach.shape, -np.inf)
    some = reach > 0
    inside[some] = _log_integral(reach[some], slope[some], dimension - 1)
    surface = math.log(dimension) + log_ball_volume(dimension)
    constant = surface - dimension / 2 * math.log(2 * math.pi) - (distance / sigma) ** 2 / 2
    return np.asarray(constant + inside)


def _log_integral(reach: np.ndarray, slope: np.ndarray, power: int) -> np.ndarray:
    """Return ln ∫₀^ρ z^n exp(-z²/2 - βz) dz for ρ > 0: a concave exponent, integrated around its largest value.

    The exponent is told from its difference to that at its top, so that nothing cancels in high dimensions.
    """
    root = np.sqrt(np.square(slope) + 4 * power)
    # (-β + √(β² + 4n)) / 2 without cancellation
    peak = np.where(slope > 0, 2 * power / np.where(slope > 0, slope + root, 1.0), (root - slope) / 2)
    top = np.minimum(np.where(peak > 0, peak, 0.0), reach)

    def fall(offset: np.ndarray) -> np.ndarray:
        """The exponent at `top` + offset, less that at `top`."""
        shape = (-1,) + (1,) * (offset.ndim - 1)
        t, b = top.reshape(shape), slope.reshape(shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            grown = power * np.log1p(offset / t) if power else 0.0
        return np.asarray(grown - offset * (t + offset / 2) - b * offset)

    low = _where_fallen(fall, np.zeros_like(top), -top)
    high = _where_fallen(fall, np.zeros_like(top), reach - top)
    middle, half = (low + high) / 2, (high - low) / 2
    values = fall(middle[:, None] + half[:, None] * _NODES)
    with np.errstate(divide="ignore"):
        level = power * np.log(top) if power else 0.0
    level = level - np.square(top) / 2 - slope * top
    return np.asarray(level + np.log(half) + logsumexp(values, axis=1, b=_WEIGHTS))


def _where_fallen(fall: Callable[[np.ndarray], np.ndarray], near: np.ndarray, far: np.ndarray) -> np.ndarray:
    """Return between `near` and `far` where the exponent has fallen by `_DEPTH`; `far` where it has not."""
    reached = ~(fall(far) < -_DEPTH)
    inner, outer = near, far
    for _ in range(_BISECTIONS):
        middle = (inner + outer) / 2
        deep = fall(middle) < -_DEPTH
        inner, outer = np.where(deep, inner, middle), np.where(deep, middle, outer)
    return np.where(reached, far, outer)
