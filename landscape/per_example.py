"""Squared norms of per-example gradients for parameters that no rule covers: vectorized, else one by one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from landscape import batches as batching

if TYPE_CHECKING:
    from landscape.problem import Problem

# What a model may raise under torch.vmap because it cannot be vectorized. Its own errors come again, one by one.
_NOT_VECTORIZED = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError)


class PerExample:
    """Per-example gradients by differentiating the whole model.

    Args:
        problem: the problem.
        memory: bytes for the gradients of a chunk of examples.
    """

    def __init__(self, problem: Problem, memory: int):
        self.problem, self.memory = problem, memory
        self._vectorized: bool | None = None

    @property
    def name(self) -> str:
        """How it is done."""
        return "per example (vectorized)" if self._vectorized else "per example"

    def squares(
        self, pieces: Sequence[Any], chosen: Sequence[int], heads: Sequence[int], cotangents: Tensor
    ) -> Tensor:
        """Squared norms of ∂⟨s_k, f_i⟩/∂w for each chosen parameter tensor w, (parameters, N, K).

        Args:
            pieces: the examples; one entry may also be a whole micro-batch whose examples are not told apart.
            chosen: numbers of the parameter tensors.
            heads: which tensors of the outputs depend on parameters.
            cotangents: s, (N, K, m).
        """
        if self._vectorized is not False and len(pieces) > 1:
            try:
                found = self._by_vmap(pieces, chosen, heads, cotangents)
            except _NOT_VECTORIZED:
                self._vectorized = False
            else:
                if self._vectorized is None:
                    first = self._one(pieces[0], chosen, heads, cotangents[0])
                    self._vectorized = _agree(first, found[:, 0])
                if self._vectorized:
                    return found
        made = [self._one(p, chosen, heads, s) for p, s in zip(pieces, cotangents, strict=True)]
        return torch.stack(made, 1)

    def gradients(
        self, piece: Any, chosen: Sequence[int], heads: Sequence[int], cotangents: Tensor
    ) -> list[Tensor]:
        """∂⟨s_k, f⟩/∂w of one example for each chosen parameter tensor w, (K, *shape); arguments as `squares`."""
        leaves = self.problem.leaves()
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(index in chosen)
        wanted = [leaves[i] for i in chosen]
        with self.problem.filled(leaves):
            nest = batching.tensors(self.problem.evaluator.outputs(piece))
            outputs = torch.cat([nest[i].reshape(-1) for i in heads])
        found = [leaf.new_zeros(len(cotangents), *leaf.shape) for leaf in wanted]
        if not outputs.requires_grad:
            return found
        for k, s in enumerate(cotangents):
            slopes = torch.autograd.grad(outputs, wanted, s.to(outputs), retain_graph=True, allow_unused=True)
            for rows, slope in zip(found, slopes, strict=True):
                if slope is not None:
                    rows[k] = slope
        return found

    def _one(self, piece: Any, chosen: Sequence[int], heads: Sequence[int], cotangents: Tensor) -> Tensor:
        """Squared norms of one example by plain autograd, (parameters, K)."""
        slopes = self.gradients(piece, chosen, heads, cotangents)
        norms = [torch.stack([slope.norm() ** 2 for slope in rows]) for rows in slopes]
        return torch.stack(norms).to(cotangents)

    def _by_vmap(
        self, pieces: Sequence[Any], chosen: Sequence[int], heads: Sequence[int], cotangents: Tensor
    ) -> Tensor:
        """All examples at once, as far as the memory goes."""
        fixed = [leaf.detach() for leaf in self.problem.leaves()]
        wanted = [fixed[i] for i in chosen]
        parts = [batching.tensors(piece) for piece in pieces]
        rows = [torch.stack(column) for column in zip(*parts, strict=True)]  # each with one row per example

        def one(example: list[Tensor], s: Tensor) -> tuple[Tensor, ...]:
            def outputs(*inserted: Tensor) -> Tensor:
                held = list(fixed)
                for index, tensor in zip(chosen, inserted, strict=True):
                    held[index] = tensor
                rest = iter(example)
                with self.problem.filled(held):
                    nest = self.problem.evaluator.outputs(batching.tree_map(lambda _: next(rest), pieces[0]))
                found = batching.tensors(nest)
                return torch.cat([found[i].reshape(-1) for i in heads])

            pull = torch.func.vjp(outputs, *wanted)[1]
            slopes = torch.vmap(pull)(s)
            return tuple(slope.flatten(1).square().sum(1) for slope in slopes)

        size = cotangents.shape[1] * sum(w.numel() * w.element_size() for w in wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a loop inside vmap is slow, and that is all the warning says
            whole = torch.vmap(one, chunk_size=max(1, self.memory // max(1, size)))
            return torch.stack(whole(rows, cotangents.to(wanted[0].dtype)))


def _agree(a: Tensor, b: Tensor) -> bool:
    allowed = math.sqrt(torch.finfo(a.dtype).eps)
    return float((a - b).norm()) <= allowed * float(a.norm())
