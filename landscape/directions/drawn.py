"""Random directions: Gaussian, or with the norms of the weights in each filter or tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from landscape import seeds
from landscape.directions.base import Directions, made
from landscape.errors import Refused

if TYPE_CHECKING:
    from landscape.problem import Problem

_STREAM = "directions"
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def gaussian(problem: Problem, count: int = 2, *, seed: int = 0) -> Directions:
    """Draw directions d ~ N(0, I), of norm about √n."""
    rows = [draw(problem, seed, i) for i in range(count)]
    return made(
        problem, rows, [f"Gaussian direction {i + 1}" for i in range(count)], kind="random", seed=seed
    )


def filter_normalized(problem: Problem, count: int = 2, *, seed: int = 0) -> Directions:
    """Draw Gaussian directions with the norm of the weights in each filter: d_j ← d_j ‖w_j‖ / ‖d_j‖.

    A filter is a slice along the first dimension of a tensor. Biases and parameters of normalization layers
    do not move.

    Source: Li et al. 2018 (arXiv 1712.09913), with `ignore="biasbn"` of the authors' code.
    """
    rows = [_normalized(problem, draw(problem, seed, i), by_filter=True) for i in range(count)]
    labels = [f"filter-normalized direction {i + 1}" for i in range(count)]
    return made(problem, rows, labels, kind="filter", seed=seed)


def layer_normalized(problem: Problem, count: int = 2, *, seed: int = 0) -> Directions:
    """Draw Gaussian directions with the norm of the weights in each tensor; otherwise as `filter_normalized`."""
    rows = [_normalized(problem, draw(problem, seed, i), by_filter=False) for i in range(count)]
    labels = [f"layer-normalized direction {i + 1}" for i in range(count)]
    return made(problem, rows, labels, kind="layer", seed=seed)


def draw(problem: Problem, seed: int, index: int) -> Tensor:
    """Draw a Gaussian vector (n,) in float64 from the stream of this index."""
    drawn = torch.randn(problem.size, generator=seeds.generator(seed, _STREAM, index), dtype=torch.float64)
    return drawn.to(problem.device)


def _normalized(problem: Problem, drawn: Tensor, *, by_filter: bool) -> Tensor:
    fixed = _of_norms(problem)
    found = []
    weights = problem.space.split(problem.parameters_vector())
    for name, d, w in zip(problem.names, problem.space.split(drawn), weights, strict=True):
        if w.ndim <= 1 or name in fixed:
            found.append(torch.zeros_like(d))
            continue
        rows = d.flatten(1) if by_filter else d.reshape(1, -1)
        sizes = (w.double().flatten(1) if by_filter else w.double().reshape(1, -1)).norm(dim=1)
        found.append((rows * (sizes / rows.norm(dim=1))[:, None]).view(d.shape))
    if not any(float(t.abs().max()) > 0 for t in found if t.numel()):
        raise Refused(
            "no measured parameter has a filter that could be normalized: all are biases or of normalization layers, "
            "or zero. Take other parameters, or Gaussian directions."
        )
    return problem.space.flatten(found)


def _of_norms(problem: Problem) -> set[str]:
    """The names of the parameters of normalization layers."""
    found = set()
    for prefix, module in problem.evaluator.model.named_modules():
        if isinstance(module, _NORMS):
            found |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters()}
    return found
