"""Checkpoints of a model, read without running code: `torch.save` of a state dict, or safetensors."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landscape.errors import Refused

_NESTED = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile put them in front


def expand(patterns: Iterable[str]) -> list[Path]:
    """Return the files that names or patterns mean, those of a pattern in natural order (epoch2 before epoch10).

    Raises:
        Refused: if one means no file.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        hits = [path] if path.is_file() else map(Path, glob.glob(str(path)))  # noqa: PTH207  (may be absolute)
        matches = sorted((hit for hit in hits if hit.is_file()), key=_natural)
        if not matches:
            raise Refused(f"{pattern} is no checkpoint: there is no such file")
        found += matches
    return found


def read(path: Path | str) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, bare or under state_dict, model or model_state_dict.

    Raises:
        Refused: if it cannot be read without running code, or holds no state dict.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # damaged files raise whatever their parts raise
        line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise Refused(f"{path} cannot be read as a state dict without running code: {line}") from error
    return _state_in(content, path)


def parameters(
    state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], origin: str
) -> list[Tensor]:
    """Return the tensors of these names and shapes, in their order.

    Args:
        state: of a checkpoint; a prefix `module.` of all names is taken off.
        wanted: shapes by name.
        origin: of the checkpoint, for messages.

    Raises:
        Refused: if one is missing or has another shape.
    """
    for prefix in _PREFIXES:
        if (
            state
            and all(name.startswith(prefix) for name in state)
            and not any(n.startswith(prefix) for n in wanted)
        ):
            state = {name.removeprefix(prefix): t for name, t in state.items()}
    missing = [name for name in wanted if name not in state]
    if missing:
        raise Refused(
            f"{origin} is of another model: it has no {', '.join(missing[:3])}; it has {', '.join(list(state)[:3])}"
        )
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise Refused(
                f"{origin} is of another model: {name} has shape {tuple(state[name].shape)} there, {shape} here"
            )
    return [state[name] for name in wanted]


def _state_in(content: Any, path: Path) -> dict[str, Tensor]:
    places = [content]
    if isinstance(content, Mapping):
        places += [content[key] for key in _NESTED if key in content]
    for place in places:
        if isinstance(place, Mapping) and place:
            found = {str(key): value for key, value in place.items() if isinstance(value, Tensor)}
            if len(found) == len([key for key in place if not str(key).endswith("_extra_state")]):
                return found
    raise Refused(f"{path} has no state dict, bare or under {', '.join(_NESTED)}")


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
