"""The diagonal of the generalized Gauss-Newton matrix, estimated by random combinations of columns.

G = (1/W) Σ_i J_iᵀ Λ_i J_i with Λ_i = Σ_c σ_ic s_ic s_icᵀ, as in `landscape.ggn_trace`. For random signs r the
squares of g = J_bᵀ Σ_ic r_ic s_ic have the mean (J_bᵀ Λ_b J_b)_jj, entry by entry, with a relative scatter of √2 at
most, however large the rest of the row is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from landscape.curvature_columns import CrossEntropy
from landscape.ggn_passes import columns_of, examples_of, outputs_of

if TYPE_CHECKING:
    from landscape.problem import Problem

# Examples that share a combination: fewer scatter less, at more passes.
EXAMPLES = 32


def sampled(problem: Problem, generators: Sequence[torch.Generator], *, examples: int = EXAMPLES) -> Tensor:
    """Estimate diag G without bias.

    Args:
        problem: with outputs.
        generators: one for each sample; a sample takes one backward pass per group of examples, two where the
            loss is not convex.
        examples: at most so many share a combination.

    Returns:
        The mean over the samples, (n,), float64, on the CPU; not negative for a convex loss.

    Raises:
        Refused: on a problem with `forward=`; or if the loss couples examples, or has an unknown form and more
            than 4096 outputs per example.
    """
    problem.require_outputs("the diagonal of the generalized Gauss-Newton matrix")
    total = torch.zeros(problem.size, dtype=torch.float64)
    weights, tested = 0.0, False
    with problem.session():
        for part, weight in problem.split(examples):
            weights += weight
            piece = next(iter(part.batches))
            leaves = part.leaves()
            with part.filled(leaves):
                outputs = outputs_of(part, piece, examples_of(piece))
                if not outputs.heads:
                    continue
                columns = columns_of(part, outputs, piece, weight, tested)
                tested = isinstance(columns, CrossEntropy)
                for stream in generators:
                    for flat, sign in columns.drawn(stream):
                        slopes = torch.autograd.grad(
                            outputs.heads, leaves, outputs.tails(flat), retain_graph=True, allow_unused=True
                        )
                        filled = [
                            torch.zeros_like(p) if s is None else s
                            for p, s in zip(leaves, slopes, strict=True)
                        ]
                        total += sign * part.space.flatten(filled).double().square().cpu()
    return total / (weights * len(generators))
