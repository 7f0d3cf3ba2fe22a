"""Probes drawn anew for each micro-batch: products, second differences, output space, and comparisons.

The block-diagonal matrix of the micro-batches' matrices A_b has the trace of A = Σ_b (w_b/W) A_b, and probes of
it scatter less than probes of A. All functions take one generator per probe; what a probe is depends on its
generator alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from landscape import ggn_trace, residual
from landscape.estimators.probes import draw, probe_gram
from landscape.plain_passes import Autocast
from landscape.problem import Problem
from landscape.second_differences import quadratics
from landscape.traces.plan import Plan

Product = Callable[[Problem, Tensor], Tensor]


def drawn(problem: Problem, generators: Sequence[torch.Generator]) -> Tensor:
    """Signs, one column per generator, (n, k)."""
    columns = [draw(g, problem.size, 1, dtype=problem.dtype, device=problem.device) for g in generators]
    return torch.cat(columns, dim=1)


def grams(problem: Problem, V: Tensor, AV: Tensor) -> Tensor:
    """Gram matrices of a block of probes for each tensor's rows, (layers, k, k)."""
    return torch.stack([probe_gram(V[a:b], AV[a:b]) for a, b in problem.space.ranges.values()])


def layer_samples(problem: Problem, V: Tensor, AV: Tensor) -> np.ndarray:
    """v·Av within the rows of each tensor, (k, layers)."""
    rows = [(V[a:b].double() * AV[a:b].double()).sum(0) for a, b in problem.space.ranges.values()]
    return torch.stack(rows, 1).cpu().numpy()


def product_of(plan: Plan) -> Product:
    """The product with the matrix of a plan, in its precision."""
    exact: dict[str, Product] = {
        "hessian": lambda part, V: part.hvp(V),
        "residual": residual.product,
        "ggn": lambda part, V: part.ggn_vp(V),
    }
    return exact[plan.matrix]


def independent(problem: Problem, plan: Plan, generators: Sequence[torch.Generator]) -> Tensor:
    """Gram matrices of probes by products, one probe per generator and group, (layers, k, k)."""
    product = product_of(plan)
    with _precision(problem, plan) as working:
        layers = averaged(
            working, plan.examples, lambda part: drawn(part, generators),
            lambda part, V: grams(part, V, product(part, V)), blank_grams(len(problem.names), problem, generators),
        )  # fmt: skip
    problem.cost.matvecs += len(generators)
    return layers


def blank_grams(layers: int, problem: Problem, generators: Sequence[torch.Generator]) -> Tensor:
    """Zeros for the Gram matrices of one probe per generator, (layers, k, k)."""
    k = len(generators)
    return torch.zeros(layers, k, k, dtype=torch.float64, device=problem.device)


def averaged(
    problem: Problem,
    examples: int,
    draw: Callable[[Problem], Tensor],
    measured: Callable[[Problem, Tensor], Tensor],
    into: Tensor,
) -> Tensor:
    """The weighted mean over micro-batches of what is measured there at what is drawn for it.

    Ranks that have divided the data all draw everything, so that streams go on alike, and measure their own.

    Args:
        problem: on all data.
        examples: of a micro-batch.
        draw: vectors for a micro-batch.
        measured: a tensor, at those vectors.
        into: zeros of its shape, float64.
    """
    shard = problem.shard

    def add_up() -> tuple[float]:
        weights = 0.0
        parts = ((part, weight, draw(part)) for part, weight in problem.split(examples))
        for part, weight, V in parts if shard is None else shard.own(parts):
            into.add_(weight * measured(part, V))
            weights += weight
        return (weights,)

    weights = add_up()[0] if shard is None else shard.add("a trace", add_up, into)[0]
    return into.div_(weights)


def differences(problem: Problem, plan: Plan, generators: Sequence[torch.Generator]) -> np.ndarray:
    """v·Av by second differences, one probe per generator and group, (k,)."""
    found = averaged(
        problem, plan.examples, lambda part: drawn(part, generators),
        lambda part, V: quadratics(part, V, residual=plan.matrix == "residual"),
        torch.zeros(len(generators), dtype=torch.float64),
    )  # fmt: skip
    problem.cost.values += 2 * len(generators)
    return found.numpy()


def output_samples(problem: Problem, plan: Plan, generators: Sequence[torch.Generator]) -> np.ndarray:
    """Output-space probes of G, the mean of `plan.outputs` per generator, (k, layers)."""
    found, weights = np.zeros((len(generators), len(problem.names))), 0.0
    for part, weight in problem.split(plan.output_examples):
        for _ in range(plan.outputs):
            found += weight * ggn_trace.sampled(part, generators)
        weights += weight
    problem.cost.gradients += plan.outputs * len(generators)
    return found / (weights * plan.outputs)


def corrections(problem: Problem, plan: Plan, generators: Sequence[torch.Generator]) -> np.ndarray:
    """What an exact probe says beyond the cheap one of the same vector, (k, layers), or (k, 1) for differences.

    Each generator draws a micro-batch with its weight as probability, and a vector. The mean is what the
    cheap probes miss on all of the data: it adds up over examples.
    """
    exact = product_of(plan)
    parts = list(problem.split(plan.pair_examples))
    ends = np.cumsum([weight for _, weight in parts])
    found = []
    for generator in generators:
        at = float(torch.rand((), generator=generator, dtype=torch.float64)) * ends[-1]
        part = parts[min(int(np.searchsorted(ends, at, side="right")), len(parts) - 1)][0]
        v = drawn(part, [generator])
        true = layer_samples(part, v, exact(part, v))[0]
        if plan.form == "differences":
            cheap = quadratics(part, v, residual=plan.matrix == "residual").numpy()
            found.append(true.sum(keepdims=True) - cheap)
        else:
            with _precision(part, plan) as working:
                found.append(true - layer_samples(part, v, exact(working, v))[0])
    problem.cost.matvecs += len(generators)
    return np.array(found)


@contextlib.contextmanager
def _precision(problem: Problem, plan: Plan) -> Iterator[Problem]:
    """The problem as the plan's products see it.

    Under autocast with PyTorch's own kernels: ours are written for one dtype.
    """
    if not plan.bfloat16:
        yield problem
        return
    plain = problem.replace(kernels="none")
    with plain.session(), Autocast(problem.device.type, dtype=torch.bfloat16):
        yield plain
