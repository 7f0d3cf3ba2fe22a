"""Checkpoints of a model: read without running code, compared with it before anything is copied."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from landscape import tensor_file
from landscape.checkpoint_files import kind, line, needs, require_harmless
from landscape.errors import Refused

T = TypeVar("T")
_NESTED = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile put them in front
_MOST_TENSORS = 100_000
_NAMED = 3  # this many keys of a kind are named, the rest counted
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint, not read yet.

    Attributes:
        shape: of the tensor.
        dtype: of its entries.
        read: returns it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def load_into(model: nn.Module, path: Path, say: Callable[[str], None], trust: bool = False) -> None:
    """Copy a checkpoint's tensors into a model.

    Args:
        model: what is filled; untouched unless every key and shape fits.
        path: a file of `torch.save` or safetensors, bare or under state_dict/model/model_state_dict.
        say: takes one line about what was found.
        trust: whether a pickle that runs code may be read.

    Raises:
        Refused: if the file is damaged, needs code, or does not fit the model.
    """
    wanted = {key: value for key, value in model.state_dict().items() if hasattr(value, "shape")}
    with opened(path, trust) as (stored, where):
        found, stripped = _without_prefix(stored, wanted)
        _refuse_misfit(path, {k: v for k, v in found.items() if isinstance(v, Stored)}, wanted)
        state = {key: value.read() if isinstance(value, Stored) else value for key, value in found.items()}
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise Refused(f"{path} could not be copied into the model: {line(error)}") from error
    notes = [f"{len(state)} tensors"]
    notes += [f"found under {where!r}"] if where else []
    notes += [f"the prefix {stripped!r} of every key was taken off"] if stripped else []
    say(f"{path}: {', '.join(notes)}")


def read(path: Path | str, wanted: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """Read the tensors of these names and shapes from a checkpoint, in their order; it may hold others.

    Raises:
        Refused: if it cannot be read without running code, or one of them is missing or has another shape.
    """
    with opened(Path(path)) as (stored, _):
        tensors = {key: value for key, value in stored.items() if isinstance(value, Stored)}
        return [entry.read() for entry in matching(tensors, wanted, str(path))]


def matching(state: Mapping[str, T], wanted: Mapping[str, tuple[int, ...]], origin: str) -> list[T]:
    """Return the entries of these names and shapes, in their order.

    Args:
        state: tensors by name; a prefix `module.` of all names is taken off.
        wanted: shapes by name.
        origin: of the state, for messages.

    Raises:
        Refused: if one is missing or has another shape.
    """
    found, _ = _without_prefix(state, wanted)
    missing = [name for name in wanted if name not in found]
    if missing:
        held = ", ".join(list(found)[:_NAMED])
        raise Refused(f"{origin} is of another model: it has no {_some(missing)}; it has {held}")
    for name, shape in wanted.items():
        there = tuple(found[name].shape)  # type: ignore[attr-defined]
        if there != tuple(shape):
            raise Refused(
                f"{origin} is of another model: {name} has shape {there} there, {tuple(shape)} here"
            )
    return [found[name] for name in wanted]


@contextmanager
def opened(path: Path, trust: bool = False) -> Iterator[tuple[dict[str, Any], str]]:
    """Open a checkpoint and look at what it holds.

    Args:
        path: of the file.
        trust: whether a pickle that runs code may be read.

    Yields:
        The entries of its state dict, tensors as `Stored`, and the key under which it was found ("" for a
        bare one).

    Raises:
        Refused: if it cannot be read without running code, is damaged, or holds no state dict.
    """
    of_kind = kind(path)
    if of_kind != "safetensors":
        state, where = _state_in(_content(path, of_kind, trust), path)
        yield {key: _stored(value, key, path) for key, value in state.items()}, where
        return
    try:
        with tensor_file.opened(path, _MOST_TENSORS) as file:
            yield {name: _lying_in(file, name) for name in file.entries}, ""
    except (tensor_file.Damaged, OSError) as error:
        raise Refused(f"{path} is damaged or no safetensors file: {line(error)}") from error


def _lying_in(file: tensor_file.TensorFile, name: str) -> Stored:
    entry = file.entries[name]
    dtype = _DTYPES[entry.code]

    def read() -> Tensor:
        if not entry.size:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(file.read(name), dtype=dtype).reshape(entry.shape)

    return Stored(entry.shape, dtype, read)


def _stored(value: Any, key: str, path: Path) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        raise Refused(f"{path}: {key} is a tensor of a kind that is not read here; store plain ones")
    return Stored(tuple(value.shape), value.dtype, lambda: value)


def _content(path: Path, of_kind: str, trust: bool) -> Any:
    if not trust:
        allowed = [_called(known) for known in torch.serialization.get_safe_globals()]
        require_harmless(path, of_kind, allowed)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:
        if called := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise Refused(f"{path} {needs(called[1])}") from error
        # torch.load on a damaged file raises whatever its parts raise
        # torch's own advice, to switch the safety off, is left out
        why = str(error).partition("WeightsUnpickler error:")[2].strip().splitlines()[:1] or [line(error)]
        raise Refused(f"{path} is damaged or no checkpoint: {why[0][:200]}") from error


def _called(known: Any) -> str:
    """Return how a pickle names what the user allowed with `torch.serialization.add_safe_globals`."""
    if isinstance(known, tuple):
        return str(known[1]).rpartition(".")[0] + " " + str(known[1]).rpartition(".")[2]
    return f"{getattr(known, '__module__', '')} {getattr(known, '__qualname__', '')}"


def _state_in(content: Any, path: Path) -> tuple[dict[str, Any], str]:
    """Return the state dict of a checkpoint and the key it was found under ("" for a bare one)."""
    held = _items(content)
    places = [("", content), *((key, held[key]) for key in _NESTED if key in held)]
    for where, candidate in places:
        place = _items(candidate.state_dict() if isinstance(candidate, nn.Module) else candidate)
        if place and all(isinstance(value, Tensor) or _is_extra(key) for key, value in place.items()):
            return {str(key): value for key, value in place.items()}, where
    holds = ", ".join(map(repr, list(held)[:6])) if held else f"a {type(content).__name__}"
    raise Refused(f"{path} has no state dict, bare or under {', '.join(_NESTED)}; it holds {holds[:200]}")


def _items(candidate: Any) -> dict[Any, Any]:
    """Return the entries of a dict; a pickle can put something else in the place of its methods."""
    return dict(dict.items(candidate)) if isinstance(candidate, dict) else {}


def _is_extra(key: Any) -> bool:
    return str(key).endswith("_extra_state")


def _without_prefix(state: Mapping[str, T], wanted: Mapping[str, Any]) -> tuple[dict[str, T], str]:
    """Take `module.` and `_orig_mod.` off where every key has it and the model has none."""
    stripped, state = "", dict(state)
    while state:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None or any(key.startswith(prefix) for key in wanted):
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        stripped += prefix
    return state, stripped


def _refuse_misfit(path: Path, state: Mapping[str, Stored], wanted: Mapping[str, Tensor]) -> None:
    # files older than this counter lack it; load_state_dict fills it in, and eval mode does not use it
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    both = [key for key in wanted if key in state]
    misfitting = [
        f"{key} is {_shape(state[key])} in the file, {_shape(wanted[key])} in the model"
        for key in both
        if tuple(state[key].shape) != tuple(wanted[key].shape)
    ]
    kinds = [
        f"{key} is {state[key].dtype} in the file, {wanted[key].dtype} in the model"
        for key in both
        if _is_inexact(state[key].dtype) and not _is_inexact(wanted[key].dtype)
    ]
    titled = {
        "missing:": missing,
        "unexpected:": unexpected,
        "of another shape:": misfitting,
        "of another kind:": kinds,
    }
    problems = [f"{title} {_some(keys)}" for title, keys in titled.items() if keys]
    if problems:
        raise Refused(
            f"{path} does not fit the model ({len(state)} and {len(wanted)} tensors); {'; '.join(problems)}"
        )


def _is_inexact(dtype: torch.dtype) -> bool:
    """Return whether numbers are real or complex; copied into integers they would be cut."""
    return dtype.is_floating_point or dtype.is_complex


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(name[:200] for name in names[:_NAMED]) + more


def _shape(value: Any) -> str:
    return f"({', '.join(map(str, value.shape))})"
