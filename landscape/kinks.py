"""Rectifiers on the side of zero on which exact arithmetic has them.

Of many million units a few stand so near to zero that their side is a matter of rounding, and each on the wrong
side changes the Hessian by far more than rounding does: 3 of 24 million by 6e-4 on a ResNet-20, 8e-6 without them.
One pass in float64 tells where they belong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from landscape import batches as batching

if TYPE_CHECKING:
    from landscape.problem import Problem

# Functions whose slope or curvature jumps at zero, and nowhere else.
_RECTIFIERS = {
    functional.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_, functional.leaky_relu,
    functional.prelu, functional.elu, functional.selu, functional.celu,
}  # fmt: skip
_IN_PLACE = {torch.relu_, Tensor.relu_}
# Units on the wrong side that are expected, about eps of all of them, from which on a pass in float64 is made.
_EXPECTED = 0.1
# Distance from zero, in eps times the units' root mean square, up to which a side is a matter of rounding.
_NEAR = 1e3
# More units of a call on the other side than these, or than this share: float64 computes something else.
_FEW, _OTHERWISE = 3, 1e-4
# Parameters above which no copy in float64 is made (256 MiB).
_LARGE = 2**25

Sides = Sequence[Tensor]
NONE: Sides = ()


def sides(problem: Problem, piece: Any) -> Sides:
    """On which side of zero the rectifiers' operands are in float64, call by call.

    Args:
        problem: inside its session.
        piece: a micro-batch of its data.

    Returns:
        A bool for each unit, True where it is positive; nothing where there are too few units for any to be expected
        on the wrong side, where the model is large or does not run in float64, or in training mode, where it may
        draw numbers.
    """
    if problem.mode == "train" or problem.size > _LARGE or not _many(problem, piece):
        return NONE
    watch = _Watch()
    try:
        wide = problem.replace(dtype=torch.float64)
        with wide.session(), torch.no_grad(), wide.filled(wide.leaves()), watch:
            wide.evaluator.loss_of(batching.tree_map(wide.evaluator.moved, piece))
    except Exception:  # noqa: BLE001  (whatever a model has against float64: it need not run in it)
        return NONE
    return watch.sides


def righted(of: Sides) -> AbstractContextManager[object]:
    """Make a graph with units on these sides; without any, no call is looked at."""
    return Righted(of) if of else nullcontext()


class Righted(TorchFunctionMode):
    """Puts units on the given sides, while a graph is made of the same pass in lower precision."""

    def __init__(self, of: Sides):
        super().__init__()
        self._left = list(reversed(of))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._left and _rectifies(func, args):
            correction = self._correction(args[0], self._left.pop())
            if correction is not None and (func in _IN_PLACE or kwargs.get("inplace")):
                args[0].add_(correction)
            elif correction is not None:
                args = (args[0] + correction, *args[1:])
        return func(*args, **kwargs)

    @torch.no_grad()
    def _correction(self, x: Tensor, positive: Tensor) -> Tensor | None:
        """What puts the units on their sides, at their distance from zero; None where they are."""
        if x.shape != positive.shape:
            self._left.clear()  # another pass than the one in float64
            return None
        wrong = (x > 0) != positive
        count = int(wrong.sum())
        if count > max(_FEW, _OTHERWISE * x.numel()):
            self._left.clear()  # it is not rounding that puts them there
            return None
        if not count:
            return None
        near = _NEAR * torch.finfo(x.dtype).eps * x.square().mean().sqrt()
        least = torch.finfo(x.dtype).tiny
        turned = torch.where(x == 0, torch.full_like(x, least), -2 * x)
        return torch.where(wrong & (x.abs() <= near), turned, torch.zeros_like(x))


class _Watch(TorchFunctionMode):
    """Notes on which side of zero the operands of rectifiers are."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _rectifies(func, args):
            self.sides.append(args[0].detach() > 0)
        return func(*args, **(kwargs or {}))


def _rectifies(func: Any, args: Sequence[Any]) -> bool:
    """Whether this is a rectifier of a plain tensor, outside of what maps calls over examples."""
    plain = func in _RECTIFIERS and bool(args) and type(args[0]) is Tensor
    return plain and torch._C._functorch.peek_interpreter_stack() is None


def _many(problem: Problem, piece: Any) -> bool:
    """Whether the problem has so many units that some are expected on the wrong side; counted on an example."""
    plans, key = problem.evaluator.plans, ("rectified units", id(problem.batches))
    if key not in plans:
        plans[key] = problem.batches, _units(problem, piece)
    return bool(plans[key][1] * torch.finfo(problem.dtype).eps >= _EXPECTED)


def _units(problem: Problem, piece: Any) -> int:
    """How many units the data have, as one example has them; as this piece has them, where that does not run alone."""
    try:
        count = batching.examples(piece)
        return _units_of(problem, batching.cut(piece, 0, 1)) * (problem.examples() or count)
    except Exception:  # noqa: BLE001  (whatever a model has against one example)
        return _units_of(problem, piece) * sum(1 for _ in problem.batches)


def _units_of(problem: Problem, piece: Any) -> int:
    with problem.filled(problem.leaves()), _Watch() as watch:
        problem.evaluator.loss_of(piece)
    return sum(side.numel() for side in watch.sides)
