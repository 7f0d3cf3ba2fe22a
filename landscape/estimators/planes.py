"""What random planes through a symmetric matrix say of it: mean curvature, spread, and how many are saddles.

For η, δ ~ N(0, I) let A = ηᵀHη, B = ηᵀHδ, C = δᵀHδ, m = (A + C)/2 and r² = ((A − C)/2)² + B², so that the
eigenvalues of [[A, B], [B, C]] are κ± = m ± r. With t = tr H and F = ‖H‖_F, exactly for every H:

    E m = t,    Var m = F²,    E r² = 2F²,    E r⁴ = 8F⁴ + 16 tr H⁴.

Where many comparable eigenvalues contribute, [[A, B], [B, C]] is Gaussian: m ~ N(t, F²) independent of r, and
r²/2F² exponential. Then E κ± = t ± √(π/2) F, and a plane is a saddle, r > |m|, with probability
E exp(−m²/2F²) = exp(−t²/4F²)/√2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from landscape.estimators.calibration import calibrated_stderr


@dataclass(frozen=True)
class PlaneEstimates:
    """What planes say of a matrix H; each estimate with its standard error.

    Attributes:
        trace: tr H.
        trace_stderr: calibrated, see `calibration`.
        frobenius_norm: ‖H‖_F.
        frobenius_norm_stderr: by the delta method.
        participation: (tr H²)² / tr H⁴, the number of comparable eigenvalues; 1 to n.
        saddle_limit: probability of a saddle where the participation is large.
        saddle_limit_stderr: by the delta method.
    """

    trace: float
    trace_stderr: float
    frobenius_norm: float
    frobenius_norm_stderr: float
    participation: float
    saddle_limit: float
    saddle_limit_stderr: float


def principal_curvatures(forms: np.ndarray) -> np.ndarray:
    """Return the eigenvalues κ₋ <= κ₊ of symmetric 2x2 matrices, (k, 2, 2) -> (k, 2).

    >>> principal_curvatures(np.array([[[1.0, 2.0], [2.0, 1.0]]])).tolist()
    [[-1.0, 3.0]]
    """
    mean, radius = _mean_and_radius(forms)
    return np.stack([mean - radius, mean + radius], axis=1)


def saddle_probability(trace: float, frobenius_norm: float) -> float:
    """Return exp(−t²/4F²)/√2, the share of random planes that are saddles in the Gaussian limit; 0 for H = 0.

    >>> round(saddle_probability(40.0, 1000**0.5), 4)
    0.474
    """
    if frobenius_norm == 0:
        return 0.0
    return math.exp(-((trace / (2 * frobenius_norm)) ** 2)) / math.sqrt(2)


def estimate(forms: np.ndarray, order: int) -> PlaneEstimates:
    """Estimate what planes say of the matrix.

    Args:
        forms: [[A, B], [B, C]] of independent planes, (k, 2, 2).
        order: n, the most that the participation can be.

    Raises:
        ValueError: if there are fewer than two planes.
    """
    if len(forms) < 2:
        raise ValueError(f"got {len(forms)} planes; a standard error needs at least 2")
    samples = np.stack([forms[:, 0, 0], forms[:, 1, 1]], axis=1).reshape(-1)
    trace, trace_stderr = float(samples.mean()), float(calibrated_stderr(samples))
    # In units in which squares neither underflow nor overflow.
    unit = float(np.abs(forms).max()) or 1.0
    squares = _mean_and_radius(forms / unit)[1] ** 2
    norm = unit * math.sqrt(float(squares.mean()) / 2)
    norm_stderr = unit**2 * float(calibrated_stderr(squares)) / (4 * norm) if norm else 0.0
    limit = saddle_probability(trace, norm)
    slope = trace / (2 * norm**2) if norm else 0.0
    error = limit * abs(slope) * math.hypot(trace_stderr, trace / norm * norm_stderr) if norm else 0.0
    return PlaneEstimates(
        trace, trace_stderr, norm, norm_stderr, _participation(squares, order), limit, error
    )


def share_interval(low: int, high: int, count: int) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) 95 % interval of a share of which `low` to `high` of `count` are known.

    >>> [round(end, 3) for end in share_interval(0, 0, 10)]
    [0.0, 0.308]
    """
    from scipy.stats import beta  # loading SciPy takes longer than many a measurement

    below = float(beta.ppf(0.025, low, count - low + 1)) if low else 0.0
    above = float(beta.ppf(0.975, high + 1, count - high)) if high < count else 1.0
    return below, above


def _mean_and_radius(forms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b, c = forms[:, 0, 0], forms[:, 0, 1], forms[:, 1, 1]
    return (a + c) / 2, np.hypot((a - c) / 2, b)


def _participation(squares: np.ndarray, order: int) -> float:
    """4 / (E r⁴/(E r²)² − 2); the ratio of sample moments times (k + 1)/k has the mean 2 for exponential r²."""
    k = len(squares)
    if not squares.any():
        return float(order)
    ratio = float((squares**2).mean() / squares.mean() ** 2) * (k + 1) / k
    return min(max(4 / (ratio - 2), 1.0), float(order)) if ratio > 2 else float(order)
