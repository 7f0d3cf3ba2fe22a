"""What a metric is, and how it is evaluated, without files.

A metric is one file with one frozen dataclass. It prepares once, is asked for units of work round after
round, measures them in blocks, and summarizes what is stored:

    prepare -> [units -> measure, measure, ...] -> [units -> ...] -> summarize

Block boundaries are a fixed function of the unit index and each unit has its own random stream, so that
runs that were interrupted, resumed or dealt over processes agree bit for bit.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from landscape import memory as footprint
from landscape import rounds, seeds, stages
from landscape.checks import Need
from landscape.estimators.stopping import stopping_counts
from landscape.metrics.base_journal import (
    PREPARATION,
    Accounts,
    Journal,
    StageJournal,
    State,
    packed,
    unpacked,
)
from landscape.problem import Problem
from landscape.results import Record, Variable

__all__ = [
    "MEMORY",
    "Journal",
    "Metric",
    "Round",
    "SequentialMetric",
    "State",
    "Values",
    "curvature_power",
    "evaluate",
    "graphs_fit",
    "growing",
    "setting",
    "vector_bytes",
]

Values = dict[str, Variable]

_STEP = "step/"  # before the names of what stages within a step keep
_HELD_PER_SAVED = 2  # bytes that a graph holds per byte that autograd saves for it, at most
MEMORY = 8 << 30  # bytes that a measurement may use beside the model, unless told otherwise


def setting(default: Any, help: str, *, grows: bool = False) -> Any:  # noqa: A002  (as argparse calls it)
    """Declare a field of a metric.

    Args:
        default: its default value.
        help: what it is, for the command line.
        grows: True for a demand (a tolerance, a number of probes): a larger one resumes and keeps all
            units; any other field names another measurement.
    """
    return field(default=default, metadata={"help": help, "grows": grows})


@dataclass(frozen=True)
class Round:
    """The next units to measure.

    Attributes:
        stop: units up to this index, exclusive, are wanted; those already done are kept.
        inputs: values that the round's units are measured at, by name, with the unit dimension first and
            one entry for each unit up to `stop` (refined grid points, say); stored with the result.
        again: whether units that are done are measured anew (a smaller tolerance needs another solve).
    """

    stop: int
    inputs: Values = field(default_factory=dict)
    again: bool = False


def growing(done: int, first: int, most: int, fine: Callable[[], bool]) -> Round | None:
    """The next round of units that grow from `first` until they are fine, or `most` are made.

    Args:
        done: units that are done.
        first: units of the first round.
        most: at the end.
        fine: whether the tolerance is reached; asked at the fixed counts of `stopping_counts` only, so that the
            answer does not depend on where an earlier, smaller `most` ended.
    """
    fixed = stopping_counts(first, max(done + 1, 2 * most))
    if done >= most or (done in fixed and fine()):
        return None
    return Round(min(next(count for count in fixed if count > done), most))


@dataclass(frozen=True)
class Metric(abc.ABC):
    """One measure of a problem. Its fields are the flags, the provenance and the resume key.

    Attributes:
        name: of the metric, as on the command line.
        headline: the variable that stands for the result.
        unit: the dimension along which units of work are counted.
        block: the most units measured at once.
        citation: the source of the definition.
        told: further variables, numbers without an error, that are told with the headline.
        listed: variables along the headline's axis that are told as a table in its place.
        seed_chooses: whether the seed says what is measured (random directions), not only with which draws.
    """

    name: ClassVar[str]
    headline: ClassVar[str]
    unit: ClassVar[str]
    block: ClassVar[int] = 16
    citation: ClassVar[str] = ""
    told: ClassVar[tuple[str, ...]] = ()
    listed: ClassVar[tuple[str, ...]] = ()
    seed_chooses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a choice that is none of a field's.

        Raises:
            ValueError: naming the allowed ones.
        """
        for key, choices in _choices(type(self)).items():
            if getattr(self, key) not in choices:
                allowed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
                raise ValueError(f"{key} is {getattr(self, key)!r}; allowed is {allowed}")

    @abc.abstractmethod
    def needs(self) -> frozenset[Need]:
        """What is asked of the problem; `check` covers it."""

    @abc.abstractmethod
    def prepare(self, problem: Problem, seed: int) -> Record:
        """Compute what all units share (directions, a pilot's choice); stored before the first unit."""

    @abc.abstractmethod
    def units(self, record: Record) -> Round | None:
        """Return the next round, None when nothing is left to do.

        A pure function of stored values, called when all units of the last round are done.
        """

    @abc.abstractmethod
    def measure(
        self, problem: Problem, shared: Record, block: range, generators: Sequence[torch.Generator]
    ) -> Values:
        """Measure a block of units; every variable has the unit dimension first."""

    @abc.abstractmethod
    def summarize(self, record: Record) -> Values:
        """Compute the estimates from stored values of the units that are done; numpy only."""

    @abc.abstractmethod
    def outlook(self, problem: Problem) -> tuple[int, int]:
        """Predict the fewest and the most curvature products (or other passes) that will be needed."""

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """Variables that are multiplied by c^p where the loss is by c, and p; those without such a law are left out."""
        return {self.headline: 1.0}

    @property
    def outlook_in(self) -> tuple[str, float]:
        """What `outlook` counts, and what one of them costs in gradients, about."""
        return "products", 2.5  # between 2.2 and 2.9 by network

    def block_size(self, problem: Problem, memory: int) -> int:
        """Choose how many units are measured at once, from shapes and the stated memory alone."""
        return max(1, min(self.block, memory // (2 * self.unit_bytes(problem))))

    def unit_bytes(self, problem: Problem) -> int:
        """Bytes that a unit of a block holds, beside the graph of its derivatives."""
        return vector_bytes(problem)

    def run_block(
        self,
        problem: Problem,
        shared: Record,
        block: range,
        generators: Sequence[torch.Generator],
        journal: Journal,
    ) -> Values:
        """Measure a block from wherever it stands; its stages are kept in the journal."""
        with journal.staged(block):
            return self.measure(problem, shared, block, generators)

    def configuration(self, *, without_demands: bool = False) -> dict[str, Any]:
        """The fields and their values; without those that only ask for more of the same."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if not (without_demands and f.metadata.get("grows"))
        }


def curvature_power(curvature: str) -> float:
    """Return the power of the loss that a curvature matrix is proportional to."""
    return 2.0 if curvature == "empirical_fisher" else 1.0  # squares of gradients


def vector_bytes(problem: Problem) -> int:
    """What a product holds per vector: the vector twice, its float64 sum, and the result."""
    return problem.size * (3 * problem.dtype.itemsize + 8)


@dataclass(frozen=True)
class SequentialMetric(Metric):
    """A metric whose blocks advance step by step (Lanczos, ascent) and can stop between steps.

    A state is a dict of arrays, or an object that `stored` turns into one and `restored` brings back, bit
    for bit; what a step needs to know, random state included, is in it. A step with stages of its own (a solve)
    leaves the state as it is until they end.

    Attributes:
        keeps_graphs: whether graphs of products are kept from step to step, where they fit into the memory.
    """

    keeps_graphs: ClassVar[bool] = True

    @abc.abstractmethod
    def start(
        self, problem: Problem, shared: Record, block: range, generators: Sequence[torch.Generator]
    ) -> Any:
        """Return the state before the first step."""

    @abc.abstractmethod
    def step(self, problem: Problem, shared: Record, block: range, state: Any) -> Any:
        """Return the state one step further."""

    @abc.abstractmethod
    def result(self, problem: Problem, shared: Record, block: range, state: Any) -> Values | None:
        """Return the block's values, or None while it has to go on."""

    def standing(self, state: Any) -> str:  # noqa: ARG002  (a metric whose steps are short has nothing to say)
        """Say in a few words how far a state is."""
        return ""

    def stored(self, state: Any) -> State:
        """Turn a state into arrays."""
        return dict(state)

    def restored(self, problem: Problem, arrays: State) -> Any:  # noqa: ARG002  (objects need the device)
        """Turn what `stored` gave back into a state."""
        return arrays

    def measure(
        self, problem: Problem, shared: Record, block: range, generators: Sequence[torch.Generator]
    ) -> Values:
        """Run a block from its start to its end."""
        return self.run_block(problem, shared, block, generators, Journal())

    def run_block(
        self,
        problem: Problem,
        shared: Record,
        block: range,
        generators: Sequence[torch.Generator],
        journal: Journal,
    ) -> Values:
        """Run a block from its saved state, or from its start, to its end."""
        multiplied = self.multiplied(problem, shared)
        with contextlib.ExitStack() as stack:
            stack.enter_context(multiplied.session())
            if self.keeps_graphs and graphs_fit(multiplied, shared.attrs.get("memory", MEMORY)):
                stack.enter_context(multiplied.keeping_graphs())
            return self._run(problem, shared, block, generators, journal)

    def multiplied(self, problem: Problem, shared: Record) -> Problem:  # noqa: ARG002
        """The problem whose products a block makes: held in its mode meanwhile, its graphs kept where they fit."""
        return problem

    def _run(
        self,
        problem: Problem,
        shared: Record,
        block: range,
        generators: Sequence[torch.Generator],
        journal: Journal,
    ) -> Values:
        stored, inner = journal.load_state(block), {}
        if stored is None:
            state = _as_read_back(self.start(problem, shared, block, generators))
        else:
            inner = {name.removeprefix(_STEP): a for name, a in stored.items() if name.startswith(_STEP)}
            own = {name: array for name, array in stored.items() if not name.startswith(_STEP)}
            stored = None  # large states are taken over array by array
            state = self.restored(problem, own)
        while (values := self.result(problem, shared, block, state)) is None:
            keep = functools.partial(self._keep, journal, block, state)
            with stages.within(stages.Stages(inner, keep, journal.books)):
                state = _as_read_back(self.step(problem, shared, block, state))
            inner = {}
            journal.save_state(block, functools.partial(self.stored, state))
            journal.step(shared, functools.partial(self.standing, state))
        return values

    def _keep(self, journal: Journal, block: range, state: Any, inner: Callable[[], State]) -> None:
        """Keep the state before a step, and the stages of the step."""

        def both() -> State:
            return {**self.stored(state), **{f"{_STEP}{name}": array for name, array in inner().items()}}

        journal.save_state(block, both)


def graphs_fit(problem: Problem, memory: int) -> bool:
    """Whether the graphs of products, once kept, take at most a quarter of the memory."""
    room = memory // 4
    needed = footprint.graphs(problem, room)
    return needed is not None and _HELD_PER_SAVED * needed <= room


def _as_read_back(state: Any) -> Any:
    return stages.as_read_back(state) if isinstance(state, dict) else state


def evaluate(
    metric: Metric,
    problem: Problem,
    seed: int = 0,
    *,
    memory: int = MEMORY,
    journal: Journal | None = None,
    record: Record | None = None,
) -> Record:
    """Evaluate a metric, without files.

    Within another evaluation, as of a metric that measures others, it is a stage of that: interrupted, both go
    on where they were.

    Args:
        metric: what to measure.
        problem: on what.
        seed: of all random streams.
        memory: bytes that it may use beside the model; blocks are cut to fit.
        journal: told of every block that is done.
        record: what an earlier evaluation left; its units are kept.

    Returns:
        The record: values of all units, and the estimates.
    """
    if journal is not None:
        return _evaluate(metric, problem, seed, memory, journal, record or Record())
    stage = stages.begin(keeps_books=True)
    if not stage.is_kept:
        return _evaluate(metric, problem, seed, memory, Journal(), record or Record())
    if stage.result is not None:
        return unpacked(stage.result)
    inner = StageJournal(stage, problem)
    return unpacked(stage.finish(packed(_evaluate(metric, problem, seed, memory, inner, inner.record))))


def _evaluate(
    metric: Metric, problem: Problem, seed: int, memory: int, journal: Journal, record: Record
) -> Record:
    with problem.session(), stages.within(None):
        if "block_size" not in record.attrs:
            record.attrs["memory"] = memory
            journal.prepare(record, functools.partial(_prepare, metric, problem, seed, journal, record))
        while True:
            if _measure_open_blocks(metric, problem, seed, record, journal):
                return record
            following = metric.units(record)
            if following is None:
                break
            open_round(metric, record, following)
        finish(metric, record)
        journal.commit(record, final=True)
    return record


def _prepare(metric: Metric, problem: Problem, seed: int, journal: Journal, record: Record) -> None:
    with Accounts(record, problem, journal) as accounts, accounts.staged(PREPARATION):
        shared = metric.prepare(problem, seed)
    record.variables.update(shared.variables)
    record.attrs.update(shared.attrs)
    size = metric.block_size(problem, record.attrs["memory"])
    record.attrs.update(block_size=size, stop=0, round=rounds.first(shared))


def finish(metric: Metric, record: Record) -> None:
    """Summarize a record whose units are all done."""
    record.variables.update(metric.summarize(record))
    record.attrs["complete"] = True


def _measure_open_blocks(
    metric: Metric, problem: Problem, seed: int, record: Record, journal: Journal
) -> bool:
    """Measure what is to be measured here; return whether the rest is left to others."""
    blocks = rounds.open_blocks(record)
    if not blocks:
        return False
    for block in journal.deal(record, blocks):
        # A block that an earlier, smaller demand left half done is measured whole: what its units say
        # together must not depend on that history.
        generators = _Streams(seed, metric.name, block)
        with Accounts(record, problem, journal) as accounts:
            values = metric.run_block(problem, record, block, generators, accounts)
        _store(record, block, values)
        journal.commit(record)
        journal.progress(record, int(record["done"].sum()), record.attrs["stop"])
    return not journal.gather(record)


class _Streams(Sequence[torch.Generator]):
    """The random streams of a block's units, made when one is asked for; one that was drawn from goes on."""

    def __init__(self, seed: int, name: str, block: range):
        self._seed, self._name, self._block = seed, name, block
        self._made: list[torch.Generator] = []

    def __len__(self) -> int:
        return len(self._block)

    @typing.overload
    def __getitem__(self, index: int) -> torch.Generator: ...
    @typing.overload
    def __getitem__(self, index: slice) -> list[torch.Generator]: ...
    def __getitem__(self, index: int | slice) -> torch.Generator | list[torch.Generator]:
        if not self._made:
            self._made = [seeds.generator(self._seed, self._name, i) for i in self._block]
        return self._made[index]


def open_round(metric: Metric, record: Record, following: Round) -> None:
    """Lengthen the unit dimension; what is not yet measured is NaN and not done."""
    stop = following.stop
    if stop <= record.attrs["stop"] and not following.again:
        raise RuntimeError(
            f"metric {metric.name!r} asked for {stop} units when {record.attrs['stop']} were done"
        )
    done = Variable((metric.unit,), np.zeros(0, bool), long_name="measured")
    for name, variable in {"done": done, **record.variables}.items():
        if variable.dims[:1] == (metric.unit,) and variable.data.shape[0] < stop:
            record.variables[name] = dataclasses.replace(
                variable, data=rounds.lengthened(variable.data, stop)
            )
    record.variables.update(following.inputs)
    record.attrs["stop"] = stop
    record.attrs["round"] = rounds.following(record.attrs.get("round", ""), stop, following.inputs)
    if following.again:
        record["done"][:] = False


def _store(record: Record, block: range, values: Mapping[str, Variable]) -> None:
    for name, variable in values.items():
        rounds.put(record, name, variable, slice(block.start, block.stop), variable.data)
    record["done"][block.start : block.stop] = True


@functools.cache
def _choices(metric: type[Metric]) -> dict[str, tuple[Any, ...]]:
    """The fields that take one of several words, and these words."""
    hints = typing.get_type_hints(metric).items()
    return {key: typing.get_args(hint) for key, hint in hints if typing.get_origin(hint) is Literal}
