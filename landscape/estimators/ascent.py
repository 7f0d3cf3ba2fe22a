"""A large value of a function on a box or an ellipsoid, by jumps to where its linear model is largest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landscape.estimators.regions import Norm, Region, quotient, unit_clip, unit_draw, unit_steepest
from landscape.estimators.search import State, noted, opened, scalar

# The share of steps that grow, and how far the first and the last of them go, in half-widths where
# the gradient is average: chosen on the digits network, whose losses rise over a hundredfold in the largest
# box; without them one start in six ends a fifth lower.
_GROWING, _FIRST_STEP, _LAST_STEP = 0.3, 0.3, 8.0
# A rise by less, relative to all that was gained: two of these in a row, and the search is stuck.
_SLOW = 1e-4
_RELEASED = 0.1  # share of coordinates that then start anew, those with the smallest slope


@dataclass(frozen=True)
class Ascent:
    """Jumps to where the linear model is largest; on a convex function no jump goes down.

    1. The first steps follow the gradient and grow from a fraction of the set to all of it, so that the
       directions of large curvature are found before all coordinates are at the boundary.
    2. Then δ jumps to the maximum of ⟨gradient, ·⟩ (conditional gradient ascent with step 1: sign ascent on a
       box, the generalized power method on an ellipsoid). Coordinates that went too far, whose slope at the new
       point shows back, go half as far next time; a jump that leads down is taken back. On an ellipsoid the
       whole step shrinks.
    3. Where jumps no longer lead up, the coordinates with the smallest slopes start anew at random.

    In units of the half-widths throughout, so that scaling the function or a coordinate changes nothing.

    Attributes:
        region: the set.
        steps: evaluations after the first.

    Source: vertex ascent on a box, measured against L-BFGS-B in `benchmarks/sharpness.py`; Journée, Nesterov,
    Richtárik & Sepulchre 2010 (arXiv 0811.4724) on the generalized power method.
    """

    region: Region
    steps: int = 20

    def start(self, generator: torch.Generator, at: Tensor | None = None) -> State:
        """Return the state before the first evaluation; a given point, once good, needs no growing steps."""
        state = opened(self.region, generator, at)
        return state | {
            "current": state["point"],
            "slope": state["best_slope"],
            "value": state["best_value"],
            "first_value": scalar(math.nan),
            "reach": torch.ones_like(state["point"]),
            "growing": scalar(0 if at is not None else int(_GROWING * self.steps)),
            "grown": scalar(0),
            "slow": scalar(0),
            "random": generator.get_state(),
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
        if not fine:
            return self._nearer(after)
        first = math.isnan(float(after["first_value"]))
        if first:
            after["first_value"] = scalar(number)
        growing = int(after["grown"]) < int(after["growing"])
        rise = number - float(after["value"])
        gained = number - float(after["first_value"])
        moved = state["point"] - state["current"]
        if not (first or growing):
            self._shrink(after, gradient, moved, up=rise > 0)
        if first or growing or rise > 0:
            slow = not (first or growing) and rise <= _SLOW * gained
            after.update(
                current=state["point"], slope=gradient, value=scalar(number),
                slow=after["slow"] + 1 if slow else scalar(0),
            )  # fmt: skip
        return self._next(after)

    def _shrink(self, after: State, gradient: Tensor, moved: Tensor, *, up: bool) -> None:
        """Let coordinates that went too far reach half as far, the others farther again after a rise."""
        reach = after["reach"]
        if self.region.norm == 2:
            after["reach"] = reach if up else reach / 2
            return
        over = gradient * moved < 0
        if not up and not bool(over.any()):
            over = torch.ones_like(over)
        wider = (2 * reach).clamp(max=1) if up else reach
        after["reach"] = torch.where(over, reach / 2, wider)

    def _nearer(self, after: State) -> State:
        """Halve the step to a point without a finite value; at the start, the distance from the centre."""
        begun = math.isfinite(float(after["best_value"]))
        origin = after["current"] if begun else torch.zeros_like(after["current"])
        after["point"] = origin + (after["point"] - origin) / 2
        after["growing"] = after["grown"]
        after["reach"] = after["reach"] / 2
        return after

    def _next(self, after: State) -> State:
        """Choose the next point from the current one."""
        r, norm = self.region.radii, self.region.norm
        u, q = quotient(after["current"], r), r * after["slope"]
        if int(after["grown"]) < int(after["growing"]):
            share = float(after["grown"]) / max(1.0, float(after["growing"]) - 1)
            step = _FIRST_STEP * (_LAST_STEP / _FIRST_STEP) ** share
            goal = unit_clip(u + step * _average_one(q, norm), norm)
            # Where nothing changes the value, back to the centre: leftovers of the start keep units switched off.
            after["point"] = r * torch.where(q != 0, goal, torch.zeros_like(u))
            after["grown"] = after["grown"] + 1
            return after
        target, reach = unit_steepest(q, norm), after["reach"]
        if norm == "inf":
            goal = torch.where(reach == 1, target, u + reach * (target - u))
        else:
            # 1 jumps; less mixes with where it is, as a shift does in a power iteration.
            far = float(reach[0])
            goal = target if far == 1 else (1 - far) * u + far * target
        if torch.equal(goal, u) or int(after["slow"]) >= 2:
            return self._release(after)
        after["point"] = r * goal
        return after

    def _release(self, after: State) -> State:
        """From the best point, start anew in the coordinates with the smallest slopes."""
        r, norm = self.region.radii, self.region.norm
        generator = torch.Generator()
        generator.set_state(after["random"].cpu())
        u, q = quotient(after["best"], r), (r * after["best_slope"]).abs()
        fresh = unit_draw(len(r), norm, generator).to(u)
        if norm == "inf":
            count = max(1, int(_RELEASED * len(q)))
            goal = torch.where(q > q.kthvalue(count).values, u, fresh)
        else:
            goal = u + _RELEASED * fresh
            goal = goal / torch.linalg.vector_norm(goal)
        after.update(
            point=r * goal, random=generator.get_state(), reach=torch.ones_like(r), slow=scalar(0),
            value=scalar(-math.inf), current=after["best"],
        )  # fmt: skip
        return after


def _average_one(q: Tensor, norm: Norm) -> Tensor:
    """The slopes in units of their root mean square (of their length, for p = 2); 0 where all vanish."""
    scale = torch.linalg.vector_norm(q.double())
    scale = scale / math.sqrt(len(q)) if norm == "inf" else scale
    return q / scale.to(q.dtype) if bool(scale > 0) else torch.zeros_like(q)
