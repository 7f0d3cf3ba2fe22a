"""A record as the bytes of a netCDF-4/HDF5 file, and back.

h5py, xarray (both engines), netCDF4 and ncdump read these files. No string has variable length: texts are
fixed-length UTF-8, arrays of texts are characters with one more axis, and the dimension names, which
netCDF-4 keeps in variable-length references, stand a second time in the attribute `dims` as JSON.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape import limits
from landscape.atomic import ResultsError
from landscape.parcel import Unpacked
from landscape.record import FORMAT_ATTRIBUTES, NAME, Record, Variable

if TYPE_CHECKING:
    from landscape.scales import Array

SCHEMA_VERSION = 1
_NUMBERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")
_FROM_COPY = "restore the file from a copy, or measure again"


def encode(record: Record, hashes: Mapping[str, str]) -> bytes:
    """Return the file of a record that `landscape.record.check` passed.

    It is made in memory: on the disk, one plain write is then all that can fail.

    Args:
        record: the measurement; its sidecar variables are described, not included.
        hashes: the hash of each sidecar variable.

    Raises:
        ValueError: if a type cannot be stored, or the file would be larger than the reader allows.
    """
    inside = {name: v for name, v in record.variables.items() if not v.sidecar}
    _check_size(record, inside)
    # Only who writes needs libhdf5: files are read in a process of their own.
    import h5py

    from landscape import scales

    # libhdf5 takes two open files in memory for one if their names are equal.
    memory = h5py.File(
        f"landscape-{uuid.uuid4().hex}",
        "w",
        driver="core",
        backing_store=False,
        libver=("v108", "v108"),  # the oldest format whose attributes may exceed 64 KiB
        track_order=True,  # netCDF-4 wants it
    )
    with memory:
        arrays = {name: _array(name, variable) for name, variable in inside.items()}
        scales.write(memory, arrays, _attributes(record, hashes))
        memory.flush()
        image: bytes = memory.id.get_file_image()
    if len(image) > limits.FILE_LIMIT:
        raise ValueError(
            f"the file would have {len(image)} bytes, more than the allowed {limits.FILE_LIMIT}; "
            "mark arrays of parameter length with sidecar=True"
        )
    return image


def decode(contents: Unpacked, where: str) -> tuple[Record, dict[str, dict[str, Any]]]:
    """Return the record in a file, and the table of what lies in its sidecar.

    Args:
        contents: what the strict reader found: attributes of the file, and its arrays with theirs.
        where: the name of the file, for messages.

    Returns:
        The record without its sidecar variables; for each of these, dims, units, long_name and blake2b.

    Raises:
        ResultsError: if the file is not ours, newer than we are, or damaged.
    """
    attributes, arrays = contents
    _check_version(attributes.get("schema_version"), where)
    coded = _json(attributes, "json_attributes", where)
    if not isinstance(coded, list):
        raise ResultsError(f"{where}: json_attributes is not a list; {_FROM_COPY}")
    attrs = {
        name: _json(attributes, name, where) if name in coded else value
        for name, value in attributes.items()
        if name not in FORMAT_ATTRIBUTES
    }
    variables = {name: _read_variable(f"{where}: {name}", *pair) for name, pair in arrays.items()}
    return Record(variables, attrs), _sidecar_table(_json(attributes, "sidecar", where), where)


def _check_version(version: Any, where: str) -> None:
    if not isinstance(version, int) or version < 1:
        raise ResultsError(
            f"{where}: not a result of landscape (no schema_version); open it with xarray or h5py"
        )
    if version > SCHEMA_VERSION:
        raise ResultsError(
            f"{where}: written by a newer landscape (schema {version}; this one reads up to "
            f"{SCHEMA_VERSION}); update landscape-toolkit"
        )


def _check_size(record: Record, inside: Mapping[str, Variable]) -> None:
    """Keep to what the strict reader reads: a file that we then refuse ourselves would be lost work."""
    names = set(inside) | {dim for v in inside.values() for dim in v.dims}
    # Each array of texts may add a dimension for its longest text.
    count = len(names) + sum(v.data.dtype.kind in "UO" for v in inside.values())
    if count > limits.COUNT_LIMIT:
        raise ValueError(f"{count} variables and dimensions; at most {limits.COUNT_LIMIT} fit in one file")
    limit = limits.COUNT_LIMIT - len(FORMAT_ATTRIBUTES) - 1  # one for netCDF's own
    if len(record.attrs) > limit:
        raise ValueError(
            f"{len(record.attrs)} attributes; at most {limit} are allowed, so put some into a dict"
        )


def _attributes(record: Record, hashes: Mapping[str, str]) -> dict[str, np.ndarray]:
    large = {
        name: {"dims": v.dims, "units": v.units, "long_name": v.long_name, "blake2b": hashes[name]}
        for name, v in record.variables.items()
        if v.sidecar
    }
    stored = {name: _stored(name, value) for name, value in record.attrs.items()}
    texts = {
        "json_attributes": json.dumps([name for name, (_, as_json) in stored.items() if as_json]),
        "sidecar": json.dumps(large),
    }
    values = {name: value for name, (value, _) in stored.items()} | {k: _fixed(v) for k, v in texts.items()}
    values["schema_version"] = np.asarray([SCHEMA_VERSION], np.int64)
    size = sum(value.nbytes for value in values.values())
    largest = max(values, key=lambda name: values[name].nbytes)
    if size > limits.ATTRIBUTE_LIMIT:
        raise ValueError(
            f"the attributes have {size} bytes, more than the allowed {limits.ATTRIBUTE_LIMIT}; "
            f"make {largest} a variable"
        )
    return values


def _stored(name: str, value: Any) -> tuple[np.ndarray, bool]:
    """Return the value as HDF5 attribute, and whether it had to be written as JSON."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str) and _is_plain(value):
        return _fixed(value), False
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return np.asarray([value], np.int64), False
    if isinstance(value, float):
        return np.asarray([value], np.float64), False
    try:
        return _fixed(json.dumps(value)), True
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"attribute {name} cannot be stored ({error}); use str, numbers, bool, None, list and dict"
        ) from error


def _is_plain(value: str) -> bool:
    """Whether HDF5 gives the text back: it drops NUL at the end and has no text of length 0."""
    try:
        return "\0" not in value and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _fixed(value: str) -> np.ndarray:
    """Return a text as HDF5 string of fixed length; h5py gives a plain `str` a variable one."""
    import h5py

    raw = value.encode()
    return np.array(raw, dtype=h5py.string_dtype("utf-8", max(1, len(raw))))


def _array(name: str, variable: Variable) -> Array:
    from landscape.scales import Array

    data, dims, kind = _plain_array(name, variable)
    texts = {"units": variable.units, "long_name": variable.long_name, "dims": json.dumps(variable.dims)}
    if not all(_is_plain(value) or not value for value in texts.values()):
        raise ValueError(f"units or long_name of {name} are not plain text: {texts}")
    return Array(data, dims, {key: _fixed(value) for key, value in (texts | kind).items()})


def _plain_array(name: str, variable: Variable) -> tuple[np.ndarray, tuple[str, ...], dict[str, str]]:
    """Return array, dimensions and the attributes that tell the kind, as netCDF stores and xarray reads them."""
    data, dims = variable.data, variable.dims
    if data.dtype == np.bool_:
        return data.astype(np.int8), dims, {"dtype": "bool"}
    if data.dtype.kind in "UO":
        characters = _characters(name, data)
        return characters, (*dims, f"string{characters.shape[-1]}"), {"_Encoding": "utf-8"}
    if data.dtype.name not in _NUMBERS:
        raise ValueError(f"{name} has type {data.dtype}; allowed are bool, str, {', '.join(_NUMBERS)}")
    return data.astype(data.dtype.newbyteorder("<"), copy=False), dims, {}


def _characters(name: str, data: np.ndarray) -> np.ndarray:
    """Return texts of shape (...) as characters of shape (..., width)."""
    texts = data.ravel().tolist()
    if not all(isinstance(entry, str) and (not entry or _is_plain(entry)) for entry in texts):
        raise ValueError(f"{name} holds something else than texts (NUL characters are not allowed in them)")
    raw = [entry.encode() for entry in texts]
    width = max([1, *map(len, raw)])
    return np.frombuffer(b"".join(r.ljust(width, b"\0") for r in raw), "S1").reshape(*data.shape, width)


def _read_variable(where: str, array: np.ndarray, stored: Mapping[str, Any]) -> Variable:
    dims = _names(_json(stored, "dims", where), where)
    if array.ndim != len(dims) + (array.dtype.kind == "S"):
        raise ResultsError(f"{where}: shape {array.shape} does not fit dims {dims}; {_FROM_COPY}")
    if array.dtype.kind == "S":
        array = _texts(array, where)
    elif stored.get("dtype") == "bool":
        array = array.astype(np.bool_)
    return Variable(dims, array, _text(stored, "units", where), _text(stored, "long_name", where))


def _texts(characters: np.ndarray, where: str) -> np.ndarray:
    """Undo `_characters`."""
    *shape, width = characters.shape
    if not width:
        raise ResultsError(f"{where}: texts of width 0; {_FROM_COPY}")
    rows = np.ascontiguousarray(characters).reshape(-1).view(f"S{width}").tolist()
    try:
        return np.array([row.decode() for row in rows], dtype=np.str_).reshape(shape)
    except UnicodeDecodeError as error:
        raise ResultsError(f"{where}: not UTF-8 text ({error}); {_FROM_COPY}") from error


def _sidecar_table(table: Any, where: str) -> dict[str, dict[str, Any]]:
    if not isinstance(table, dict):
        raise ResultsError(f"{where}: the table of the sidecar is damaged; {_FROM_COPY}")
    for name, entry in table.items():
        if not NAME.fullmatch(name) or not isinstance(entry, dict):
            raise ResultsError(f"{where}: the sidecar's entry {name!r} is damaged; {_FROM_COPY}")
        entry["dims"] = _names(entry.get("dims"), f"{where}: {name}")
        for key in ("units", "long_name", "blake2b"):
            _text(entry, key, f"{where}: {name}")
    return table


def _names(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(n, str) and NAME.fullmatch(n) for n in value):
        raise ResultsError(f"{where}: dims {value!r} is not a list of names; {_FROM_COPY}")
    if len(set(value)) != len(value):
        raise ResultsError(f"{where}: dims {value!r} has a name twice; {_FROM_COPY}")
    return tuple(value)


def _text(attrs: Mapping[str, Any], name: str, where: str) -> str:
    value = attrs.get(name)
    if not isinstance(value, str):
        raise ResultsError(f"{where}: no text attribute {name!r}; {_FROM_COPY}")
    return value


def _json(attrs: Mapping[str, Any], name: str, where: str) -> Any:
    try:
        return json.loads(_text(attrs, name, where))
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{where}: attribute {name!r} is not JSON ({error}); {_FROM_COPY}") from error
