"""How far a ray stays in a sublevel set: the first crossing, by bracketing and root finding.

For a function f along a ray and a level ε the radius is r = sup{r : f(s) < ε for all 0 < s < r}. It knows of
the function only a callable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

CROSSED: Final = 0
"""The ray leaves the set where the function reaches the level."""
NOT_FINITE: Final = 1
"""The ray leaves the set where the function stops to be a number."""
UNBOUNDED: Final = 2
"""The ray is still in the set at the limit, which stands for the radius."""
NEVER_INSIDE: Final = 3
"""Not even the smallest radius tried is in the set; the radius is 0."""

STEP: Final = 1.5
# Smaller than any radius of use: at that distance from the start every displacement is lost in rounding.
_LEAST = 1e-40
# Closer logarithms of radii are lost in their own rounding.
_FINEST = 1e-13


@dataclass(frozen=True)
class Radii:
    """Radii of one ray, one for each level, in the order of the levels given.

    Attributes:
        radii: r, (levels,).
        status: `CROSSED`, `NOT_FINITE`, `UNBOUNDED` or `NEVER_INSIDE`, (levels,).
        evaluations: of the function.
        not_finite: how many of them gave NaN or an infinity.
        lowest: the least finite value of the function; inf where there is none.
    """

    radii: np.ndarray
    status: np.ndarray
    evaluations: int
    not_finite: int
    lowest: float


def first_crossings(
    function: Callable[[float], float],
    levels: Sequence[float],
    *,
    start: float,
    limit: float,
    rtol: float,
    step: float = STEP,
) -> Radii:
    """Find the radius of a ray for each level.

    The function is evaluated at `start`; from there down by factors of `step`² until it is in the set, then up
    by factors of `step` until it is not, where the bracket is closed. So what leaves the set and returns between
    two neighbouring radii of that scan, or below the first, is not seen. A value that is no finite number is not
    in the set. The next level goes on where the last one ended.

    Args:
        function: f(r) for r > 0; f(0) is taken as 0.
        levels: ε > 0; r is in the set where f(r) < ε, strictly.
        start: radius of the first evaluation, at most `limit`.
        limit: radius at which a ray counts as unbounded.
        rtol: the most that ln r may be off, given the right bracket.
        step: factor of the scan, above 1.

    Raises:
        ValueError: for an argument outside its range.

    >>> found = first_crossings(lambda r: r * r, [4.0, 1.0], start=0.5, limit=100.0, rtol=1e-12)
    >>> [round(r, 9) for r in found.radii.tolist()]
    [2.0, 1.0]
    """
    _require(levels, start, limit, rtol, step)
    ray = _Ray(function)
    radii, status = np.zeros(len(levels)), np.zeros(len(levels), int)
    inside = 0.0
    for index in np.argsort(levels, kind="stable"):
        found = _crossing(ray, levels[index], max(inside, start), inside, limit, rtol, step)
        radii[index], status[index], inside = found
    return Radii(radii, status, len(ray.seen), ray.not_finite, ray.lowest)


class _Ray:
    """A function that remembers its values."""

    def __init__(self, function: Callable[[float], float]):
        self.function = function
        self.seen: dict[float, float] = {}

    def __call__(self, radius: float) -> float:
        if radius not in self.seen:
            self.seen[radius] = float(self.function(radius))
        return self.seen[radius]

    @property
    def not_finite(self) -> int:
        return sum(not math.isfinite(value) for value in self.seen.values())

    @property
    def lowest(self) -> float:
        return min((value for value in self.seen.values() if math.isfinite(value)), default=math.inf)


def _crossing(
    ray: _Ray, level: float, start: float, inside: float, limit: float, rtol: float, step: float
) -> tuple[float, int, float]:
    """Return the radius for one level, its status, and the largest radius found in the set."""
    radius, outside = start, math.inf
    while not _contains(ray(radius), level):
        outside = radius
        radius /= step * step
        if radius <= inside:  # in the set of a smaller level
            radius = inside
            break
        if radius < _LEAST * start:
            return 0.0, NEVER_INSIDE, 0.0
    lower = radius
    # Known from a smaller level; the scan would step over it where it is a pocket without numbers.
    known = [r for r, value in ray.seen.items() if r > lower and not _contains(value, level)]
    outside = min([outside, *known])
    for following in _scan(lower, limit, step):
        if following >= outside or not _contains(ray(following), level):
            outside = min(following, outside)
            break
        lower = following
    else:
        return limit, UNBOUNDED, lower
    lower, upper = _closed(ray, level, lower, outside, rtol)
    if not math.isfinite(ray(upper)):
        return math.sqrt(lower * upper), NOT_FINITE, lower
    return math.exp(_interpolated(ray, level, lower, upper)), CROSSED, lower


def _scan(radius: float, limit: float, step: float) -> Iterator[float]:
    """Yield radii by factors of `step`, the limit last."""
    while radius < limit:
        radius = min(radius * step, limit)
        yield radius


def _contains(value: float, level: float) -> bool:
    return math.isfinite(value) and value < level


def _closed(ray: _Ray, level: float, lower: float, upper: float, rtol: float) -> tuple[float, float]:
    """Narrow a bracket of the crossing until ln upper - ln lower <= rtol.

    Secant steps in ln f against ln r, where a power of r is a straight line. A step keeps rtol / 2 away from
    both ends, so that a root that is known well enough is enclosed by one more evaluation; where two steps in a
    row have not halved the bracket, it is bisected.
    """
    rtol = max(rtol, _FINEST)
    widths = [math.inf, math.inf]
    while (width := math.log(upper / lower)) > rtol:
        if width > widths[-2] / 2:
            at = math.log(lower) + width / 2
            widths = [math.inf, math.inf]
        else:
            at = _interpolated(ray, level, lower, upper)
            at = min(max(at, math.log(lower) + rtol / 2), math.log(upper) - rtol / 2)
            widths.append(width)
        middle = math.exp(at)
        if not lower < middle < upper:
            break  # neighbouring numbers
        if _contains(ray(middle), level):
            lower = middle
        else:
            upper = middle
    return lower, upper


def _interpolated(ray: _Ray, level: float, lower: float, upper: float) -> float:
    """Return ln r where the straight line of ln f through both ends meets the level; else the middle."""
    low, high = ray(lower), ray(upper)
    a, b = math.log(lower), math.log(upper)
    if not (0 < low < high and math.isfinite(high)):
        return (a + b) / 2
    share = math.log(level / low) / math.log(high / low)
    return a + (b - a) * min(max(share, 0.0), 1.0)


def _require(levels: Sequence[float], start: float, limit: float, rtol: float, step: float) -> None:
    if not levels or not all(0 < level < math.inf for level in levels):
        raise ValueError(f"levels are {list(levels)}; allowed are finite numbers > 0")
    if not 0 < start <= limit < math.inf:
        raise ValueError(f"start is {start} and limit {limit}; allowed is 0 < start <= limit, finite")
    if not rtol >= 0:
        raise ValueError(f"rtol is {rtol}; allowed is a number >= 0")
    if not 1 < step < math.inf:
        raise ValueError(f"step is {step}; allowed is a number > 1")
