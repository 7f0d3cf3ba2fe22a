"""Text of the command line -> values of the types that a metric's fields have."""

from __future__ import annotations

import ast
import difflib
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal, Union

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def parse(text: str, hint: Any) -> Any:
    """Return the value that a text stands for.

    Args:
        text: what the user wrote, for example `1e-3,5e-4`, `1e-4:1e-1:4`, `none`.
        hint: a type: `int`, `float`, `bool`, `str`, `None`, `Literal[...]`, `tuple[...]`, or a union of these.

    Raises:
        ValueError: if the text does not stand for such a value; the message says what is allowed.

    >>> parse("1e-4:1e-1:4", tuple[float, ...])
    (0.0001, 0.001, 0.01, 0.1)
    >>> parse("-1:1,-0.3:0.9", tuple[tuple[float, float], ...])
    ((-1.0, 1.0), (-0.3, 0.9))
    >>> parse("61", int | tuple[int, ...]), parse("61,", int | tuple[int, ...])
    (61, (61,))
    """
    return _parse(text.strip(), hint, separator=",")


def describe(hint: Any) -> str:
    """Return how a help text shows the values of a type.

    >>> describe(Literal["hessian", "ggn"]), describe(tuple[float, ...]), describe(str | None)
    ('[hessian|ggn]', 'NUMBER,...', 'TEXT|none')
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "[" + "|".join(str(choice) for choice in inner) + "]"
    if origin in (Union, types.UnionType):
        return "|".join(describe(member) for member in sorted(inner, key=lambda member: member is type(None)))
    if origin is tuple:
        if typing.get_origin(inner[0]) is tuple:
            return "A:B,..."
        return f"{describe(inner[0])},..." if inner[-1] is Ellipsis else ",".join(describe(m) for m in inner)
    return {int: "INTEGER", float: "NUMBER", bool: "yes|no", str: "TEXT", type(None): "none"}.get(
        hint, "VALUE"
    )


def show(value: Any) -> str:
    """Return a value as the user would write it.

    >>> show((0.0005, 0.001)), show(None), show(((-1, 1), (-1, 1))), show((61,))
    ('0.0005,0.001', 'none', '-1:1,-1:1', '61,')
    """
    if isinstance(value, tuple | list):
        if not value:
            return "()"
        parts = [":".join(map(show, v)) if isinstance(v, tuple | list) else show(v) for v in value]
        return ",".join(parts) + ("," if len(parts) == 1 else "")
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def literal(text: str) -> Any:
    """Return a Python literal, or the text itself where it is none: `16`, `(3, 4)`, `relu`."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean a or b?)` for the known words that are near, else an empty text."""

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, _folded(word), _folded(name)).ratio()

    close = sorted(((likeness(name), name) for name in known), reverse=True)[:2]
    # a second one only if it is about as near as the first
    near = [name for ratio, name in close if ratio >= 0.65 and ratio > close[0][0] - 0.08]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _folded(name: str) -> str:
    return name.lower().replace("_", "-").lstrip("-")


def size(text: str) -> int:
    """Return a number of bytes.

    Raises:
        ValueError: for anything but a positive number with an optional unit.

    >>> size("8GiB"), size("500 MB"), size("1024")
    (8589934592, 500000000, 1024)
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
             "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
             "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().lower()
    try:
        count = float(digits) * units[unit]
        if count >= 1:
            return int(count)
    except (ValueError, KeyError, OverflowError):
        pass
    raise ValueError(f"{text!r} is no amount of memory; write for example 8GiB, 500MB or a number of bytes")


def _parse(text: str, hint: Any, separator: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _choice(text, inner)
    if origin in (Union, types.UnionType):
        return _first_that_fits(text, inner, separator)
    if origin is tuple:
        return _tuple(text, inner, separator)
    readers: dict[Any, Callable[[str], Any]] = {
        int: _integer,
        float: _number,
        bool: _boolean,
        type(None): _none,
    }
    if hint in readers:
        return readers[hint](text)
    return text if hint is str else literal(text)


def _choice(text: str, choices: tuple[Any, ...]) -> Any:
    folded = text.lower().replace("-", "_")
    for choice in choices:
        if folded == str(choice).lower().replace("-", "_"):
            return choice
    words = [str(choice) for choice in choices]
    raise ValueError(f"{text!r} is none of {', '.join(words)}{nearest(text, words)}")


def _first_that_fits(text: str, members: tuple[Any, ...], separator: str) -> Any:
    # str takes everything, so it is asked last; None only takes one word, so it is asked first
    order = sorted(members, key=lambda m: 0 if m is type(None) else 2 if m is str else 1)
    problems = []
    for member in order:
        try:
            return _parse(text, member, separator)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(problems[-1])


def _tuple(text: str, inner: tuple[Any, ...], separator: str) -> tuple[Any, ...]:
    parts = [part.strip() for part in text.split(separator)]
    if parts and not parts[-1]:
        parts.pop()  # `61,` is a tuple of one
    if inner[-1] is not Ellipsis:
        if len(parts) != len(inner):
            raise ValueError(f"{text!r} has {len(parts)} values; allowed are {len(inner)}, as a{separator}b")
        return tuple(_parse(part, member, ":") for part, member in zip(parts, inner, strict=True))
    values: list[Any] = []
    for part in parts:
        if inner[0] in (int, float) and ":" in part:
            values += _geometric(part, inner[0])
        else:
            values.append(_parse(part, inner[0], ":"))
    return tuple(values)


def _geometric(text: str, kind: type) -> list[Any]:
    """Return the n numbers a, ..., b with equal ratios that `a:b:n` stands for."""
    parts = text.split(":")
    allowed = (
        f"{text!r} is no range a:b:n (from a to b in n numbers of equal ratio, a and b positive, n >= 2)"
    )
    try:
        start, stop, count = float(parts[0]), float(parts[1]), int(parts[2])
    except (ValueError, IndexError) as error:
        raise ValueError(allowed) from error
    if len(parts) != 3 or not (start > 0 and stop > 0 and 2 <= count <= 100_000):
        raise ValueError(allowed)
    # 12 digits: 1e-3 and not 0.0009999999999999998 in the stored configuration
    inside = [float(f"{start * (stop / start) ** (i / (count - 1)):.12g}") for i in range(1, count - 1)]
    values = [start, *inside, stop]
    return list(dict.fromkeys(round(v) for v in values)) if kind is int else values


def _integer(text: str) -> int:
    try:
        number = float(text) if "e" in text.lower() or "." in text else int(text)
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{text!r} is no integer")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None


def _boolean(text: str) -> bool:
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise ValueError(f"{text!r} is neither yes nor no")


def _none(text: str) -> None:
    if text.lower() not in {"none", "null"}:
        raise ValueError(f"{text!r} is not none")
