"""`landscape compare`: the numbers of several runs side by side, read without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import report, values
from .plot import FORMATS
from .progress import emit, say
from .show import files

if TYPE_CHECKING:
    from landscape.results import Record

# What two measurements must have in common to be two values of one quantity: an attribute, in words.
_SAME = (("data_fingerprint", "the data"), ("dtype", "the precision"), ("seed", "the seed"))


@click.command("compare", short_help="Set the numbers of several runs side by side.")
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; NaN is null.")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE",
              help="Draw the measurement that the runs have in common, too: .png, .pdf, .svg or .html.")  # fmt: skip
@click.option("--debug", is_flag=True, expose_value=False, help="Show the trace of an error too.")
def command(runs: tuple[Path, ...], as_json: bool, out: Path | None) -> None:
    """Compare RUNs, run directories or measurements (.h5).

    One line for each number that any of them holds; of two runs also their difference, in standard errors
    where both have one. What differs in settings, data, precision or seed is said below.
    """
    from landscape import reading

    reading.start()  # it loads while we do
    from landscape import foreign

    if len(runs) < 2:
        raise click.UsageError("compare takes two runs or more; landscape show tells what one holds")
    held = [_records(run) for run in runs]
    with foreign.understood("one of these runs"):
        if as_json:
            both = zip(runs, held, strict=True)
            told = report.dump([{"run": str(run), "measurements": _plain(found)} for run, found in both])
        else:
            told = "\n".join([report.aligned(list(_lines(runs, held))), *_differences(runs, held)])
    emit(told)
    if out:
        _draw(held, out)


def _records(run: Path) -> dict[str, tuple[Path, Record]]:
    """The measurements of a run, by metric; by the name of the file where there are several of a metric."""
    from landscape import results

    found = [(path, results.read(path)) for path in files(run)]
    metrics = [str(record.attrs.get("metric", path.stem)) for path, record in found]
    names = [m if metrics.count(m) == 1 else path.stem for m, (path, _) in zip(metrics, found, strict=True)]
    return dict(zip(names, found, strict=True))


def _lines(runs: tuple[Path, ...], held: list[dict[str, tuple[Path, Record]]]) -> Iterator[tuple[str, ...]]:
    two = len(runs) == 2
    yield ("measure", *map(str, runs), *(("difference", "in standard errors") if two else ()))
    for name in dict.fromkeys(name for found in held for name in found):
        estimates = [_estimates(found.get(name)) for found in held]
        for label in dict.fromkeys(key for one in estimates for key in one):
            cells = [one.get(label) for one in estimates]
            texts = [cell.text if cell else "-" for cell in cells]
            yield (
                f"{name}: {label}" if label != name else name,
                *texts,
                *(_difference(*cells) if two else ()),
            )


def _estimates(measured: tuple[Path, Record] | None) -> dict[str, report.Estimate]:
    return {e.name: e for e in report.summarize(measured[1]).estimates} if measured else {}


def _difference(first: report.Estimate | None, second: report.Estimate | None) -> tuple[str, str]:
    """Second less first, and over the standard error of the difference."""
    if first is None or second is None:
        return "", ""
    apart = second.value - first.value
    if first.stderr is None or second.stderr is None:
        return f"{apart:.4g}", ""
    error = math.hypot(first.stderr, second.stderr)
    return f"{apart:.4g}", f"{apart / error:.1f}" if error > 0 and math.isfinite(error) else ""


def _differences(runs: tuple[Path, ...], held: list[dict[str, tuple[Path, Record]]]) -> Iterator[str]:
    """Say what stands in the way of reading two values as one quantity of two models."""
    for name in dict.fromkeys(name for found in held for name in found):
        present = [
            (run, found[name][1].attrs) for run, found in zip(runs, held, strict=True) if name in found
        ]
        fields = [_settings(attrs) for _, attrs in present]
        for field in dict.fromkeys(key for one in fields for key in one):
            shown = [values.show(one.get(field)) for one in fields]
            if len(set(shown)) > 1:
                yield f"{name}: {field} differs: {', '.join(shown)}"
        for attribute, words in _SAME:
            if len({str(attrs.get(attribute)) for _, attrs in present}) > 1:
                yield f"{name}: {words} differ" if words.endswith("data") else f"{name}: {words} differs"


def _settings(attrs: Any) -> dict[str, Any]:
    stored = attrs.get("configuration")
    fields = json.loads(stored) if isinstance(stored, str) else stored
    return dict(fields) if fields else {}


def _plain(found: dict[str, tuple[Path, Record]]) -> list[dict[str, Any]]:
    return [report.as_json(record, path) for path, record in found.values()]


def _draw(held: list[dict[str, tuple[Path, Record]]], out: Path) -> None:
    from landscape import plots

    if out.suffix.lower() not in FORMATS:
        raise click.UsageError(f"-o {out}: allowed are {', '.join(FORMATS)}")
    common = [
        name for name in held[0]
        if all(name in found for found in held)
        and str(held[0][name][1].attrs.get("metric")) in plots.metrics_with_a_picture()
    ]  # fmt: skip
    if len(common) != 1:
        what = f"these have {', '.join(common)}: name the files" if common else "these have none"
        raise click.UsageError(f"-o draws one measurement that all runs have; {what}")
    plots.plot([found[common[0]][0] for found in held], out)
    say(f"wrote {out}")
