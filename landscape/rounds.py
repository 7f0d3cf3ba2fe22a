"""Rounds of units in a record: how units are put in, and a name for a round that all who measure it agree on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from landscape.errors import TOLERANCE_MISSED
from landscape.record import Record, Variable

FOLDER = ".parts"  # beside a result: states of unfinished blocks, and parts of rounds


def first(shared: Record) -> str:
    """Name what was prepared: units measured with another preparation belong to another measurement."""
    digest = hashlib.blake2b(json.dumps(shared.attrs, sort_keys=True, default=str).encode(), digest_size=8)
    _update(digest, shared.variables)
    return digest.hexdigest()


def following(before: str, stop: int, inputs: Mapping[str, Variable]) -> str:
    """Name the round after the one that is called `before`: by its end and what its units are measured at."""
    digest = hashlib.blake2b(f"{before}/{stop}".encode(), digest_size=8)
    _update(digest, inputs)
    return digest.hexdigest()


def is_open(record: Record) -> bool:
    """Whether a first round has begun."""
    return "done" in record


def open_blocks(record: Record) -> list[range]:
    """The blocks of the current round of which a unit is not done."""
    size, stop = record.attrs["block_size"], record.attrs["stop"]
    blocks = [range(start, min(start + size, stop)) for start in range(0, stop, size)]
    return [block for block in blocks if not record["done"][block.start : block.stop].all()]


def exit_code(record: Record) -> int:
    """The exit code of a measurement whose rounds are all done."""
    return TOLERANCE_MISSED if "converged" in record and not bool(record["converged"]) else 0


def put(record: Record, name: str, like: Variable, where: slice | np.ndarray, values: np.ndarray) -> None:
    """Put the values of some units into a variable; where it is new, all other units are blank.

    Args:
        record: a round is open in it.
        name: of the variable.
        like: its dimensions, the unit's first, and labels.
        where: which units.
        values: theirs.
    """
    if name not in record:
        empty = like.data[:0]
        empty = empty if empty.dtype.kind in "fUb" else empty.astype(float)
        blank = lengthened(empty, record.attrs["stop"])
        record.variables[name] = dataclasses.replace(like, data=blank)
    held = record.variables[name]
    if (
        values.dtype.kind == "U" and values.dtype.itemsize > held.data.dtype.itemsize
    ):  # or longer texts were cut
        held = record.variables[name] = dataclasses.replace(held, data=held.data.astype(values.dtype))
    held.data[where] = values


def lengthened(data: np.ndarray, stop: int) -> np.ndarray:
    """Return the values of all units up to `stop`; new ones are blank."""
    blank = np.nan if data.dtype.kind == "f" else np.zeros((), data.dtype)
    longer = np.full((stop, *data.shape[1:]), blank, data.dtype)
    longer[: data.shape[0]] = data
    return longer


def _update(digest: Any, variables: Mapping[str, Variable]) -> None:
    for name, variable in sorted(variables.items()):
        data = np.ascontiguousarray(variable.data)
        digest.update(f"{name}{data.dtype}{data.shape}".encode())
        digest.update(data.tobytes() if data.dtype.kind == "U" else data.reshape(-1).view(np.uint8))
