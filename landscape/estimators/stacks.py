"""Spectral norms of a stack of symmetric matrices, by Lanczos chains in lockstep, each with a stop of its own.

A stack is known by `shape` (N, d, d), `dtype`, `device`, `A @ V` for V (N, d, 1), and `A[index]`, the stack of
some of its matrices; a dense tensor is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

_SOONEST: Final = (
    4  # products before which a small residual may belong to an eigenvalue that is not the largest
)
_ROUNDING: Final = 10  # units in the last place of ‖A‖ that a residual is not asked to fall below


class Stack(Protocol):
    """Symmetric matrices that are known by their products."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, d, d)."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the vectors that it takes."""

    @property
    def device(self) -> torch.device:
        """Where these vectors live."""

    def __matmul__(self, other: Tensor, /) -> Tensor:
        """Return A_i v_i, (N, d, 1)."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return the stack of some of the matrices."""


@dataclass(frozen=True)
class Norms:
    """Eigenvalues of largest modulus of N matrices.

    Attributes:
        values: θ_i with its sign, (N,) float64; NaN where a product was not finite.
        residual_norms: ‖A_i v - θ_i v‖, within which an eigenvalue lies, (N,).
        converged: whether the tolerance was reached, (N,).
        matvecs: products that each took, (N,).
    """

    values: np.ndarray
    residual_norms: np.ndarray
    converged: np.ndarray
    matvecs: np.ndarray


def spectral_norms(A: Stack, start: Tensor, rtol: float = 1e-4, max_matvecs: int = 200) -> Norms:
    """The eigenvalue of largest modulus of each matrix of a stack, with its residual.

    Lanczos with full reorthogonalization. A chain ends where residual ≤ max(rtol |θ|, 10 eps ‖A‖) and the
    other end of its spectrum does not reach as far; products are then made with the others alone.

    Args:
        A: the matrices.
        start: start vectors, (N, d), or one for all, (d,); not zero.
        rtol: residual that is asked for, relative to the eigenvalue.
        max_matvecs: products after which a chain is given up.

    Source: Lanczos 1950 (doi 10.6028/jres.045.026); Parlett, The Symmetric Eigenvalue Problem, §13.2.

    >>> spectral_norms(torch.diag_embed(torch.tensor([[1.0, 2.0], [1.0, -3.0]])), torch.ones(2)).values.round(3)
    array([ 2., -3.])
    """
    found = _Found(A.shape[0])
    chains = _Chains(A, start)
    limit = min(max_matvecs, A.shape[1])
    while len(chains.index):
        chains.step()
        ended = chains.ended(rtol, limit)
        found.take(chains, ended, rtol)
        chains.drop(ended)
    return Norms(found.values, found.residuals, found.converged, found.matvecs)


class _Chains:
    """The chains that go on, all with the same number j of steps."""

    def __init__(self, A: Stack, start: Tensor):
        self.A, self.eps = A, float(torch.finfo(A.dtype).eps)
        count, size = A.shape[0], A.shape[1]
        rows = start.to(A.device, A.dtype).expand(count, size)
        self.index = np.arange(count)  # of the matrices in the whole stack
        self.place = torch.arange(count, device=A.device)  # of the matrices in A
        self.basis = _zeros(A, count, min(16, size + 1), size)
        self.basis[:, 0] = rows / rows.norm(dim=1, keepdim=True)
        self.alpha, self.beta = np.zeros((count, 0)), np.zeros((count, 0))

    @property
    def steps(self) -> int:
        return self.alpha.shape[1]

    def step(self) -> None:
        """One product with every matrix."""
        j = self.steps
        q = self.basis[:, j]
        whole = torch.zeros(*self.A.shape[:2], 1, dtype=self.A.dtype, device=self.A.device)
        whole[self.place, :, 0] = q
        w = (self.A @ whole)[self.place, :, 0]
        alpha = (q * w).sum(dim=1)
        Q = self.basis[:, : j + 1]
        for _ in range(2):  # "twice is enough" (Parlett, §6.9)
            w = w - (Q.transpose(1, 2) @ (Q @ w[..., None]))[..., 0]
        beta = w.norm(dim=1)
        self.alpha = np.column_stack([self.alpha, alpha.double().cpu().numpy()])
        self.beta = np.column_stack([self.beta, beta.double().cpu().numpy()])
        if j + 1 == self.basis.shape[1]:
            room = _zeros(self.A, len(w), min(j + 1, self.A.shape[1] - j), self.A.shape[1])
            self.basis = torch.cat([self.basis, room], dim=1)
        self.basis[:, j + 1] = w / torch.where(beta > 0, beta, 1.0)[:, None]

    def ended(self, rtol: float, limit: int) -> np.ndarray:
        """Which chains need not, or cannot, go on."""
        size, last = np.abs(self.alpha).max(axis=1), self.beta[:, -1]
        with np.errstate(invalid="ignore"):
            exhausted = last <= _ROUNDING * self.eps * np.maximum(size, self.beta.max(axis=1))
            # No residual exceeds the last β, and ‖A‖ is at least |α|.
            exhausted |= (last <= rtol * size) & (self.steps >= _SOONEST)
        exhausted = np.asarray(exhausted | ~np.isfinite(last + size))
        if self.steps >= limit:
            return np.ones(len(last), bool)
        if _tested(self.steps) and not exhausted.all():
            open_ = ~exhausted
            exhausted[open_] = self.tops(open_, rtol)[2]
        return exhausted

    def tops(self, which: np.ndarray, rtol: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """θ of largest modulus, its residual, and whether it has converged, for some chains."""
        alpha, beta = self.alpha[which], self.beta[which]
        count, j = alpha.shape
        T = np.zeros((count, j, j))
        T[:, range(j), range(j)] = alpha
        T[:, range(j - 1), range(1, j)] = T[:, range(1, j), range(j - 1)] = beta[:, :-1]
        values, vectors = np.linalg.eigh(T)
        residuals = beta[:, -1:] * np.abs(vectors[:, -1])
        ends = values[:, [0, -1]], residuals[:, [0, -1]]
        outer = np.abs(ends[0]).argmax(axis=1)
        rows = np.arange(count)
        theta, residual = ends[0][rows, outer], ends[1][rows, outer]
        allowed = np.maximum(rtol * np.abs(theta), _ROUNDING * self.eps * np.abs(theta))
        other = np.abs(ends[0][rows, 1 - outer]) + ends[1][rows, 1 - outer]
        settled = (other <= np.abs(theta)) | (ends[1][rows, 1 - outer] <= allowed)
        return theta, residual, (residual <= allowed) & settled

    def drop(self, ended: np.ndarray) -> None:
        """Go on without some chains; where less than half of the stack is left, with a stack of the rest."""
        if not ended.any():
            return
        stay = torch.from_numpy(~ended).to(self.place.device)
        self.index, self.alpha, self.beta = self.index[~ended], self.alpha[~ended], self.beta[~ended]
        self.place, self.basis = self.place[stay], self.basis[stay]
        if 0 < len(self.index) <= self.A.shape[0] // 2:
            self.A = self.A[self.place]
            self.place = torch.arange(len(self.index), device=self.place.device)


class _Found:
    """What is known of the whole stack."""

    def __init__(self, count: int):
        self.values, self.residuals = np.full(count, np.nan), np.full(count, np.nan)
        self.converged, self.matvecs = np.zeros(count, bool), np.zeros(count, np.int64)

    def take(self, chains: _Chains, ended: np.ndarray, rtol: float) -> None:
        """Write down the chains that have ended."""
        self.matvecs[chains.index[ended]] = chains.steps
        fine = ended & np.isfinite(chains.alpha).all(axis=1) & np.isfinite(chains.beta).all(axis=1)
        if fine.any():
            values, residuals, converged = chains.tops(fine, rtol)
            where = chains.index[fine]
            self.values[where], self.residuals[where], self.converged[where] = values, residuals, converged


def _zeros(A: Stack, *shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=A.dtype, device=A.device)


def _tested(steps: int) -> bool:
    """Whether all chains are looked at after so many products; eigenvalues of small matrices take time too."""
    return steps >= _SOONEST and steps % (2 if steps < 12 else 4 if steps < 48 else 16) == 0
