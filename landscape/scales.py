"""Arrays, dimensions and attributes as netCDF-4 lays them out in HDF5, written with h5py alone.

A dimension is an HDF5 dimension scale: the coordinate variable of its name, or a place-holder that is never
filled. Each array refers to those of its axes. h5netcdf writes the same at five times the cost, which a
short measurement feels.

Source: NetCDF-4 file format specification, "Creation order", "Dimensions with HDF5 dimension scales".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import h5py
import numpy as np
from h5py import h5a, h5d, h5ds, h5p, h5s, h5t

from landscape._version import __version__

_BARE = b"This is a netCDF dimension but not a netCDF variable."


@dataclass(frozen=True)
class Array:
    """What is stored under a name.

    Attributes:
        data: numbers, or characters of type S1.
        dims: a name for each axis; an array whose first axis has its own name is a coordinate.
        attrs: attributes; texts as arrays of fixed-length strings.
    """

    data: np.ndarray
    dims: tuple[str, ...]
    attrs: Mapping[str, np.ndarray]


def write(file: h5py.File, arrays: Mapping[str, Array], attrs: Mapping[str, np.ndarray]) -> None:
    """Write arrays and the attributes of the file itself into an empty file that tracks order.

    Args:
        file: the file.
        arrays: by name; a dimension has one length wherever it stands.
        attrs: of the file.
    """
    for name, value in attrs.items():
        _write_attribute(file.id, name, value)
    made_by = f"version=2,landscape={__version__},hdf5={h5py.version.hdf5_version},h5py={h5py.__version__}"
    _write_attribute(file.id, "_NCProperties", np.array(made_by.encode()))
    sets: dict[str, h5d.DatasetID] = {}
    numbers: dict[str, int] = {}
    for name, array in arrays.items():
        for dim, length in zip(array.dims, array.data.shape, strict=True):
            if dim not in numbers and dim not in arrays:
                sets[dim] = _create(file, dim, np.dtype(">f4"), (length,))
                h5ds.set_scale(sets[dim], _BARE + b"%10d" % length)
                _write_number(sets[dim], "_Netcdf4Dimid", len(numbers))
            numbers.setdefault(dim, len(numbers))
        sets[name] = _create(file, name, array.data.dtype, array.data.shape)
        if array.data.size:
            sets[name].write(h5s.ALL, h5s.ALL, np.ascontiguousarray(array.data))
        if array.dims[:1] == (name,):
            h5ds.set_scale(sets[name], name.encode())
        for key, value in array.attrs.items():
            _write_attribute(sets[name], key, value)
    for name, array in arrays.items():
        if array.dims[:1] != (name,):
            for axis, dim in enumerate(array.dims):
                h5ds.attach_scale(sets[name], sets[dim], axis)
        if array.dims:
            _write_attribute(
                sets[name], "_Netcdf4Coordinates", np.array([numbers[dim] for dim in array.dims], np.int32)
            )
            _write_number(sets[name], "_Netcdf4Dimid", numbers[array.dims[0]])


def _create(file: h5py.File, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> h5d.DatasetID:
    plan = h5p.create(h5p.DATASET_CREATE)
    plan.set_attr_creation_order(h5p.CRT_ORDER_TRACKED | h5p.CRT_ORDER_INDEXED)
    plan.set_obj_track_times(False)
    space = h5s.create(h5s.SCALAR)
    if shape:
        # A length of 0 means a dimension without limit, and only what is stored in chunks can have one.
        space = h5s.create_simple(shape, tuple(length or h5s.UNLIMITED for length in shape))
        if 0 in shape:
            plan.set_chunk(tuple(length or 1 for length in shape))
    return h5d.create(file.id, name.encode(), h5t.py_create(dtype, logical=True), space, plan)


def _write_number(owner: h5d.DatasetID, name: str, value: int) -> None:
    _write_attribute(owner, name, np.array(value, np.int32))


def _write_attribute(owner: h5py.h5g.GroupID | h5d.DatasetID, name: str, value: np.ndarray) -> None:
    kind = h5t.py_create(value.dtype, logical=True)
    space = h5s.create_simple(value.shape) if value.shape else h5s.create(h5s.SCALAR)
    h5a.create(owner, name.encode(), kind, space).write(value, mtype=kind)
