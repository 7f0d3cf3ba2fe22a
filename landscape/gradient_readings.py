"""What is read off per-example gradients: sums of their squares, norms of each example, norms of their images.

A reading is given the gradients of a micro-batch's examples for K cotangents each, with signs, and returns what
adds up: Σ_ik σ_ik r(∇_ik). From the columns of the loss's curvature (`landscape.ggn_passes`) follow with it the
diagonal of the Gauss-Newton matrix G, and traces of Lᵀ G L.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from landscape.example_norms import squares
from landscape.linear_maps import Map
from landscape.uses import Outer, Use


class Reading(ABC):
    """What is read off per-example gradients and added up."""

    @abstractmethod
    def of_gradients(self, index: int, gradients: Tensor, signs: Tensor) -> Any:
        """Σ σ r(∇) of parameter tensor `index`, from gradients (N, K, *shape) and signs (N, K)."""

    @abstractmethod
    def of_rows(self, index: int, left: Tensor, right: Tensor, signs: Tensor) -> Any:
        """The same where gradients are outer products, of left (N, K, O) and right (N, I); shape (O, I)."""

    def of_uses(
        self, index: int, uses: Sequence[Use], g: Sequence[Sequence[Tensor]], signs: Tensor, memory: int
    ) -> Any:
        """The same from all uses of the tensor, and for each the K output gradients.

        Args:
            index: number of the parameter tensor.
            uses: all its uses.
            g: for each use, the K output gradients.
            signs: (N, K).
            memory: bytes that explicit gradients may take.
        """
        if len(uses) == 1 and isinstance(uses[0], Outer) and _one_row(uses[0]):
            right = uses[0].right(0, uses[0].examples)[:, 0, :, 0]
            left = torch.stack([uses[0].left(one, 0, uses[0].examples)[:, 0, :, 0] for one in g[0]], 1)
            return self.of_rows(index, left, right, signs)
        total: Any = 0.0
        for rows, columns in _steps(uses[0], len(g[0]), g[0][0].element_size(), memory):
            gradients = uses[0].gradients(g[0][columns], rows.start, rows.stop)
            for use, one in zip(uses[1:], g[1:], strict=True):
                gradients += use.gradients(one[columns], rows.start, rows.stop)
            total = total + self.of_gradients(index, gradients, signs[rows, columns])
        return total

    def placed(self, read: Any, position: int, count: int) -> Any:  # noqa: ARG002
        """What was read off a single example, `position` of `count`, as it adds up with the others'."""
        return read


class ExampleNorms(Reading):
    """Σ_k σ_ik ‖∇_ik‖² of each example i, float64 (N,)."""

    def of_gradients(self, index: int, gradients: Tensor, signs: Tensor) -> Tensor:  # noqa: ARG002
        """As the class says."""
        return (gradients.flatten(2).square().sum(2).double() * signs).sum(1)

    def of_rows(self, index: int, left: Tensor, right: Tensor, signs: Tensor) -> Tensor:  # noqa: ARG002
        """Without forming the gradients."""
        return (left.square().sum(2).double() * right.square().sum(1, keepdim=True).double() * signs).sum(1)

    def of_uses(
        self,
        index: int,  # noqa: ARG002
        uses: Sequence[Use],
        g: Sequence[Sequence[Tensor]],
        signs: Tensor,
        memory: int,
    ) -> Tensor:
        """By the rules for norms."""
        return (squares(uses, g, memory).double() * signs).sum(1)

    def placed(self, read: Tensor, position: int, count: int) -> Tensor:
        """In its place, zero elsewhere."""
        found = read.new_zeros(count)
        found[position] = read[0]
        return found


class Squares(Reading):
    """Σ σ ∇², entry by entry, float64."""

    def of_gradients(self, index: int, gradients: Tensor, signs: Tensor) -> Tensor:  # noqa: ARG002
        """As the class says, of the tensor's shape."""
        squared = gradients.square()
        weights = signs.reshape(-1).to(squared)
        return (weights @ squared.reshape(len(weights), -1)).view(gradients.shape[2:]).double()

    def of_rows(self, index: int, left: Tensor, right: Tensor, signs: Tensor) -> Tensor:  # noqa: ARG002
        """(σ g²)ᵀ a²: the K columns are added up first."""
        weighed = (left.square() * signs[:, :, None].to(left)).sum(1)
        return (weighed.T @ right.square()).double()


class MappedNorms(Reading):
    """Σ σ ‖Lᵀ∇‖² for a linear map L of each parameter tensor.

    Args:
        maps: one for each parameter tensor.
    """

    def __init__(self, maps: Sequence[Map]):
        self.maps = maps

    def of_gradients(self, index: int, gradients: Tensor, signs: Tensor) -> float:
        """As the class says."""
        images = self.maps[index].pull(gradients.reshape(*signs.shape, -1))
        return float((torch.linalg.vector_norm(images, dim=-1).double().square() * signs).sum())

    def of_rows(self, index: int, left: Tensor, right: Tensor, signs: Tensor) -> float:
        """Without forming the gradients."""
        return float(self.maps[index].outer_norms(left, right, signs))


def _one_row(use: Outer) -> bool:
    """Whether each example has one row, of a matrix that stands as (O, I)."""
    return (
        not use.transposed
        and use.name == "matrix product"
        and math.prod(use.input.shape[:-1]) == use.examples
    )


def _steps(use: Use, K: int, width: int, memory: int) -> Iterator[tuple[slice, slice]]:
    """Examples and columns whose gradients, and as much again, fit into the memory; at least one of each."""
    fit = max(1, memory // (2 * math.prod(use.shape) * width))
    columns = min(K, fit)
    step = max(1, fit // columns)
    for lo in range(0, use.examples, step):
        for first in range(0, K, columns):
            yield slice(lo, min(lo + step, use.examples)), slice(first, min(first + columns, K))
