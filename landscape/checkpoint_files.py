"""Files of weights as they lie on the disk: which there are, of what kind, and whether they may be opened.

What a hostile one can do was tried: a pickle runs code, a compressed archive expands a thousandfold, a
description of 64 MB makes a hundred million objects, a call of `bytearray(10**12)`, which
`torch.load(weights_only=True)` allows, takes all memory. Everything here is found out before torch sees a byte,
and torch is not needed for it.
"""

from __future__ import annotations

import difflib
import glob
import io
import pickletools
import re
import struct
import zipfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from landscape import opening
from landscape.errors import Refused

PICKLE_LIMIT = 64 << 20  # bytes of a description
STEPS_LIMIT = 500_000  # steps of a description: thirty for each tensor, each at most some hundred bytes
DIRECTORY_LIMIT = 16 << 20  # bytes of an archive's table of contents
_ENDINGS = {".pt", ".pth", ".safetensors", ".ckpt"}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5
_END, _END64, _LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_DTYPES = (
    "float64 float32 float16 bfloat16 complex64 complex128 int64 int32 int16 int8 uint8 bool "
    "float8_e4m3fn float8_e5m2 uint16 uint32 uint64"
)
_STORAGES = "Double Float Half BFloat16 ComplexFloat ComplexDouble Long Int Short Char Byte Bool"
# What a state dict and what usually lies beside it are made of: nothing that makes more than it is given.
_HARMLESS = {
    "collections OrderedDict", "__builtin__ set", "builtins set", "torch Size", "torch device",
    "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter", "torch.storage UntypedStorage",
    *(f"torch {name}" for name in _DTYPES.split()), *(f"torch {name}Storage" for name in _STORAGES.split()),
}  # fmt: skip


def expand(patterns: Iterable[str]) -> list[Path]:
    """Return the files that names or patterns mean, in natural order (epoch2 before epoch10), each once.

    Raises:
        Refused: if one means no file.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        hits = [path] if path.is_file() else map(Path, glob.glob(str(path)))  # noqa: PTH207  (may be absolute)
        matches = [hit for hit in hits if hit.is_file()]
        if not matches:
            raise Refused(f"{pattern}: {_absent(path)}")
        found += sorted(matches, key=_natural)
    return list({path.resolve(): path for path in found}.values())


def kind(path: Path) -> str:
    """Return "zip", "safetensors" or "pickle", by content: a name may lie.

    Raises:
        Refused: if it cannot be opened, or is empty.
    """
    try:
        with opening.regular(path) as file:
            head = file.read(9)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise Refused(f"{path} is empty; copy or write it again")
    if head[:4] == b"PK\x03\x04":
        return "zip"
    return "safetensors" if path.suffix == ".safetensors" or head[8:] == b"{" else "pickle"


def require_harmless(path: Path, of_kind: str, known: Collection[str] = ()) -> None:
    """Refuse a file of `torch.save` that does more than to bring tensors of its own size.

    Args:
        path: of the file.
        of_kind: "zip", or "pickle" as torch wrote before 1.6.
        known: names that may be called too, each a module and a name with a blank between.

    Raises:
        Refused: naming what it does.
    """
    try:
        with opening.regular(path) as file:
            if of_kind == "zip":
                _check_archive(path, file, known)
            else:
                with io.BufferedReader(file) as buffered:  # type: ignore[type-var]
                    _check_pickles(path, buffered, known)
    except Refused:
        raise
    except Exception as error:
        # zipfile and pickletools raise many things at damaged files
        raise Refused(f"{path} is damaged ({line(error)}); copy or write it again") from error


def needs(name: str) -> str:
    """Return the words for a pickle that calls something."""
    return (
        f"needs code to be read ({name}), and running code from a checkpoint is refused. Write it anew with "
        "torch.save(model.state_dict(), ...), or, if you know who made it, give --trust-checkpoint"
    )


def line(error: BaseException) -> str:
    """Return an error's text as one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _check_archive(path: Path, file: BinaryIO, known: Collection[str]) -> None:
    """Refuse an archive that expands, or that two programs could read differently."""
    size = opening.size(file)
    table = _size_of_directory(path, file, size)
    if table > DIRECTORY_LIMIT:
        raise Refused(
            f"{path} has a table of contents of {table} bytes; allowed are {DIRECTORY_LIMIT >> 20} MiB"
        )
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise Refused(f"{path} has compressed members, which torch.save never writes; it is not read")
        if sum(member.file_size for member in members) > size:
            raise Refused(
                f"{path} claims more bytes inside than the file has; it is damaged or made to do harm"
            )
        _check_names(path, [member.filename for member in members])
        pickles = [member for member in members if member.filename.lower().endswith("data.pkl")]
        if not pickles:
            raise Refused(f"{path} is a zip archive without data.pkl, so no file of torch.save")
        largest = max(member.file_size for member in pickles)
        if largest > PICKLE_LIMIT:
            raise Refused(
                f"{path} has a description of {largest} bytes; allowed are {PICKLE_LIMIT >> 20} MiB"
            )
        for member in pickles:
            _check_steps(path, [archive.read(member)], known)


def _size_of_directory(path: Path, file: BinaryIO, size: int) -> int:
    """Return the bytes of the table of contents, which the end of the archive states.

    Source: PKWARE, APPNOTE.TXT 6.3, sections 4.3.14 to 4.3.16.
    """
    end = _at(file, size - 22, 22)
    if end[:4] != _END or end[20:] != b"\0\0":
        raise Refused(
            f"{path} does not end like an archive of torch.save: it was cut, or something was added"
        )
    stated = struct.unpack_from("<I", end, 12)[0]
    locator = _at(file, size - 42, 20)
    if locator[:4] != _LOCATOR64:
        return int(stated)
    record = _at(file, struct.unpack_from("<Q", locator, 8)[0], 56)
    return max(int(stated) % 0xFFFFFFFF, int(struct.unpack_from("<Q", record, 40)[0]))


def _at(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(max(0, start))
    return file.read(count).ljust(count, b"\0")


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Refuse names that are one to torch (it takes a for A) but several to us: each would be read again."""
    inside = [name.partition("/")[2] for name in names]
    data = [name.removeprefix("data/") for name in inside if name.lower().startswith("data/")]
    if len({name.lower() for name in names}) < len(names) or not all(re.fullmatch("[0-9]+", n) for n in data):
        raise Refused(f"{path} has members with names that torch.save never gives; it is not read")


def _check_pickles(path: Path, file: BinaryIO, known: Collection[str]) -> None:
    """Look through the pickles with which a file of torch.save before 1.6 begins."""
    limited: Any = _Limited(file, PICKLE_LIMIT)
    first = [found for _, found, _ in pickletools.genops(limited)] if _is_pickle(file) else []
    if _LEGACY_MAGIC not in first:
        raise Refused(f"{path} is no checkpoint: neither a file of torch.save nor safetensors")
    _check_steps(path, [limited] * (_LEGACY_PICKLES - 1), known)


def _is_pickle(file: BinaryIO) -> bool:
    head = file.read(1)
    file.seek(0)
    return head == b"\x80"


def _check_steps(path: Path, pickles: Iterable[Any], known: Collection[str]) -> None:
    steps = 0
    for pickle in pickles:
        for operation, argument, _ in pickletools.genops(pickle):
            steps += 1
            if steps > STEPS_LIMIT:
                raise Refused(f"{path} takes more than {STEPS_LIMIT} steps to be read; it is not read")
            if operation.name in {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}:
                raise Refused(f"{path} {needs(operation.name)}")
            if operation.name == "GLOBAL" and argument not in _HARMLESS and argument not in known:
                raise Refused(f"{path} {needs(str(argument).replace(' ', '.'))}")


class _Limited:
    """A file of which only so many bytes can be read."""

    def __init__(self, file: BinaryIO, left: int):
        self.file, self.left = file, left

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError("its description is too long")
        self.left -= count
        return self.file.read(count)

    def readline(self) -> bytes:
        found = self.file.readline(self.left)
        self.left -= len(found)
        return found


def _absent(path: Path) -> str:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in _ENDINGS)
        example = f"; in it are {', '.join(inside[:3])}" if inside else ""
        return f"is a directory, allowed is a file or a pattern in quotes, 'epoch*.pt'{example}"
    if glob.has_magic(str(path)):
        return "no file matches"
    if not path.parent.is_dir():
        return f"no such file (there is no directory {path.parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_file()], n=1)
    return f"no such file (did you mean {near[0]}?)" if near else "no such file"


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    return [
        (not part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in re.split(r"(\d+)", str(path))
    ]
