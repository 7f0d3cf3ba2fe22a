"""Statistics of BatchNorms, computed anew for other parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from landscape import batches as batching

if TYPE_CHECKING:
    from landscape.problem import Problem


def recomputed(problem: Problem) -> dict[str, Tensor]:
    """Return the running statistics of all BatchNorms at the problem's parameters, by name of the buffer.

    One pass over the data in which BatchNorms normalize by the batch and all else is as in evaluation; the
    statistics are means over the batches, weighted by their examples. They depend on how the data are cut.
    Empty for a model without BatchNorm.
    """
    evaluator = problem.evaluator
    norms = {
        name: m for name, m in evaluator.model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    }  # fmt: skip
    kept = {name: (m.training, m.momentum) for name, m in norms.items()}
    seen = 0
    with problem.session(), torch.no_grad(), evaluator.slots.filled(problem.substitutes(problem.leaves())):
        try:
            for piece, _ in evaluator.pieces(problem.batches):
                count = batching.examples(piece)
                seen += count
                for m in norms.values():
                    m.training, m.momentum = True, count / seen
                evaluator.loss_of(piece)
        finally:
            for name, m in norms.items():
                m.training, m.momentum = kept[name]
        statistics = {f"{name}.{key}": getattr(m, key) for name, m in norms.items() for key in _KEYS}
        return {name: t.clone() for name, t in statistics.items()}


_KEYS = ("running_mean", "running_var")
