"""The log-determinant of a positive definite operator, exactly or by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import torch

from landscape.errors import Refused
from landscape.estimators.calibration import calibrated_stderr
from landscape.estimators.deflation import Pairs, deflated
from landscape.estimators.density import MEMORY, rules_of, sample_chains
from landscape.estimators.lanczos import Chains
from landscape.estimators.probes import Operator, order
from landscape.estimators.quadrature import Array, Rule, radau

Method = Literal["auto", "dense", "lanczos"]

DENSE: Final = 2048  # order up to which "auto" forms the matrix: some seconds for its eigenvalues
_DENSE_COPIES: Final = 4  # matrices of float64 beside each other while eigenvalues are computed
_BLOCK: Final = 16
_SYMMETRIC: Final = 0.02  # below this skewness nothing is widened: it would be by 1e-4
_NORMAL: Final = 1.959963984540054  # 97.5 % quantile of N(0, 1)


@dataclass(frozen=True)
class LogdetEstimate:
    """A log-determinant; `value` ± 1.96 `stderr` covers the truth in 95 % of seeds.

    Attributes:
        value: ln det(A + shift I).
        stderr: calibrated standard error over start vectors, with the quadrature's error; rounding alone for
            the dense method.
        eigenvalue_min: the smallest eigenvalue or Ritz value of A that was met.
        residual_norm: its residual, 0 for the dense method.
        method: "dense" or "lanczos".
        matvecs: products with A that were spent.
    """

    value: float
    stderr: float
    eigenvalue_min: float
    residual_norm: float
    method: str
    matvecs: int


def logdet(
    A: Operator,
    shift: float = 0.0,
    *,
    probes: int = 16,
    steps: int = 100,
    seed: int = 0,
    method: Method = "auto",
    distribution: str = "gaussian",
    lower: float | None = None,
    deflate: Pairs | None = None,
    memory: int = MEMORY,
) -> LogdetEstimate:
    """Estimate ln det(A + σI) = Σ ln λ_i + (n - r) · mean of Σ_j w_j ln(θ_j + σ), λ_i the r deflated ones + σ.

    *Sampling error.* For Gaussian start vectors the variance is known from the spectrum itself,
    2(n - r)²/(k(n - r + 2)) times that of ln(λ + σ) over the eigenvalues, and is taken from the same
    quadrature, with its skewness; for signs it comes from the spread of the probes. *Quadrature error.* The
    Gauss rule lies above vᵀ ln(A + σ) v, the Gauss-Radau rule with a node at a lower end of the spectrum
    below: the value is their mean, half their distance the error. Where no positive lower end is known, the
    difference from 3/4 of the nodes takes its place.

    Args:
        A: symmetric operator of shape (n, n).
        shift: σ, in the unit of A.
        probes: chains k >= 1 (two or more for signs, which show no error alone).
        steps: products m of a chain.
        seed: any integer.
        method: "dense" forms A by n products; "auto" does so where n <= 2048, n <= probes · steps, and it
            fits into the memory.
        distribution: of the start vectors, "gaussian" or "rademacher" (less variance where A is nearly
            diagonal).
        lower: a known lower bound of the eigenvalues of A, 0.0 for a Gauss-Newton or Fisher matrix. Ritz values
            that rounding put below it are raised to it.
        deflate: eigenvalues, shape (r,), and orthonormal eigenvectors, shape (n, r), that are known: their
            logarithms are added exactly, and sampling is left with the rest.
        memory: bytes for the chains' bases, or the matrix.

    Returns:
        The estimate.

    Raises:
        Refused: if A + shift is not positive definite, naming the smallest eigenvalue that was met.
        ValueError: for an argument outside its range.

    Source: Ubaru, Chen, Saad (2017), doi:10.1137/16M1104974; bounds: Golub and Meurant (2010), §6.

    >>> round(logdet(torch.diag(torch.tensor([1.0, 2.0, 4.0]).double())).value, 9)  # ln 8
    2.079441542
    """
    n = order(A)
    if method not in get_args(Method):
        raise ValueError(f"method = {method!r}; allowed are {', '.join(get_args(Method))}")
    if not math.isfinite(shift):
        raise ValueError(f"shift = {shift}; allowed is a finite number")
    if distribution == "rademacher" and probes < 2:
        raise ValueError(f"probes = {probes}; signs need at least 2 for a standard error, 16 are usual")
    fits = _DENSE_COPIES * 8 * n * n <= memory
    if method == "dense" or (method == "auto" and fits and n <= min(DENSE, probes * steps)):
        return _dense(A, shift, lower)
    P = deflated(A, deflate)
    _logarithms(P.values, 0.0, shift, lower, torch.finfo(A.dtype).eps)  # refuses before any product
    found = sample_chains(P, "logdet", probes, steps, seed, distribution, memory)
    return from_chains(found, n, P.dtype, atoms=P.values, shift=shift, lower=lower, distribution=distribution)


def _dense(A: Operator, shift: float, lower: float | None) -> LogdetEstimate:
    n = order(A)
    matrix = torch.empty(n, n, dtype=torch.float64)
    for start in range(0, n, _BLOCK):
        units = torch.zeros(n, min(_BLOCK, n - start), dtype=A.dtype, device=A.device)
        units[start : start + _BLOCK].fill_diagonal_(1.0)
        matrix[:, start : start + _BLOCK] = (A @ units).double().cpu()
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2).numpy()
    return from_eigenvalues(values, A.dtype, shift=shift, lower=lower)


def from_eigenvalues(
    values: Array, dtype: torch.dtype, *, shift: float = 0.0, lower: float | None = None
) -> LogdetEstimate:
    """Compute ln det(A + shift I) from all eigenvalues of A, shape (n,), ascending.

    Args:
        values: computed from products in `dtype`.
        dtype: whose rounding is in them.
        shift: as for `logdet`.
        lower: as for `logdet`.

    Raises:
        Refused: as `logdet`.
    """
    n, eps = len(values), torch.finfo(dtype).eps
    logs = _logarithms(values, 0.0, shift, lower, eps)
    rounding = math.sqrt(n) * eps * float(np.abs(values).max()) * float(np.linalg.norm(np.exp(-logs)))
    return LogdetEstimate(float(logs.sum()), rounding, float(values[0]), 0.0, "dense", n)


def from_chains(
    chains: Chains,
    n: int,
    dtype: torch.dtype,
    *,
    atoms: Array | None = None,
    shift: float = 0.0,
    lower: float | None = None,
    distribution: str = "gaussian",
) -> LogdetEstimate:
    """Estimate ln det(A + shift I) from chains that have been run; see `logdet`.

    Args:
        chains: from random start vectors in the space that is left when the atoms are taken out.
        n: order of A.
        dtype: of the chains' vectors.
        atoms: eigenvalues that were deflated, shape (r,).
        shift: as for `logdet`.
        lower: as for `logdet`.
        distribution: of the start vectors.

    Raises:
        Refused: as `logdet`.
    """
    values = np.zeros(0) if atoms is None else np.asarray(atoms, dtype=np.float64)
    n, eps = n - len(values), torch.finfo(dtype).eps
    rules, coarse = rules_of(chains, dtype)
    least = min(rules, key=lambda r: r.nodes[0])
    smallest, residual = float(least.nodes[0]), float(least.residual_norms[0])
    logs = [_logarithms(r.nodes, residual, shift, lower, eps) for r in rules]
    gauss = np.array([r.weights @ f for r, f in zip(rules, logs, strict=True)])
    # Kept clear of the smallest node, by more than rounding can move one.
    size = max(float(np.abs(r.nodes).max()) for r in rules)
    end = min(r.nodes[0] - r.residual_norms[0] for r in rules) if lower is None else lower
    end = min(end, smallest - 30 * eps * size)
    if end + shift > 0:
        other = np.array([_bounded(a, b, end, shift) for a, b in chains.rows()])
        middle, error = (gauss + other) / 2, np.abs(gauss - other) / 2
    else:
        short = [r.weights @ _logarithms(r.nodes, residual, shift, lower, eps) for r in coarse]
        middle, error = gauss, np.abs(gauss - short)
    sampling = _sampling_error(rules, logs, n) if distribution == "gaussian" else None
    if sampling is None:
        sampling = float(calibrated_stderr(n * middle))
    # The quadrature errs to one side in all chains: its error adds to the interval's half-width.
    quadrature = n * float(error.mean()) / _NORMAL
    rounding = 4 * eps * n * float(np.abs(middle).max())
    return LogdetEstimate(
        value=float(_logarithms(values, 0.0, shift, lower, eps).sum()) + n * float(middle.mean()),
        stderr=math.hypot(sampling, rounding) + quadrature,
        eigenvalue_min=min([smallest, *values.tolist()]),
        residual_norm=residual,
        method="lanczos",
        matvecs=int(chains.lengths.sum()),
    )


def _bounded(alpha: Array, beta: Array, end: float, shift: float) -> float:
    """Return the Gauss-Radau rule's value, a lower bound."""
    rule = radau(alpha, beta, end)
    return float(rule.weights @ np.log(np.maximum(rule.nodes, end) + shift))


def _sampling_error(rules: Sequence[Rule], logs: Sequence[Array], n: int) -> float:
    """Return the standard error of the mean for start vectors uniform on the sphere.

    With B = ln(A + σ) less its mean eigenvalue, a sample has the variance 2 tr B² n/(n + 2) and very nearly
    the skewness 8 tr B³ / (2 tr B²)^(3/2).
    """
    weights, f = np.concatenate([r.weights for r in rules]) / len(rules), np.concatenate(logs)
    centred = f - weights @ f
    second, third = n * float(weights @ centred**2), n * abs(float(weights @ centred**3))
    if second == 0.0:
        return 0.0
    skewness = min(8 * third / (2 * second) ** 1.5, math.sqrt(8)) / math.sqrt(len(rules))
    return math.sqrt(2 * second * n / (n + 2) / len(rules)) * _widening(skewness)


def _widening(skewness: float) -> float:
    """Return A/1.96, where A standard errors, themselves estimated, cover 95 % for a mean of skewness g.

    The variance is itself read from mean v·B²v, whose covariance with the error E of the mean v·Bv is 4 tr B³/k:
    given E it is σ²(1 + gE/2σ), exactly so for one eigenvalue. |E| <= A times its root is a quadratic
    inequality for Z = E/σ, which is of Pearson type III, and is to hold with probability 0.95.
    """
    if skewness < _SYMMETRIC:
        return 1.0
    from scipy import optimize, stats  # loading SciPy takes longer than many a measurement

    law = stats.pearson3(skewness)

    def excess(A: float) -> float:
        middle = A * A * skewness / 4
        reach = math.hypot(middle, A)
        return float(law.cdf(middle + reach) - law.cdf(middle - reach)) - 0.95

    return float(optimize.brentq(excess, 0.1, 40.0)) / _NORMAL


def _logarithms(values: Array, residual: float, shift: float, lower: float | None, eps: float) -> Array:
    """Return ln(λ + shift), where each is positive by more than rounding."""
    if len(values) == 0:
        return np.empty(0)
    if lower is not None:
        values = np.maximum(values, lower)
    least, size = float(values.min()), float(np.abs(values).max())
    rounding = 0.0 if lower is not None else eps * math.sqrt(len(values)) * size
    if not least + shift > rounding:
        raise Refused(
            f"A + {shift:g} I is not positive definite: lambda_min of A is at most {least:.6g} (residual "
            f"{residual:.1g}), so its log-determinant does not exist; take a shift above {-least:.6g}, or pass "
            "lower=0.0 if A is known to be positive semidefinite (a Gauss-Newton or Fisher matrix)"
        )
    return np.log(values + shift)
