"""`measure`: an evaluation with a file, that can be interrupted and goes on where it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from landscape import foreign, identity, lock, product_checks, provenance, ranks, results, sharing
from landscape import memory as footprint
from landscape.checks import Need, Report
from landscape.errors import Refused
from landscape.journal import FileJournal, Progress, delete_states
from landscape.memory import Plan
from landscape.metrics.base import MEMORY, Metric, evaluate
from landscape.plain_passes import precision
from landscape.problem import Problem
from landscape.results import Record
from landscape.shares import Share

if TYPE_CHECKING:
    import xarray


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
        delete_states(path)
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
                delete_states(path, record)
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
    journal = FileJournal(metric, share, about, progress)
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
