"""What one measurement holds in memory, and the rules that its names and shapes follow."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape.limits import RANK_LIMIT

if TYPE_CHECKING:
    import xarray

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# netCDF-4 keeps its own tables under these names.
_RESERVED = {"CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST"}
# Root attributes that the file format itself adds.
FORMAT_ATTRIBUTES = {"schema_version", "json_attributes", "sidecar"}
_STRING_DIM = re.compile(r"string[0-9]+")  # the axis of characters in xarray's convention
# xarray turns these units into times on opening; "s" stays a number.
_TIME_UNITS = re.compile(r"days|hours|minutes|seconds|(milli|micro|nano)seconds|.*\bsince\b.*")


@dataclass(frozen=True, eq=False)
class Variable:
    """A named array's contents.

    Attributes:
        dims: a name per axis.
        data: numbers, bool or str; one axis per name in `dims`.
        units: "1" for a plain number; "s", not "seconds".
        long_name: what it is, in words.
        sidecar: True for arrays of parameter length, stored beside the file.
    """

    dims: tuple[str, ...]
    data: np.ndarray
    units: str = "1"
    long_name: str = ""
    sidecar: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))
        object.__setattr__(self, "data", np.asarray(self.data))
        if self.data.ndim != len(self.dims):
            raise ValueError(
                f"{len(self.dims)} dimension names {self.dims} for an array of {self.data.ndim} axes, "
                f"shape {self.data.shape}; give one name per axis"
            )


@dataclass
class Record:
    """One measurement.

    Attributes:
        variables: by name; a variable whose name is its only dimension is a coordinate.
        attrs: str, int, float, bool, None, and lists and dicts (with str keys) of these.
    """

    variables: dict[str, Variable] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.variables:
            raise KeyError(f"no variable {name!r}; there are: {', '.join(self.variables) or 'none'}")
        return self.variables[name].data

    def __contains__(self, name: object) -> bool:
        return name in self.variables

    def to_xarray(self) -> xarray.Dataset:
        """Return the same as an `xarray.Dataset`; coordinates become coordinates."""
        import xarray as xr

        data: dict[str, Any] = {}
        coordinates: dict[str, Any] = {}
        for name, variable in self.variables.items():
            place = coordinates if variable.dims == (name,) else data
            labels = {"units": variable.units, "long_name": variable.long_name}
            place[name] = (variable.dims, variable.data, labels)
        return xr.Dataset(data, coordinates, dict(self.attrs))


def check(record: Record) -> None:
    """Refuse what the file format cannot hold, or what another reader would turn into something else.

    Raises:
        ValueError: naming the variable, dimension or attribute.
    """
    lengths: dict[str, int] = {}
    for name, variable in record.variables.items():
        _check_variable(name, variable)
        for dim, length in zip(variable.dims, variable.data.shape, strict=True):
            if lengths.setdefault(dim, length) != length:
                raise ValueError(
                    f"dimension {dim} has length {lengths[dim]}, but {length} in {name}; make them one"
                )
    for name, variable in record.variables.items():
        if name in lengths and variable.dims != (name,):
            raise ValueError(
                f"{name} is a dimension, so a variable {name} must have it alone, not {variable.dims}; rename one"
            )
        if name in lengths and variable.sidecar:
            raise ValueError(
                f"{name} is a coordinate and cannot lie in a sidecar; rename it or keep it in the file"
            )
    for name in record.attrs:
        if not NAME.fullmatch(name) or name in _RESERVED | FORMAT_ATTRIBUTES or name.startswith("_"):
            raise ValueError(
                f"{name!r} cannot name an attribute; use letters, digits and _, a letter first, "
                f"and not {', '.join(sorted(_RESERVED | FORMAT_ATTRIBUTES))}"
            )


def _check_variable(name: str, variable: Variable) -> None:
    for word in (name, *variable.dims):
        if not NAME.fullmatch(word) or word in _RESERVED or _STRING_DIM.fullmatch(word):
            raise ValueError(
                f"{word!r} cannot name a variable or dimension; use letters, digits and _, "
                f"and not {', '.join(sorted(_RESERVED))} or string<number>"
            )
    if len(set(variable.dims)) != len(variable.dims):
        raise ValueError(f"{name} has a dimension twice: {variable.dims}; name each axis differently")
    if len(variable.dims) > RANK_LIMIT:
        raise ValueError(f"{name} has {len(variable.dims)} dimensions; at most {RANK_LIMIT} are allowed")
    if _TIME_UNITS.fullmatch(variable.units):
        raise ValueError(
            f"{name} has units {variable.units!r}, which xarray turns into times; write 's' instead"
        )
