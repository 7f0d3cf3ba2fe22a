"""Rectifiers that write over their operand, where nobody reads it afterwards: no other memory is gone through.

Which ones may is seen in one pass on a batch of the same shapes. The operand was made by a call that shares memory
with nothing, was read only by such calls, and is gone when the model makes its next call; and nothing in that pass
let numbers decide what is called. Even so a rectifier writes over an operand only while no more hold it, or its
memory, than did then.
"""

from __future__ import annotations

import contextlib
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
_OF_FORM = (bool, int, float, torch.Size, torch.dtype, torch.device, torch.layout)
_BY_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

# (rectifier, references to its operand, its operand) -> whether to write over it
Answer = Callable[[Any, int, Tensor], bool]


class Call(NamedTuple):
    """A call of a rectifier.

    Attributes:
        rectifier: the module, or `relu` for the function.
        references: to its operand, up to which it may write over it; 0 where it never may.
        sharers: of the operand's memory, likewise.
        numbers: that the operand has.
    """

    rectifier: Any
    references: int
    sharers: int
    numbers: int


Calls = Sequence[Call]
NONE: Calls = ()


def seen(model: nn.Module, passing: Callable[[Any], object], batch: Any) -> Calls:
    """Run a pass without gradients, and return its rectifiers in order.

    Returns:
        Nothing where none may write over its operand: none may in a pass that hands out numbers, or lets them decide.
    """
    numbers, watch = _Numbers(), _Watch()
    with _standing_in(model), _answering(watch.note), numbers, watch:
        result = passing(batch)  # held: what is returned is not gone
        watch.settle()
    del result
    may = not (numbers.decide or watch.shown) and any(call.references for call in watch.calls)
    return tuple(watch.calls) if may else NONE


def shapes(batch: Any) -> Any:
    """What batches have in common of which one pass is like the other."""
    return tuple((t.shape, t.dtype) for t in batching.tensors(batch))


class InPlace:
    """Makes passes in which rectifiers write over their operand.

    Args:
        model: whose passes they are.
        known: by shapes, the rectifiers that were seen; `watch` adds to it. None leaves all rectifiers alone.
    """

    def __init__(self, model: nn.Module, known: dict[Any, Calls] | None):
        self._model, self._known = model, known
        self._left: Iterator[Call] = iter(())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Stand in for rectifiers meanwhile."""
        with _standing_in(self._model) if self._known is not None else contextlib.nullcontext():
            yield

    def lacks(self, kind: Any) -> bool:
        """Whether a pass of these shapes is still to be watched."""
        return self._known is not None and kind not in self._known

    def watch(self, passing: Callable[[Any], Any], batch: Any, kind: Any) -> None:
        """Make a pass, `passing(batch)`, to see its rectifiers; `kind` are the batch's shapes."""
        assert self._known is not None
        self._known[kind] = NONE
        # Without inference mode, in which calls hide what they are made of; some models run only within.
        with contextlib.suppress(RuntimeError), torch.inference_mode(mode=False), torch.no_grad():
            self._known[kind] = seen(self._model, passing, batch)

    def __call__(self, passing: Callable[[Any], Any], batch: Any, kind: Any) -> Any:
        """Make a pass within `active`, after one of these shapes was watched."""
        calls = self._known[kind] if self._known is not None else NONE
        if not calls:
            return passing(batch)
        self._left = iter(calls)
        with _answering(self._may):
            return passing(batch)

    def _may(self, rectifier: Any, references: int, operand: Tensor) -> bool:
        call = next(self._left, None)
        if call is None or call.rectifier is not rectifier:
            self._left = iter(())  # another pass than the one that was seen
            return False
        return references <= call.references and _sharers(operand) <= call.sharers


class _Watch(TorchFunctionMode):
    """Notes every rectifier, and whether its operand is gone at the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.shown = False  # whether numbers were handed out
        self._own = WeakIdKeyDictionary()  # tensors that share memory with no other
        self._noted: Call | None = None  # a rectifier that is going to be called
        # The last one and its operand, if it may once that is gone.
        self._last: tuple[TensorWeakRef, Call] | None = None

    def note(self, rectifier: Any, references: int, operand: Tensor) -> bool:
        """Take note of a rectifier that is going to be called; it may not before its operand is seen to be gone."""
        self.settle()
        with torch._C.DisableTorchFunction():
            self._noted = Call(rectifier, references, _sharers(operand), operand.numel())
        self.calls.append(self._noted._replace(references=0))
        return False

    def settle(self) -> None:
        """Allow the last rectifier, if its operand is gone."""
        if self._last is not None and self._last[0]() is None:
            self.calls[-1] = self._last[1]
        self._last = None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        noted, self._noted = self._noted, None
        self.settle()
        func = _PLAIN_RELU if func is relu else func  # PyTorch's own looks itself up where we stand in
        result = func(*args, **(kwargs or {}))
        given = batching.tensors([list(args), dict(kwargs or {})])
        new = type(result) is Tensor and not any(result is t for t in given)
        if noted is not None and new and self._could_be(args[0], result):
            self._last = TensorWeakRef(args[0]), noted
        if new and func in _SHARING_NOTHING:
            self._own[result] = None
        elif not isinstance(result, _OF_FORM):
            self.shown |= result is not None and not batching.tensors(result)
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
def _standing_in(model: nn.Module) -> Iterator[None]:
    """Stand in for the model's rectifiers and for `functional.relu`; all as before where nobody answers."""
    modules = [
        m for m in model.modules() if type(m) in _MODULES and not m.inplace and "forward" not in vars(m)
    ]
    for module in modules:
        vars(module)["forward"] = _asking(module)
    _stand_in(1)
    try:
        yield
    finally:
        _stand_in(-1)
        for module in modules:
            vars(module).pop("forward", None)


@contextmanager
def _answering(answer: Answer) -> Iterator[None]:
    """Let rectifiers in this thread ask whether to write over their operand."""
    before = getattr(_asked, "answer", None)
    _asked.answer = answer
    try:
        yield
    finally:
        _asked.answer = before


def _asking(module: nn.Module) -> Callable[[Tensor], Tensor]:
    other: Any = copy.copy(module)
    other.inplace = True
    # `nn.ReLU` calls what we stand in for, and would ask twice.
    over, beside = (torch.relu_, torch.relu) if type(module) is nn.ReLU else (other.forward, module.forward)
    plain = module.forward

    def forward(input: Tensor) -> Tensor:  # noqa: A002  (PyTorch's name)
        answer = getattr(_asked, "answer", None)
        if answer is None or type(input) is not Tensor:
            made: Tensor = plain(input)
        elif answer(module, sys.getrefcount(input), input):
            made = over(input)
        else:
            made = beside(input)
        return made

    return forward


@torch.jit.ignore  # type: ignore[untyped-decorator]
def relu(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """Stand in for `torch.nn.functional.relu`."""
    answer = getattr(_asked, "answer", None)
    if answer is None or inplace or type(input) is not Tensor:
        return _PLAIN_RELU(input, inplace)
    return torch.relu_(input) if answer(relu, sys.getrefcount(input), input) else torch.relu(input)


def _sharers(x: Tensor) -> int:
    """How many hold the memory of a tensor, the tensor and this question included."""
    try:
        count: int = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # it has none of its own
        return sys.maxsize
    return count


_PLAIN_RELU = functional.relu
_asked = threading.local()
_lock, _askers = threading.Lock(), [0]


def _stand_in(more: int) -> None:
    """Stand in from the first who asks to the last, in whatever order they end; not for a function of the user's."""
    with _lock:
        _askers[0] += more
        before, after = (_PLAIN_RELU, relu) if _askers[0] else (relu, _PLAIN_RELU)
        if functional.relu is before:
            functional.relu = after
