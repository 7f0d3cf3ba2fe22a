"""Rectifiers that write over their operand, where nobody reads it afterwards: no other memory is gone through.

Which ones may is seen in one pass. The operand was made by a call that shares memory with nothing, was read only by
such calls, and is gone when the model makes its next call; and nothing in that pass let numbers decide what is
called, so that other passes are like it. Even so a rectifier writes over an operand only while nobody else holds it.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from landscape import batches as batching

_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.SiLU, nn.Hardswish)
# Calls whose result has memory of its own.
_SHARING_NOTHING = {
    torch.conv1d, torch.conv2d, torch.conv3d, functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__,
    functional.batch_norm, functional.layer_norm, functional.group_norm, torch.add, Tensor.add, Tensor.__add__,
    torch.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.selu, functional.silu,
    functional.hardswish,
}  # fmt: skip
# What calls return that say something of a tensor, but nothing of its numbers.
_OF_FORM = (bool, int, float, torch.Size, torch.dtype, torch.device, torch.layout, type(None))
_BY_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

Answer = Callable[[Any, int], bool]  # (rectifier, references to its operand) -> whether to write over it


class Call(NamedTuple):
    """A call of a rectifier.

    Attributes:
        rectifier: the module, or `relu` for the function.
        holders: references to its operand up to which it may write over it; 0 where it never may.
    """

    rectifier: Any
    holders: int


def seen(model: nn.Module, forward: Callable[[], object]) -> tuple[Call, ...]:
    """Run a pass without gradients, and return its rectifiers in order.

    Returns:
        Nothing where none of them may write over its operand.
    """
    numbers, watch = _Numbers(), _Watch()
    with _answered(model, watch.note), numbers, watch:
        result = forward()  # held: what is returned is not gone
        watch.settle()
    del result
    may = not (numbers.decide or watch.shown) and any(call.holders for call in watch.calls)
    return tuple(watch.calls) if may else ()


class InPlace:
    """Answers the rectifiers of passes like the one that was seen.

    Args:
        model: the same.
        calls: what `seen` returned; of the same pass, on examples of any number.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]):
        self._model, self._calls, self._next = model, calls, 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Answer rectifiers in this thread, if any is to be answered."""
        if not self._calls:
            yield
            return
        with _answered(self._model, self._may):
            yield

    def begin(self) -> None:
        """Expect the first rectifier: a pass begins."""
        self._next = 0

    def _may(self, rectifier: Any, holders: int) -> bool:
        place = self._next
        if place < len(self._calls) and self._calls[place].rectifier is rectifier:
            self._next = place + 1
            return holders <= self._calls[place].holders
        self._next = len(self._calls)  # another pass than the one that was seen
        return False


class _Watch(TorchFunctionMode):
    """Notes every rectifier, and whether its operand is gone at the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.shown = False  # whether numbers were handed out
        self._own = WeakIdKeyDictionary()  # tensors that share memory with no other
        self._noted = False  # whether the next call is that of a rectifier
        self._operand: TensorWeakRef | None = None  # of the last rectifier, if it may write over it

    def note(self, rectifier: Any, holders: int) -> bool:
        """Take note of a rectifier that is going to be called."""
        self.calls.append(Call(rectifier, holders))
        self._noted = True
        return False

    def settle(self) -> None:
        """Say that the last rectifier may not, if its operand is still there."""
        if self._operand is not None and self._operand() is not None:
            self._take_back()
        self._operand = None

    def _take_back(self) -> None:
        self.calls[-1] = Call(self.calls[-1].rectifier, 0)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        noted, self._noted = self._noted, False
        if not noted:
            self.settle()
        func = _PLAIN_RELU if func is relu else func  # PyTorch's own looks itself up where we stand in
        result = func(*args, **(kwargs or {}))
        given = batching.tensors([list(args), dict(kwargs or {})])
        new = type(result) is Tensor and not any(result is t for t in given)
        if noted and new and self._could_be(args[0], result):
            self._operand = TensorWeakRef(args[0])
        elif noted:
            self._take_back()
        if new and func in _SHARING_NOTHING:
            self._own[result] = None
        elif not isinstance(result, _OF_FORM):
            self.shown |= not batching.tensors(result)
            for t in given:
                if t in self._own:
                    del self._own[t]
        return result

    def _could_be(self, operand: Any, result: Tensor) -> bool:
        """Whether the result could stand in the memory of the operand."""
        return (
            operand in self._own
            and (operand.dtype, operand.shape, operand.stride(), operand.device)
            == (result.dtype, result.shape, result.stride(), result.device)
            and not result.requires_grad
        )


class _Numbers(TorchDispatchMode):
    """Notes whether numbers become Python's, or shapes: both can decide what is called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.decide = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.decide |= isinstance(result, bool | int | float) or not _BY_NUMBERS.isdisjoint(func.tags)
        return result


# --- standing in for rectifiers -----------------------------------------------------------------------


@contextmanager
def _answered(model: nn.Module, answer: Answer) -> Iterator[None]:
    """Let rectifiers of the model, and `functional.relu` in this thread, ask whether to write over their operand."""
    modules = [
        m for m in model.modules() if type(m) in _MODULES and not m.inplace and "forward" not in vars(m)
    ]
    before = getattr(_asked, "answer", None)
    for module in modules:
        vars(module)["forward"] = _asking(module, answer)
    _asked.answer = answer
    _stand_in(1)
    try:
        yield
    finally:
        _stand_in(-1)
        _asked.answer = before
        for module in modules:
            vars(module).pop("forward", None)


def _asking(module: nn.Module, answer: Answer) -> Callable[[Tensor], Tensor]:
    over: Any = copy.copy(module)
    over.inplace = True
    # `nn.ReLU` calls what we stand in for, and would ask twice.
    first, second = (torch.relu_, torch.relu) if type(module) is nn.ReLU else (over.forward, module.forward)

    def forward(x: Tensor) -> Tensor:
        made: Tensor = first(x) if answer(module, sys.getrefcount(x)) else second(x)
        return made

    return forward


def relu(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002  (PyTorch's names)
    """Stand in for `torch.nn.functional.relu`."""
    answer = getattr(_asked, "answer", None)
    if answer is None or inplace or type(input) is not Tensor:
        return _PLAIN_RELU(input, inplace)
    return torch.relu_(input) if answer(relu, sys.getrefcount(input)) else torch.relu(input)


_PLAIN_RELU = functional.relu
_asked = threading.local()
_lock, _askers = threading.Lock(), [0]


def _stand_in(more: int) -> None:
    """Stand in from the first who asks to the last, in whatever order they end."""
    with _lock:
        _askers[0] += more
        functional.relu = relu if _askers[0] else _PLAIN_RELU
