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

import numpy as np

Arrays = dict[str, np.ndarray]
_RESULT, _STATE = "result", "state"


class Stage:
    """A stage of the work at hand.

    Attributes:
        result: what it came to before the work was interrupted, None where it did not end.
        state: what it goes on from, None at its start.
    """

    def __init__(self, stages: Stages | None = None, place: int = 0):
        self._stages, self._place = stages, place
        held = {} if stages is None else stages.held.get(place, {})
        self.result: Arrays | None = held.get(_RESULT)
        self.state: Arrays | None = held.get(_STATE)

    @property
    def is_kept(self) -> bool:
        """Whether anything is kept at all."""
        return self._stages is not None

    def save(self, state: Callable[[], Arrays]) -> None:
        """Keep a state, which is made only where it is written."""
        if self._stages is not None:
            self._stages.save(self._place, state)

    def finish(self, result: Arrays) -> Arrays:
        """Keep the result, and return it as it would be read back."""
        self.result = result = as_read_back(result)
        if self._stages is not None:
            self._stages.held[self._place] = {_RESULT: result}
            self._stages.save()
        return result


class Stages:
    """The stages of one piece of work.

    Args:
        held: what `arrays` gave before.
        keep: called with a function that gives the arrays that are to be kept.
    """

    def __init__(self, held: Mapping[str, np.ndarray], keep: Callable[[Callable[[], Arrays]], None]):
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
        self._keep(lambda: self._arrays({} if state is None else {place: {_STATE: state()}}))

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


def begin() -> Stage:
    """Begin the next stage of the work at hand; one that keeps nothing where there is none."""
    stages = _at_hand.get()
    return Stage() if stages is None else stages.next()


def kept(compute: Callable[[], Arrays]) -> Arrays:
    """Return what `compute` returns; when the work is resumed, what it returned before.

    Stages that begin in it are kept until it ends.
    """
    stage = begin()
    if stage.result is not None:
        return stage.result
    if not stage.is_kept:
        return as_read_back(compute())
    with within(Stages(stage.state or {}, stage.save)):
        result = compute()
    return stage.finish(result)


def as_read_back(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Lay out arrays as they would be read back: sums depend on the memory layout, in the last bit."""
    return {key: np.array(value, order="C") for key, value in arrays.items()}
