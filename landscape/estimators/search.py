"""Searching a box or an ellipsoid for a large value, one evaluation after the other.

A search asks for the value and the gradient at one point after the other and keeps all it knows in a state of
plain tensors, so that it can be stored between two evaluations and goes on to the same bits. What is found is a
lower bound of the maximum.

    state = search.start(generator)
    while not search.done(state):
        value, gradient = function(search.point(state))
        state = search.observe(state, value, gradient)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from landscape.estimators.regions import Region

State = dict[str, Tensor]
Function = Callable[[Tensor], tuple[Any, Tensor]]


@dataclass(frozen=True)
class Maximum:
    """What a search found.

    Attributes:
        point: δ with the largest value, (d,).
        value: there; NaN where no value was finite.
        gap: what the linear model at that point could still gain, max ⟨gradient, δ' − δ⟩ over the set.
        evaluations: of the function.
        nonfinite: how many of them were NaN or infinite.
        lowest: the smallest value seen; NaN where none was finite.
    """

    point: Tensor
    value: float
    gap: float
    evaluations: int
    nonfinite: int
    lowest: float


class Search(Protocol):
    """One way of searching, without what changes on the way."""

    @property
    def region(self) -> Region:
        """The set."""

    def start(self, generator: torch.Generator, at: Tensor | None = None) -> State:
        """Return the state before the first evaluation, at a random point or the given one, (d,)."""

    def point(self, state: State) -> Tensor:
        """Return the point δ to be evaluated next, (d,), within the set."""

    def observe(self, state: State, value: Any, gradient: Tensor) -> State:
        """Return the state that knows the value and the gradient (d,) at that point."""

    def done(self, state: State) -> bool:
        """Tell whether nothing is left to do."""


def maximize(function: Function, search: Search, generator: torch.Generator) -> Maximum:
    """Search from one random point.

    Args:
        function: δ (d,) -> value and gradient (d,).
        search: `Ascent` or `Apgd`.
        generator: source of the starting point.

    >>> from landscape.estimators.ascent import Ascent
    >>> H = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    >>> box = Region(torch.full((4,), 0.1))
    >>> found = maximize(lambda d: (0.5 * d @ H @ d, H @ d), Ascent(box, 10), torch.Generator().manual_seed(0))
    >>> round(found.value, 6)
    0.05
    """
    state = search.start(generator)
    while not search.done(state):
        state = search.observe(state, *function(search.point(state)))
    return maximum(search, state)


def maximum(search: Search, state: State) -> Maximum:
    """Return the best that a search has seen."""
    slope, best = state["best_slope"], state["best"]
    gap = search.region.rise(slope) - float((slope.double() * best.double()).sum())
    value = float(state["best_value"])
    return Maximum(
        point=best,
        value=value if math.isfinite(value) else math.nan,
        gap=max(gap, 0.0) if math.isfinite(value) else math.nan,
        evaluations=int(state["evaluations"]),
        nonfinite=int(state["nonfinite"]),
        lowest=float(state["lowest"]) if math.isfinite(value) else math.nan,
    )


def opened(region: Region, generator: torch.Generator, at: Tensor | None) -> State:
    """Return what the state of every search holds, before the first evaluation."""
    first = region.draw(generator) if at is None else region.project(at.to(region.radii))
    return {
        "point": first,
        "best": first,
        "best_slope": torch.zeros_like(first),
        "best_value": scalar(-math.inf),
        "evaluations": scalar(0),
        "nonfinite": scalar(0),
        "lowest": scalar(math.inf),
    }


def noted(state: State, value: Any, gradient: Tensor) -> tuple[State, float, bool]:
    """Return the state with one more evaluation counted, the value as a number, and whether it is finite."""
    number = float(value)
    fine = math.isfinite(number) and bool(gradient.isfinite().all())
    after = {**state, "evaluations": state["evaluations"] + 1}
    if not fine:
        after["nonfinite"] = state["nonfinite"] + 1
        return after, number, fine
    after["lowest"] = scalar(min(number, float(state["lowest"])))
    if number > float(state["best_value"]):
        after.update(best=state["point"], best_slope=gradient, best_value=scalar(number))
    return after, number, fine


def scalar(value: float) -> Tensor:
    """Return a number as states hold it."""
    return torch.tensor(value, dtype=torch.float64)
