"""What a series of values says about a measure: whether it notices a change that leaves the function alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Verdict = Literal["invariant", "covariant", "broken", "undefined"]
VERDICTS: Final[tuple[Verdict, ...]] = ("invariant", "covariant", "broken", "undefined")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """What was found about one measure.

    Attributes:
        verdict: "invariant": the same at all α. "covariant": proportional to α^p. "broken": neither, so that no
            statement about the function follows from the value. "undefined": not a number somewhere, or of unknown
            standard error.
        exponent: p; 0 if invariant, nan if broken or undefined.
        factor: largest over smallest value, in modulus; nan if undefined.
    """

    verdict: Verdict
    exponent: float
    factor: float


def judge(
    alpha: ArrayLike, values: ArrayLike, errors: ArrayLike, tolerance: float, *, logarithmic: bool = False
) -> Finding:
    """Judge a measure by its values along α.

    A value counts as the same as another if it differs by less than `tolerance` of it, or by less than four
    standard errors of both; a power law is fitted to the logarithms of the moduli.

    Args:
        alpha: factors of the transformation, positive, shape (k,).
        values: of the measure, shape (k,).
        errors: standard errors of the values, shape (k,); 0 where they have none, nan where it is not known.
        tolerance: relative.
        logarithmic: whether the values are natural logarithms (of a volume, of an evidence): judged are then the
            numbers that they are the logarithms of.

    >>> judge([0.5, 1, 2], [3, 3, 3], [0, 0, 0], 0.01).verdict
    'invariant'
    >>> judge([0.5, 1, 2], [2, 8, 32], [0, 0, 0], 0.01)
    Finding(verdict='covariant', exponent=2.0, factor=16.0)
    """
    a, v, e = (np.asarray(x, dtype=np.float64) for x in (alpha, values, errors))
    if not (np.isfinite(v).all() and np.isfinite(e).all()):
        return Finding("undefined", np.nan, np.nan)
    if logarithmic:
        return _judged_logarithms(a, v, e, tolerance)
    least, most = float(np.abs(v).min()), float(np.abs(v).max())
    factor = 1.0 if most == 0 else (most / least if least > 0 else np.inf)
    middle = float(v[np.argmin(np.abs(np.log(a)))])
    if _same(v, middle, e, tolerance):
        return Finding("invariant", 0.0, factor)
    if least > 0 and (v > 0).all() | (v < 0).all() and len(np.unique(a)) > 2:
        x, y = np.log(a), np.log(np.abs(v))
        slope = float(np.polyfit(x, y, 1)[0])
        exponent = round(2 * slope) / 2 if abs(2 * slope - round(2 * slope)) < 0.05 else slope
        law = middle * (a / a[np.argmin(np.abs(x))]) ** exponent
        if _same(v, law, e, tolerance):
            return Finding("covariant", exponent, factor)
    return Finding("broken", np.nan, factor)


def _judged_logarithms(a: Array, v: Array, e: Array, tolerance: float) -> Finding:
    """The same from logarithms, which may be out of the range of floating-point numbers."""
    x, spread = np.log(a), float(v.max() - v.min())
    middle = int(np.argmin(np.abs(x)))
    noise = np.maximum(np.log1p(tolerance), 4 * np.hypot(e, e[middle]))
    factor = float(np.exp(spread)) if spread < 700 else np.inf
    if (np.abs(v - v[middle]) <= noise).all():
        return Finding("invariant", 0.0, factor)
    slope = float(np.polyfit(x, v, 1)[0]) if len(np.unique(a)) > 2 else np.nan
    if (np.abs(v - v[middle] - slope * (x - x[middle])) <= noise).all():
        return Finding("covariant", slope, factor)
    return Finding("broken", np.nan, factor)


def _same(values: Array, expected: Array | float, errors: Array, tolerance: float) -> bool:
    """Whether all values are what is expected, to the tolerance or to four standard errors of both."""
    expected = np.broadcast_to(expected, values.shape)
    nearest = int(np.argmin(np.abs(values - expected)))
    noise = 4 * np.hypot(errors, errors[nearest])
    return bool((np.abs(values - expected) <= np.maximum(tolerance * np.abs(expected), noise)).all())
