"""Checkpoints: read without running code, compared with the model before anything is copied.

What a hostile file can do was tried: a pickle runs code (refused), a compressed archive expands a
thousandfold (refused before it is read), a tensor with stride 0 claims 10^12 elements (its shape does not
fit), a safetensors header of a gigabyte (its length is checked first).
"""

from __future__ import annotations

import glob
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from landscape.errors import Refused

from .values import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
NESTED = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile put them in front
MAX_PICKLE = 64 << 20
MAX_HEADER = 10 << 20
_NAMED = 3  # this many keys of a kind are named, the rest counted


def expand(patterns: tuple[str, ...]) -> list[Path]:
    """Return the files that the patterns name, in natural order (epoch2 before epoch10), each once.

    Raises:
        click.UsageError: if a pattern names no file.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        hits = [path] if path.is_file() else map(Path, glob.glob(str(path)))  # noqa: PTH207  (may be absolute)
        matches = [hit for hit in hits if hit.is_file()]
        if not matches:
            raise click.UsageError(f"--checkpoint {pattern}: {_absent(path)}")
        found += sorted(matches, key=_natural)
    return list({path.resolve(): path for path in found}.values())


def load_into(model: nn.Module, path: Path, say: Callable[[str], None], trust: bool = False) -> None:
    """Copy a checkpoint's tensors into a model.

    Args:
        model: what is filled; untouched unless every key and shape fits.
        path: a file of `torch.save` or safetensors, bare or under state_dict/model/model_state_dict.
        say: takes one line about what was found.
        trust: whether a pickle that runs code may be read.

    Raises:
        landscape.Refused: if the file is damaged, needs code, or does not fit the model.
    """
    wanted = {key: value for key, value in model.state_dict().items() if hasattr(value, "shape")}
    kind = _kind(path)
    if kind == "safetensors":
        state, where = _safetensors(path, wanted), ""
    else:
        content = _torch_file(path, kind, trust)
        state, where = _state_in(content, path)
    state, stripped = _without_prefix(state, wanted)
    _refuse_misfit(path, {key: value for key, value in state.items() if hasattr(value, "shape")}, wanted)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise Refused(f"{path} could not be copied into the model: {_line(error)}") from error
    notes = [f"{len(state)} tensors"]
    notes += [f"found under {where!r}"] if where else []
    notes += [f"the prefix {stripped!r} of every key was taken off"] if stripped else []
    say(f"{path}: {', '.join(notes)}")


def _absent(path: Path) -> str:
    if path.is_dir():
        inside = sorted(
            p.name for p in path.iterdir() if p.suffix in {".pt", ".pth", ".safetensors", ".ckpt"}
        )
        example = f"; in it are {', '.join(inside[:_NAMED])}" if inside else ""
        return f"is a directory, allowed is a file or a pattern in quotes, 'epoch*.pt'{example}"
    parent = path.parent
    if glob.has_magic(str(path)):
        return "no file matches"
    if not parent.is_dir():
        return f"no such file (there is no directory {parent})"
    return f"no such file{nearest(path.name, [p.name for p in parent.iterdir() if p.is_file()])}"


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    return [
        (not part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in re.split(r"(\d+)", str(path))
    ]


def _kind(path: Path) -> str:
    """Return "zip", "safetensors" or "pickle", by content: a name may lie."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
            size = path.stat().st_size
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise Refused(f"{path} is empty; copy or write it again")
    if head[:4] == b"PK\x03\x04":
        return "zip"
    length = int.from_bytes(head[:8], "little")
    if path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{"):
        if length > min(MAX_HEADER, size):
            raise Refused(
                f"{path} is no safetensors file, or damaged: its header claims {length} bytes; allowed are "
                f"{MAX_HEADER >> 20} MiB and the size of the file"
            )
        return "safetensors"
    return "pickle"


def _safetensors(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = list(file.keys())
            # names and shapes are compared while the tensors still lie in the file
            shapes = {
                key: _Shape(tuple(file.get_slice(key).get_shape())) for key in keys[: 2 * len(wanted) + 1000]
            }
            _refuse_misfit(path, _without_prefix(shapes, wanted)[0], wanted)
            return {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise Refused(f"{path} is damaged or no safetensors file: {_line(error)}") from error


class _Shape:
    """Stands in for a tensor that was not read."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape


def _torch_file(path: Path, kind: str, trust: bool) -> Any:
    import pickle

    import torch

    if kind == "zip":
        _check_archive(path)
    elif not trust:
        raise Refused(
            f"{path} is an old-style pickle or no checkpoint at all; such a file cannot be checked before it is "
            "read. Write it anew with torch.save(model.state_dict(), ...), or, if you know who made it, give "
            "--trust-checkpoint (it may run code)"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise Refused(f"{path} {_needed(error)}") from error
    except Exception as error:
        # torch.load on a damaged file raises whatever its parts raise
        raise Refused(f"{path} is damaged or no checkpoint: {_line(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuse an archive that expands: stored members only, no larger than the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:
        raise Refused(f"{path} is damaged ({_line(error)}); copy or write it again") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise Refused(f"{path} has compressed members, which torch.save never writes; it is not read")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise Refused(f"{path} claims more bytes inside than the file has; it is damaged or made to do harm")
    pickles = [member.file_size for member in members if member.filename.endswith("data.pkl")]
    if not pickles:
        raise Refused(f"{path} is a zip archive without data.pkl, so no file of torch.save")
    if max(pickles) > MAX_PICKLE:
        raise Refused(f"{path} has a description of {max(pickles)} bytes; allowed are {MAX_PICKLE >> 20} MiB")


def _needed(error: Exception) -> str:
    found = re.search(r"GLOBAL\s+(\S+)", str(error))
    what = f"needs code to be read ({found.group(1)})" if found else "is damaged or needs code to be read"
    return (
        f"{what}, and running code from a checkpoint is refused. Write it anew with "
        "torch.save(model.state_dict(), ...), or, if you know who made it, give --trust-checkpoint"
    )


def _state_in(content: Any, path: Path) -> tuple[dict[str, Any], str]:
    """Return the state dict of a checkpoint and the key it was found under ("" for a bare one)."""
    import torch

    places = [("", content)]
    if isinstance(content, Mapping):
        places += [(key, content[key]) for key in NESTED if key in content]
    for where, candidate in places:
        place = candidate.state_dict() if isinstance(candidate, torch.nn.Module) else candidate
        if isinstance(place, Mapping) and place:
            extra = [key for key, v in place.items() if not (isinstance(v, torch.Tensor) or _is_extra(key))]
            if not extra:
                return {str(key): value for key, value in place.items()}, where
    held = (
        f"it holds {', '.join(map(repr, list(content)[:6]))}"
        if isinstance(content, Mapping)
        else (f"it holds a {type(content).__name__}")
    )
    raise Refused(f"{path} has no state dict, bare or under {', '.join(NESTED)}; {held}")


def _is_extra(key: Any) -> bool:
    return str(key).endswith("_extra_state")


def _without_prefix(state: dict[str, T], wanted: Mapping[str, Any]) -> tuple[dict[str, T], str]:
    """Take `module.` and `_orig_mod.` off where every key has it and the model has none."""
    stripped = ""
    while state:
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None or any(key.startswith(prefix) for key in wanted):
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        stripped += prefix
    return state, stripped


def _refuse_misfit(path: Path, state: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    # files older than this counter lack it; load_state_dict fills it in, and eval mode does not use it
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    misfitting = [
        f"{key} is {_shape(state[key])} in the file, {_shape(wanted[key])} in the model"
        for key in wanted
        if key in state and tuple(state[key].shape) != tuple(wanted[key].shape)
    ]
    kinds = [
        f"{key} is {state[key].dtype} in the file, {wanted[key].dtype} in the model"
        for key in wanted
        if key in state and _is_inexact(state[key]) and not _is_inexact(wanted[key])
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


def _is_inexact(value: Any) -> bool:
    """Return whether a tensor's numbers are real or complex; copied into integers they would be cut."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and bool(dtype.is_floating_point or dtype.is_complex)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _shape(value: Any) -> str:
    return f"({', '.join(map(str, value.shape))})"


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
