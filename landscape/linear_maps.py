"""Linear maps L into the space of one parameter tensor, and of all of them: traces of Lᵀ A L are made with these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Block = Callable[[Tensor], Tensor]


class Map(ABC):
    """A linear map L from vectors of `size` numbers to flat parameter tensors of n numbers."""

    @property
    @abstractmethod
    def size(self) -> int:
        """m, the number of columns of L."""

    @abstractmethod
    def push(self, z: Tensor) -> Tensor:
        """L z for each z, (..., m) -> (..., n)."""

    @abstractmethod
    def pull(self, y: Tensor) -> Tensor:
        """Lᵀ y for each y, (..., n) -> (..., m)."""

    @abstractmethod
    def outer_norms(self, left: Tensor, right: Tensor, signs: Tensor) -> Tensor:
        """Σ_ik σ_ik ‖Lᵀ(g_ik a_iᵀ)‖² for tensors of shape (O, I), without forming the outer products.

        Args:
            left: g, (N, K, O).
            right: a, (N, I).
            signs: σ, (N, K).
        """


@dataclass(frozen=True, eq=False)
class Scale(Map):
    """L = diag(w).

    Attributes:
        factors: w, (n,).
    """

    factors: Tensor

    @property
    def size(self) -> int:
        """As many as parameters."""
        return self.factors.numel()

    def push(self, z: Tensor) -> Tensor:
        """W ⊙ z."""
        return z * self.factors

    def pull(self, y: Tensor) -> Tensor:
        """W ⊙ y."""
        return y * self.factors

    def outer_norms(self, left: Tensor, right: Tensor, signs: Tensor) -> Tensor:
        """g² W² a², the K columns added up first."""
        squared = (left.square() * signs[:, :, None].to(left)).sum(1)
        W = self.factors.reshape(squared.shape[1], right.shape[1])
        return ((squared @ W.square()) * right.square()).sum(dtype=torch.float64)


class Rows(Map):
    """L: Z -> F Z, one F for each group of rows, with F Fᵀ = W Wᵀ for the matrix W of a parameter tensor.

    tr Lᵀ A L is then Σ_{s,s'} ⟨w_s, w_s'⟩ tr A_{s,s'} over the rows w_s of W, those of one group.

    Args:
        tensor: the parameter tensor.
        axis: which of its axes counts rows.
        groups: of rows; each stands on its own inputs.
    """

    def __init__(self, tensor: Tensor, axis: int = 0, groups: int = 1):
        self._shape, self._axis, self._groups = tensor.shape, axis, groups
        W = self._matrices(tensor.reshape(-1))  # groups, rows, columns
        rows, self._columns = W.shape[1:]
        # Where there are fewer rows than columns, F is the triangular factor of W = F Q: as few columns as may be.
        self._F = torch.linalg.qr(W.mT).R.mT.contiguous() if rows < self._columns else W

    @property
    def size(self) -> int:
        """Groups times columns of F times columns of W."""
        return self._F.shape[0] * self._F.shape[2] * self._columns

    def push(self, z: Tensor) -> Tensor:
        """F Z."""
        Z = z.reshape(*z.shape[:-1], self._groups, self._F.shape[2], self._columns)
        moved = (self._F @ Z).flatten(-3, -2)  # rows first, then all other axes
        front = [size for i, size in enumerate(self._shape) if i != self._axis]
        whole = moved.reshape(*z.shape[:-1], self._shape[self._axis], *front)
        return whole.movedim(z.ndim - 1, z.ndim - 1 + self._axis).reshape(*z.shape[:-1], -1)

    def pull(self, y: Tensor) -> Tensor:
        """Fᵀ Y."""
        return (self._F.mT @ self._matrices(y)).flatten(-3)

    def outer_norms(self, left: Tensor, right: Tensor, signs: Tensor) -> Tensor:
        """‖Fᵀg‖² ‖a‖²."""
        squared = (torch.linalg.vector_norm(left @ self._F[0], dim=-1).square() * signs.to(left)).sum(1)
        total: Tensor = (squared * torch.linalg.vector_norm(right, dim=-1).square()).sum(dtype=torch.float64)
        return total

    def _matrices(self, y: Tensor) -> Tensor:
        """Flat tensors (..., n) as (..., groups, rows, columns)."""
        lead = y.shape[:-1]
        whole = y.reshape(*lead, *self._shape).movedim(len(lead) + self._axis, len(lead))
        rows = self._shape[self._axis] // self._groups
        return whole.reshape(*lead, self._groups, rows, -1)


@dataclass(frozen=True, eq=False)
class Maps:
    """L = blockdiag(L_1, ..., L_t), a map for each parameter tensor.

    Attributes:
        each: the maps, in the order of the parameter tensors.
    """

    each: Sequence[Map]

    @property
    def size(self) -> int:
        """The number of columns of L."""
        return sum(one.size for one in self.each)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Which columns belong to which parameter tensor."""
        ends = [sum(one.size for one in self.each[: i + 1]) for i in range(len(self.each))]
        return [(end - one.size, end) for one, end in zip(self.each, ends, strict=True)]

    def push(self, Z: Tensor) -> Tensor:
        """L Z for a block of columns, (m, k) -> (n, k)."""
        parts = zip(self.each, torch.split(Z, [one.size for one in self.each]), strict=True)
        return torch.cat([one.push(z.T).T for one, z in parts])

    def pull(self, Y: Tensor, sizes: Sequence[int]) -> Tensor:
        """Lᵀ Y for a block of columns, (n, k) -> (m, k); `sizes` of the parameter tensors."""
        parts = zip(self.each, torch.split(Y, list(sizes)), strict=True)
        return torch.cat([one.pull(y.T).T for one, y in parts])
