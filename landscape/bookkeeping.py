"""What stands in every measurement beside its numbers, and of what type: those who read one rely on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from landscape.record import Record


def _is(*kinds: type) -> Callable[[Any], bool]:
    # bool is an int to Python
    return lambda value: isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _spans(value: Any) -> bool:
    spans = list(value.values()) if isinstance(value, dict) else [None]
    return all(isinstance(s, list) and len(s) == 2 and all(map(_whole(0), s)) for s in spans)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_whole(1), value))


def _configuration(value: Any) -> bool:
    try:
        return isinstance(value, str) and isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


def _or_none(allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or allowed(value)


# Attribute -> what it may be, in words, and the test of it. An attribute that is not there is no fault here.
_ATTRIBUTES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **{
        name: ("a text", _is(str))
        for name in ("metric", "headline", "unit", "citation", "command", "time", "dtype")
    },
    **dict.fromkeys(("configuration", "fixed_configuration"), ("the JSON of a table", _configuration)),
    **dict.fromkeys(("told", "listed"), ("a list of texts", _texts)),
    **{name: ("a whole number", _is(int)) for name in ("seed", "memory")},
    **{name: ("a positive whole number", _whole(1)) for name in ("block_size", "world_size", "threads")},
    "stop": ("a whole number, not negative", _whole(0)),
    "part": ("a pair of positive whole numbers", _pair),
    "complete": ("true or false", _is(bool)),
    "memory_plan": ("a table", _table),
    "check": ("a table or none", _or_none(_table)),
    "exit_code": ("a whole number or none", _or_none(_whole(0))),
    "git_commit": ("a text or none", _or_none(_is(str))),
    "parameter_ranges": ("a table of pairs of whole numbers", _spans),
}


def fault(record: Record) -> str:
    """Return what is wrong with a measurement's bookkeeping, in words; an empty text if nothing is."""
    for name, (words, allowed) in _ATTRIBUTES.items():
        if name in record.attrs and not allowed(record.attrs[name]):
            return f"its attribute {name} is {record.attrs[name]!r:.80}; allowed is {words}"
    lengths: dict[str, int] = {}
    for name, variable in record.variables.items():
        for dim, length in zip(variable.dims, variable.data.shape, strict=True):
            if lengths.setdefault(dim, length) != length:
                return f"its dimension {dim} has length {lengths[dim]}, but {length} in {name}"
    return _fault_of_units(record)


def _fault_of_units(record: Record) -> str:
    """The mask of what is measured is one entry for each unit."""
    if "done" not in record or "stop" not in record.attrs or "unit" not in record.attrs:
        return ""
    done, attrs = record.variables["done"], record.attrs
    if done.data.dtype != bool or done.dims != (attrs["unit"],) or len(done.data) != attrs["stop"]:
        return f"its variable done does not have one true or false for each of {attrs['stop']} units"
    return ""
