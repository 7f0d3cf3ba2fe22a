"""A device that is none: its tensors hold real numbers on the CPU, and may not meet those of the CPU.

Inside `second_device()`, what is made on or moved to the device "meta" computes like a GPU's tensors would: to use it
together with a tensor of the CPU raises, so does reading it by numpy, or drawing on it from a generator of the CPU.
Only numbers (0-d) and indices may come from the CPU, as on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default,
            torch.ops.aten._index_put_impl_.default}  # fmt: skip


class Elsewhere(Tensor):
    """A tensor of the second device."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.held = real
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held})"

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError("can't convert a tensor of the second device to numpy; use .cpu()")

    __array__ = numpy  # type: ignore[assignment]

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__(_indices(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_indices(key), value)

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def second_device() -> Iterator[torch.device]:
    make = torch.tensor

    def tensor(values: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = make(values, **options)  # PyTorch's own leaves tensors of "meta" without values
        return made if device is None else made.to(device)

    torch.tensor = tensor
    try:
        with _Mode():
            yield DEVICE
    finally:
        torch.tensor = make


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    there = [t for t in given if isinstance(t, Elsewhere)]
    here = [t for t in given if not isinstance(t, Elsewhere) and t.ndim]
    wanted, plain = kwargs.get("device"), dict(kwargs)
    if wanted is not None:
        plain["device"] = torch.device("cpu")
    lands = torch.device(wanted).type == "meta" if wanted is not None else bool(there)
    if there and here and func not in _MOVES:
        indices = func in _INDEXED and isinstance(args[0], Elsewhere) and len(here) == sum(
            isinstance(t, Tensor) and not isinstance(t, Elsewhere) for t in tree_flatten(args[1])[0]
        )  # fmt: skip
        if not indices:
            raise RuntimeError(f"Expected all tensors to be on the same device ({func})")
    if lands and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError("Expected a generator of the second device")
    out = func(*tree_map(_real, args), **tree_map(_real, plain))
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if not lands:
        return out
    made = tree_map(lambda t: Elsewhere(t) if isinstance(t, Tensor) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, made) if there else made


def _indices(key: Any) -> Any:
    """Lists as tensors of the CPU: PyTorch's own way leaves those of "meta" without values."""
    parts = key if isinstance(key, tuple) else (key,)
    made = tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)
    return made if isinstance(key, tuple) else made[0]


def _real(t: Any) -> Any:
    return t.held if isinstance(t, Elsewhere) else t
