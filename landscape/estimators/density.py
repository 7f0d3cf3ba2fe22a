"""The spectral density by stochastic Lanczos quadrature, with an error band, and its outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, get_args

import numpy as np
import torch

from landscape.estimators import lanczos, smoothing
from landscape.estimators.deflation import Deflated, Pairs, deflated
from landscape.estimators.lanczos import Chains
from landscape.estimators.outliers import Outliers, count_outliers
from landscape.estimators.probes import DISTRIBUTIONS, Operator, draw
from landscape.estimators.quadrature import Array, Rule, gauss, merged, padded
from landscape.estimators.smoothing import Axis, AxisName, WidthName
from landscape.seeds import generator

MEMORY: Final = 8 << 30  # bytes for the chains' bases, unless told otherwise

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "ghorbani": {"probes": 10, "steps": 90, "width": "ghorbani"},
        "pyhessian": {"probes": 1, "steps": 100, "distribution": "rademacher", "width": "ghorbani"},
        "papyan": {"probes": 1, "steps": 128, "width": "papyan"},
        "papyan_code": {"probes": 1, "steps": 128, "width": "papyan_code"},
        "papyan_log": {"probes": 1, "steps": 2048, "axis": "log_magnitude", "width": "papyan_code", "floor": 1e-5},
    }
)  # fmt: skip
"""Arguments of `density` with which the authors drew theirs: `density(A, **PRESETS["ghorbani"])`.

Ghorbani et al. (2019) and their JAX example; PyHessian's defaults; Papyan (2018, 2020): κ = 3 in the paper
(JMLR, App. D.2), 1.25 in both repositories; for logarithmic plots no κ is stated, that of the code is taken.
Absolute numbers of theirs (the variance 1e-5, ε = 1e-5) are relative here, so that they scale with the loss.
"""


@dataclass(frozen=True)
class DensityEstimate:
    """An estimated spectral density with its 95 % band.

    Attributes:
        grid: eigenvalues, shape (x,); |λ| + ε where `axis` is "log_magnitude".
        coordinate: u of the grid, evenly spaced, shape (x,); the grid itself on the linear axis.
        density: per unit of u, shape (x,). Its integral over u is 1, less the mass of the atoms.
        low: lower end of the band, shape (x,).
        high: upper end, shape (x,).
        width: σ of the Gaussian kernel, in the unit of u.
        axis: the coordinate.
        atoms: deflated eigenvalues, each of mass 1/n, shape (r,).
        ritz_values: nodes, shape (probe, node), ascending; NaN where a chain ended early.
        weights: shape (probe, node), NaN likewise; each row sums to the share (n - r)/n that was sampled.
        residual_norms: of the Ritz values, shape (probe, node).
        outliers: eigenvalues beyond the bulk.
        chains: the tridiagonal matrices, from which all this follows.
        matvecs: products with A that were spent.
    """

    grid: Array
    coordinate: Array
    density: Array
    low: Array
    high: Array
    width: float
    axis: Axis
    atoms: Array
    ritz_values: Array
    weights: Array
    residual_norms: Array
    outliers: Outliers
    chains: Chains
    matvecs: int


def density(
    A: Operator,
    probes: int = 8,
    steps: int = 100,
    seed: int = 0,
    *,
    axis: AxisName = "linear",
    width: WidthName | float | None = None,
    floor: float = 1e-6,
    distribution: str = "gaussian",
    deflate: Pairs | None = None,
    memory: int = MEMORY,
) -> DensityEstimate:
    """Estimate the density of eigenvalues φ(u) = (1/n) Σ_i N(u; u(λ_i), σ²), with a 95 % band.

    Lanczos chains from random unit vectors run in lockstep, each its own Gauss quadrature, smoothed by a
    Gaussian kernel. The band covers φ with this kernel: it holds the sampling error, by the known
    distribution of the weights, and the quadrature error, m against 3/4 m nodes (`smoothing`).

    Args:
        A: symmetric operator of shape (n, n).
        probes: chains k >= 1.
        steps: products m of a chain, and nodes of its quadrature.
        seed: any integer.
        axis: "linear"; "log", signed, u = asinh(λ/2ε); "log_magnitude", u = ln(|λ| + ε).
        width: σ in the unit of u, or the rule it follows (`smoothing.kernel_width`). The default is
            "resolution" on the linear axis, what m nodes resolve, and "converged" on the others: the smallest
            of a ladder at which m and 3/4 m nodes agree to 5 % of the maximum.
        floor: ε over the largest |Ritz value|; for the logarithmic axes.
        distribution: of the start vectors, "gaussian" or "rademacher". The band is made for the first; signs
            are exact on diagonal operators, where it is too wide.
        deflate: eigenvalues, shape (r,), and orthonormal eigenvectors, shape (n, r), to be taken out and
            drawn as atoms: the kernel then follows the bulk's range.
        memory: bytes for the bases; chains run in groups that fit.

    Returns:
        The estimate. All of it scales with A.

    Raises:
        ValueError: for an argument outside its range, or chains that do not fit into the memory.
        Refused: if a product is not finite.

    Source: Lin, Saad, Yang (2016), doi:10.1137/130934283; Ghorbani et al. (2019), arXiv:1901.10159.

    >>> found = density(torch.diag(torch.linspace(0, 1, 50)), probes=2, steps=20)
    >>> round(float(np.trapezoid(found.density, found.grid)), 6)
    1.0
    """
    if axis not in get_args(AxisName):
        raise ValueError(f"axis = {axis!r}; allowed are {', '.join(get_args(AxisName))}")
    if not 0 < floor < 1:
        raise ValueError(f"floor = {floor}; allowed is a number between 0 and 1, for example 1e-6")
    P = deflated(A, deflate)
    found = sample_chains(P, "density", probes, steps, seed, distribution, memory)
    return from_chains(found, int(A.shape[0]), P.dtype, atoms=P.values, axis=axis, width=width, floor=floor)


def from_chains(
    chains: Chains,
    n: int,
    dtype: torch.dtype,
    *,
    atoms: Array | None = None,
    axis: AxisName = "linear",
    width: WidthName | float | None = None,
    floor: float = 1e-6,
) -> DensityEstimate:
    """Estimate the density from chains that have been run; see `density`.

    Args:
        chains: from random start vectors in the space that is left when the atoms are taken out.
        n: order of the operator.
        dtype: of the chains' vectors.
        atoms: eigenvalues that were deflated, shape (r,).
        axis: as for `density`.
        width: as for `density`.
        floor: as for `density`.
    """
    values = np.zeros(0) if atoms is None else np.asarray(atoms, dtype=np.float64)
    dimension = n - len(values)
    rules, coarse = rules_of(chains, dtype)
    size = max(float(np.abs(r.nodes).max()) for r in rules)
    coordinate = Axis(axis) if axis == "linear" else Axis(axis, floor * size or 1.0)
    if width is None:
        width = "resolution" if axis == "linear" else "converged"
    share = dimension / n
    smooth = smoothing.curve(rules, coarse, coordinate, width, dimension, share)
    return DensityEstimate(
        grid=coordinate.eigenvalue(smooth.coordinate),
        coordinate=smooth.coordinate,
        density=smooth.density,
        low=smooth.low,
        high=smooth.high,
        width=smooth.width,
        axis=coordinate,
        atoms=values,
        ritz_values=padded([r.nodes for r in rules]),
        weights=share * padded([r.weights for r in rules]),
        residual_norms=padded([r.residual_norms for r in rules]),
        outliers=count_outliers(rules, dimension),
        chains=chains,
        matvecs=int(chains.lengths.sum()),
    )


def sample_chains(
    P: Deflated, name: str, probes: int, steps: int, seed: int, distribution: str, memory: int
) -> Chains:
    """Run chains from random start vectors, in groups that fit into the memory.

    Args:
        P: the operator, on the complement of what is known.
        name: of the random streams; probe i draws from (seed, name, i).
        probes: chains k.
        steps: length m of a chain.
        seed: any integer.
        distribution: "gaussian" or "rademacher".
        memory: bytes for the bases of a group.

    Returns:
        All k chains.

    Raises:
        ValueError: for an argument outside its range, or chains that do not fit into the memory.
    """
    if probes < 1:
        raise ValueError(f"probes = {probes}; allowed is 1 or more, 8 are usual")
    if steps < 1:
        raise ValueError(f"steps = {steps}; allowed is 1 or more, 100 are usual")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution {distribution!r} is unknown; allowed are {', '.join(DISTRIBUTIONS)}")
    n = int(P.shape[0])
    together = lanczos.chains_that_fit(n, steps, P.dtype, memory)
    # A chain on the complement ends with it: what is left then is rounding.
    length = min(steps, P.dimension)
    total: Chains | None = None
    for begin in range(0, probes, together):
        streams = (generator(seed, name, i) for i in range(begin, min(begin + together, probes)))
        V = torch.cat([draw(s, n, 1, distribution, dtype=P.dtype, device=P.device) for s in streams], dim=1)
        found = lanczos.chains(P, P.project(V), length)
        total = found if total is None else total.joined(found)
    if total is None:
        raise RuntimeError("no chain was run")
    return total


def rules_of(chains: Chains, dtype: torch.dtype) -> tuple[list[Rule], list[Rule]]:
    """Return the quadrature of each chain, and that of its first 3/4; equal where a chain broke down.

    Args:
        chains: the tridiagonal matrices.
        dtype: of the chains' vectors; copies of an eigenvalue within its rounding are one node.
    """
    eps = torch.finfo(dtype).eps
    rules, coarse = [], []
    for alpha, beta in chains.rows():
        rules.append(merged(gauss(alpha, beta), eps))
        short = max(1, len(alpha) * 3 // 4)
        coarse.append(rules[-1] if beta[-1] == 0.0 else merged(gauss(alpha[:short], beta[:short]), eps))
    return rules, coarse
