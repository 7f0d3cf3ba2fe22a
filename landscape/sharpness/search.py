"""One search after the other: from the smallest set to the largest, step by step, with a state that can be stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from landscape.estimators.apgd import Apgd
from landscape.estimators.ascent import Ascent
from landscape.estimators.lbfgsb import lbfgsb
from landscape.estimators.regions import Norm, Region
from landscape.estimators.search import Function, Maximum, Search, State, maximum

Maximizer = Literal["ascent", "apgd", "lbfgsb"]
# What is found in a set: its columns in the stored table.
FOUND = ("value", "gap", "evaluations", "nonfinite", "lowest")
_ON_CPU = {"random"}


@dataclass(frozen=True)
class Ladder:
    """Sets of growing size, ε_1 < ε_2 < ..., each searched in turn.

    Attributes:
        function: δ -> value and gradient.
        scale: c, (d,); the sets are {‖δ/c‖_p <= ε}.
        norm: p.
        epsilon: ascending.
        maximizer: how each set is searched.
        steps: of each search.
        warm: whether a search begins where the one before found its maximum, moved to the new set's boundary.
        start: where the first search begins, for ε = 1; None for a random point.
    """

    function: Function
    scale: Tensor
    norm: Norm
    epsilon: tuple[float, ...]
    maximizer: Maximizer
    steps: int
    warm: bool
    start: Tensor | None = None

    def search(self, rung: int) -> Search:
        """Return the search of one set."""
        region = self._region(rung)
        return Apgd(region, self.steps) if self.maximizer == "apgd" else Ascent(region, self.steps)

    def _region(self, rung: int) -> Region:
        return Region(self.epsilon[rung] * self.scale, self.norm)

    def step(self, climb: Climb, generator: Callable[[int], torch.Generator]) -> Climb:
        """Make one evaluation; with L-BFGS-B, whose inside cannot be stored, one whole search.

        Args:
            climb: how far it is.
            generator: rung -> the random stream of its start.
        """
        if self.maximizer == "lbfgsb":
            region = self._region(climb.rung)
            first = self._first(climb)
            first = region.draw(generator(climb.rung)) if first is None else first
            return self._up(climb, lbfgsb(self.function, region, first, self.steps))
        search = self.search(climb.rung)
        state = climb.inner or search.start(generator(climb.rung), self._first(climb))
        state = search.observe(state, *self.function(search.point(state)))
        if search.done(state):
            return self._up(climb, maximum(search, state))
        return Climb(climb.rung, climb.found, climb.best, state)

    def _first(self, climb: Climb) -> Tensor | None:
        if climb.rung and self.warm and climb.best is not None:
            return climb.best * (self.epsilon[climb.rung] / self.epsilon[climb.rung - 1])
        return None if self.start is None else self.start * self.epsilon[climb.rung]

    def _up(self, climb: Climb, found: Maximum) -> Climb:
        """Note what was found. A larger set holds the smaller one's maximum, so its own is no smaller."""
        row = [found.value, found.gap, found.evaluations, found.nonfinite, found.lowest]
        best = found.point
        if climb.rung and not row[0] >= climb.found[-1][0] and math.isfinite(climb.found[-1][0]):
            best = climb.best if climb.best is not None else best
            row[:2] = [climb.found[-1][0], math.nan]
        return Climb(climb.rung + 1, [*climb.found, row], best)


@dataclass
class Climb:
    """How far one climb of a ladder is.

    Attributes:
        rung: which set is being searched.
        found: for each set that is done, the columns of `FOUND`.
        best: the maximum of the last of them, (d,).
        inner: the state of the search that is under way; empty before it begins.
    """

    rung: int = 0
    found: list[list[float]] = field(default_factory=list)
    best: Tensor | None = None
    inner: State = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all of it as arrays."""
        held = {f"inner_{name}": t.cpu().numpy() for name, t in self.inner.items()}
        best = {} if self.best is None else {"best": self.best.cpu().numpy()}
        table = np.array(self.found, dtype=np.float64) if self.found else np.zeros((0, len(FOUND)))
        return {"rung": np.array(self.rung), "found": table, **best, **held}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], device: torch.device) -> Climb:
        """Bring it back, bit for bit."""

        def tensor(name: str, array: np.ndarray) -> Tensor:
            # scalars and random states are of the processor
            made = torch.from_numpy(np.array(array))
            return made if made.ndim == 0 or name in _ON_CPU else made.to(device)

        names = [name.removeprefix("inner_") for name in arrays if name.startswith("inner_")]
        return cls(
            rung=int(arrays["rung"]),
            found=[list(map(float, row)) for row in arrays["found"]],
            best=tensor("best", arrays["best"]) if "best" in arrays else None,
            inner={name: tensor(name, arrays[f"inner_{name}"]) for name in names},
        )
