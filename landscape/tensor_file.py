"""Safetensors files, read without trusting them: the header is checked against the file before anything is made.

The arrays are read into memory of their own. A file that is mapped into memory, as the library does, ends
the process when somebody shortens it meanwhile.

Source: https://huggingface.co/docs/safetensors (length of the header, header, data).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from landscape import opening

HEADER_LIMIT = 10_000_000  # bytes
RANK_LIMIT = 64
# Bytes of an entry of each type that the format knows, and whose entries fill whole bytes.
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class Damaged(ValueError):  # noqa: N818  (the state of a file)
    """What is wrong with a file."""


@dataclass(frozen=True)
class Entry:
    """One array in a file.

    Attributes:
        code: its type, in the format's words.
        shape: as in NumPy.
        start: where its bytes begin, counted from the beginning of the file.
        size: how many these are.
    """

    code: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class TensorFile:
    """An open file whose header was checked.

    Attributes:
        file: what is read from.
        metadata: texts by name.
        entries: arrays by name.
    """

    file: BinaryIO
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]

    def read(self, name: str) -> bytearray:
        """Return the bytes of an array.

        Raises:
            Damaged: if the file ends before them.
        """
        entry = self.entries[name]
        data = bytearray(entry.size)
        self.file.seek(entry.start)
        rest = memoryview(data)
        while rest:
            count = self.file.readinto(rest)  # type: ignore[attr-defined]
            if not count:
                raise Damaged(f"it ends before the end of {name}")
            rest = rest[count:]
        return data


@contextmanager
def opened(path: Path | str, most: int) -> Iterator[TensorFile]:
    """Open a file and check its header.

    Args:
        path: of the file.
        most: arrays that it may hold.

    Raises:
        OSError: if it cannot be opened or is no regular file.
        Damaged: if the header is not one, or says something that the file does not bear out.
    """
    with opening.regular(path) as file:
        size = opening.size(file)
        head = file.read(8)
        if len(head) < 8:
            raise Damaged(f"it has {size} bytes, less than a header")
        (length,) = struct.unpack("<Q", head)
        if length > min(HEADER_LIMIT, size - 8):
            raise Damaged(
                f"its header claims {length} bytes; allowed are {HEADER_LIMIT} and the size of the file"
            )
        text = TensorFile(file, {}, {"header": Entry("U8", (length,), 8, length)}).read("header")
        _require_few(text.count(b'"dtype"'), most)  # before objects are made of them
        header = _header(text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise Damaged("its metadata are not texts")
        _require_few(len(header), most)
        entries = {name: _entry(name, stated, 8 + length) for name, stated in header.items()}
        _require_seamless(entries, 8 + length, size)
        yield TensorFile(file, metadata, entries)


def _require_few(count: int, most: int) -> None:
    if count > most:
        raise Damaged(f"it holds {count} arrays, more than the allowed {most}")


def _header(text: bytearray) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"its header is not JSON ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(header, dict):
        raise Damaged("its header is no table")
    return header


def _entry(name: str, stated: Any, base: int) -> Entry:
    try:
        code, shape, (start, end) = stated["dtype"], stated["shape"], stated["data_offsets"]
        sound = isinstance(shape, list) and len(shape) <= RANK_LIMIT and _whole([*shape, start, end])
        size = math.prod(shape) * SIZES[code] if sound else -1
    except (TypeError, ValueError, KeyError) as error:
        raise Damaged(f"its header does not describe {name[:100]!r}") from error
    if size < 0 or end - start != size:
        raise Damaged(f"its header contradicts itself about {name[:100]!r}")
    return Entry(code, tuple(shape), base + start, size)


def _whole(numbers: list[Any]) -> bool:
    return all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)


def _require_seamless(entries: Mapping[str, Entry], base: int, size: int) -> None:
    """The arrays lie one behind the other from the header to the end, as the format demands."""
    end = base
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.size)):
        if entry.start != end:
            raise Damaged("its arrays overlap, or leave gaps")
        end += entry.size
    if end != size:
        raise Damaged(f"its arrays end at byte {end}, the file at {size}")
