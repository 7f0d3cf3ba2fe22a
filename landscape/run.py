"""`measure`: an evaluation with a file, that can be interrupted and goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from landscape import foreign, product_checks, provenance, results
from landscape import memory as footprint
from landscape.checks import Need, Report
from landscape.errors import Refused
from landscape.memory import Plan
from landscape.metrics.base import MEMORY, Journal, Metric, State, evaluate
from landscape.problem import Problem
from landscape.results import Record

if TYPE_CHECKING:
    import xarray

# Writing may take this share of the time (the file is rewritten whole).
_WRITING_SHARE = 0.05
# Seconds before the first writing: a measurement that is done by then is written once.
_UNWRITTEN_SECONDS = 0.1
# Exit codes of the command line, written into the run too: some launchers lose them.
_TOLERANCE_MISSED, _INTERRUPTED = 4, 130


@dataclass(frozen=True)
class Progress:
    """How far a measurement is.

    Attributes:
        metric: its name.
        done: units measured.
        total: units of the current round; an adaptive metric may ask for more.
        message: the estimate so far, in words.
    """

    metric: str
    done: int
    total: int | None
    message: str


def measure(
    metric: Metric,
    problem: Problem,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    check: bool = True,
    progress: Callable[[Progress], None] | None = None,
    memory: int | None = None,
) -> xarray.Dataset:
    """Measure a metric of a problem, store it, and return it.

    Interrupted at any moment, the same call goes on where it was and ends with the same numbers. On a
    complete file it returns what is there; with a larger demand (a smaller rtol) it adds to it.

    Args:
        metric: what to measure, for example `landscape.metrics.Trace(rtol=0.01)`.
        problem: on what.
        out: a run directory (the file is `<out>/<metric>.h5`), or a file `x.h5`; None writes nothing.
        seed: of all random streams.
        overwrite: start anew instead of resuming or refusing.
        check: test first whether the problem can be measured (`Problem.check`).
        progress: called after each block of units.
        memory: bytes that may be used beside the model and its data; default 8 GiB. Batches that need more
            are cut, unless the problem was given a microbatch.

    Returns:
        The dataset: estimates, their errors, the values of all units, provenance in `attrs`.

    Raises:
        Refused: if the problem fails its check, if one example needs more memory than is allowed, or if
            the file holds another measurement.
        ResultsError: if the file cannot be read or written.
    """
    memory = MEMORY if memory is None else memory
    path = None if out is None else result_path(out, metric)
    record, identity = None, None
    if path is not None:
        results.clean_leftovers(path.parent)
        results.require_writable(path.parent)
        if path.exists() and not overwrite:
            record = results.read(path)
            identity = _identity(metric, problem, seed, memory, problem.data_fingerprint())
            _require_same(path, record, identity)
            foreign.require_usable(path, record, metric)
            if record.attrs.get("complete") and metric.units(record) is None:
                return record.to_xarray()
    stored = record.attrs.get("memory_plan") if record else None
    plan = Plan(**stored) if stored else memory_plan(metric, problem, memory, check=check)
    given = problem
    if plan.microbatch != problem.microbatch:
        problem = problem.replace(microbatch=plan.microbatch)
    with provenance.asked() as origin:  # git answers while the check runs
        problem, report = _checked(metric, problem, record) if check else (_unchecked(problem), None)
        _require_same_products(path, record, problem)
        if identity is None:
            data = report.data_fingerprint if report else problem.data_fingerprint()
            identity = _identity(metric, given, seed, memory, data)
        if record is None:
            chosen = {"memory_plan": dataclasses.asdict(plan), "check": None}
            record = Record(attrs={**identity, **_described(metric, problem, origin()), **chosen})
    if record.attrs["check"] is None:
        record.attrs.update(check=report.as_dict() if report else None, products=problem.products_in_use)
    record.attrs.update(complete=False, exit_code=None)
    journal = _Journal(metric, path, identity, progress)
    try:
        left = _memory_for_block(metric, problem, memory, plan)
        evaluate(metric, problem, seed, memory=left, journal=journal, record=record)
    except BaseException:
        journal.keep(record)
        raise
    return record.to_xarray()


def memory_plan(metric: Metric, problem: Problem, memory: int | None = None, *, check: bool = True) -> Plan:
    """Choose micro-batch and block for a measurement within the memory; see `landscape.memory.plan`.

    Args:
        metric: what is to be measured.
        problem: on what.
        memory: bytes, default 8 GiB.
        check: as for `measure`.

    Raises:
        Refused: if one example does not fit.
    """
    memory = MEMORY if memory is None else memory
    return footprint.plan(
        problem, memory, vector=metric.unit_bytes(problem), block=metric.block_size(problem, memory),
        products=bool(metric.needs() & {Need.HESSIAN, Need.GGN, Need.INPUTS}), check=check,
    )  # fmt: skip


def _memory_for_block(metric: Metric, problem: Problem, memory: int, plan: Plan) -> int:
    """The memory with which the metric chooses the plan's block."""
    whole = plan.block == metric.block_size(problem, memory)
    return memory if whole else 2 * plan.block * metric.unit_bytes(problem)


def _checked(metric: Metric, problem: Problem, record: Record | None) -> tuple[Problem, Report]:
    """Check the problem; what is known or stored of its products goes with it, else the first one is checked."""
    before = record.attrs["check"] if record else None
    # Where nothing is left to choose, a refusal comes before any work; so does one of what was not checked before.
    eager = problem.products != "auto" or (record is not None and before is None)
    problem = problem.knowing(product_checks.stored(before or {}))
    # A single example cannot be cut in two to see that the loss adds up.
    whole = problem.replace(microbatch=2) if problem.microbatch == 1 else problem
    return problem, whole.check(metric.needs(), products=eager)


def _unchecked(problem: Problem) -> Problem:
    return problem.replace(products="autodiff" if problem.products == "auto" else problem.products)


def _require_same_products(path: Path | None, record: Record | None, problem: Problem) -> None:
    before, now = record.attrs["products"] if record else "not needed", problem.products_in_use
    if "not needed" not in {before, now} and before != now:
        raise Refused(
            f"{path} was measured with {before} products, now they are made by {now}; "
            "measure under another name with out=..., or start anew with overwrite"
        )


def result_path(out: str | Path, metric: Metric) -> Path:
    """Return the file of a measurement: `out` itself if it ends in .h5, else `<out>/<metric>.h5`."""
    out = Path(out)
    return out if out.suffix == ".h5" else out / f"{metric.name}.h5"


class _Journal(Journal):
    """Writes the record whole after a block, but spends at most 5 % of the time on it."""

    def __init__(
        self,
        metric: Metric,
        path: Path | None,
        identity: dict[str, Any],
        progress: Callable[[Progress], None] | None,
    ):
        self.metric, self.path, self.tell = metric, path, progress
        same = {key: identity[key] for key in _SAME}
        self.key = hashlib.blake2b(json.dumps(same, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.spacing = _Spacing(_UNWRITTEN_SECONDS)
        self.state_spacing = _Spacing()
        self.unwritten = False
        self.states: dict[Path, range] = {}

    def commit(self, record: Record, *, final: bool = False) -> None:
        self.unwritten = True
        if final:
            missed = "converged" in record and not bool(record["converged"])
            record.attrs["exit_code"] = _TOLERANCE_MISSED if missed else 0
        if self.path is not None and (final or self.spacing.due()):
            self._write(record)

    def keep(self, record: Record) -> None:
        """Write what is done, on the way out."""
        record.attrs["exit_code"] = _INTERRUPTED
        # Also where all units are in the file: it does not say yet that this was an interruption.
        open_end = self.unwritten or not record.attrs["complete"]
        if self.path is not None and open_end and "block_size" in record.attrs:
            self._write(record)

    def progress(self, record: Record, done: int, total: int) -> None:
        if self.tell is not None:
            self.tell(Progress(self.metric.name, done, total, _so_far(self.metric, record)))

    def load_state(self, block: range) -> State | None:
        if self.path is None:
            return None
        path = _state_path(self.path, block)
        found = results.read_state(path)
        if found is None or found[1].get("key") != self.key:
            return None
        self.states[path] = block
        return found[0]

    def save_state(self, block: range, state: Callable[[], State]) -> None:
        if self.path is not None and self.state_spacing.due():
            path = _state_path(self.path, block)
            with self.state_spacing:
                results.write_state(path, state(), {"key": self.key})
            self.states[path] = block

    def _write(self, record: Record) -> None:
        if self.path is None:
            return
        if "done" in record and record["done"].any():
            record.variables.update(self.metric.summarize(record))
        with self.spacing:
            results.write(self.path, record)
        self.unwritten = False
        for path, block in list(self.states.items()):
            if (
                "done" in record and record["done"][block.start : block.stop].all()
            ):  # their results are safe now
                path.unlink(missing_ok=True)
                del self.states[path]


def _state_path(path: Path, block: range) -> Path:
    return path.parent / ".parts" / f"{path.stem}.state-{block.start}.safetensors"


class _Spacing:
    """Tells when writing again keeps it under its share of the time; measures each writing."""

    def __init__(self, first_after: float = 0.0) -> None:
        self.ended, self.wait = time.monotonic(), first_after

    def due(self) -> bool:
        return time.monotonic() - self.ended >= self.wait

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.ended = time.monotonic()
        self.wait = (self.ended - self.began) / _WRITING_SHARE


def _so_far(metric: Metric, record: Record) -> str:
    values = metric.summarize(record)
    if metric.headline not in values or values[metric.headline].data.ndim:
        return ""
    text = f"{metric.headline} {float(values[metric.headline].data):.5g}"
    error = values.get(f"{metric.headline}_stderr")
    return text if error is None else f"{text} ± {float(error.data):.2g}"


def _identity(metric: Metric, problem: Problem, seed: int, memory: int, data: str) -> dict[str, Any]:
    """What makes two runs the same measurement."""
    return {
        "metric": metric.name,
        "configuration": json.dumps(metric.configuration(), sort_keys=True),
        "fixed_configuration": json.dumps(metric.configuration(without_demands=True), sort_keys=True),
        "seed": seed,
        "parameters_fingerprint": problem.fingerprint(),
        "data_fingerprint": data,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": problem.device.type,
        "mode": problem.mode,
        "reduction": problem.reduction,
        "microbatch": problem.microbatch,
        "memory": memory,
    }


_SAME = {
    "metric": "the metric",
    "fixed_configuration": "the metric's settings",
    "seed": "the seed",
    "parameters_fingerprint": "the model's parameters",
    "data_fingerprint": "the data or their batches",
    "dtype": "the dtype",
    "device": "the device",
    "mode": "the model's mode",
    "reduction": "the reduction",
    "microbatch": "the micro-batch",
    "memory": "the memory",
}


def _require_same(path: Path, record: Record, identity: dict[str, Any]) -> None:
    differing = [
        f"{words} ({record.attrs.get(key)} there, {identity[key]} now)"
        for key, words in _SAME.items()
        if record.attrs.get(key) != identity[key]
    ]
    if differing:
        raise Refused(
            f"{path} holds another measurement; different: {'; '.join(differing)}. Choose another place "
            "(out=..., --out), or start anew (overwrite=True, --overwrite)."
        )
    record.attrs["configuration"] = identity["configuration"]


def _described(metric: Metric, problem: Problem, origin: dict[str, Any]) -> dict[str, Any]:
    return {
        "examples": problem.examples(),
        **origin,
        "torch_version": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "world_size": 1,
        "headline": metric.headline,
        "told": list(metric.told),
        "listed": list(metric.listed),
        "unit": metric.unit,
        "citation": metric.citation,
        "parameter_ranges": {name: list(span) for name, span in problem.space.ranges.items()},
    }
