"""Probes of Lᵀ A L for a linear map L into parameter space: traces of A in other units, or of chosen directions.

As in `landscape.traces.probing`, probes are drawn anew for each micro-batch; here they are drawn in the space
that L maps from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from landscape import ggn_trace
from landscape.estimators.probes import draw, probe_gram
from landscape.linear_maps import Maps
from landscape.problem import Problem
from landscape.traces.plan import Plan
from landscape.traces.probing import Product, averaged, blank_grams, product_of


def independent(problem: Problem, maps: Maps, plan: Plan, generators: Sequence[torch.Generator]) -> Tensor:
    """Gram matrices of probes by products, one probe per generator and group, (layers, k, k)."""
    product = product_of(plan)

    def drawn(part: Problem) -> Tensor:
        columns = [draw(g, maps.size, 1, dtype=part.dtype, device=part.device) for g in generators]
        return torch.cat(columns, dim=1)

    def grams(part: Problem, Z: Tensor) -> Tensor:
        image = applied(part, maps, product, Z)
        return torch.stack([probe_gram(Z[a:b], image[a:b]) for a, b in maps.ranges])

    problem.cost.matvecs += len(generators)
    into = blank_grams(len(maps.ranges), problem, generators)
    return averaged(problem, plan.examples, drawn, grams, into)


def diagonal(problem: Problem, maps: Maps, plan: Plan, block: range) -> np.ndarray:
    """Diagonal entries of Lᵀ A L, each in the column of its parameter tensor, (k, layers)."""
    Z = torch.zeros(maps.size, len(block), dtype=problem.dtype, device=problem.device)
    Z[list(block), range(len(block))] = 1.0
    image = applied(problem, maps, product_of(plan), Z)
    rows = [(Z[a:b].double() * image[a:b].double()).sum(0) for a, b in maps.ranges]
    return torch.stack(rows, 1).cpu().numpy()


def output_samples(
    problem: Problem, maps: Maps, plan: Plan, generators: Sequence[torch.Generator]
) -> np.ndarray:
    """Output-space probes of LᵀGL, the mean of `plan.outputs` per generator, (k, layers)."""
    found, weights = np.zeros((len(generators), len(problem.names))), 0.0
    for part, weight in problem.split(plan.output_examples):
        for _ in range(plan.outputs):
            found += weight * ggn_trace.sampled(part, generators, maps.each)
        weights += weight
    problem.cost.gradients += plan.outputs * len(generators)
    return found / (weights * plan.outputs)


def applied(problem: Problem, maps: Maps, product: Product, Z: Tensor) -> Tensor:
    """LᵀAL Z for a block of columns."""
    return maps.pull(product(problem, maps.push(Z)), problem.space.sizes)
