"""Linear maps P that bend uniform directions towards flat ones, of determinant 1.

P ∝ A^(-1/2) would turn the ellipsoid of a quadratic loss with curvature A into a ball. Any positive P gives
unbiased estimates with the weight ‖P u‖^(-D), so an estimate of A is good enough, and a part of it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from landscape import ggn_diagonal, operators, seeds
from landscape.errors import Refused
from landscape.estimators.eigen import eigsh

if TYPE_CHECKING:
    from landscape.problem import Problem

SAMPLES: Final = 16
"""Samples of the Gauss-Newton diagonal, and probes of the mean curvature beside the eigenvectors."""
_RTOL = 1e-6  # of eigenpairs: their directions enter to the power D


@dataclass(frozen=True)
class Preconditioner:
    """P = diag(exp s) (I + U (diag(exp f) - I) Uᵀ), det P = 1.

    Attributes:
        scale: s, (n,); None for zeros.
        vectors: U, orthonormal columns (n, k); None for none.
        factors: f, (k,).
    """

    scale: Tensor | None = None
    vectors: Tensor | None = None
    factors: Tensor | None = None

    def direction(self, u: Tensor) -> tuple[Tensor, float]:
        """Return v = P u / ‖P u‖ and the logarithm of the weight, -D ln(‖P u‖ / ‖u‖).

        Args:
            u: of any length but 0, (n,), float64.
        """
        made = u
        if self.vectors is not None and self.factors is not None:
            made = made + self.vectors @ (torch.expm1(self.factors) * (self.vectors.T @ made))
        if self.scale is not None:
            made = made * self.scale.exp()
        length = float(made.norm())
        weight = 0.0 if made is u else -len(u) * math.log(length / float(u.norm()))
        return made / length, weight


def from_diagonal(diagonal: Tensor, damping: float) -> Preconditioner:
    """Take p_i ∝ (d_i + damping · mean d)^(-1/2).

    Args:
        diagonal: of a curvature matrix, (n,); what is negative counts as 0.
        damping: > 0.

    Raises:
        Refused: if no entry is positive.
    """
    wide = diagonal.double().clamp(min=0)
    mean = float(wide.mean())
    if not (mean > 0 and math.isfinite(mean)):
        raise Refused(
            f"the diagonal of the curvature matrix has the mean {mean:g}; a preconditioner needs a positive one. "
            "Take preconditioner='none'"
        )
    logs = -0.5 * (wide / mean + damping).log()
    return Preconditioner(scale=logs - logs.mean())


def from_eigenpairs(values: np.ndarray, vectors: Tensor, rest: float, damping: float) -> Preconditioner:
    """Take P ∝ (λ + damping · mean λ)^(-1/2) along eigenvectors, and the same for the mean curvature across.

    Args:
        values: λ, (k,).
        vectors: orthonormal columns, (n, k).
        rest: mean curvature across all of them; NaN where they span everything.
        damping: > 0; what is negative counts as 0.

    Raises:
        Refused: if no eigenvalue is positive.
    """
    top = float(np.max(values))
    if not (top > 0 and math.isfinite(top)):
        raise Refused(
            f"the largest eigenvalue is {top:g}; a preconditioner needs a positive one. "
            "Take preconditioner='none', or curvature='ggn'"
        )
    size, count = vectors.shape
    values, rest = np.maximum(values, 0.0), 0.0 if size == count else max(rest, 0.0)
    added = damping * (float(values.sum()) + (size - count) * rest) / size
    logs = -0.5 * np.log(values + added)
    across = 0.0 if size == count else -0.5 * math.log(rest + added)
    factors = torch.from_numpy(logs - across)
    # det P = 1: the sum of all n logarithms is 0
    level = -float(factors.sum()) / size
    scale = torch.full((size,), level, dtype=torch.float64)
    return Preconditioner(scale, vectors.double().cpu(), factors)


def ggn(problem: Problem, damping: float, seed: int) -> Preconditioner:
    """Build P from the Gauss-Newton diagonal, estimated by `SAMPLES` samples."""
    streams = [seeds.generator(seed, "volume/diagonal", i) for i in range(SAMPLES)]
    return from_diagonal(ggn_diagonal.sampled(problem, streams), damping)


def eigenvectors(problem: Problem, curvature: str, top: int, damping: float, seed: int) -> Preconditioner:
    """Build P from the largest eigenpairs of a curvature matrix, and its mean across them by probes."""
    A = operators.named(problem, curvature)
    pairs = eigsh(A, min(top, A.shape[0]), rtol=_RTOL, seed=seed)
    vectors = pairs.vectors.double().cpu()
    rest = math.nan
    if vectors.shape[1] < A.shape[0]:
        streams = [seeds.generator(seed, "volume/rest", i) for i in range(SAMPLES)]
        probes = torch.stack([torch.randn(A.shape[0], generator=g, dtype=torch.float64) for g in streams], 1)
        probes -= vectors @ (vectors.T @ probes)
        made = (A @ probes.to(A.device, A.dtype)).double().cpu()
        rest = float((probes * made).sum() / probes.square().sum())
    return from_eigenpairs(pairs.values.double().cpu().numpy(), vectors, rest, damping)
