"""APGD: projected gradient ascent with momentum and a step that looks after itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landscape.estimators.regions import Region
from landscape.estimators.search import State, noted, opened, scalar

# Croce & Hein 2020 (arXiv 2003.01690), §3.
_MOMENTUM, _FIRST_STEP, _IMPROVING = 0.75, 2.0, 0.75


@dataclass(frozen=True)
class Apgd:
    """Projected gradient ascent with momentum and a step that is halved where it stops paying.

    z = P(x_k + η s(g)), x_{k+1} = P(x_k + α (z − x_k) + (1 − α)(x_k − x_{k−1})) with s(g) the point of the set
    with the largest ⟨g, ·⟩, α = 0.75 and η = 2 (in units of the set) at first. At checkpoints η is halved and
    the search returns to its best point, if less than 75 % of the steps since the last one went up, or if
    neither η nor the best value changed. P is the projection in units of the set.

    Attributes:
        region: the set.
        steps: evaluations after the first.

    Source: Croce & Hein 2020 (arXiv 2003.01690), for robustness; Andriushchenko et al. 2023 (arXiv 2302.07011),
    for sharpness. The code of the latter averages with x_{k−1} itself, starts at the centre, and steps along
    c ⊙ g with Euclidean projections, which on an ellipsoid come to rest at δ ∝ c³g where c²g is best; here
    stands the published recursion, from a random point, in one geometry.
    """

    region: Region
    steps: int = 20

    def start(self, generator: torch.Generator, at: Tensor | None = None) -> State:
        """Return the state before the first evaluation."""
        state = opened(self.region, generator, at)
        return state | {
            "before": state["point"],
            "value": scalar(-math.inf),
            "step": scalar(_FIRST_STEP),
            "ups": scalar(0),
            "halved": scalar(1),
            "best_at_checkpoint": scalar(-math.inf),
        }

    def point(self, state: State) -> Tensor:
        """Return the point to be evaluated next."""
        return state["point"]

    def done(self, state: State) -> bool:
        """Tell whether all evaluations are made."""
        return int(state["evaluations"]) > self.steps

    def observe(self, state: State, value: Any, gradient: Tensor) -> State:
        """Return the state that knows the value and the gradient, and where to go next."""
        after, number, fine = noted(state, value, gradient)
        taken = int(after["evaluations"]) - 1  # steps that led here
        if taken > 0 and fine and number > float(state["value"]):
            after["ups"] = state["ups"] + 1
        after["value"] = scalar(number) if fine else state["value"]
        known = math.isfinite(float(after["best_value"]))
        if not fine:  # half-way back to what was fine, or to the centre
            origin = after["best"] if known else torch.zeros_like(after["best"])
            after.update(point=origin + (state["point"] - origin) / 2, before=origin, step=after["step"] / 2)
            return after
        x, before, slope = state["point"], state["before"], gradient
        if taken in checkpoints(self.steps) and self._exhausted(after, taken):
            after["step"] = after["step"] / 2
            x, before, slope = after["best"], after["best"], after["best_slope"]
        project = self.region.pull_back
        z = project(x + after["step"].to(x) * self.region.steepest(slope))
        momentum = _MOMENTUM if taken > 0 else 1.0
        after["before"] = x
        after["point"] = project(x + momentum * (z - x) + (1 - momentum) * (x - before))
        return after

    def _exhausted(self, after: State, taken: int) -> bool:
        """Whether the step no longer pays, at a checkpoint; notes what the next one compares with."""
        marks = [0, *checkpoints(self.steps)]
        span = taken - marks[marks.index(taken) - 1]
        few = float(after["ups"]) < _IMPROVING * span
        same = not float(after["halved"]) and float(after["best_at_checkpoint"]) == float(after["best_value"])
        after["ups"] = scalar(0)
        after["halved"] = scalar(float(few or same))
        after["best_at_checkpoint"] = after["best_value"]
        return few or same


def checkpoints(steps: int) -> list[int]:
    """Return the steps at which APGD looks back: p₁ = 0.22, p_{k+1} = p_k + max(p_k − p_{k−1} − 0.03, 0.06).

    >>> checkpoints(20)
    [5, 9, 12, 15, 16, 18, 19, 20]
    """
    before, now, found = 0.0, 0.22, [0.0]
    while now <= 1 + 1e-12:
        found.append(now)
        before, now = now, now + max(now - before - 0.03, 0.06)
    return sorted({min(steps, math.ceil(p * steps)) for p in found if p > 0})
