"""What pictures say in words: numbers with their errors, and what was measured of which run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from landscape.results import Record

_MATRICES = {
    "hessian": "Hessian",
    "ggn": "Gauss–Newton matrix",
    "fisher": "Fisher matrix",
    "empirical_fisher": "empirical Fisher matrix",
    "input_hessian": "input Hessian",
}
_LONGEST_LABEL = 30


@dataclass(frozen=True)
class Subject:
    """What a measurement is of.

    Attributes:
        matrix: in words, such as "the Hessian".
        run: its name, "" where it has none.
        size: order of the matrix, None where it is not known.
        counted: what the order counts: "parameters" or "inputs".
        curvature: unit of the matrix's entries.
    """

    matrix: str
    run: str
    size: int | None = None
    counted: str = "parameters"
    curvature: str = "loss / parameter²"

    @property
    def density(self) -> str:
        """Unit of a density over eigenvalues."""
        return " / ".join(reversed(self.curvature.split(" / ")))


def subject(record: Record, name: str) -> Subject:
    """Return what a record was measured of.

    Args:
        record: the measurement.
        name: of the run; "" where it has none, then the model that is named in the record stands for it.
    """
    fields = configuration(record)
    curvature = str(fields.get("curvature", "hessian"))
    matrix = f"the {_MATRICES.get(curvature, curvature)}"
    run = name or str(record.attrs.get("model") or "")
    if fields.get("layer"):
        matrix = f"block {clipped(str(fields['layer']))} of {matrix}"
    size = record.attrs.get("order")
    if size is None and "layer_size" in record:
        size = int(record["layer_size"].sum())
    if curvature != "input_hessian":
        return Subject(matrix, run, size)
    matrix += f" at example {fields.get('example', 0)}"
    return Subject(matrix, run, size, "inputs", "loss / input²")


def configuration(record: Record) -> Mapping[str, Any]:
    """Return the metric's fields as they are stored; empty where they are not."""
    stored = record.attrs.get("configuration")
    fields = json.loads(stored) if isinstance(stored, str) else stored
    return fields if isinstance(fields, Mapping) else {}


def title(quantity: str, subjects: Sequence[Subject]) -> str:
    """Return what a picture shows: of one run with its name, of several with what they have in common.

    >>> title("Trace", [Subject("the Hessian", "mine", 26122)])
    'Trace of the Hessian of mine (26 122 parameters)'
    >>> title("Trace", [Subject("the Hessian", "a", 64), Subject("the Hessian", "b", 64)])
    'Trace of the Hessian, 2 runs (64 parameters)'
    """
    matrices, sizes = ({getattr(s, key) for s in subjects} for key in ("matrix", "size"))
    text = f"{quantity} of {subjects[0].matrix}" if len(matrices) == 1 else quantity
    if len(subjects) > 1:
        text += f", {len(subjects)} runs"
    elif subjects[0].run:
        text += f" of {subjects[0].run}"
    size = subjects[0].size
    return f"{text} ({grouped(size)} {subjects[0].counted})" if len(sizes) == 1 and size else text


def labels(subjects: Sequence[Subject]) -> list[str]:
    """Return a name for each run in a legend, with its matrix where they differ, else numbered if need be."""
    names = [clipped(s.run) or f"run {i}" for i, s in enumerate(subjects, start=1)]
    if len({s.matrix for s in subjects}) > 1:
        names = [f"{name}: {s.matrix.removeprefix('the ')}" for s, name in zip(subjects, names, strict=True)]
    return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, 1)]


def clipped(name: str, longest: int = _LONGEST_LABEL) -> str:
    """Return a name without its middle where it is too long.

    >>> clipped("resnet20_cifar10_batch_size_4096", 16)
    'resnet2…ize_4096'
    """
    return name if len(name) <= longest else f"{name[: (longest - 1) // 2]}…{name[-(longest // 2) :]}"


def unbroken(text: str) -> str:
    """Return a text with spaces at which no line is broken."""
    return text.replace(" ", "\u00a0")


def shortened(names: list[str], longest: int = _LONGEST_LABEL) -> list[str]:
    """Return the names cut to a length at which they can still be told apart.

    What all have in front is left out, then words are shortened; numbers and the last word stay.

    >>> shortened([f"model.layers.{i}.self_attn.q_proj.weight" for i in (3, 11)], 20)
    ['…3.sel.q_p.weight', '…11.sel.q_p.weight']
    """
    if all(len(name) <= longest for name in names):
        return names
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts) and len(names) > 1:
        common += 1
    mark = "…" if common else ""
    for letters in (99, 6, 3, 1):
        cut = [
            mark + ".".join([*(w if w.isdigit() else w[:letters] for w in p[common:-1]), p[-1]])
            for p in parts
        ]
        if all(len(name) <= longest for name in cut) and len(set(cut)) == len(set(names)):
            return cut
    return [name if len(name) <= longest else f"…{name[1 - longest :]}" for name in names]


def plus_minus(value: float, stderr: float | None) -> str:
    """Return `value ± stderr`, the error with two digits and the value with as many places.

    Args:
        value: an estimate.
        stderr: its standard error; 0 for an exact value, None or NaN where it is not known.

    >>> plus_minus(1234.5678, 6.789), plus_minus(-1.5e-7, 2e-9)
    ('1234.6 ± 6.8', '(−1.500 ± 0.020) × 10⁻⁷')
    >>> plus_minus(2.0, 0.0), plus_minus(2.5, None)
    ('2', '2.5')
    """
    if not math.isfinite(value):
        return str(value)
    if stderr is None or not math.isfinite(stderr) or stderr == 0:
        # an exact value is as exact as its arithmetic: ten digits hold in double precision
        return f"{value:.{10 if stderr == 0 else 6}g}".replace("-", "−")
    power = math.floor(math.log10(max(abs(value), stderr)))
    if stderr >= 100 or power < -3:
        return f"({_fixed(value / 10.0**power, stderr / 10.0**power)}) × {power_of_ten(power)}"
    return _fixed(value, stderr)


def power_of_ten(power: int) -> str:
    """Return 10 to a power in words.

    >>> power_of_ten(-12)
    '10⁻¹²'
    """
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def number(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, and a power of ten where it is far from 1.

    >>> number(5.52654), number(-0.04429), number(5.8e-5), number(12), number(0)
    ('5.53', '−0.0443', '5.80 × 10⁻⁵', '12.0', '0')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}".replace("-", "−")
    # the power of the rounded number: 9.999 is 10.0
    power = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if -3 <= power <= 4:
        return f"{value:.{max(0, digits - 1 - power)}f}".replace("-", "−")
    return f"{value / 10.0**power:.{digits - 1}f} × {power_of_ten(power)}".replace("-", "−")


def grouped(count: int) -> str:
    """Return a count with its digits in threes where it has more than four."""
    return f"{count:,}".replace(",", " ") if count >= 10_000 else str(count)


def scale(values: np.ndarray, unit: str) -> tuple[float, str]:
    """Return a factor that brings values to a readable size, and the unit they then have."""
    largest = float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0))
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    if -3 <= power <= 3:
        return 1.0, unit
    return 10.0**-power, f"{power_of_ten(power)} {unit}"


def _fixed(value: float, stderr: float) -> str:
    places = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{value:.{places}f} ± {stderr:.{places}f}".replace("-", "−")
