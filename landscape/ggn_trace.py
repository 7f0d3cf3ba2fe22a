"""The exact trace of the generalized Gauss-Newton matrix, and of its diagonal block per parameter tensor.

G = (1/W) Σ_i J_iᵀ Λ_i J_i with J_i = ∂f_i/∂θ, Λ_i = ∂²ℓ_i/∂f_i² = Σ_c σ_ic s_ic s_icᵀ and W the sum of weights, so

    tr G_ll = (1/W) Σ_i Σ_c σ_ic ‖J_i,lᵀ s_ic‖² :

sums of squared norms of per-example gradients. Column c of all examples of a micro-batch goes through one
backward pass that ends at the outputs of the layers; the norms follow from the layers' inputs and output
gradients (`landscape.uses`). What no rule covers is differentiated per example.

`sampled` estimates the same numbers with random signs over the columns, at one backward pass a sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from landscape import stages
from landscape.curvature_columns import CrossEntropy
from landscape.ggn_passes import Passes, columns_of, examples_of, few_of, outputs_of
from landscape.gradient_readings import MappedNorms, Squares
from landscape.linear_maps import Map
from landscape.output_curvature import Outputs

if TYPE_CHECKING:
    from landscape.problem import Problem

# Enough for the output gradients of all columns of a few images.
MEMORY = 1 << 28
_STAGE = 16  # batches that an interruption may lose


@dataclass(frozen=True)
class BlockTraces:
    """Traces of the diagonal blocks of the Gauss-Newton matrix.

    Attributes:
        names: of the parameter tensors.
        blocks: trace of each one's diagonal block, float64.
        rules: how each was made: a layer's rule, "per example (vectorized)", "per example", or "unused".
        columns: the most columns of an example.
        passes: backward passes, in units of all data.
    """

    names: list[str]
    blocks: np.ndarray
    rules: list[str]
    columns: int
    passes: float

    @property
    def trace(self) -> float:
        """The trace of the whole matrix."""
        return float(self.blocks.sum())


def exact(problem: Problem, *, memory: int = MEMORY) -> BlockTraces:
    """Compute tr G and the trace of each parameter tensor's diagonal block without sampling.

    Args:
        problem: with outputs; examples must not influence one another.
        memory: bytes for output gradients and for explicit per-example gradients, each.

    Raises:
        Refused: on a problem with `forward=`; or if the loss couples examples, or has an unknown form and
            more than 4096 outputs per example.
    """
    problem.require_outputs("the exact trace of the generalized Gauss-Newton matrix")
    with problem.session():
        return _exact(Passes(problem, memory))


def by_batch(
    problem: Problem, batches: Iterable[Any], *, memory: int = MEMORY
) -> tuple[np.ndarray, np.ndarray]:
    """Compute what `exact` averages, batch by batch.

    Args:
        problem: as for `exact`.
        batches: some of its batches.
        memory: as for `exact`.

    Returns:
        Sums over the terms of each batch, float64 (batches, parameter tensors), and the batches' weights;
        the blocks' traces are Σ sums / Σ weights.

    Raises:
        Refused: as `exact`.
    """
    problem.require_outputs("the exact trace of the generalized Gauss-Newton matrix")
    with problem.session():
        sums, weights = Passes(problem, memory).over(batches)
        return np.array(sums), weights


def averaged(problem: Problem, maps: Sequence[Map] | None = None) -> np.ndarray:
    """Compute the traces of the diagonal blocks of G, or of Lᵀ G L, a few batches at a time.

    Each few batches are a stage of the work at hand: interrupted, it goes on with those that are left.

    Args:
        problem: as for `exact`.
        maps: L, one for each parameter tensor; by default the identity.

    Returns:
        float64 (parameter tensors,).

    Raises:
        Refused: as `exact`.
    """
    batches = iter(problem.batches)
    found: list[dict[str, np.ndarray]] = []
    while few := list(itertools.islice(batches, _STAGE)):

        def some(few: list[Any] = few) -> dict[str, np.ndarray]:
            made = by_batch(problem, few) if maps is None else mapped_by_batch(problem, few, maps)
            return dict(zip(("sums", "weights"), made, strict=True))

        found.append(stages.kept(some))
    sums, weights = (np.concatenate([part[name] for part in found]) for name in ("sums", "weights"))
    return np.asarray(sums.sum(axis=0) / weights.sum())


def mapped_by_batch(
    problem: Problem, batches: Iterable[Any], maps: Sequence[Map], *, memory: int = MEMORY
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the traces of Lᵀ G L as `by_batch` those of G, L = blockdiag of a map for each parameter tensor.

    Args:
        problem: as for `exact`.
        batches: some of its batches.
        maps: L, one for each parameter tensor.
        memory: as for `exact`.

    Returns:
        As `by_batch`.

    Raises:
        Refused: as `exact`.
    """
    problem.require_outputs("the exact trace of the generalized Gauss-Newton matrix")
    with problem.session():
        sums, weights = Passes(problem, memory, MappedNorms(maps)).over(batches)
        return np.array(sums), weights


def diagonal_by_batch(
    problem: Problem, batches: Iterable[Any], *, memory: int = MEMORY
) -> tuple[Tensor, float]:
    """Compute the diagonal of G without sampling, summed over some batches.

    Args:
        problem: as for `exact`.
        batches: some of its batches.
        memory: as for `exact`.

    Returns:
        The sum over the batches' terms, float64 (n,), and the sum of their weights; the diagonal of G is
        Σ sums / Σ weights over all batches.

    Raises:
        Refused: as `exact`.
    """
    problem.require_outputs("the diagonal of the generalized Gauss-Newton matrix")
    with problem.session():
        sums, weights = Passes(problem, memory, Squares()).over(batches)
    total = torch.zeros(problem.size, dtype=torch.float64, device=problem.device)
    for row in sums:
        for (start, stop), part in zip(problem.space.ranges.values(), row, strict=True):
            total[start:stop] += part.reshape(-1) if isinstance(part, Tensor) else part
    return total, float(weights.sum())


def columns(problem: Problem) -> int:
    """The number of backward passes over all data that `exact` needs, told from the first micro-batch.

    Positions times (classes - 1) for cross-entropy, the number of outputs for losses that sum over
    outputs, and the rank of the loss's second derivative for others. Sequences of other lengths in later
    micro-batches have other numbers of columns. That cross-entropy has its closed form is tested by `exact`,
    not here.

    Raises:
        Refused: as `exact`.
    """
    problem.require_outputs("the exact trace of the generalized Gauss-Newton matrix")
    with problem.session():
        piece, weight = few_of(problem, next(iter(problem.evaluator.pieces(problem.batches)))[0])
        with problem.filled(problem.leaves()):
            outputs = outputs_of(problem, piece, examples_of(piece))
            return columns_of(problem, outputs, piece, weight, tested=True).count if outputs.heads else 0


def sampled(
    problem: Problem, generators: Sequence[torch.Generator], maps: Sequence[Map] | None = None
) -> np.ndarray:
    """Estimate the trace of each diagonal block from random combinations of columns.

    One sample is (1/W) Σ_b ‖J_bᵀ Σ_ic r_ic s_ic‖² over micro-batches b with independent random signs r: its
    mean is the exact trace, since E r_ic r_jd = 0 unless (i, c) = (j, d). One plain backward pass per
    micro-batch, two where the loss is not convex; tied parameters need no care. Smaller micro-batches
    scatter less at the same cost per example.

    Args:
        problem: with outputs.
        generators: one per sample.
        maps: L of each parameter tensor, for the traces of LᵀGL; by default the identity.

    Returns:
        float64 (samples, parameter tensors).

    Raises:
        Refused: as `exact`.
    """
    problem.require_outputs("the trace of the generalized Gauss-Newton matrix")
    found = np.zeros((len(generators), len(problem.names)))
    weights, tested = 0.0, False
    with problem.session():
        for piece, weight in problem.evaluator.pieces(problem.batches):
            weights += weight
            leaves = problem.leaves()
            with problem.filled(leaves):
                outputs = outputs_of(problem, piece, examples_of(piece))
                if not outputs.heads:
                    continue
                parts = columns_of(problem, outputs, piece, weight, tested)
                tested = isinstance(parts, CrossEntropy)
                for row, stream in zip(found, generators, strict=True):
                    for flat, sign in parts.drawn(stream):
                        row[:] += sign * _squared_gradients(outputs, leaves, flat, maps)
    return found / weights


def _squared_gradients(
    outputs: Outputs, leaves: Sequence[Tensor], flat: Tensor, maps: Sequence[Map] | None
) -> np.ndarray:
    slopes = torch.autograd.grad(
        outputs.heads, leaves, outputs.tails(flat), retain_graph=True, allow_unused=True
    )
    if maps is not None:
        slopes = tuple(
            None if g is None else one.pull(g.reshape(-1)) for g, one in zip(slopes, maps, strict=True)
        )
    norms = [0.0 if g is None else float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in slopes]
    return np.square(norms)


def _exact(passes: Passes) -> BlockTraces:
    problem = passes.problem
    found, weights = passes.over(problem.batches)
    sums = np.array(found)
    rules = [" and ".join(sorted(kinds)) or "unused" for kinds in passes.rules]
    blocks = sums.sum(axis=0) / weights.sum()
    return BlockTraces(problem.names, blocks, rules, passes.columns, passes.work / passes.examples)
