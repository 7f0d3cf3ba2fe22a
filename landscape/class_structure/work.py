"""Work that can stop between any two steps: `start`, `step`, `result`, with a state that can be stored."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
NAME = "class_structure"


@dataclass(frozen=True)
class Limits:
    """What the tasks were told before the first of them began.

    Attributes:
        capacity: mean vectors that may be held at once.
        sketch: numbers that a vector is sketched to, 0 for none.
        memory: bytes for the bases of Krylov spaces, and for explicit per-example gradients.
        eigenvalues: k, how many are wanted at the top.
        rtol: their relative residual.
        probes: chains of each density.
        steps: of each chain.
        seed: of all random streams.
        attribution: whether G3 is attributed to examples.
    """

    capacity: int
    sketch: int
    memory: int
    eigenvalues: int
    rtol: float
    probes: int
    steps: int
    seed: int
    attribution: bool


class Task(abc.ABC):
    """Some units of work that are measured together.

    Attributes:
        units: how many.
        passes: over all data that they take beside products, each about a gradient.
    """

    units: int = 1
    passes: float = 0.0

    @abc.abstractmethod
    def start(self) -> Any:
        """Return the state before the first step."""

    @abc.abstractmethod
    def step(self, state: Any) -> Any:
        """Return the state one step further; it may be changed in place."""

    @abc.abstractmethod
    def result(self, state: Any) -> list[Arrays] | None:
        """Return the values of each unit, None while it has to go on."""

    def stored(self, state: Any) -> Arrays:
        """Turn a state into arrays."""
        return dict(state)

    def restored(self, arrays: Arrays) -> Any:
        """Bring a state back."""
        return {key: np.array(value) for key, value in arrays.items()}


@dataclass
class Work:
    """Tasks one after the other, and how far they are.

    Attributes:
        position: of the task that is on.
        finished: values of the units of those before it.
        inner: its state; arrays as they were stored where `tasks` is None.
        tasks: None after `restored`, until they are made again.
    """

    position: int
    finished: list[Arrays]
    inner: Any
    tasks: list[Task] | None

    @classmethod
    def begun(cls, tasks: list[Task]) -> Work:
        """Nothing is done."""
        return cls(0, [], tasks[0].start(), tasks)

    def step(self) -> None:
        """One step of the task that is on, or the first state of the next one."""
        assert self.tasks is not None
        task = self.tasks[self.position]
        self.inner = task.step(self.inner)
        if (found := task.result(self.inner)) is not None:
            self.finished += found
            self.position += 1
            self.inner = self.tasks[self.position].start() if self.position < len(self.tasks) else None

    def done(self) -> list[Arrays] | None:
        """The values of all units, None while there is work."""
        return self.finished if self.tasks is not None and self.position == len(self.tasks) else None

    def stored(self) -> Arrays:
        """Turn all of it into arrays."""
        assert self.tasks is not None
        on = self.position < len(self.tasks)
        inner = self.tasks[self.position].stored(self.inner) if on else {}
        units = {f"unit.{i}.{key}": x for i, one in enumerate(self.finished) for key, x in one.items()}
        counts = np.array([self.position, len(self.finished)])
        return {"counts": counts, **units, **{f"inner.{key}": x for key, x in inner.items()}}

    @classmethod
    def restored(cls, arrays: Arrays) -> Work:
        """Bring it back, but for the tasks."""
        position, units = map(int, arrays["counts"])
        finished = [under(arrays, f"unit.{i}.") for i in range(units)]
        return cls(position, finished, under(arrays, "inner."), None)

    def with_tasks(self, tasks: list[Task]) -> None:
        """Go on with these tasks, the same as before."""
        self.tasks = tasks
        if self.position < len(tasks):
            self.inner = tasks[self.position].restored(self.inner)


def under(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays whose names begin so, without that beginning."""
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
