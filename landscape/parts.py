"""Part files: what one of several processes measured of a round, beside the measurement's own file.

`<run>/.parts/<metric>.part-<i>-of-<n>.h5` holds the values of the units that process i of n measured, and what they
cost. Anybody may take them in, in any order and more than once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from landscape import atomic, results, rounds, tensors
from landscape.errors import Refused
from landscape.record import Record

COSTS = ("matvecs", "gradients", "values", "wall_seconds")
# Known from the first product on, so that who made none has them from others.
_LEARNT = ("products", "kernels", "check")


@dataclass(frozen=True)
class Base:
    """What a round began with: the units that were done, and the cost until then."""

    done: np.ndarray
    costs: dict[str, float]

    @classmethod
    def of(cls, record: Record) -> Base:
        """The base that a record is, before its next units are measured."""
        return cls(record["done"].copy(), {key: record[key].item() for key in COSTS if key in record})


def path_of(path: Path, index: int, count: int) -> Path:
    """Return the file of part `index` (from 1) of `count`, beside the measurement `path`."""
    return path.parent / rounds.FOLDER / f"{path.stem}.part-{index}-of-{count}.h5"


def paths(path: Path) -> list[Path]:
    """Return the part files that lie beside the measurement `path`, in the order of their numbers."""
    name = re.compile(re.escape(path.stem) + r"\.part-([0-9]+)-of-([0-9]+)\.h5")
    folder = path.parent / rounds.FOLDER
    found = [(name.fullmatch(p.name), p) for p in folder.iterdir()] if folder.is_dir() else []
    numbered = [(int(match[2]), int(match[1]), p) for match, p in found if match]
    return [p for _, _, p in sorted(numbered)]


def number(record: Record) -> tuple[int, int]:
    """Return which part of how many a part file is."""
    index, count = record.attrs["part"]
    return int(index), int(count)


def read(path: Path) -> Record:
    """Read a part file.

    Raises:
        ResultsError: if it cannot be read, or is none.
    """
    record = results.read(path)
    part, told = record.attrs.get("part"), {"configuration", "stop", "round"} <= record.attrs.keys()
    is_part = isinstance(part, list) and len(part) == 2 and told and "done" in record
    if not is_part or record["done"].dtype != bool or record["done"].ndim != 1:
        raise results.ResultsError(f"{path} is no part of a measurement; delete it")
    return record


def write(path: Path, record: Record, base: Base, index: int, count: int) -> None:
    """Write the part of `record` that is not of its base.

    Raises:
        ResultsError: if the file cannot be written.
    """
    unit, size = record.variables["done"].dims[0], record.attrs["block_size"]
    own = np.zeros(len(record["done"]), bool)
    for start in range(0, record.attrs["stop"], size):
        block = slice(start, min(start + size, record.attrs["stop"]))
        # A block that was half done before is measured whole.
        own[block] = record["done"][block].all() and not base.done[block].all()
    held = {
        name: v for name, v in record.variables.items() if v.dims[:1] == (unit,) and len(v.data) == len(own)
    }
    held["done"] = dataclasses.replace(record.variables["done"], data=own)
    for key, before in {**dict.fromkeys(COSTS, 0), **base.costs}.items():
        if key in record:
            spent = np.asarray(record[key].item() - before)
            held[key] = dataclasses.replace(record.variables[key], data=spent)
    results.write(path, Record(held, {**record.attrs, "part": [index, count]}))


def fits(record: Record, part: Record) -> bool:
    """Whether a part is of the round that is open in a record."""
    return part.attrs.get("round") == record.attrs.get("round") and len(part["done"]) == len(record["done"])


def adopt(record: Record, part: Record) -> None:
    """Put the units of a part into a record, and add its cost where they are new there.

    Raises:
        Refused: if its products were made in another way.
        ResultsError: if its variables have another shape.
    """
    done, unit = part["done"], record.variables["done"].dims[0]
    if not (done & ~record["done"]).any():
        return
    made = {str(r.attrs.get("products", "not needed")) for r in (record, part)} - {"not needed"}
    if len(made) > 1:
        raise Refused(
            f"part {number(part)[0]}/{number(part)[1]} was measured with other products than the rest "
            f"({' and '.join(sorted(made))}); start anew with overwrite"
        )
    for name, variable in part.variables.items():
        if name != "done" and variable.dims[:1] == (unit,):
            if name in record and record[name].shape != variable.data.shape:
                raise results.ResultsError(
                    f"{name} has shape {variable.data.shape} in part {number(part)[0]}/{number(part)[1]} and "
                    f"{record[name].shape} elsewhere; run that part again"
                )
            rounds.put(record, name, variable, done, variable.data[done])
    record["done"][done] = True
    for key in COSTS:
        if key in part:
            before = record[key] if key in record else 0  # noqa: SIM401  (a Record is no dict)
            spent = part.variables[key]
            record.variables[key] = dataclasses.replace(spent, data=np.asarray(before + spent.data))
    if part.attrs.get("products") != "not needed":
        record.attrs.update({key: part.attrs[key] for key in _LEARNT if key in part.attrs})


def digest(path: Path) -> str:
    """Hash a file, so that who is told of it can tell when he sees it; "" where there is none."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise atomic.explain("read", path, error) from error


def remove(path: Path) -> None:
    """Delete a part file and what lies beside it.

    Raises:
        ResultsError: if it cannot be deleted.
    """
    atomic.remove(path)
    atomic.remove(tensors.sidecar_path(path))
