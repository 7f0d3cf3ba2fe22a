"""A problem at other parameters with the same function, and how far the function is the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from landscape import batches as batching
from landscape.errors import Refused

if TYPE_CHECKING:
    from landscape.problem import Problem

# Relative change of the outputs, in units of the dtype's rounding, above which a transformation that is exact
# on paper is refused. Rounding through twenty layers is some tens of units.
_ALLOWED = 2.0**13


@dataclass(frozen=True)
class Transformed:
    """A problem moved along its orbit.

    Attributes:
        problem: the moved problem; its `parameters_vector()` is T(θ).
        diagonal: D (n,), float64, with T(θ) = D θ; for a permutation ones.
        order: where T permutes, the positions (n,) with T(θ) = D θ[order]; else None.
        buffers: the buffers that had to move, by name, as `Problem.at` takes them.
        function_change: max |f(T(θ)) − f(θ)| / max |f(θ)| over all outputs on all data.
        exact: whether f is unchanged in exact arithmetic, not only up to a norm's ε.
        name: what was done.
    """

    problem: Problem
    diagonal: Tensor
    buffers: Mapping[str, Tensor]
    function_change: float
    exact: bool
    name: str
    order: Tensor | None = None

    @property
    def vector(self) -> Tensor:
        """T(θ), a vector (n,)."""
        return self.problem.parameters_vector()

    def cotangent(self, g: Tensor) -> Tensor:
        """D⁻¹ g (in the order of T): the gradient at T(θ), if g is the gradient at θ; (n,) or (n, k).

        The Hessian at T(θ) times v is `cotangent(H @ pull(v))`, with H that at θ.
        """
        return self._permuted(g) / self._along(g)

    def push(self, v: Tensor) -> Tensor:
        """D v (in the order of T): where T takes a displacement v of θ; (n,) or (n, k)."""
        return self._permuted(v) * self._along(v)

    def pull(self, v: Tensor) -> Tensor:
        """The displacement of θ that T takes to v; (n,) or (n, k)."""
        shrunk = v / self._along(v)
        if self.order is None:
            return shrunk
        return torch.empty_like(shrunk).index_copy_(0, self.order.to(v.device), shrunk)

    def _along(self, v: Tensor) -> Tensor:
        return self.diagonal.to(v.device, v.dtype).reshape(-1, *[1] * (v.ndim - 1))

    def _permuted(self, v: Tensor) -> Tensor:
        return v if self.order is None else v[self.order.to(v.device)]


def moved(
    problem: Problem,
    *,
    diagonal: Tensor,
    buffers: Mapping[str, Tensor],
    exact: bool,
    name: str,
    order: Tensor | None = None,
    rounding: float = 0.0,
) -> Transformed:
    """Move a problem and measure the change of its function.

    Args:
        problem: at θ.
        diagonal: D (n,), float64.
        buffers: the buffers' new values.
        exact: whether nothing may change but by rounding.
        name: what is done.
        order: of a permutation.
        rounding: of what the network computes, where that is coarser than the problem's dtype.

    Raises:
        Refused: if the function changes by more than rounding though it should not.
    """
    theta = problem.parameters_vector()
    theta = theta if order is None else theta[order.to(theta.device)]
    vector = (theta.double() * diagonal.to(theta.device)).to(theta.dtype)
    if not bool(torch.isfinite(vector).all()):
        raise Refused(
            f"{name} takes parameters out of the range of {problem.dtype}; take a smaller step or float64"
        )
    new = problem.at(vector, {**problem.buffers(), **buffers})
    change = function_change(problem, new)
    if exact and not change <= _ALLOWED * max(torch.finfo(problem.dtype).eps, rounding):
        raise Refused(
            f"{name} changes the function by {change:.1e} (relative), where only rounding is allowed: either the "
            "network loses digits there (take dtype=float64, or a smaller step), or a rule is wrong"
        )
    return Transformed(new, diagonal, dict(buffers), change, exact, name, order)


def widest(problem: Problem) -> Problem:
    """The problem in float64, where the model runs in it."""
    return problem if problem.dtype == torch.float64 else problem.in_float64() or problem


def function_change(problem: Problem, other: Problem) -> float:
    """The largest relative difference of two problems' functions, max |f' − f| / max |f|, over all data.

    With several outputs, the worst of them.

    Args:
        problem: with f; on a problem with `forward=`, the loss of each batch stands for its outputs.
        other: with f', on the same data.

    Returns:
        The ratio; nan where an output is not a number.
    """
    largest: list[float] = []
    apart: list[float] = []
    for piece in problem.evaluator.cut(problem.batches):
        f, g = outputs(problem, piece), outputs(other, piece)
        largest = _larger(largest, _maxima(f))
        apart = _larger(apart, _maxima([b - a for a, b in zip(f, g, strict=True)]))
    return _worst(apart, largest)


def relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """The same of outputs at hand: the worst over the outputs of max |after − before| / max |before|."""
    return _worst(_maxima([b - a for a, b in zip(before, after, strict=True)]), _maxima(before))


def outputs(problem: Problem, piece: Any) -> list[Tensor]:
    """The floating-point outputs of a problem on a micro-batch; of a black box, its loss."""
    evaluator = problem.evaluator
    run: Callable[[Any], Any] = evaluator.outputs if evaluator.has_outputs else evaluator.loss_of
    with problem.session(), torch.no_grad(), problem.filled(problem.leaves()):
        found = run(piece)
    return [t.double() for t in batching.tensors(found) if t.is_floating_point()]


def _maxima(tensors: list[Tensor]) -> list[float]:
    return [float(t.abs().max()) if t.numel() else 0.0 for t in tensors]


def _larger(a: list[float], b: list[float]) -> list[float]:
    """The larger of each pair; nan is the largest."""
    if not a:
        return b
    return [math.nan if math.isnan(x) or math.isnan(y) else max(x, y) for x, y in zip(a, b, strict=True)]


def _worst(apart: list[float], largest: list[float]) -> float:
    ratios = [d / f if f > 0 else (0.0 if d == 0 else math.inf) for d, f in zip(apart, largest, strict=True)]
    return math.nan if any(math.isnan(r) for r in ratios) else max(ratios, default=0.0)
