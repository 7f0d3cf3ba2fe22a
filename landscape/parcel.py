"""What the reader process found, on its way back: plain bytes, which are checked on arrival.

A damaged file may make libhdf5 do anything, so the process that read one is not believed either: names,
types and sizes are checked again, and nothing here can run code.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape.limits import ATTRIBUTES_LIMIT, COUNT_LIMIT, ENTRIES_LIMIT, RANK_LIMIT
from landscape.record import NAME

if TYPE_CHECKING:
    from landscape.strict import Contents

HEADER_LIMIT = 1 << 24  # bytes of names and shapes
_TYPE = re.compile(r"[<>|]([iu][1248]|f[48])|\|S[1-9][0-9]{0,8}")

Plain = int | float | str | list[Any]
Unpacked = tuple[dict[str, Plain], dict[str, tuple[np.ndarray, dict[str, Plain]]]]


class Damaged(Exception):  # noqa: N818  (the state of what arrived)
    """The answer is not one that our reader gives, or says that the file was refused."""


def pack(found: Contents) -> Iterator[bytes | memoryview]:
    """Yield the answer of the reader, piece by piece."""
    arrays = list(found.attrs.values())
    for array, attrs in found.variables.values():
        arrays += [array, *attrs.values()]
    variables = [
        [name, array.dtype.str, array.shape, _table(attrs)]
        for name, (array, attrs) in found.variables.items()
    ]
    yield _header({"attrs": _table(found.attrs), "variables": variables})
    for array in arrays:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def refusal(reason: str) -> bytes:
    """Return the answer for a file that is not read."""
    return _header({"refused": reason})


def unpack(answer: bytes | memoryview, file_size: int) -> Unpacked:
    """Return root attributes as plain values, and name -> (array, its attributes).

    Args:
        answer: all that came.
        file_size: bytes of the file that was read; its variables cannot be larger.

    Raises:
        Damaged: with the reason for which a file was refused, or with what is wrong with the answer.
    """
    try:
        return _unpacked(memoryview(answer), file_size)
    except (ValueError, TypeError, KeyError, IndexError, struct.error, RecursionError) as error:
        raise Damaged(f"what it holds cannot be told ({' '.join(str(error).split())[:200]})") from error


def answer_limit(file_size: int) -> int:
    """Return the most bytes that an answer about a file of this size can have."""
    return 8 + HEADER_LIMIT + file_size + ATTRIBUTES_LIMIT


def _unpacked(answer: memoryview, file_size: int) -> Unpacked:
    (length,) = struct.unpack_from("<Q", answer)
    if length > min(HEADER_LIMIT, len(answer) - 8):
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(bytes(answer[8 : 8 + length]))
    if "refused" in header:
        raise Damaged(str(header["refused"]))
    if 8 + length + _declared(header, file_size) != len(answer):
        raise ValueError("more or fewer bytes than declared")
    arrays = _arrays(answer[8 + length :])
    next(arrays)
    attrs = _attributes(header["attrs"], arrays)
    variables = {}
    for name, kind, shape, table in header["variables"]:
        array = arrays.send((kind, shape))
        variables[str(name)] = (array, _attributes(table, arrays))
    return attrs, variables


def _declared(header: Any, file_size: int) -> int:
    """Return the bytes that all arrays need, each looked at before the first is made."""
    if len(header["variables"]) > COUNT_LIMIT:
        raise ValueError("too many variables")
    tables = [header["attrs"], *(table for *_, table in header["variables"])]
    attributes = sum(_size(*entry) for table in tables for entry in table)
    data = sum(_size(name, kind, shape) for name, kind, shape, _ in header["variables"])
    entries = max((math.prod(shape) for table in tables for _, _, shape in table), default=0)
    if attributes > ATTRIBUTES_LIMIT or data > file_size or entries > ENTRIES_LIMIT:
        raise ValueError("more than the file has")
    return attributes + data


def _size(name: Any, kind: Any, shape: Any) -> int:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"the name {name!r}")
    if not isinstance(kind, str) or not _TYPE.fullmatch(kind):
        raise ValueError(f"the type {kind!r}")
    whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in shape)
    if not whole or len(shape) > RANK_LIMIT:
        raise ValueError(f"the shape {shape!r}")
    return int(math.prod(shape) * np.dtype(kind).itemsize)


def _arrays(data: memoryview) -> Any:
    """Take (type, shape), yield the next array, a copy: the answer can then be let go."""
    start, made = 0, None
    while True:
        kind, shape = yield made
        dtype = np.dtype(kind)
        count = math.prod(shape)
        made = np.frombuffer(data, dtype, count, start).reshape(shape).copy()
        start += count * dtype.itemsize


def _attributes(table: Any, arrays: Any) -> dict[str, Plain]:
    return {name: _plain(arrays.send((kind, shape))) for name, kind, shape in table}


def _plain(array: np.ndarray) -> Plain:
    flat = [value.decode() if isinstance(value, bytes) else value for value in array.ravel().tolist()]
    return flat[0] if len(flat) == 1 else flat


def _table(attrs: dict[str, np.ndarray]) -> list[list[Any]]:
    return [[name, array.dtype.str, array.shape] for name, array in attrs.items()]


def _header(values: dict[str, Any]) -> bytes:
    text = json.dumps(values).encode()
    if len(text) > HEADER_LIMIT:
        text = json.dumps({"refused": "its names are too long"}).encode()
    return struct.pack("<Q", len(text)) + text
