"""The loss of an example as a function of its input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landscape import batches as batching
from landscape import products, vectors
from landscape.errors import Refused
from landscape.problem import Problem


@dataclass(frozen=True)
class ExampleLoss:
    """ℓ(x), the loss of one example as a batch of one, as a function of the numbers x of its input.

    The numbers are those of the input's floating-point tensors, one after the other, each C-contiguous.

    Attributes:
        problem: model and loss; parameters are fixed.
        piece: the example, a batch of one.
    """

    problem: Problem
    piece: Any

    @property
    def inputs(self) -> list[Tensor]:
        """The floating-point tensors of the input."""
        return input_part(self.problem, self.piece)

    @property
    def size(self) -> int:
        """How many numbers x has."""
        return sum(t.numel() for t in self.inputs)

    def hvp(self, V: Tensor) -> Tensor:
        """∇²ℓ(x) V for one vector (d,) or a block (d, k).

        Raises:
            ValueError: if V does not have d rows.
        """
        space = vectors.ParameterSpace({str(i): t for i, t in enumerate(self.inputs)})
        rows = vectors.aligned_pieces(V.to(self.problem.device, self.problem.dtype), space)
        with self.problem.session(), self.problem.evaluator.twice_differentiable():
            columns = [space.flatten(_filled(result, self.inputs)) for result in self._products(rows)]
        self.problem.cost.matvecs += len(columns)
        return columns[0] if V.ndim == 1 else torch.stack(columns, dim=1)

    def _products(self, rows: list[list[Tensor]]) -> Iterator[products.Optional]:
        leaves = {id(t): t.detach().requires_grad_() for t in self.inputs}
        piece = batching.tree_map(lambda t: leaves.get(id(t), t), self.piece)
        with self.problem.filled(self.problem.leaves()):
            loss = self.problem.evaluator.loss_of(piece)
            graph = products.HessianGraph(loss, list(leaves.values()))
            yield from graph.products(rows)


def example_loss(problem: Problem, index: int) -> ExampleLoss:
    """The loss of one example as a function of its input.

    Args:
        problem: on whatever data.
        index: of the example, in the order of the data.

    Raises:
        IndexError: if there are fewer examples.
        Refused: if its input has no floating-point number (token ids), or nobody says which part of a batch
            is the input (`forward=` with batches that are no pairs).
    """
    seen = 0
    for batch in problem.batches:
        count = batching.examples(batch)
        if 0 <= index - seen < count:
            # Copies, so that each tensor of the example is an object of its own.
            one = batching.tree_map(torch.clone, batching.cut(batch, index - seen, index - seen + 1))
            found = ExampleLoss(problem, one)
            if not found.inputs:
                raise Refused(
                    "the input has no floating-point tensor (token ids?), so that the loss has no derivative with "
                    "respect to it"
                )
            return found
        seen += count
    raise IndexError(f"example {index} was asked for; allowed is 0 to {seen - 1}")


def input_part(problem: Problem, piece: Any) -> list[Tensor]:
    """The floating-point tensors of a batch from which the target is not made.

    Args:
        problem: the problem.
        piece: a batch in which each tensor is an object of its own.

    Raises:
        Refused: if nobody says which part of a batch is the input.
    """
    if not problem.evaluator.has_outputs:
        if isinstance(piece, tuple | list) and len(piece) == 2:
            return [t for t in batching.tensors(piece[0]) if t.is_floating_point()]
        raise Refused(
            f"a batch is a {type(piece).__name__}, expected a pair (input, target): with forward= nothing else says "
            "which part of it is the input"
        )
    floating = [t for t in batching.tensors(piece) if t.is_floating_point()]
    leaves = {id(t): t.detach().requires_grad_() for t in floating}
    with torch.enable_grad():
        target = problem.evaluator.target_of(batching.tree_map(lambda t: leaves.get(id(t), t), piece))
        made = [t.sum() for t in batching.tensors(target) if t.requires_grad]
    if not made:
        return floating
    slopes = torch.autograd.grad(made, list(leaves.values()), allow_unused=True)
    return [t for t, slope in zip(floating, slopes, strict=True) if slope is None]


def _filled(found: products.Optional, like: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, like, strict=True)]
