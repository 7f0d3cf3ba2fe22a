"""The exponents with which unknowns follow nodes: a sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exponents:
    """The matrix B (unknowns, nodes) of s = B z, with s the unknowns' and z the nodes' log-scales.

    Attributes:
        shape: (unknowns, nodes).
        rows: the unknowns of its entries.
        columns: the nodes of its entries.
        values: its entries, float64.
    """

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    values: Tensor

    def times(self, z: Tensor) -> Tensor:
        """B z, of z (nodes,)."""
        made = torch.zeros(self.shape[0], dtype=torch.float64)
        return made.index_add_(0, self.rows, self.values * z[self.columns])

    def transposed_times(self, s: Tensor, power: int = 1) -> Tensor:
        """Bᵀ s, of s (unknowns,); with a power, of B's entries raised to it."""
        made = torch.zeros(self.shape[1], dtype=torch.float64)
        return made.index_add_(0, self.columns, self.values**power * s[self.rows])

    def only(self, nodes: Tensor) -> Exponents:
        """The same with the columns of other nodes emptied; `nodes` (nodes,) is a mask."""
        kept = nodes[self.columns]
        return Exponents(self.shape, self.rows[kept], self.columns[kept], self.values[kept])
