"""Results: one measurement = one netCDF-4/HDF5 file that h5py, xarray, netCDF4 and ncdump read.

`write` puts a `Record` on the disk as a whole or not at all, `read` brings it back and trusts nothing in the
file, `open` gives it as an `xarray.Dataset`. Arrays of parameter length lie beside the file in
`<stem>.arrays.safetensors`. This module needs no torch, and xarray only where a Dataset is asked for.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from landscape import atomic, bookkeeping, netcdf, reading, tensors
from landscape.atomic import ResultsError, clean_leftovers, require_writable
from landscape.provenance import provenance
from landscape.record import Record, Variable, check
from landscape.tensors import read_state, write_state

if TYPE_CHECKING:
    import xarray

__all__ = [
    "Record",
    "ResultsError",
    "Variable",
    "clean_leftovers",
    "open",
    "provenance",
    "read",
    "read_run",
    "read_state",
    "require_writable",
    "write",
    "write_state",
]


def write(path: Path | str, record: Record) -> None:
    """Write `record` to `path`, as a whole or not at all.

    A kill at any moment leaves a file that `read` reads: the old one or the new one. The sidecar is written
    first, is not touched when its arrays are unchanged, and keeps the old arrays until the file is replaced.

    Args:
        path: the file, such as `runs/mine/trace.h5`; missing directories are made.
        record: what to write.

    Raises:
        ResultsError: if the file cannot be written; the old one is then as it was.
        ValueError: if the record breaks a rule of the format (names, lengths, types, sizes).
    """
    path = Path(path)
    check(record)
    large = {name: v.data for name, v in record.variables.items() if v.sidecar}
    if large and path.suffix != ".h5":
        raise ValueError(
            f"{path}: a result with arrays in a sidecar must be named *.h5, or two could share one"
        )
    hashes = {name: tensors.digest(array) for name, array in large.items()}
    image = netcdf.encode(record, hashes)
    beside = tensors.sidecar_path(path)
    tensors.update_sidecar(beside, large, hashes)
    atomic.replace(path, [image])
    if path.suffix == ".h5":
        # What could not be dropped now is dropped after the next write; the result is whole either way.
        with contextlib.suppress(ResultsError):
            tensors.prune_sidecar(beside, hashes)


def read(path: Path | str) -> Record:
    """Read a file that `write` wrote, with the arrays of its sidecar.

    Raises:
        ResultsError: if it is missing, damaged, foreign, or of a newer version; nothing in it is followed.
    """
    path = Path(path)
    record, table = netcdf.decode(reading.read(path), str(path))
    beside = tensors.sidecar_path(path)
    arrays = tensors.read_sidecar(beside, {name: entry["blake2b"] for name, entry in table.items()})
    for name, entry in table.items():
        if arrays[name].ndim != len(entry["dims"]):
            raise ResultsError(
                f"{beside}: {name} does not fit dims {entry['dims']}; restore both files from a copy"
            )
        if name in record.variables:
            raise ResultsError(f"{path} and its sidecar both hold {name}; restore both files from a copy")
        labels = (entry["units"], entry["long_name"])
        record.variables[name] = Variable(entry["dims"], arrays[name], *labels, sidecar=True)
    if fault := bookkeeping.fault(record):
        raise ResultsError(f"{path}: {fault}; it was changed: restore it from a copy, or measure again")
    return record


def read_run(path: Path | str) -> dict[str, Record]:
    """Read all measurements of a run directory, by file name without `.h5`, sorted.

    Raises:
        ResultsError: if there is no such directory, no measurement in it, or one cannot be read.
    """
    path = Path(path)
    try:
        files = sorted(p for p in path.iterdir() if p.suffix == ".h5" and not p.name.startswith("."))
    except OSError as error:
        raise atomic.explain("read", path, error) from error
    if not files:
        raise ResultsError(
            f"{path}: no measurement (*.h5) in this directory; measure with --out {path} first"
        )
    return {file.stem: read(file) for file in files}


def open(path: Path | str) -> xarray.Dataset | dict[str, xarray.Dataset]:  # noqa: A001 (landscape.open)
    """Open a measurement, or all measurements of a run directory by name.

    Raises:
        ResultsError: if there is nothing, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return {name: record.to_xarray() for name, record in read_run(path).items()}
    return read(path).to_xarray()
