"""`measure`: an evaluation with a file, that can be interrupted and goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from landscape import foreign, identity, lock, product_checks, provenance, ranks, results, sharing
from landscape import memory as footprint
from landscape._version import __version__
from landscape.checks import Need, Report
from landscape.errors import Refused
from landscape.memory import Plan
from landscape.metrics.base import MEMORY, Journal, Metric, State, evaluate
from landscape.metrics.base_journal import PREPARATION
from landscape.plain_passes import precision
from landscape.problem import Problem
from landscape.results import Record
from landscape.shares import Share

if TYPE_CHECKING:
    import xarray

# Writing takes this share of the time at most (the file is rewritten whole); a kill loses 50 times a writing.
_WRITING_SHARE = 0.02
# Seconds before the first writing: a measurement that is done by then is written once.
_UNWRITTEN_SECONDS = 0.1
_PARTS = ".parts"  # where states of unfinished blocks lie
# Exit codes of the command line, written into the run too: some launchers lose them.
_TOLERANCE_MISSED, _INTERRUPTED = 4, 130


@dataclass(frozen=True)
class Progress:
    """How far a measurement is.

    Attributes:
        metric: its name.
        done: units measured.
        total: units of the current round; an adaptive metric may ask for more. None while it waits for another
            process, whom the message names.
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
    wait: bool = False,
    shard: Literal["units", "data", "none"] = "units",
    part: tuple[int, int] | None = None,
    timeout: float = ranks.TIMEOUT,
) -> xarray.Dataset:
    """Measure a metric of a problem, store it, and return it.

    Interrupted at any moment, the same call goes on where it was and ends with the same numbers. On a
    complete file it returns what is there; with a larger demand (a smaller rtol) it adds to it.

    Where torchrun or another launcher has started several ranks (RANK and WORLD_SIZE in the environment, or
    torch.distributed initialized), all of them call this with the same model and all of the data, and divide the
    work; a run goes on, with the same bits, on any other number of ranks.

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
        wait: where another process measures into the same file, wait until it is done; else refuse. One
            that was killed does not count, unless it ran on another machine.
        shard: what ranks divide: "units", whole blocks of them, without a word between ranks until a round is
            done (with out=None every rank measures all); "data": each takes a part of the batches, and every
            product and gradient is summed over ranks, equal to one process to rounding; "none": this process
            measures alone.
        part: (i, n): measure part i of n, 1 <= i <= n, of the blocks into a part file, in a job of its own;
            `landscape.merge` puts the parts together.
        timeout: seconds without a sign of life after which a rank is lost.

    Returns:
        The dataset: estimates, their errors, the values of all units, provenance in `attrs`. Of a part, what
        is measured; `attrs["complete"]` is False.

    Raises:
        Refused: if the problem fails its check, if one example needs more memory than is allowed, if the file
            holds another measurement, if another process is measuring into it (which is named), or if another
            rank measures something else.
        RankLost: if another rank died, stopped or failed.
        ResultsError: if the file cannot be read or written.
        ValueError: for a part that cannot be.
    """
    path = None if out is None else result_path(out, metric)

    def waiting(text: str) -> None:
        if progress is not None:
            progress(Progress(metric.name, 0, None, text))

    # Processes that share a model (FSDP) make all passes together, each with its own data.
    divided = shard if problem.apart else "data"
    with sharing.of(path, divided, part, timeout) as share, lock.held(share.locked, wait=wait, tell=waiting):
        return _measure(
            metric,
            problem,
            share,
            seed=seed,
            overwrite=overwrite,
            check=check,
            progress=progress,
            memory=MEMORY if memory is None else memory,
        )


def _measure(
    metric: Metric,
    problem: Problem,
    share: Share,
    *,
    seed: int,
    overwrite: bool,
    check: bool,
    progress: Callable[[Progress], None] | None,
    memory: int,
) -> xarray.Dataset:
    """Measure into a file that no other process measures into, but for those who share the work."""
    path, record, about = share.path, None, None
    if path is not None and overwrite and share.main:
        _delete_states(path)
    share.begin(overwrite=overwrite)
    problem = share.divided(problem)
    if path is not None and path.exists() and not overwrite:
        record = results.read(path)
        about = identity.of(metric, problem, seed, memory, problem.data_fingerprint())
        share.agree(about)
        identity.require_same(path, record, about)
        foreign.require_usable(path, record, metric)
        record.attrs["configuration"] = about["configuration"]
        foreign.require_usable(path, record, metric)
        if record.attrs.get("complete") and metric.units(record) is None:
            if share.main:
                _delete_states(path, record)
            return record.to_xarray()
    stored = record.attrs.get("memory_plan") if record else None
    plan = Plan(**stored) if stored else memory_plan(metric, problem, memory, check=check)
    given = problem
    if plan.microbatch != problem.microbatch:
        problem = problem.replace(microbatch=plan.microbatch)
    with provenance.asked() as origin:  # git answers while the check runs
        problem, report = _checked(metric, problem, record) if check else (_unchecked(problem), None)
        _require_same_products(path, record, problem)
        if about is None:
            data = report.data_fingerprint if report else problem.data_fingerprint()
            about = identity.of(metric, given, seed, memory, data)
            share.agree(about)
        if record is None:
            chosen = {"memory_plan": dataclasses.asdict(plan), "check": None}
            record = Record(attrs={**about, **_described(metric, problem, origin()), **chosen})
    if record.attrs["check"] is None:
        record.attrs.update(check=report.as_dict() if report else None, products=problem.products_in_use)
    record.attrs.update(complete=False, exit_code=None, world_size=share.world)
    journal = _Journal(metric, share, about, progress)
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
    """Writes the record whole after a block, but spends at most 2 % of the time on it."""

    def __init__(
        self,
        metric: Metric,
        share: Share,
        about: dict[str, Any],
        progress: Callable[[Progress], None] | None,
    ):
        self.metric, self.share, self.path, self.tell = metric, share, share.path, progress
        # With its demands: what a block came to for smaller ones is not what it has to come to. With the version:
        # stages are known by their order.
        same = {key: about[key] for key in (*identity.SAME, "configuration")} | {"version": __version__}
        self.key = hashlib.blake2b(json.dumps(same, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.spacing, self.state_spacing = _Spacing(_UNWRITTEN_SECONDS), _Spacing(_UNWRITTEN_SECONDS)
        self.unwritten = False

    def prepare(self, record: Record, make: Callable[[], None]) -> None:
        self.share.prepare(record, make, functools.partial(self._write, record))
        self.commit(record)

    def deal(self, record: Record, blocks: Sequence[range]) -> Sequence[range]:  # noqa: ARG002
        return self.share.deal(record, functools.partial(self._write, record))

    def gather(self, record: Record) -> bool:
        return self.share.gather(record, functools.partial(self._write, record))

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
        if self.tell is not None and (self.share.main or self.share.world == 1):
            self.tell(Progress(self.metric.name, done, total, _so_far(self.metric, record)))

    def step(self, record: Record, standing: Callable[[], str]) -> None:
        if self.tell is not None and (self.share.main or self.share.world == 1) and (words := standing()):
            self.tell(Progress(self.metric.name, int(record["done"].sum()), record.attrs["stop"], words))

    def load_state(self, block: range) -> State | None:
        if self.path is None:
            return None
        self.share.meet()
        found = results.read_state(_state_path(self.path, block))
        self.share.meet()
        return found[0] if found is not None and found[1].get("key") == self.key else None

    def save_state(self, block: range, state: Callable[[], State]) -> None:
        if self.path is not None and self.share.writes and self.state_spacing.due():
            with self.state_spacing:
                results.write_state(_state_path(self.path, block), state(), {"key": self.key})

    def _write(self, record: Record) -> None:
        if self.path is None or not self.share.writes:
            return
        if self.share.main and "done" in record and record["done"].any():
            record.variables.update(self.metric.summarize(record))
        with self.spacing:
            self.share.write(record)
        self.unwritten = False
        _delete_states(self.path, record)


def _state_path(path: Path, block: range) -> Path:
    which = "prepare" if block == PREPARATION else block.start
    return path.parent / _PARTS / f"{path.stem}.state-{which}.safetensors"


def kept_in(path: Path) -> Path | None:
    """Return where the work on a result is kept: its file, or the state of what comes before; None for nowhere."""
    return next((place for place in (path, _state_path(path, PREPARATION)) if place.exists()), None)


def _delete_states(path: Path, record: Record | None = None) -> None:
    """Delete the states of what is in the record, which is stored, or all of them.

    A kill may have come between its writing and this.
    """
    every = record is None or bool(record.attrs["complete"])
    done = record["done"] if record is not None and "done" in record else np.zeros(0, bool)
    size = 0 if record is None else int(record.attrs["block_size"])
    with contextlib.suppress(OSError):
        for state in (path.parent / _PARTS).iterdir():
            found = re.fullmatch(rf"{re.escape(path.stem)}\.state-(prepare|[0-9]+)\.safetensors", state.name)
            if found is None:
                continue
            block = done[int(found[1]) :][:size] if found[1] != "prepare" else np.ones(1, bool)
            if every or (len(block) and block.all()):
                state.unlink()


class _Spacing:
    """Tells when writing again keeps it under its share of the time; measures each writing."""

    def __init__(self, first_after: float) -> None:
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


def _described(metric: Metric, problem: Problem, origin: dict[str, Any]) -> dict[str, Any]:
    return {
        "examples": problem.examples(),
        **origin,
        "torch_version": str(torch.__version__),
        "model_dtype": precision(problem.evaluator.model),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "headline": metric.headline,
        "told": list(metric.told),
        "listed": list(metric.listed),
        "unit": metric.unit,
        "citation": metric.citation,
        "parameter_ranges": {name: list(span) for name, span in problem.space.ranges.items()},
    }
