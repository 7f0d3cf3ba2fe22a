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
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from landscape import memory as footprint
from landscape import product_checks, seeds
from landscape.checks import Need
from landscape.problem import Problem
from landscape.results import Record, Variable

Values = dict[str, Variable]
State = dict[str, np.ndarray]

_SPENT = "cost_of_this_block"
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


def doubling(done: int, first: int, most: int, fine: Callable[[], bool]) -> Round | None:
    """The next round of units that double from `first` until they are fine, or `most` are made.

    Args:
        done: units that are done.
        first: units of the first round.
        most: at the end.
        fine: whether the tolerance is reached; asked at first, 2 first, 4 first, ... only, so that the answer does
            not depend on where an earlier, smaller `most` ended.
    """
    fixed = [first << i for i in range(most.bit_length())]
    if done >= most or (done in fixed and fine()):
        return None
    return Round(min(next(count for count in fixed if count > done), most))


class Journal:
    """Where an evaluation tells what it did; this one forgets. `landscape.run` writes files."""

    def commit(self, record: Record, *, final: bool = False) -> None:
        """Take note of the units that are done; `final` after the last."""

    def progress(self, record: Record, done: int, total: int) -> None:
        """Take note of how far the current round is."""

    def step(self, record: Record, standing: Callable[[], str]) -> None:
        """Take note of a step of a sequential block; `standing` says in words where it is."""

    def load_state(self, block: range) -> State | None:
        """Return the saved state of a sequential block, if there is one."""

    def save_state(self, block: range, state: Callable[[], State]) -> None:
        """Keep the state of a sequential block, which is made only where it is kept."""


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
    """

    name: ClassVar[str]
    headline: ClassVar[str]
    unit: ClassVar[str]
    block: ClassVar[int] = 16
    citation: ClassVar[str] = ""
    told: ClassVar[tuple[str, ...]] = ()
    listed: ClassVar[tuple[str, ...]] = ()

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
        journal: Journal,  # noqa: ARG002  (sequential metrics keep their state there)
    ) -> Values:
        """Measure a block from wherever it stands."""
        return self.measure(problem, shared, block, generators)

    def configuration(self, *, without_demands: bool = False) -> dict[str, Any]:
        """The fields and their values; without those that only ask for more of the same."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if not (without_demands and f.metadata.get("grows"))
        }


def vector_bytes(problem: Problem) -> int:
    """What a product holds per vector: the vector twice, its float64 sum, and the result."""
    return problem.size * (3 * problem.dtype.itemsize + 8)


@dataclass(frozen=True)
class SequentialMetric(Metric):
    """A metric whose blocks advance step by step (Lanczos, ascent) and can stop between steps.

    A state is a dict of arrays, or an object that `stored` turns into one and `restored` brings back, bit
    for bit; what a step needs to know, random state included, is in it.

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
        with contextlib.ExitStack() as stack:
            if self.keeps_graphs and graphs_fit(problem, shared.attrs.get("memory", MEMORY)):
                stack.enter_context(problem.keeping_graphs())
            return self._run(problem, shared, block, generators, journal)

    def _run(
        self,
        problem: Problem,
        shared: Record,
        block: range,
        generators: Sequence[torch.Generator],
        journal: Journal,
    ) -> Values:
        before = np.array(list(vars(problem.cost).values()))
        stored = journal.load_state(block)
        if stored is None:
            state = _as_read_back(self.start(problem, shared, block, generators))
        else:  # what it cost so far belongs to the block, whoever paid
            for key, count in zip(vars(problem.cost), stored.pop(_SPENT), strict=True):
                setattr(problem.cost, key, getattr(problem.cost, key) + int(count))
            state = self.restored(problem, stored)
        while (values := self.result(problem, shared, block, state)) is None:
            state = _as_read_back(self.step(problem, shared, block, state))
            spent = np.array(list(vars(problem.cost).values())) - before
            journal.save_state(block, functools.partial(self._to_store, state, spent))
            journal.step(shared, functools.partial(self.standing, state))
        return values

    def _to_store(self, state: Any, spent: np.ndarray) -> State:
        return {**self.stored(state), _SPENT: spent}


def graphs_fit(problem: Problem, memory: int) -> bool:
    """Whether the graphs of products, once kept, take at most a quarter of the memory."""
    room = memory // 4
    needed = footprint.graphs(problem, room)
    return needed is not None and _HELD_PER_SAVED * needed <= room


def _as_read_back(state: Any) -> Any:
    """Lay out arrays as they would be read back: sums depend on the memory layout, in the last bit."""
    if not isinstance(state, dict):
        return state
    return {key: np.array(value, order="C") for key, value in state.items()}


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
    journal = journal or Journal()
    record = record or Record()
    with problem.session():
        if "block_size" not in record.attrs:
            record.attrs["memory"] = memory
            with _charged(record, problem):
                shared = metric.prepare(problem, seed)
            record.variables.update(shared.variables)
            record.attrs.update(shared.attrs)
            record.attrs.update(block_size=metric.block_size(problem, memory), stop=0)
            journal.commit(record)
        while True:
            _measure_open_blocks(metric, problem, seed, record, journal)
            following = metric.units(record)
            if following is None:
                break
            _open_round(metric, record, following)
        record.variables.update(metric.summarize(record))
        record.attrs["complete"] = True
        journal.commit(record, final=True)
    return record


def _measure_open_blocks(
    metric: Metric, problem: Problem, seed: int, record: Record, journal: Journal
) -> None:
    size, stop = record.attrs["block_size"], record.attrs["stop"]
    for start in range(0, stop, size):
        block = range(start, min(start + size, stop))
        if record["done"][start : block.stop].all():
            continue
        # A block that an earlier, smaller demand left half done is measured whole: what its units say
        # together must not depend on that history.
        generators = _Streams(seed, metric.name, block)
        with _charged(record, problem):
            values = metric.run_block(problem, record, block, generators, journal)
        _store(record, block, values)
        journal.commit(record)
        journal.progress(record, int(record["done"].sum()), stop)


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


def _open_round(metric: Metric, record: Record, following: Round) -> None:
    """Lengthen the unit dimension; what is not yet measured is NaN and not done."""
    stop = following.stop
    if stop <= record.attrs["stop"] and not following.again:
        raise RuntimeError(
            f"metric {metric.name!r} asked for {stop} units when {record.attrs['stop']} were done"
        )
    done = Variable((metric.unit,), np.zeros(0, bool), long_name="measured")
    for name, variable in {"done": done, **record.variables}.items():
        if variable.dims[:1] == (metric.unit,) and variable.data.shape[0] < stop:
            record.variables[name] = dataclasses.replace(variable, data=_lengthened(variable.data, stop))
    record.variables.update(following.inputs)
    record.attrs["stop"] = stop
    if following.again:
        record["done"][:] = False


def _store(record: Record, block: range, values: Mapping[str, Variable]) -> None:
    for name, variable in values.items():
        if name not in record:
            empty = variable.data[:0]
            empty = empty if empty.dtype.kind in "fUb" else empty.astype(float)
            stop = record.attrs["stop"]
            record.variables[name] = dataclasses.replace(variable, data=_lengthened(empty, stop))
        record[name][block.start : block.stop] = variable.data
    record["done"][block.start : block.stop] = True


def _lengthened(data: np.ndarray, stop: int) -> np.ndarray:
    blank = np.nan if data.dtype.kind == "f" else np.zeros((), data.dtype)
    longer = np.full((stop, *data.shape[1:]), blank, data.dtype)
    longer[: data.shape[0]] = data
    return longer


class _charged:  # noqa: N801  (reads as a verb where it is used)
    """Add to the record what was computed meanwhile: matvecs, gradients, values, seconds."""

    def __init__(self, record: Record, problem: Problem):
        self.record, self.problem = record, problem

    def __enter__(self) -> None:
        self.before, self.began = dataclasses.replace(self.problem.cost), time.perf_counter()

    def __exit__(self, *error: object) -> None:
        _note_products(self.record, self.problem)
        if error[0] is not None:
            return
        spent = {key: getattr(self.problem.cost, key) - count for key, count in vars(self.before).items()}
        seconds = time.perf_counter() - self.began
        for key, spent_now in {**spent, "wall_seconds": seconds}.items():
            unit, words = ("s", "time spent measuring") if key == "wall_seconds" else ("1", _COUNTED[key])
            before = self.record[key] if key in self.record else 0  # noqa: SIM401  (a Record is no dict)
            self.record.variables[key] = Variable((), np.asarray(before + spent_now), unit, words)


def _note_products(record: Record, problem: Problem) -> None:
    """Tell how products are made: known from the first one on, and stored with the first unit."""
    record.attrs["kernels"] = problem.kernels_in_use
    record.attrs["products"] = problem.products_in_use
    record.attrs["autocast"] = problem.evaluator.autocast
    if record.attrs.get("check") and problem.products == "auto":
        record.attrs["check"].update(product_checks.summary(problem.product_checks))


_COUNTED = {
    "matvecs": "products of the curvature matrix with a vector",
    "gradients": "gradients over all data",
    "values": "evaluations of the loss over all data",
}


@functools.cache
def _choices(metric: type[Metric]) -> dict[str, tuple[Any, ...]]:
    """The fields that take one of several words, and these words."""
    hints = typing.get_type_hints(metric).items()
    return {key: typing.get_args(hint) for key, hint in hints if typing.get_origin(hint) is Literal}
