"""From quadrature rules to a smoothed spectral density with a 95 % band; numpy only.

The density is φ(u) = (1/n) Σ_i N(u; u(λ_i), σ²) in a coordinate u of the eigenvalue; estimated is it by the
mean over k chains of Σ_j w_j N(u; u(θ_j), σ²).

*Sampling error.* A start vector uniform on the sphere gives eigenvalue i the weight of a
Beta(1/2, (n-1)/2) variable, very nearly χ²_1/n. With K_i = N(u; u(λ_i), σ²),

    Var φ̂(u) = 2 / (k (n + 2)) · [ (1/n) Σ K_i² - φ(u)² ],

and the first term is estimated by the same quadrature: far better than from the spread of a few chains. φ̂ is
a weighted sum of χ² variables, skewed where few eigenvalues contribute: it is taken as φ χ²_ν/ν with
ν = 2φ²/Var (Satterthwaite). In counts of eigenvalues, ν = kN with N = (n + 2) φ² / [(1/n)ΣK² - φ²], which is
never below 1; estimated from k chains, N has the standard error √(2N/k), and the lower end is taken.

*Quadrature error.* The difference from the rules with 3/4 of the nodes, its largest value within a kernel's
width (it oscillates), is added at both ends; three times that on a logarithmic axis, where the kernel is too
narrow near zero for the error to fall faster than 1/m: error(3m/4) - error(m) is then a third of error(m).

Where a logarithmic axis stretches the nodes further apart than the kernel reaches, two rules of different m
say nothing about each other. There the band takes what any measure with this Gauss rule allows: by the
inequalities of Chebyshev, Markov and Stieltjes (Szegő, Orthogonal Polynomials, §3.41), the mass w_j lies
between the neighbours θ_{j-1} and θ_{j+1}, so that Σ_j w_j min K ≤ φ ≤ Σ_j w_j max K over these intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from landscape.estimators.quadrature import Array, Rule

AxisName = Literal["linear", "log", "log_magnitude"]
WidthName = Literal["resolution", "converged", "ghorbani", "papyan", "papyan_code"]
WIDTHS: Final = get_args(WidthName)

_PER_WIDTH: Final = 4  # grid points per σ: the trapezoid rule is then exact to 1e-100, and curves look smooth
_TAIL: Final = 6.0  # σ beyond the outermost nodes: 2e-9 of the mass is cut off
_RESOLVED: Final = 0.01  # share of the kernel's peak that a quadrature may miss, for the width "resolution"
_CONVERGED: Final = (
    0.05  # share of the highest density by which m and 3/4 m nodes may differ, for "converged"
)
_LADDER: Final = 24  # widths tried for "converged", a factor √2 apart
_FLAT: Final = 1e-6  # a spectrum narrower than this share of its size is drawn as one line of this width
_REACH: Final = 4.0  # σ between a node's neighbours, on a logarithmic axis, from which they are too far apart
_CHUNK: Final = 1 << 21  # kernel values formed at once


@dataclass(frozen=True)
class Axis:
    """A coordinate u of the eigenvalue λ.

    Attributes:
        name: "linear": u = λ. "log": u = asinh(λ / 2ε), which is ±ln(|λ|/ε) away from zero and keeps the
            sign. "log_magnitude": u = ln(|λ| + ε), Papyan's, which folds the signs.
        epsilon: ε, in the unit of λ; not used by "linear".
    """

    name: AxisName
    epsilon: float = 0.0

    def coordinate(self, eigenvalues: ArrayLike) -> Array:
        """Return u of eigenvalues."""
        x = np.asarray(eigenvalues, dtype=np.float64)
        if self.name == "linear":
            return x
        if self.name == "log":
            return np.arcsinh(x / (2 * self.epsilon))
        return np.log(np.abs(x) + self.epsilon)

    def eigenvalue(self, u: Array) -> Array:
        """Return the eigenvalue at u; |λ| + ε for "log_magnitude"."""
        if self.name == "linear":
            return u
        return 2 * self.epsilon * np.sinh(u) if self.name == "log" else np.exp(u)


@dataclass(frozen=True)
class Curve:
    """A smoothed density on a grid, per unit of the coordinate.

    Attributes:
        coordinate: u, evenly spaced, shape (x,).
        width: σ, in the unit of u.
        density: shape (x,); its integral over u is the share of the eigenvalues that were sampled.
        low: lower end of the 95 % band, shape (x,).
        high: upper end, shape (x,).
    """

    coordinate: Array
    width: float
    density: Array
    low: Array
    high: Array


def curve(
    rules: Sequence[Rule],
    coarse: Sequence[Rule],
    axis: Axis,
    width: WidthName | float,
    dimension: int,
    share: float = 1.0,
) -> Curve:
    """Smooth the mean of quadrature rules, with its band.

    Args:
        rules: of the chains, from m nodes.
        coarse: of the same chains, from 3/4 m nodes.
        axis: the coordinate in which the kernel is a Gaussian.
        width: a rule's name (see `kernel_width`), or σ in the unit of the coordinate.
        dimension: n of the space that the start vectors were drawn from.
        share: of all eigenvalues that this space holds.

    Returns:
        The curve, on a grid that reaches 6 σ beyond the nodes with 4 points per σ.

    >>> one = Rule(np.array([1.0, 3.0]), np.array([0.5, 0.5]), np.zeros(2))
    >>> found = curve([one], [one], Axis("linear"), 0.1, dimension=1000)
    >>> round(float(np.trapezoid(found.density, found.coordinate)), 6)
    1.0
    """
    from scipy import ndimage  # loading SciPy takes longer than many a measurement

    low, high = span(rules, axis)
    if isinstance(width, str) and width == "converged":
        sigma = _converged_width(rules, coarse, axis, low, high)
    else:
        sigma = kernel_width(width, low, high, max(len(r.nodes) for r in rules))
    u = grid(low, high, sigma)
    mean, square = smoothed(rules, axis, u, sigma)
    difference = np.abs(mean - smoothed(coarse, axis, u, sigma)[0])
    difference *= 1.0 if axis.name == "linear" else 1 / (4 / 3 - 1)
    error = ndimage.maximum_filter1d(difference, 2 * _PER_WIDTH + 1)
    below, above = _sampling_band(mean, square, len(rules), dimension)
    lower, upper = below - error, above + error
    if axis.name != "linear":
        least, most, gap = _between_neighbours(rules, axis, u, sigma)
        apart = gap > _REACH * sigma
        lower = np.where(apart, np.minimum(lower, below - (mean - least)), lower)
        upper = np.where(apart, np.maximum(upper, above + (most - mean)), upper)
    lower = np.maximum(lower, 0.0)
    return Curve(u, sigma, share * mean, share * lower, share * upper)


def span(rules: Sequence[Rule], axis: Axis) -> tuple[float, float]:
    """Return the range of the nodes in the coordinate, their residuals included; never empty."""
    ends = [r.nodes[i] + sign * r.residual_norms[i] for r in rules for i, sign in ((0, -1), (-1, 1))]
    size = max(map(abs, ends))
    if axis.name == "log_magnitude":
        # Nodes of small magnitude lie between the ends.
        u = [axis.coordinate(r.nodes) for r in rules]
        low, high = min(float(x.min()) for x in u), float(axis.coordinate(size))
    else:
        low, high = float(axis.coordinate(min(ends))), float(axis.coordinate(max(ends)))
    flat = _FLAT * size if axis.name == "linear" else _FLAT
    if high - low <= flat:
        half = flat / 2 or 0.5  # the zero operator has no scale at all
        low, high = (low + high) / 2 - half, (low + high) / 2 + half
    return low, high


def kernel_width(width: WidthName | float, low: float, high: float, steps: int) -> float:
    """Return σ, in the unit of the coordinate.

    - "resolution": σ = √(2 ln 100)/4 · (high - low)/m = 0.76 (high - low)/m. Chebyshev's coefficients of a
      Gaussian of width s = 2σ/(high - low) on [-1, 1] fall like exp(-p²s²/2); a rule that is exact to degree
      2m - 1 misses those from p = 2m on, here 1 % of the kernel's peak.
    - "ghorbani": σ² = 1e-5 (high - low)²: the variance 1e-5 max(1, range) of the authors' code and
      PyHessian's, for eigenvalues divided by their range, so that it scales with the loss.
    - "papyan": σ = 2/(m-1)/√(8 ln κ) · half the range with a margin of 5 %, κ = 3 (JMLR 2020, App. D.2).
    - "papyan_code": the same with κ = 1.25, as in the authors' repositories.
    - a number: σ itself.

    Args:
        width: one of these; "converged" needs the rules, see `curve`.
        low: lower end of the spectrum, in the coordinate.
        high: upper end.
        steps: nodes m of a chain.

    Raises:
        ValueError: for another name, or a number that is no width.

    Source: Ghorbani et al. (2019), arXiv:1901.10159; Papyan (2020), arXiv:2008.11865.
    """
    reach = high - low
    if width == "resolution":
        return math.sqrt(2 * math.log(1 / _RESOLVED)) / 4 * reach / steps
    if width == "ghorbani":
        return math.sqrt(1e-5) * reach
    if width in ("papyan", "papyan_code"):
        kappa = 3.0 if width == "papyan" else 1.25
        return 2 / max(steps - 1, 1) / math.sqrt(8 * math.log(kappa)) * 1.05 * reach / 2
    if isinstance(width, str) or not 0 < width < math.inf:
        raise ValueError(f"width = {width!r}; allowed are {', '.join(WIDTHS)} or a positive number")
    return float(width)


def grid(low: float, high: float, width: float) -> Array:
    """Return the points at which a density of this kernel is drawn, 4 per σ and 6 σ beyond both ends."""
    start, stop = low - _TAIL * width, high + _TAIL * width
    return np.linspace(start, stop, math.ceil((stop - start) / width * _PER_WIDTH) + 1)


def smoothed(rules: Sequence[Rule], axis: Axis, u: Array, width: float) -> tuple[Array, Array]:
    """Return the means over chains of Σ w K and of Σ w K² at the points u, K the Gaussian kernel."""
    nodes = axis.coordinate(np.concatenate([r.nodes for r in rules]))
    weights = np.concatenate([r.weights for r in rules]) / len(rules)
    height = 1 / (math.sqrt(2 * math.pi) * width)
    mean, square = np.zeros_like(u), np.zeros_like(u)
    piece = max(1, _CHUNK // len(u))
    for start in range(0, len(nodes), piece):
        part = slice(start, start + piece)
        K = height * np.exp(-0.5 * ((u[:, None] - nodes[part]) / width) ** 2)
        mean += K @ weights[part]
        square += (K * K) @ weights[part]
    return mean, square


def _sampling_band(mean: Array, square: Array, chains: int, dimension: int) -> tuple[Array, Array]:
    """Return both ends of the 95 % interval for the sampling error; see the module."""
    from scipy.stats import chi2

    spread = np.maximum(square - mean**2, 0.0)
    there = mean > 0.0
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        count = np.where(there, (dimension + 2) * mean**2 / spread, 1.0)
    # Beyond this many the band is thinner than rounding; infinite on a multiple of the identity.
    count = np.clip(np.nan_to_num(count, nan=1.0, posinf=1e12), 1.0, 1e12)
    freedom = chains * np.maximum(count - np.sqrt(2 * count / chains), 1.0)
    low, high = (mean * freedom / chi2.ppf(p, freedom) for p in (0.975, 0.025))
    return low, high


def _between_neighbours(
    rules: Sequence[Rule], axis: Axis, u: Array, width: float
) -> tuple[Array, Array, Array]:
    """Return the least and the largest φ(u) that the rules allow, and how far apart neighbours are around u.

    A chain that ended exactly is no bracket but the measure itself.
    """
    height = 1 / (math.sqrt(2 * math.pi) * width)
    least, most, gap = np.zeros_like(u), np.zeros_like(u), np.zeros_like(u)
    for rule in rules:
        x, rest = rule.nodes, rule.residual_norms
        wide = rest.any()
        a = np.concatenate([[x[0] - rest[0]], x[:-1]]) if wide else x
        b = np.concatenate([x[1:], [x[-1] + rest[-1]]]) if wide else x
        ends = np.sort([axis.coordinate(a), axis.coordinate(b)], axis=0)
        if axis.name == "log_magnitude":  # the coordinate folds at zero
            ends[0] = np.where((a < 0) & (b > 0), axis.coordinate(0.0), ends[0])
        piece = max(1, _CHUNK // len(x))
        for part in (slice(start, start + piece) for start in range(0, len(u), piece)):
            low, high = ends[0] - u[part, None], ends[1] - u[part, None]
            near = np.exp(-0.5 * (np.maximum(np.maximum(low, -high), 0.0) / width) ** 2) * rule.weights
            far = np.exp(-0.5 * (np.maximum(-low, high) / width) ** 2) * rule.weights
            share = near.sum(axis=1)
            least[part] += height * far.sum(axis=1)
            most[part] += height * share
            apart = near @ (ends[1] - ends[0])
            gap[part] += np.divide(apart, share, out=np.zeros_like(share), where=share > 0)
    return least / len(rules), most / len(rules), gap / len(rules)


def _converged_width(
    rules: Sequence[Rule], coarse: Sequence[Rule], axis: Axis, low: float, high: float
) -> float:
    """Return the smallest width of the ladder at which m and 3/4 m nodes agree to 5 % of the maximum."""
    finest = kernel_width("resolution", low, high, max(len(r.nodes) for r in rules)) / 4
    width = finest
    for i in range(_LADDER):
        width = finest * 2 ** (i / 2)
        u = grid(low, high, width)
        fine, _ = smoothed(rules, axis, u, width)
        rough, _ = smoothed(coarse, axis, u, width)
        if width >= (high - low) / 4 or np.abs(fine - rough).max() <= _CONVERGED * fine.max():
            break
    return width
