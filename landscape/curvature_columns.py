"""Columns of the loss's second derivative with respect to a model's outputs: Λ_i = Σ_c σ_ic s_ic s_icᵀ.

Three forms: cross-entropy in closed form, a diagonal, and eigenvectors. `landscape.output_curvature` finds
out which one a loss has. Outputs of a micro-batch stand as (N, m): N examples with m numbers each.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

# Stands in for a sum of probabilities that has underflowed; its terms are then zero too.
_TINY = torch.finfo(torch.float64).tiny


class Columns(ABC):
    """Λ of a micro-batch, as a product of columns."""

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of columns of an example."""

    @property
    @abstractmethod
    def present(self) -> list[bool]:
        """For each column, whether it is not zero in every example."""

    @abstractmethod
    def column(self, c: int) -> tuple[Tensor, Tensor | None]:
        """Column c of every example, (N, m), and its signs (N,), None where all are +1."""

    @abstractmethod
    def drawn(self, stream: torch.Generator) -> list[tuple[Tensor, int]]:
        """Pairs (Σ_c r_c s_c over the columns of one sign, that sign), r random signs; each part (N, m)."""


@dataclass(frozen=True)
class CrossEntropy(Columns):
    """Λ = κ (diag p − p pᵀ) at each position, p = softmax(f).

    With q_c = Σ_{j ≥ c} p_j, column c of C − 1 is √(κ p_c q_{c+1} / q_c) (e_c − Σ_{j > c} (p_j / q_{c+1}) e_j): the
    Cholesky factor of the covariance of a multinomial (Tanabe & Sagae 1992, doi
    10.1111/j.2517-6161.1992.tb01875.x). No difference of nearly equal numbers occurs, however sure the model is.

    Attributes:
        p: probabilities (N, k, C, D), k·D positions per example, float64.
        kappa: (N, k, D), float64.
        dtype: of the columns.
    """

    p: Tensor
    kappa: Tensor
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """C − 1 per position."""
        return self.kappa[0].numel() * (self.p.shape[2] - 1)

    @functools.cached_property
    def present(self) -> list[bool]:
        """Whether a class at a position has weight in any example."""
        some = (self._lengths[0] > 0).any(0)  # k, C - 1, D
        return [bool(b) for b in some.transpose(1, 2).flatten()]

    @functools.cached_property
    def _lengths(self) -> tuple[Tensor, Tensor]:
        """√(κ p_c q_{c+1} / q_c), the head of a column, and the same divided by q_{c+1}, (N, k, C − 1, D)."""
        tails = self.p.flip(2).cumsum(2).flip(2)  # q
        share = self.p[:, :, :-1] / tails[:, :, :-1].clamp(min=_TINY)
        heads = (self.kappa[:, :, None] * share * tails[:, :, 1:]).sqrt()
        return heads, heads / tails[:, :, 1:].clamp(min=_TINY)

    def column(self, c: int) -> tuple[Tensor, Tensor | None]:
        """One class at one position."""
        _, _, classes, places = self.p.shape
        position, label = divmod(c, classes - 1)
        row, place = divmod(position, places)
        heads, below = (t[:, row, label, place] for t in self._lengths)
        made = torch.zeros(self.p.shape, dtype=self.dtype, device=self.p.device)
        made[:, row, label, place] = heads
        made[:, row, label + 1 :, place] = self.p[:, row, label + 1 :, place] * -below[:, None]
        return made.flatten(1), None

    def drawn(self, stream: torch.Generator) -> list[tuple[Tensor, int]]:
        """A random sign per position and class but the last."""
        heads, below = self._lengths
        r = _signs(stream, heads, heads)
        made = torch.zeros_like(self.p)
        made[:, :, :-1] = heads * r
        made[:, :, 1:] -= self.p[:, :, 1:] * (below * r).cumsum(2)
        return [(made.flatten(1).to(self.dtype), 1)]


@dataclass(frozen=True)
class Diagonal(Columns):
    """Λ = diag(d): the loss is a sum over outputs.

    Attributes:
        d: (N, m).
    """

    d: Tensor

    @property
    def count(self) -> int:
        """One per output."""
        return self.d.shape[1]

    @property
    def present(self) -> list[bool]:
        """Whether an output is bent in any example."""
        return [bool(b) for b in (self.d != 0).any(0)]

    def column(self, c: int) -> tuple[Tensor, Tensor | None]:
        """One output."""
        made = torch.zeros_like(self.d)
        made[:, c] = self.d[:, c].abs().sqrt()
        return made, _sign_or_none(self.d[:, c])

    def drawn(self, stream: torch.Generator) -> list[tuple[Tensor, int]]:
        """A random sign per output."""
        r = _signs(stream, self.d, self.d)
        parts = [((self.d * sign).clamp(min=0).sqrt() * r, sign) for sign in (1, -1)]
        return [(part, sign) for part, sign in parts if part.any()]


@dataclass(frozen=True)
class Dense(Columns):
    """Λ = Σ_c λ_c u_c u_cᵀ by eigendecomposition.

    Attributes:
        eigenvalues: (N, r), largest magnitude first.
        vectors: u √|λ|, (N, m, r).
    """

    eigenvalues: Tensor
    vectors: Tensor

    @property
    def count(self) -> int:
        """The rank."""
        return self.eigenvalues.shape[1]

    @property
    def present(self) -> list[bool]:
        """All: they were counted so."""
        return [True] * self.count

    def column(self, c: int) -> tuple[Tensor, Tensor | None]:
        """One eigenvector."""
        return self.vectors[:, :, c].contiguous(), _sign_or_none(self.eigenvalues[:, c])

    def drawn(self, stream: torch.Generator) -> list[tuple[Tensor, int]]:
        """A random sign per eigenvector."""
        r = _signs(stream, self.eigenvalues, self.vectors)
        found = []
        for sign in (1, -1):
            chosen = r * (self.eigenvalues * sign > 0)
            if chosen.any():
                found.append(((self.vectors @ chosen[..., None])[..., 0], sign))
        return found


def _signs(stream: torch.Generator, shape: Tensor, like: Tensor) -> Tensor:
    bits = torch.randint(0, 2, shape.shape, generator=stream, dtype=torch.int8)
    return (2 * bits - 1).to(like)


def _sign_or_none(values: Tensor) -> Tensor | None:
    return None if (values >= 0).all() else values.sign()
