"""`merge`: bring the parts of a measurement together, if they belong together and none is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from landscape import foreign, identity, lock, parts, results, rounds
from landscape.errors import Refused
from landscape.metrics import registry
from landscape.metrics.base import Metric, finish, open_round
from landscape.record import Record

_LISTED = 8  # part numbers, or units, that a message names one by one


@dataclass(frozen=True)
class Merged:
    """What a merge came to.

    Attributes:
        record: the measurement.
        further: units that a further round measures; 0 where all is done.
    """

    record: Record
    further: int


def merge(path: Path | str, metric: type[Metric] | None = None) -> Merged:
    """Merge the part files that `measure(part=(i, n))` left of a measurement, and finish it.

    The result is that of one process, bit for bit. A metric that stops at a tolerance may ask for a further
    round once all units of this one are known: then the round is stored, and the same parts go on.

    Args:
        path: the measurement's file, `<run>/<metric>.h5`.
        metric: its class; looked up by its name where it is registered.

    Raises:
        Refused: if a part is missing, not finished or of another measurement, or if another process is
            measuring into the file; nothing is changed then.
        ResultsError: if a file cannot be read or written.
    """
    path = Path(path)
    with lock.held(path), foreign.understood(path):
        return _merged(path, metric)


def _merged(path: Path, metric: type[Metric] | None) -> Merged:
    record = results.read(path)
    found = [(place, parts.read(place)) for place in parts.paths(path)]
    _require_alike(record, found)
    if found:
        record.attrs["configuration"] = found[0][1].attrs["configuration"]
    chosen = configured(record, metric)
    further = _take_in(chosen, record, found)
    if rounds.is_open(record) and record["done"].any():
        record.variables.update(chosen.summarize(record))
    record.attrs.update(complete=False, exit_code=None)
    if further is None:
        finish(chosen, record)
        record.attrs["exit_code"] = rounds.exit_code(record)
    results.write(path, record)
    for place, _ in found:
        parts.remove(place)
    return Merged(record, further or 0)


def configured(record: Record, metric: type[Metric] | None = None) -> Metric:
    """Make the metric anew that a record was measured with.

    Raises:
        Refused: if it is of another one than `metric`.
        UnknownMetric: if no metric of its name is registered.
    """
    name = str(record.attrs["metric"])
    if metric is not None and metric.name != name:
        raise Refused(f"the measurement is of {name}, not of {metric.name}")
    settings: dict[str, Any] = json.loads(record.attrs["configuration"])
    return (metric or registry.load(name))(**{key: _tuples(value) for key, value in settings.items()})


def _take_in(metric: Metric, record: Record, found: Sequence[tuple[Path, Record]]) -> int | None:
    """Go through rounds as one process would; return the units of one that nobody has begun, None at the end."""
    while True:
        stop: int = record.attrs["stop"]
        if rounds.is_open(record) and rounds.open_blocks(record):
            fitting = [part for _, part in found if parts.fits(record, part)]
            for part in fitting:
                parts.adopt(record, part)
            if missing := rounds.open_blocks(record):
                if not fitting and record["done"].any():
                    return stop
                raise Refused(_missing(record, missing, [parts.number(part) for part in fitting]))
        following = metric.units(record)
        if following is None:
            return None
        open_round(metric, record, following)


def _require_alike(record: Record, found: Sequence[tuple[Path, Record]]) -> None:
    for place, part in found:
        differing = identity.differing(record.attrs, part.attrs, "in the file", "in the part")
        if not differing and part.attrs["configuration"] != found[0][1].attrs["configuration"]:
            first = found[0][1].attrs["configuration"]
            differing = [
                f"the metric's demands ({first} in {found[0][0].name}, {part.attrs['configuration']})"
            ]
        if differing:
            raise Refused(
                f"{place} is a part of another measurement; different: {'; '.join(differing)}. Run it again as the "
                "others were, or delete it"
            )


def _missing(record: Record, blocks: Sequence[range], there: Sequence[tuple[int, int]]) -> str:
    unit, size = record.variables["done"].dims[0], record.attrs["block_size"]
    units = [f"{b.start}-{b.stop - 1}" if len(b) > 1 else f"{b.start}" for b in blocks]
    text = f"{unit} {_first(units)} (of {record.attrs['stop']}) not measured"
    counts = sorted({count for _, count in there})
    if not counts:
        return f"{text}: no part of this round is there; run the parts first (--part 1/n and so on)"
    count = counts[-1]
    owners = sorted({block.start // size % count + 1 for block in blocks})
    lacking = [f"{i}/{count}" + (" (not finished)" if (i, count) in there else "") for i in owners]
    return f"{text}: part {_first(lacking)} missing; run it, then merge again"


def _first(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_LISTED]) + (f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else "")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
