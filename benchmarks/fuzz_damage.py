"""How files of ours are damaged: bytes at random, and values at random in files whose form is right."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from landscape import results
from landscape.record import Record

_SIZES = (
    0,
    1,
    2,
    255,
    65535,
    1 << 31,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
)


def damaged(content: bytes, others: list[bytes], random: Random) -> bytes:
    """Return a file with bits, bytes, sizes or whole stretches changed, moved, cut out or put in."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        random.choice(_WAYS)(data, others, random)
    return bytes(data)


def _place(data: bytearray, random: Random) -> int:
    # half of the damage goes where the structure is, at the beginning
    return random.randrange(min(len(data), 4096) if random.random() < 0.5 else len(data)) if data else 0


def _bits(data: bytearray, _: list[bytes], random: Random) -> None:
    for _ in range(random.choice((1, 1, 2, 4, 16)) if data else 0):
        data[_place(data, random)] ^= 1 << random.randrange(8)


def _bytes(data: bytearray, _: list[bytes], random: Random) -> None:
    for _ in range(random.choice((1, 1, 2, 4, 16)) if data else 0):
        data[_place(data, random)] = random.choice((0, 1, 255, random.randrange(256)))


def _run(data: bytearray, _: list[bytes], random: Random) -> None:
    start, length = _place(data, random), random.choice((2, 8, 64, 512))
    data[start : start + length] = random.choice((b"\0", b"\xff", random.randbytes(1))) * len(
        data[start : start + length]
    )


def _cut(data: bytearray, _: list[bytes], random: Random) -> None:
    del data[random.randrange(len(data) + 1) :]


def _hole(data: bytearray, _: list[bytes], random: Random) -> None:
    start = _place(data, random)
    del data[start : start + random.choice((1, 8, 64, 512))]


def _size(data: bytearray, _: list[bytes], random: Random) -> None:
    form, value = random.choice((("<H", 2), ("<I", 4), ("<Q", 8))), random.choice(_SIZES)
    start = _place(data, random) // form[1] * form[1]
    raw = struct.pack(form[0], value % (1 << 8 * form[1]))
    data[start : start + form[1]] = raw


def _splice(data: bytearray, others: list[bytes], random: Random) -> None:
    source = random.choice((bytes(data), random.choice(others)))
    length, start = random.choice((4, 64, 512)), random.randrange(len(source) + 1)
    piece, target = source[start : start + length], _place(data, random)
    data[target : target + (len(piece) if random.random() < 0.7 else 0)] = piece


_WAYS = (_bits, _bytes, _run, _cut, _hole, _size, _splice)


# --- nonsense: files whose form is right ---------------------------------------------------------------

_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2**70, 1e308, float("nan"), "", "x", "$\\frac{", "\x1b[2J\u202e", "\udc80", "[1", "{}",
    "../../x", [], [None], ["a", 3], [[[]]], {}, {"a": None}, {"a": [0, 1, 2]}, {"kind": 3}, {"value": {"b": 1}},
    json.dumps({"k": {}}),
)  # fmt: skip


def write_nonsense(path: Path, record: Record, random: Random) -> None:
    """Write a measurement that `_nonsense` changed, in a way that the format can hold."""
    while True:
        with contextlib.suppress(ValueError):
            results.write(path, _nonsense(record, random))
            return


def _nonsense(record: Record, random: Random) -> Record:
    """Return a measurement with values of other types, other shapes, other names, or without some."""
    changed = Record(dict(record.variables), dict(record.attrs))
    for _ in range(random.choice((1, 1, 2, 5))):
        if random.random() < 0.5:
            name = random.choice([*changed.attrs, "headline", "told", "listed", "configuration"])
            changed.attrs[name] = random.choice(_VALUES)
            if random.random() < 0.2:
                del changed.attrs[name]
            continue
        name = random.choice([*changed.variables])
        variable = changed.variables.pop(name)
        if random.random() < 0.8:
            changed.variables[name] = _other(variable, random)
    return changed


def _other(variable: Any, random: Random) -> Any:
    data, dims = variable.data, variable.dims
    way = random.randrange(6)
    if way == 0:
        data = np.full(data.shape, random.choice((np.nan, np.inf, -1e308, 0.0, 1e-320)))
    elif way == 1:
        data = np.full(data.shape, random.choice(("", "text", "$x_", "\u202e")))
    elif way == 2:
        data = np.full(data.shape, random.choice((True, False)))
    elif way == 3:
        data = np.full(data.shape, random.choice((2**62, -1, 0)), np.int64)
    elif way == 4:
        data, dims = np.zeros((0, *data.shape)), ("other", *dims)
    else:
        data, dims = (
            np.float64(data.ravel()[0]) if data.size and data.dtype.kind in "fiub" else np.zeros(()),
            (),
        )
    return dataclasses.replace(variable, data=data, dims=tuple(f"n{k}" for k in range(np.ndim(data)))
                               if random.random() < 0.5 and np.ndim(data) else dims)  # fmt: skip
