"""The strict reader: takes the bytes of an HDF5 file and trusts none of them.

It runs in a process of its own (`landscape.reading`), so that what libhdf5 does with them harms nobody.

libhdf5 can loop for ever on the variable-length data of a damaged file, follows links to other files, and
fills any amount of memory that a small file asks for. This reader therefore looks before it reads: only
plain datasets in the root group, only fixed-length numbers and characters, only sizes within limits, only
data in one piece: damaged chunks have crashed libhdf5 2.0 (2 in 100 files with a few bytes changed). Nothing
of variable length is ever read; dimension names come from an attribute of our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import h5py
import numpy as np

from landscape.limits import ATTRIBUTE_LIMIT, ATTRIBUTES_LIMIT, COUNT_LIMIT, ENTRIES_LIMIT, RANK_LIMIT
from landscape.record import NAME

_MACHINERY = {"DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME"}


class Refusal(Exception):  # noqa: N818  (what was found, not a fault of the reader)
    """What is wrong with a file."""


@dataclass(frozen=True)
class Contents:
    """What a file holds, still in its stored form: numbers, or bytes of fixed length.

    Attributes:
        attrs: root attributes.
        variables: name -> (array, attributes); characters are arrays of `S1`.
    """

    attrs: dict[str, np.ndarray]
    variables: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]


class _Budget:
    """Bytes that may still be asked for."""

    def __init__(self, limit: int, what: str) -> None:
        self._left = limit
        self._limit = limit
        self._what = what

    def take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise Refusal(f"{self._what} need more than the allowed {self._limit} bytes")


def contents(image: bytes) -> Contents:
    """Return what is in the HDF5 file `image`.

    Raises:
        Refusal: if something in it is too large, or of a kind that we do not write.
        Exception: whatever h5py raises for a damaged file.
    """
    with h5py.File(h5py.h5f.open_file_image(image)) as file:
        return _contents(file, len(image))


def _contents(file: h5py.File, file_size: int) -> Contents:
    if len(file) > COUNT_LIMIT:
        raise Refusal(f"{len(file)} variables, more than the allowed {COUNT_LIMIT}")
    # Our data are stored in full: what needs more bytes than the file has is a bomb.
    data = _Budget(file_size, "its variables")
    attributes = _Budget(ATTRIBUTES_LIMIT, "its attributes")
    root = _read_attributes(file, "the file", attributes)
    variables = {}
    for name in file:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise Refusal(f"the name {name!r} is not made of letters, digits and _")
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise Refusal(f"{name} is a link to somewhere else")
        if file.get(name, getclass=True) is not h5py.Dataset:
            raise Refusal(f"{name} is not an array")
        dataset = file[name]
        attrs = _read_attributes(dataset, name, attributes)
        if _is_bare_dimension(dataset, attrs):
            continue
        variables[name] = (_read_dataset(dataset, name, data), attrs)
    return Contents(root, variables)


def _is_bare_dimension(dataset: h5py.Dataset, attrs: dict[str, np.ndarray]) -> bool:
    """Netcdf-4 stores a dimension without coordinates as an array that was never filled."""
    return "dims" not in attrs and "CLASS" in dataset.attrs and dataset.id.get_storage_size() == 0


def _read_dataset(dataset: h5py.Dataset, name: str, budget: _Budget) -> np.ndarray:
    """Return the array after refusing everything that reading could be harmed by."""
    stored = dataset.id.get_type()
    _check_type(stored, name)
    if isinstance(stored, h5py.h5t.TypeStringID) and stored.get_size() != 1:
        raise Refusal(f"{name} holds strings of {stored.get_size()} bytes instead of characters")
    shape = _check_shape(dataset.id.get_space(), name)
    size = math.prod(shape) * stored.get_size()
    budget.take(size)
    if not size:
        return np.zeros(shape, dataset.id.dtype)
    plan = dataset.id.get_create_plist()
    if plan.get_external_count():
        raise Refusal(f"{name} keeps its data in other files")
    if plan.get_layout() == h5py.h5d.VIRTUAL:
        raise Refusal(f"{name} is virtual: its data lie in other files")
    if plan.get_layout() not in (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS):
        raise Refusal(
            f"{name} is stored in chunks (unpack it with `h5repack -l CONTI -f NONE` if you packed it)"
        )
    if dataset.id.get_storage_size() != size:
        raise Refusal(f"{name} claims {size} bytes, but {dataset.id.get_storage_size()} are stored")
    return np.asarray(dataset[()])


def _check_type(stored: h5py.h5t.TypeID, name: str) -> None:
    if isinstance(stored, h5py.h5t.TypeStringID):
        if stored.is_variable_str():
            raise Refusal(f"{name} holds strings of variable length")
    elif isinstance(stored, h5py.h5t.TypeIntegerID):
        if stored.get_size() not in (1, 2, 4, 8):
            raise Refusal(f"{name} holds integers of {stored.get_size()} bytes")
    elif isinstance(stored, h5py.h5t.TypeFloatID):
        if stored.get_size() not in (4, 8):
            raise Refusal(f"{name} holds floats of {stored.get_size()} bytes")
    else:
        raise Refusal(f"{name} holds neither numbers nor characters")


def _check_shape(space: h5py.h5s.SpaceID, name: str) -> tuple[int, ...]:
    kind = space.get_simple_extent_type()
    if kind == h5py.h5s.SCALAR:
        return ()
    if kind != h5py.h5s.SIMPLE:
        raise Refusal(f"{name} is empty: it has a type but no value")
    if space.get_simple_extent_ndims() > RANK_LIMIT:
        raise Refusal(f"{name} has {space.get_simple_extent_ndims()} dimensions")
    return tuple(int(length) for length in space.get_simple_extent_dims())


def _read_attributes(item: h5py.File | h5py.Dataset, owner: str, budget: _Budget) -> dict[str, np.ndarray]:
    """Return the attributes of one object, those of the netCDF machinery left out."""
    if h5py.h5a.get_num_attrs(item.id) > COUNT_LIMIT:
        raise Refusal(f"{owner} has more than {COUNT_LIMIT} attributes")
    return {
        name: _read_attribute(item, name, f"attribute {name} of {owner}", budget)
        for name in item.attrs
        if name not in _MACHINERY and not name.startswith(("_Netcdf4", "_NC", "_nc3"))
    }


def _read_attribute(item: h5py.File | h5py.Dataset, name: str, what: str, budget: _Budget) -> np.ndarray:
    if not NAME.fullmatch(name):
        raise Refusal(f"{what!r} is not made of letters, digits and _")
    attribute = h5py.h5a.open(item.id, name.encode())
    stored = attribute.get_type()
    _check_type(stored, what)
    shape = _check_shape(attribute.get_space(), what)
    size = math.prod(shape) * stored.get_size()
    if size > ATTRIBUTE_LIMIT:
        raise Refusal(f"{what} has {size} bytes, more than the allowed {ATTRIBUTE_LIMIT}")
    if math.prod(shape) > ENTRIES_LIMIT:
        raise Refusal(f"{what} has {math.prod(shape)} entries, more than the allowed {ENTRIES_LIMIT}")
    budget.take(size)
    values = np.zeros(shape, dtype=attribute.dtype)
    if values.size:
        attribute.read(values)
    return values
