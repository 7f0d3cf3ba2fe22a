"""What an evaluation tells and keeps: journals, the accounts of a piece of work, and an evaluation within another."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from landscape import product_checks, stages
from landscape.problem import Problem
from landscape.results import Record, Variable

State = dict[str, np.ndarray]

# Stands for the block where the state of `prepare` is kept; units are counted from 0.
PREPARATION = range(-1, 0)

_BOOKS = _SPENT, _FOUND = "cost_of_this_block", "products_of_this_block"
_COUNTED = {
    "matvecs": "products of the curvature matrix with a vector",
    "gradients": "gradients over all data",
    "values": "evaluations of the loss over all data",
}


class Journal:
    """Where an evaluation tells what it did; this one forgets. `landscape.run` writes files.

    It also knows who else is at work: others may prepare, or measure some of a round's blocks.
    """

    books: stages.Books | None = None

    def prepare(self, record: Record, make: Callable[[], None]) -> None:
        """Put what all units share into the record, by `make` or from who made it."""
        make()
        self.commit(record)

    def deal(self, record: Record, blocks: Sequence[range]) -> Sequence[range]:  # noqa: ARG002
        """Of a round's open blocks, return those to be measured here; take in what is known of the others."""
        return blocks

    def gather(self, record: Record) -> bool:  # noqa: ARG002
        """Take in what others measured of the round; False where some of it is still to come."""
        return True

    def commit(self, record: Record, *, final: bool = False) -> None:
        """Take note of the units that are done; `final` after the last."""

    def progress(self, record: Record, done: int, total: int) -> None:
        """Take note of how far the current round is."""

    def step(self, record: Record, standing: Callable[[], str]) -> None:
        """Take note of a step of a sequential block; `standing` says in words where it is."""

    def load_state(self, block: range) -> State | None:
        """Return the saved state of a block, or of `PREPARATION`, if there is one."""

    def save_state(self, block: range, state: Callable[[], State]) -> None:
        """Keep the state of a block that is not done, which is made only where it is kept."""

    def staged(self, block: range) -> contextlib.AbstractContextManager[None]:
        """Let what is computed meanwhile keep its stages in the state of a block."""
        keep = functools.partial(self.save_state, block)
        return stages.within(stages.Stages(self.load_state(block) or {}, keep, self.books))


class Accounts(Journal):
    """The costs of one piece of work: what was computed meanwhile is added to the record.

    With a state it keeps what the work cost so far and what was found out of products: these belong to the
    work, whoever paid.
    """

    def __init__(self, record: Record, problem: Problem, journal: Journal):
        self._record, self._problem, self._journal = record, problem, journal
        self.books = self

    def __enter__(self) -> Accounts:
        self._before, self._began = dataclasses.asdict(self._problem.cost), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            return
        self._note_products()
        for key, words in _COUNTED.items():
            self._add(key, self._spent()[key], "1", words)
        self._add("wall_seconds", time.perf_counter() - self._began, "s", "time spent measuring")

    def load_state(self, block: range) -> State | None:
        """Return a saved state, and take over its costs."""
        held = self._journal.load_state(block)
        if held is not None:
            held = dict(held)
            self.restore({key: held.pop(key) for key in _BOOKS})
        return held

    def step(self, record: Record, standing: Callable[[], str]) -> None:
        """Pass it on."""
        self._journal.step(record, standing)

    def save_state(self, block: range, state: Callable[[], State]) -> None:
        """Keep a state with its costs."""
        self._journal.save_state(block, lambda: {**state(), **self.read()})

    def staged(self, block: range) -> contextlib.AbstractContextManager[None]:
        """Let what is computed meanwhile keep its stages, each with its costs, in the state of a block."""
        keep = functools.partial(self._journal.save_state, block)
        return stages.within(stages.Stages(self._journal.load_state(block) or {}, keep, self.books))

    def read(self) -> State:
        """Return what the work cost so far, and what was found out of products."""
        found = product_checks.summary(self._problem.product_checks)
        text = json.dumps({**found, "kernels": self._kernels()}).encode()
        return {_SPENT: np.array(list(self._spent().values())), _FOUND: np.frombuffer(text, np.uint8)}

    def restore(self, books: State) -> None:
        """Take what `read` returned for what the work cost so far."""
        for key, count in zip(_COUNTED, books[_SPENT], strict=True):
            setattr(self._problem.cost, key, self._before[key] + int(count))
        found = json.loads(books[_FOUND].tobytes())
        self._problem.learn(product_checks.stored(found))
        self._record.attrs["kernels"] = found["kernels"]

    def _spent(self) -> dict[str, int]:
        return {key: getattr(self._problem.cost, key) - self._before[key] for key in _COUNTED}

    def _kernels(self) -> Any:
        # A resumed run that makes no product of its own keeps what stands there.
        return self._problem.kernels_in_use or self._record.attrs.get("kernels")

    def _note_products(self) -> None:
        """Tell how products are made: known from the first one on, and stored with the first unit."""
        attrs, problem = self._record.attrs, self._problem
        attrs["kernels"] = self._kernels()
        attrs["autocast"] = problem.evaluator.autocast
        if "products" not in attrs or problem.products_in_use != "not needed":
            attrs["products"] = problem.products_in_use
        if attrs.get("check") and problem.products == "auto":
            attrs["check"].update(product_checks.summary(problem.product_checks))

    def _add(self, key: str, amount: float, unit: str, words: str) -> None:
        before = self._record[key] if key in self._record else 0  # noqa: SIM401  (a Record is no dict)
        self._record.variables[key] = Variable((), np.asarray(before + amount), unit, words)


class StageJournal(Journal):
    """The journal of an evaluation within another one: record and state are a stage of that.

    Args:
        stage: of the other one.
        problem: that is evaluated; its count of passes takes over what the blocks that are done cost.

    Attributes:
        record: what the stage holds of it.
    """

    def __init__(self, stage: stages.Stage, problem: Problem):
        self._stage, held = stage, stage.state or {}
        self._states: dict[int, State] = {}
        for name, array in held.items():
            kind, _, rest = name.partition("/")
            if kind != _RECORD:
                self._states.setdefault(int(kind), {})[rest] = array
        self.record = unpacked(held) if _ABOUT in held else Record()
        for key in _COUNTED:  # of the blocks that are done
            if key in self.record:
                setattr(problem.cost, key, getattr(problem.cost, key) + int(self.record[key]))

    def commit(self, record: Record, *, final: bool = False) -> None:
        """Keep the record."""
        if not final:
            self._stage.save(lambda: packed(record))

    def load_state(self, block: range) -> State | None:
        """Return the state of a block."""
        return self._states.get(block.start)

    def save_state(self, block: range, state: Callable[[], State]) -> None:
        """Keep the state of a block, and the record of those before it."""

        def both() -> State:
            return {**packed(self.record), **{f"{block.start}/{k}": v for k, v in state().items()}}

        self._stage.save(both)


_RECORD, _ABOUT = "record", "record/about"


def packed(record: Record) -> State:
    """Return a record as arrays."""
    texts = {name: v.data.tolist() for name, v in record.variables.items() if v.data.dtype.kind in "UO"}
    about = {
        "attrs": record.attrs,
        "variables": {n: [v.dims, v.units, v.long_name, v.sidecar] for n, v in record.variables.items()},
        "texts": texts,
    }
    numbers = {f"{_RECORD}/variables/{n}": v.data for n, v in record.variables.items() if n not in texts}
    return {_ABOUT: np.frombuffer(json.dumps(about, default=_plain).encode(), np.uint8), **numbers}


def unpacked(arrays: State) -> Record:
    """Return the record that `packed` made."""
    about = json.loads(arrays[_ABOUT].tobytes())
    found = {}
    for name, (dims, units, long_name, sidecar) in about["variables"].items():
        is_text = name in about["texts"]
        data = np.array(about["texts"][name], np.str_) if is_text else arrays[f"{_RECORD}/variables/{name}"]
        found[name] = Variable(tuple(dims), data.copy(), units, long_name, sidecar=sidecar)
    return Record(found, about["attrs"])


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r} is no plain value")
