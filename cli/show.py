"""`landscape show`: what a run holds, read without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import report, values
from .progress import emit, say

if TYPE_CHECKING:
    from landscape.results import Record

# what `show` says about where a number comes from: a title, then attributes with their form
_LINES: tuple[tuple[Any, ...], ...] = (
    (
        "model",
        ("model", "{}"),
        ("parameters", "{} parameters"),
        ("parameters_fingerprint", "fingerprint {:.8}"),
    ),
    ("data", ("data", "{}"), ("examples", "{} examples"), ("data_fingerprint", "fingerprint {:.8}")),
    ("way", ("way", "{}"), ("reason", "{}")),
    ("warning", ("warning", "{}")),
    ("seed", ("seed", "{}")),
    (
        "computed on",
        ("device", "{}"),
        ("dtype", "{}"),
        ("threads", "threads: {}"),
        ("world_size", "processes: {}"),
    ),
    (
        "cost",
        ("matvecs", "{:.0f} products"),
        ("backward_passes", "{:.0f} backward passes"),
        ("gradients", "{:.0f} gradients"),
        ("values", "{:.0f} evaluations of the loss"),
        ("wall_seconds", "{:.1f} s"),
    ),
    ("versions", ("landscape_version", "landscape {}"), ("torch_version", "torch {}"), ("time", "{}")),
    ("command", ("command", "{}")),
)


@click.command("show", short_help="Show what a run holds.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; NaN is null.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the trace of an error too.")
def command(run: Path, as_json: bool) -> int:
    """Show what RUN holds: a run directory, or one measurement (.h5).

    For each measurement: its headline with standard error, configuration, model, seed, versions, cost, and
    how much of it is done.
    """
    from landscape import reading

    reading.start()  # it loads while we do
    from landscape import foreign, results

    failed = 0
    shown: list[dict[str, Any]] = []
    for index, path in enumerate(files(run)):
        try:
            record = results.read(path)
            with foreign.understood(path):
                if as_json:
                    shown.append(report.as_json(record, path) | {"complete": completeness(record)[1]})
                    continue
                told = text(record, path)
        except results.ResultsError as error:
            # the other measurements of the run are still worth showing
            say(" ".join(str(error).split()))
            failed = 3
            continue
        emit(("\n" if index else "") + told)
    if as_json:
        emit(report.dump(shown))
    return failed


def files(run: Path) -> list[Path]:
    """Return the measurements of a run: its `.h5` files, or those of the runs below it.

    Raises:
        landscape.results.ResultsError: if there is none.
    """
    from landscape.results import ResultsError

    if run.is_file() or not run.exists():
        return [run]  # reading a missing file says so
    found = next((hits for hits in (_measurements(run, "*.h5"), _measurements(run, "*/*.h5")) if hits), [])
    if not found:
        raise ResultsError(f"{run} holds no measurement; landscape measure --out {run} makes one")
    return found


def _measurements(run: Path, pattern: str) -> list[Path]:
    return sorted(path for path in run.glob(pattern) if path.is_file())


def text(record: Record, path: Path) -> str:
    """Return what `show` prints of one measurement."""
    summary = report.summarize(record, path)
    lines = [str(path)]
    rows: list[tuple[str, ...]] = []
    for index, estimate in enumerate(summary.estimates):
        note = {True: ", converged", False: ", tolerance NOT reached", None: ""}[summary.converged]
        relative = f" ({estimate.relative})" if estimate.relative else ""
        rows.append((estimate.name, estimate.text + relative + (note if index == 0 else "")))
    if not summary.estimates and not summary.listing:
        headline = str(record.attrs.get("headline", summary.metric))
        shape = record[headline].shape if headline in record else ()
        rows.append((headline, f"array {shape}" if shape else "nothing measured yet"))
    rows += [(title, line) for title, line in _details(record) if line]
    lines += ["  " + line for line in report.aligned(rows).splitlines()]
    if summary.listing:
        lines += ["", *("  " + line for line in summary.listing.splitlines())]
    return "\n".join(lines)


def completeness(record: Record) -> tuple[str, bool | None]:
    """Return how much is done, in words, and whether that is all (None where the file does not say)."""
    complete = record.attrs.get("complete")
    if "done" in record:
        done = record["done"]
        unit = record.variables["done"].dims[0]
        counted = record.attrs.get("counted") or unit + ("es" if unit.endswith("s") else "s")
        words = f"{int(done.sum())} of {done.size} {counted}"
        if complete is None:
            complete = bool(done.all())
    else:
        words = ""
    state = {True: "complete", False: "not finished; the same command goes on", None: ""}[complete]
    return ", ".join(part for part in (words, state) if part), complete


def _details(record: Record) -> Iterator[tuple[str, str]]:
    found = {name: report.lookup(record, name) for name in {key for _, *parts in _LINES for key, _ in parts}}
    yield "configuration", _configuration(record.attrs)
    if "stderr_reason" in record:
        yield "no error", "; ".join(sorted({str(reason) for reason in record["stderr_reason"] if reason}))
    yield "done", completeness(record)[0]
    for title, *parts in _LINES:
        yield title, ", ".join(form.format(found[name]) for name, form in parts if found[name] is not None)
    if record.attrs.get("git_commit"):
        dirty = ", with changes that are not committed" if record.attrs.get("git_dirty") else ""
        yield "your commit", f"{record.attrs['git_commit']:.12}{dirty}"
    if record.attrs.get("check", "") is None:
        yield "check", "skipped (--no-check)"


def _configuration(attrs: Mapping[str, Any]) -> str:
    stored = attrs.get("configuration")
    fields = json.loads(stored) if isinstance(stored, str) else stored
    if not isinstance(fields, Mapping):
        return ""
    return " ".join(f"{name.replace('_', '-')}={values.show(value)}" for name, value in fields.items())
