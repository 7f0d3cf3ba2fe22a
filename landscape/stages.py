"""Stages of a piece of work that may be interrupted: what they came to is kept while the work is not done.

A metric's `prepare`, or its measuring of a block, is such a piece of work; a solve for eigenpairs, a measure of
another metric, a micro-batch of examples are its stages. The work begins anew when it is resumed and comes to its
stages in the same order, so they are known by their place in it: one that is finished returns what it
returned, one that was under way goes on from its state. Without an evaluation around it nothing is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Protocol

import numpy as np

Arrays = dict[str, np.ndarray]
_RESULT, _STATE = "result", "state"
_BOOKS = "books/"  # before the names of what the accounts say of a stage


class Books(Protocol):
    """Accounts of a piece of work."""

    def read(self) -> Arrays:
        """Return what it cost so far."""

    def restore(self, books: Arrays) -> None:
        """Take what `read` returned for what it cost so far."""


class Stage:
    """A stage of the work at hand.

    Attributes:
        result: what it came to before the work was interrupted, None where it did not end.
        state: what it goes on from, None at its start.
    """

    def __init__(self, stages: Stages | None = None, place: int = 0):
        self._stages, self._place = stages, place
        held = {} if stages is None else stages.held.get(place, {})
        self.result, self.state = (_parted(held.get(kind), _BOOKS)[0] for kind in (_RESULT, _STATE))

    def restore_books(self, *, of_state: bool = True) -> None:
        """Take over what the stage cost so far."""
        if self._stages is None or self._stages.books is None:
            return
        held = self._stages.held.get(self._place, {})
        books = _parted(held.get(_RESULT) or (held.get(_STATE) if of_state else None), _BOOKS)[1]
        if books:
            self._stages.books.restore(books)

    @property
    def is_kept(self) -> bool:
        """Whether anything is kept at all."""
        return self._stages is not None

    def save(self, state: Callable[[], Arrays]) -> None:
        """Keep a state, which is made only where it is written."""
        if self._stages is not None:
            self._stages.save(self._place, state)

    def within(self) -> contextlib.AbstractContextManager[None]:
        """Let stages that begin meanwhile be parts of this one."""
        if self._stages is None:
            return within(None)
        return within(Stages(self.state or {}, self.save, self._stages.books))

    def finish(self, result: Arrays) -> Arrays:
        """Keep the result, and return it as it would be read back."""
        self.result = result = as_read_back(result)
        if self._stages is not None:
            self._stages.held[self._place] = {_RESULT: {**result, **self._stages.read_books()}}
            self._stages.save()
        return result


class Stages:
    """The stages of one piece of work.

    Args:
        held: what `arrays` gave before.
        keep: called with a function that gives the arrays that are to be kept.
        books: the accounts of the work.
    """

    def __init__(
        self,
        held: Mapping[str, np.ndarray],
        keep: Callable[[Callable[[], Arrays]], None],
        books: Books | None = None,
    ):
        self.books = books
        self.held: dict[int, dict[str, Arrays]] = {}
        for name, array in held.items():
            place, kind, rest = name.split("/", 2)
            self.held.setdefault(int(place), {}).setdefault(kind, {})[rest] = array
        self._keep, self._next = keep, 0

    def next(self) -> Stage:
        """Return the next stage."""
        self._next += 1
        return Stage(self, self._next - 1)

    def save(self, place: int = 0, state: Callable[[], Arrays] | None = None) -> None:
        """Keep all that is finished, and the state of one that is not."""

        def arrays() -> Arrays:
            now = {} if state is None else {place: {_STATE: {**state(), **self.read_books()}}}
            return self._arrays(now)

        self._keep(arrays)

    def read_books(self) -> Arrays:
        """Return what the work cost so far, under names of their own."""
        return {} if self.books is None else {f"{_BOOKS}{k}": v for k, v in self.books.read().items()}

    def _arrays(self, now: Mapping[int, Mapping[str, Arrays]]) -> Arrays:
        return {
            f"{place}/{kind}/{name}": array
            for place, kinds in {**self.held, **now}.items()
            for kind, arrays in kinds.items()
            for name, array in arrays.items()
        }


_at_hand: ContextVar[Stages | None] = ContextVar("stages", default=None)


@contextlib.contextmanager
def within(stages: Stages | None) -> Iterator[None]:
    """Let stages that begin meanwhile be those of this piece of work; None lets nothing be kept."""
    token = _at_hand.set(stages)
    try:
        yield
    finally:
        _at_hand.reset(token)


def begin(*, keeps_books: bool = False) -> Stage:
    """Begin the next stage of the work at hand; one that keeps nothing where there is none.

    Args:
        keeps_books: whether its state holds accounts of its own.
    """
    stages = _at_hand.get()
    stage = Stage() if stages is None else stages.next()
    stage.restore_books(of_state=not keeps_books)
    return stage


def kept(compute: Callable[[], Arrays]) -> Arrays:
    """Return what `compute` returns; when the work is resumed, what it returned before.

    Stages that begin in it are kept until it ends.
    """
    stage = begin()
    if stage.result is not None:
        return stage.result
    if not stage.is_kept:
        return as_read_back(compute())
    with stage.within():
        result = compute()
    return stage.finish(result)


def _parted(arrays: Arrays | None, prefix: str) -> tuple[Arrays | None, Arrays]:
    """Return the arrays without this prefix, and those with it, without it."""
    if arrays is None:
        return None, {}
    own = {name: array for name, array in arrays.items() if not name.startswith(prefix)}
    return own, {name.removeprefix(prefix): arrays[name] for name in arrays.keys() - own.keys()}


def as_read_back(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Lay out arrays as they would be read back: sums depend on the memory layout, in the last bit."""
    return {key: np.array(value, order="C") for key, value in arrays.items()}
