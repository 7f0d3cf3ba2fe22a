"""Safetensors files: arrays of parameter length beside a result, and the states of unfinished units.

Both carry a hash of their contents (BLAKE2b, RFC 7693, 16 bytes), which is checked on reading.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from landscape import atomic
from landscape.atomic import ResultsError

_TYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}
_HEADER_LIMIT = 10_000_000  # bytes; a header full of empty tensors otherwise costs seconds and a gigabyte
_SIDECAR = "sidecar 1"
_STATE = "state 1"
_AGAIN = "bring it back from where it was made, or delete both files and measure again"


def digest(array: np.ndarray) -> str:
    """Return the hash of an array's type, shape and values."""
    array = _plain(array)
    hasher = hashlib.blake2b(f"{array.dtype.name} {array.shape}".encode(), digest_size=16)
    hasher.update(_bytes(array))
    return hasher.hexdigest()


def sidecar_path(path: Path) -> Path:
    """Return where the parameter-length arrays of the result `path` lie."""
    return path.with_name(f"{path.stem}.arrays.safetensors")


def update_sidecar(path: Path, arrays: Mapping[str, np.ndarray], hashes: Mapping[str, str]) -> None:
    """Bring `arrays` into the sidecar `path`, and keep those that lie there until `prune_sidecar`.

    The result beside it still states the old arrays: a kill before it is replaced must leave both. Nothing
    is written when all are there already.

    Args:
        path: the sidecar.
        arrays: by name.
        hashes: the `digest` of each.

    Raises:
        ResultsError: if the file cannot be written, or is another program's.
        ValueError: if an array has a type that cannot be stored.
    """
    if not arrays:
        return
    present = _stated(path)
    found = {name: _key(present, name, value) for name, value in hashes.items()}
    if None not in found.values():
        return
    kept = {
        (f"{key}@{value}" if key in hashes else key): (key, value)
        for key, value in present.items()
        if key not in found.values()
    }
    _rewrite(path, {name: (_plain(array), hashes[name]) for name, array in arrays.items()}, kept)


def prune_sidecar(path: Path, hashes: Mapping[str, str]) -> None:
    """Drop from the sidecar `path` what is not among `hashes`; without any, delete the file.

    Raises:
        ResultsError: if the file cannot be written or deleted, or is another program's.
    """
    present = _stated(path)
    if present == dict(hashes):
        return
    if not hashes:
        atomic.remove(path)
        return
    keys = {name: _key(present, name, value) for name, value in hashes.items()}
    _rewrite(path, {}, {name: (key, hashes[name]) for name, key in keys.items() if key is not None})


def read_sidecar(path: Path, hashes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return the arrays that `hashes` names, each checked.

    Raises:
        ResultsError: if the file or an array in it is missing, damaged or another one.
    """
    if not hashes:
        return {}
    arrays = {}
    try:
        with _opened(path) as file:
            present = _labels(file, path)
            for name, expected in hashes.items():
                key = _key(present, name, expected)
                if key is None:
                    raise ResultsError(
                        f"{path} holds another {name} than the result beside it states; {_AGAIN}"
                    )
                arrays[name] = np.asarray(file.get_tensor(key))
                if digest(arrays[name]) != expected:
                    raise ResultsError(f"{path} is damaged: {name} differs from its hash; {_AGAIN}")
    except FileNotFoundError as error:
        names = ", ".join(hashes)
        raise ResultsError(
            f"{path} is missing; it holds {names} of the result beside it; {_AGAIN}"
        ) from error
    except OSError as error:
        raise atomic.explain("read", path, error) from error
    except ResultsError:
        raise
    except Exception as error:
        raise ResultsError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); {_AGAIN}") from error
    return arrays


def write_state(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write the state of an unfinished unit, as a whole or not at all.

    Args:
        path: the file.
        arrays: any shapes, also 0-d and empty; numbers or bool.
        metadata: JSON-able values.

    Raises:
        ResultsError: if the file cannot be written.
        TypeError: if `metadata` is not JSON-able.
        ValueError: if an array has a type that cannot be stored.
    """
    plain = {name: _plain(array) for name, array in arrays.items()}
    note = json.dumps(dict(metadata))
    labels = {"landscape": _STATE, "metadata": note, "blake2b": _state_hash(plain, note)}
    layout = {name: _describe(array) for name, array in plain.items()}
    atomic.replace(Path(path), _pieces(layout, labels, lambda name: plain[name]))


def read_state(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Return the arrays and metadata that `write_state` wrote; None if the file is absent or damaged."""
    try:
        with _opened(Path(path)) as file:
            labels = file.metadata() or {}
            if labels.get("landscape") != _STATE:
                return None
        arrays = _arrays(Path(path))
        if _state_hash(arrays, labels["metadata"]) != labels["blake2b"]:
            return None
        return arrays, json.loads(labels["metadata"])
    except Exception:  # noqa: BLE001 (whatever is wrong with it: the unit starts again)
        return None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a file whose header was found sound, each once; the library holds them twice meanwhile."""
    arrays, names = {}, {code: name for name, code in _TYPES.items()}
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                file.seek(8 + length + entry["data_offsets"][0])
                dtype = np.dtype(names[entry["dtype"]]).newbyteorder("<")
                count = math.prod(entry["shape"])
                arrays[name] = np.fromfile(file, dtype, count).reshape(entry["shape"])
    return arrays


def _state_hash(arrays: Mapping[str, np.ndarray], note: str) -> str:
    parts = sorted((name, digest(array)) for name, array in arrays.items())
    return hashlib.blake2b(json.dumps([note, parts]).encode(), digest_size=16).hexdigest()


def _key(present: Mapping[str, str], name: str, value: str) -> str | None:
    """Return under which key the array `name` with hash `value` lies, if it does."""
    return next((key for key in (name, f"{name}@{value}") if present.get(key) == value), None)


def _stated(path: Path) -> dict[str, str]:
    """Return the hash of each array as the sidecar states it; nothing if it is absent or damaged."""
    try:
        with _opened(path) as file:
            return _labels(file, path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise atomic.explain("read", path, error) from error
    except ResultsError:
        raise
    except Exception:  # noqa: BLE001 (damaged: to be replaced, and whatever needed it is lost already)
        return {}


def _labels(file: Any, path: Path) -> dict[str, str]:
    labels = file.metadata() or {}
    if labels.get("landscape") != _SIDECAR:
        raise ResultsError(
            f"{path} was not written by landscape; move it away, or give the result another name"
        )
    return {key: labels[key] for key in file.keys() if key in labels}  # noqa: SIM118 (not a mapping)


def _rewrite(
    path: Path, fresh: Mapping[str, tuple[np.ndarray, str]], kept: Mapping[str, tuple[str, str]]
) -> None:
    """Write the arrays `fresh` and those `kept` of the old file (new key -> old key and hash)."""
    labels = {"landscape": _SIDECAR} | {name: value for name, (_, value) in (*fresh.items(), *kept.items())}
    layout = {name: _describe(array) for name, (array, _) in fresh.items()}
    if not kept:
        atomic.replace(path, _pieces(layout, labels, lambda name: fresh[name][0]))
        return
    with _opened(path) as old:
        for name, (key, _) in kept.items():
            part = old.get_slice(key)
            layout[name] = (part.get_dtype(), tuple(part.get_shape()))

        def get(name: str) -> np.ndarray:
            return fresh[name][0] if name in fresh else np.asarray(old.get_tensor(kept[name][0]))

        atomic.replace(path, _pieces(layout, labels, get))


def _pieces(
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    labels: Mapping[str, str],
    get: Callable[[str], np.ndarray],
) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file: length of the header, header, data (https://huggingface.co/docs/safetensors).

    The library's own writer hides which error the system gave and copies every array; this one does neither.
    """
    sizes = {code: np.dtype(name).itemsize for name, code in _TYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(labels)}
    end = 0
    # Wide types first: every array then starts at a multiple of its item's size.
    names = sorted(layout, key=lambda name: (-sizes[layout[name][0]], name))
    for name in names:
        code, shape = layout[name]
        start, end = end, end + int(np.prod(shape, dtype=object)) * sizes[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise TypeError(
            f"{len(layout)} arrays and their metadata need a header of {len(text)} bytes; store fewer"
        )
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        yield _bytes(_plain(get(name)))


def _describe(array: np.ndarray) -> tuple[str, tuple[int, ...]]:
    return _TYPES[array.dtype.name], array.shape


def _plain(array: np.ndarray) -> np.ndarray:
    """Return the array in C order and little-endian; `numpy.ascontiguousarray` would make a 0-d array 1-d."""
    array = np.asarray(array)
    if array.dtype.name not in _TYPES:
        raise ValueError(f"arrays of type {array.dtype} cannot be stored; allowed are {', '.join(_TYPES)}")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
    if length > _HEADER_LIMIT:
        raise ValueError(f"its header claims {length} bytes, more than the allowed {_HEADER_LIMIT}")
    with safe_open(path, framework="numpy") as tensors:
        yield tensors
