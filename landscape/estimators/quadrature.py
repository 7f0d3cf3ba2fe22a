"""Gauss quadrature from Lanczos chains: vᵀ f(A) v ≈ Σ_j w_j f(θ_j).

The nodes θ are the eigenvalues of the tridiagonal T, the weights the squares of the first components of its
eigenvectors (Golub and Welsch 1969). m nodes are exact for polynomials of degree 2m - 1; after a breakdown,
for every f.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_ROUNDING = 30.0  # of a Ritz value, in eps of the products' type, over the largest


@dataclass(frozen=True)
class Rule:
    """One chain's quadrature.

    Attributes:
        nodes: Ritz values θ, ascending, shape (m,).
        weights: shape (m,), their sum is 1.
        residual_norms: ‖A y_j - θ_j y_j‖ of each Ritz vector, shape (m,): an eigenvalue lies within it.
    """

    nodes: Array
    weights: Array
    residual_norms: Array


def gauss(alpha: ArrayLike, beta: ArrayLike) -> Rule:
    """Return the Gauss rule of a chain.

    Args:
        alpha: diagonal of T, shape (m,).
        beta: off-diagonal, shape (m,); its last entry is the norm of the remainder.

    Returns:
        m nodes and weights.

    Source: Golub and Meurant, Matrices, Moments and Quadrature with Applications (2010), §3 and §6.2.

    >>> rule = gauss([2.0, 2.0], [1.0, 0.0])
    >>> rule.nodes.round(12).tolist(), rule.weights.round(12).tolist()
    ([1.0, 3.0], [0.5, 0.5])
    """
    from scipy.linalg import eigh_tridiagonal  # loading SciPy takes longer than many a measurement

    a, b = np.asarray(alpha, dtype=np.float64), np.asarray(beta, dtype=np.float64)
    # LAPACK's thresholds are absolute near the smallest numbers.
    scale = max(float(np.abs(a).max()), float(np.abs(b).max())) or 1.0
    nodes, U = eigh_tridiagonal(a / scale, b[:-1] / scale)
    weights = U[0] ** 2
    return Rule(nodes * scale, weights / weights.sum(), np.abs(b[-1] * U[-1]))


def radau(alpha: ArrayLike, beta: ArrayLike, end: float) -> Rule:
    """Return the Gauss-Radau rule of a chain: m free nodes and one at `end`, exact to degree 2m.

    For a function whose odd derivatives are positive (the logarithm) and `end` at or below the
    spectrum it is a lower bound of vᵀ f(A) v, where the Gauss rule is an upper one.

    Args:
        alpha: diagonal of T, shape (m,).
        beta: off-diagonal, shape (m,).
        end: a number below all nodes of the Gauss rule.

    Returns:
        m + 1 nodes and weights; the residual norms are those of no Ritz vector, and NaN. A chain that broke
        down is exact: its Gauss rule comes back.

    Raises:
        ValueError: if `end` does not lie below them.

    Source: Golub (1973), doi:10.1137/1015032, §7; Golub and Meurant (2010), §6.2.2.
    """
    a, b = np.asarray(alpha, dtype=np.float64), np.asarray(beta, dtype=np.float64)
    if b[-1] == 0.0:
        return gauss(a, b)
    # The last pivot δ of T - end I gives e_mᵀ (T - end I)^-1 e_m = 1/δ.
    pivots = [a[0] - end]
    for diagonal, link in zip(a[1:], b[:-1], strict=True):
        if pivots[-1] <= 0:
            break
        pivots.append(diagonal - end - link**2 / pivots[-1])
    if not pivots[-1] > 0:
        least = gauss(a, b).nodes[0]
        raise ValueError(f"end = {end}; it must lie below all Ritz values, the smallest is {least}")
    rule = gauss(np.append(a, end + b[-1] ** 2 / pivots[-1]), np.append(b, 0.0))
    return Rule(rule.nodes, rule.weights, np.full(len(rule.nodes), np.nan))


def merged(rule: Rule, eps: float) -> Rule:
    """Return the rule with nodes that agree to rounding made one.

    Where few distinct eigenvalues are met, rounding errors grow from step to step until the chain leaves the
    invariant subspace and meets the same eigenvalues again. With full reorthogonalisation that is all that
    happens: the copies share the weight, and their sum is right.

    Args:
        rule: of a chain.
        eps: of the type of the chain's vectors.

    Returns:
        Each group's weights summed, at the node that weighs most.
    """
    size = float(np.abs(rule.nodes).max())
    group = np.concatenate([[0], np.cumsum(np.diff(rule.nodes) > _ROUNDING * eps * size)])
    if group[-1] + 1 == len(group):
        return rule
    weights = np.asarray(np.bincount(group, rule.weights), dtype=np.float64)
    heaviest = np.lexsort((-rule.weights, group))[np.searchsorted(group, np.arange(len(weights)))]
    return Rule(rule.nodes[heaviest], weights, rule.residual_norms[heaviest])


def padded(rows: list[Array]) -> Array:
    """Stack rows of different length, shape (k, longest), NaN where a row has ended."""
    result = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return result
