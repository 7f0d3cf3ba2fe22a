"""Means over the data: gradients and curvature products, summed micro-batch by micro-batch.

Products are made by autodiff (reverse over reverse, one graph for all vectors of a block) or by central
differences: of gradients for H, of outputs for G = mean of Jᵀ(∂²ℓ/∂f²)J. The empirical Fisher matrix, which
needs gradients only, is always made by autodiff.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from landscape import batches as batching
from landscape import products, vectors
from landscape.evaluator import require_weight

if TYPE_CHECKING:
    from landscape.problem import Problem
    from landscape.sharded import Shard

# Central differences err by h² from curvature and eps/h from rounding; eps^(1/3) balances the two
# (Press et al., Numerical Recipes, §5.7).
_STEP_EXPONENT = 1 / 3

# Sums over micro-batches are held in float64 up to this many numbers (512 MiB), beyond it in the working
# precision: a block of vectors is then held once more, not three times.
_WIDE_SUMS = 2**26

Made = Iterator[products.Optional]


def gradient(problem: Problem) -> Tensor:
    """∇L(θ), a vector (n,)."""
    return value_and_gradient(problem)[1]


def value_and_gradient(problem: Problem) -> tuple[Tensor, Tensor]:
    """L(θ), a 0-d float64 tensor, and ∇L(θ), a vector (n,)."""
    total = weights = 0.0

    def slopes(piece: Any) -> Made:
        nonlocal total, weights
        leaves, weight = problem.leaves(), problem.evaluator.weigh(piece)
        with problem.filled(leaves):
            loss = problem.evaluator.loss_of(piece)
            total += float(loss.detach().double()) * problem.evaluator.scale(weight)
            weights += weight
            yield products.gradient(loss, leaves)

    with problem.session():
        if problem.shard is not None:
            mean, slope = _shard_mean(
                problem, problem.shard, 1, slopes, _Summed("the gradient", lambda: total)
            )
            return torch.tensor(mean, dtype=torch.float64), slope[0]
        slope = _mean(problem, 1, slopes)[0]
    return torch.tensor(total / weights, dtype=torch.float64), slope


def hessian_by_autodiff(problem: Problem, V: Tensor) -> Tensor:
    """H V for one vector (n,) or a block (n, k)."""

    def graph(piece: Any, leaves: list[Tensor]) -> products.Graph:
        return products.HessianGraph(problem.evaluator.loss_of(piece), leaves)

    return _by_autodiff(problem, V, "hessian", graph)


def ggn_by_autodiff(problem: Problem, V: Tensor) -> Tensor:
    """G V for one vector (n,) or a block (n, k)."""

    def graph(piece: Any, leaves: list[Tensor]) -> products.Graph:
        return products.GgnGraph(problem.evaluator.outputs(piece), _ending(problem, piece), leaves)

    return _by_autodiff(problem, V, "ggn", graph)


def empirical_fisher(problem: Problem, V: Tensor) -> Tensor:
    """Σ_i w_i g_i g_iᵀ V / Σ_i w_i over examples, for one vector (n,) or a block (n, k)."""

    def graph(piece: Any, leaves: list[Tensor]) -> products.Graph:
        scale = problem.evaluator.scale(problem.evaluator.weigh(piece))
        # The Gauss-Newton matrix of half the sum of squares of the examples' losses.
        terms = _terms(problem, piece)
        return products.GgnGraph(terms, lambda t: t.square().sum() / (2 * scale), leaves)

    return _by_autodiff(problem, V, "empirical_fisher", graph)


def _terms(problem: Problem, piece: Any) -> Tensor:
    """The sum of each example's terms over the root of its weight; examples without weight are left out."""
    outputs, target = problem.evaluator.outputs(piece), problem.evaluator.target_of(piece)
    found = []
    for i in range(batching.examples(piece)):
        if (weight := problem.evaluator.weigh(batching.cut(piece, i, i + 1))) > 0:
            one = batching.cut(outputs, i, i + 1), batching.cut(target, i, i + 1)
            found.append(
                problem.evaluator.loss_from(*one) * (problem.evaluator.scale(weight) / math.sqrt(weight))
            )
    return torch.stack(found)


def hessian_by_differences(problem: Problem, V: Tensor, step: float | None = None) -> Tensor:
    """H V from differences of gradients, for one vector (n,) or a block (n, k).

    Args:
        problem: the problem.
        V: the vectors.
        step: ‖h v‖ / (1 + ‖θ‖) of the displacements; default eps^(1/3).
    """

    def made(piece: Any, rows: Tensor) -> Made:
        for row in rows:
            h = _factor(problem, row, step)
            up, down = (_slopes_at(problem, piece, row * (sign * h)) for sign in (1, -1))
            for i in range(len(up)):  # one after the other, so that three are not held
                a, b, up[i], down[i] = up[i], down[i], None, None
                up[i] = None if a is None or b is None else (a - b) / (2 * h)
                del a, b
            yield up

    return _by_differences(problem, V, made)


def _slopes_at(problem: Problem, piece: Any, displacement: Tensor) -> list[Tensor | None]:
    leaves = problem.leaves(displacement=displacement)
    del displacement
    with problem.filled(leaves):
        return list(products.gradient(problem.evaluator.loss_of(piece), leaves))


def ggn_by_differences(problem: Problem, V: Tensor, step: float | None = None) -> Tensor:
    """G V with J v from differences of outputs; arguments as `hessian_by_differences`."""

    def made(piece: Any, rows: Tensor) -> Made:
        leaves = problem.leaves()
        for row in rows:
            changes = output_differences(problem, piece, row, step)
            with problem.filled(leaves):
                outputs = problem.evaluator.outputs(piece)
                wanted = [t.requires_grad for t in batching.tensors(outputs)]
                pushed = [change for change, want in zip(changes, wanted, strict=True) if want]
                yield products.pullback(outputs, _ending(problem, piece), leaves, pushed)

    return _by_differences(problem, V, made)


def output_differences(problem: Problem, piece: Any, v: Tensor, step: float | None = None) -> list[Tensor]:
    """J v from central differences of a micro-batch's outputs, one entry for each tensor of them.

    Args:
        problem: the problem.
        piece: the micro-batch.
        v: (n,).
        step: as for `hessian_by_differences`.
    """
    h = _factor(problem, v, step)
    moved = []
    for sign in (1, -1):
        with torch.no_grad(), problem.filled(problem.leaves(displacement=v * (sign * h))):
            moved.append(batching.tensors(problem.evaluator.outputs(piece)))
    return [(up - down) / (2 * h) for up, down in zip(*moved, strict=True)]


def _by_autodiff(
    problem: Problem, V: Tensor, matrix: str, graph: Callable[[Any, list[Tensor]], products.Graph]
) -> Tensor:
    from landscape import kernels, kinks  # not every measurement makes products

    rows = vectors.aligned_pieces(V.to(problem.device, problem.dtype), problem.space)
    kept = problem.kept_graphs(matrix)
    position = itertools.count()

    def made(piece: Any) -> Made:
        if not rows:
            return
        index = next(position)
        found = None if kept is None else kept.get(index)
        if found is not None and not found.reruns:
            yield from found.products(rows, keep=True)
            return
        leaves = problem.leaves() if found is None else found.parameters
        # A pass in float64 pays where many products are made of one graph.
        right = found is None and kept is not None and problem.kernels.kinks
        sides = kinks.sides(problem, piece) if right else kinks.NONE
        # Filled while products are made, too: activation checkpointing runs the model again.
        with problem.evaluator.unfused(), problem.filled(leaves):
            fresh = found is None
            if found is None:
                plain = problem.evaluator.twice_differentiable()
                with plain, kernels.active(problem.kernels), kinks.righted(sides):
                    found = graph(piece, leaves)
            del sides  # not needed while products are made
            making = found.products(rows, keep=kept is not None)
            if kept is not None and fresh:
                kept[index] = found
                if problem.device.type == "cpu":  # elsewhere passes run in other threads
                    with products.Watch() as watch:
                        first = [next(making)]
                    found.reruns = watch.called
                    yield first.pop()  # so that it is not held here, too
            yield from making

    with problem.session(), kernels.multiplying(problem.kernels):
        total = _mean(problem, len(rows), made, _Summed(f"the {matrix} product", of=lambda: V))
    return _shaped_like(V, total)


def _by_differences(problem: Problem, V: Tensor, made: Callable[[Any, Tensor], Made]) -> Tensor:
    rows = vectors.column_major(V.to(problem.device, problem.dtype), problem.size)
    with problem.session():
        about = _Summed("a product by differences", of=lambda: V)
        total = _mean(problem, len(rows), lambda piece: made(piece, rows), about)
    return _shaped_like(V, total)


def _shaped_like(V: Tensor, total: Tensor) -> Tensor:
    # Column-major: what follows takes one vector after the other, and this costs no copy.
    return total[0] if V.ndim == 1 else total.T


@dataclass(frozen=True)
class _Summed:
    """What ranks that have divided the data tell each other about a sum.

    Attributes:
        what: it is, in words.
        also: a number that is summed beside it.
        of: the vectors of a product, whose results must be finite.
    """

    what: str
    also: Callable[[], float] = float
    of: Callable[[], Tensor] | None = None


def _shard_mean(
    problem: Problem, shard: Shard, count: int, made: Callable[[Any], Made], about: _Summed
) -> tuple[float, Tensor]:
    """The mean of the number beside it and Σ made(piece) / Σ weights, over the micro-batches of all ranks."""
    dtype = torch.float64 if count * problem.size <= _WIDE_SUMS else problem.dtype
    total = torch.zeros(count, problem.size, dtype=dtype, device=problem.device)

    def fill() -> tuple[float, float]:
        weights = 0.0
        for piece, weight in problem.evaluator.pieces(problem.batches, shard.own):
            for row, result in zip(total, made(piece), strict=False):
                _add(row, problem.space, list(result), problem.evaluator.scale(weight), False)
            weights += weight
        return weights, about.also()

    weights, also, _ = shard.add(
        about.what, fill, total, of=about.of or problem.parameters_vector, finite=about.of is not None
    )
    require_weight(weights > 0)
    return also / weights, total.div_(weights).to(problem.dtype)


def _mean(problem: Problem, count: int, made: Callable[[Any], Made], about: _Summed | None = None) -> Tensor:
    """Return Σ made(piece) / Σ weights over the micro-batches, (count, n).

    In float64 where several micro-batches are added, up to `_WIDE_SUMS` numbers.
    """
    if problem.shard is not None and about is not None:
        return _shard_mean(problem, problem.shard, count, made, about)[1]
    pieces = problem.evaluator.pieces(problem.batches)
    ahead = list(itertools.islice(pieces, 2))
    wide = len(ahead) > 1 and count * problem.size <= _WIDE_SUMS
    dtype = torch.float64 if wide else problem.dtype
    # Empty, not zero: memory is taken where a row is written, after the graph of its product is gone.
    total = torch.empty(count, problem.size, dtype=dtype, device=problem.device)
    # In units of the first weight, so that a batch alone is not rounded for its weight's sake.
    unit, weights = ahead[0][1], 0.0
    for piece, weight in itertools.chain(ahead, pieces):
        rows, scale = iter(total), problem.evaluator.scale(weight) / unit
        for result in made(piece):
            parts = list(result)
            del result
            _add(next(rows), problem.space, parts, scale, not weights)
        weights += weight / unit
    return (total.div_(weights) if weights != 1 else total).to(problem.dtype)


def _add(
    total: Tensor, space: vectors.ParameterSpace, parts: list[Tensor | None], scale: float, first: bool
) -> None:
    """Add `scale` times the parts to the flat total, and take each out of the list, so that it is freed."""
    for i, (start, stop) in enumerate(space.ranges.values()):
        part, parts[i] = parts[i], None
        into = total[start:stop]
        if part is None and first:
            into.zero_()
        elif part is None:
            continue
        elif first:
            into.copy_(part.detach().reshape(-1)).mul_(scale)
        else:
            into.add_(part.detach().reshape(-1), alpha=scale)


def _factor(problem: Problem, row: Tensor, step: float | None) -> float:
    """The factor h of θ ± h v: ‖h v‖ = eps^(1/3) (1 + ‖θ‖), whatever the length of v."""
    length = float(row.norm())
    relative = step if step is not None else torch.finfo(problem.dtype).eps ** _STEP_EXPONENT
    theta = math.sqrt(sum(float(leaf.detach().norm()) ** 2 for leaf in problem.leaves()))
    return relative * (1 + theta) / length if length > 0 else 1.0


def _ending(problem: Problem, piece: Any) -> Callable[[Any], Tensor]:
    """The loss as a function of the outputs."""
    target = problem.evaluator.target_of(piece)
    return lambda outputs: problem.evaluator.loss_from(outputs, target)
