"""Projected gradient attacks on all examples of a batch at once, each with a stop of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from landscape.errors import Refused
from landscape.example_outputs import labels_of, predictions_of, require_labels
from landscape.example_scalars import ExampleScalars, Pass


@dataclass(frozen=True)
class Attack:
    """Ascent of each example's loss within a ball around it.

    Attributes:
        epsilon: radius, in the unit of the input.
        norm: of the ball.
        steps: of the ascent.
        length: of a step, in the norm.
        clamp: range in which the moved inputs stay, or None.

    Source: Madry et al. 2018 (arXiv 1706.06083).
    """

    epsilon: float
    norm: Literal[2, "inf"]
    steps: int
    length: float
    clamp: tuple[float, float] | None = None

    def finds(self, scalars: ExampleScalars, start: Tensor) -> Tensor:
        """Whether a wrong answer was met on the way, (N,) bool.

        Args:
            scalars: the examples' losses.
            start: displacements (N, d) to begin with; brought into the ball.
        """
        found = torch.zeros(scalars.count, dtype=torch.bool)
        index = torch.arange(scalars.count)  # of those that are still attacked
        x, move = scalars.points(), start
        move = self.project(x, move)
        for _ in range(self.steps):
            slope, done = scalars.slopes(move)
            met = wrong(done, len(index))
            found[index[met]] = True
            if met.all():
                return found
            if met.sum() >= len(index) / 2:
                left = (~met).nonzero()[:, 0]
                index, there = index[left], left.to(move.device)
                scalars, x, move, slope = scalars.take(there), x[there], move[there], slope[there]
            move = self.project(x, move + self.length * self.direction(slope))
        found[index[succeeded(scalars, move)]] = True
        return found

    def direction(self, slope: Tensor) -> Tensor:
        """The step of length one that climbs most; 0 where the slope is."""
        if self.norm == "inf":
            return slope.sign()
        length = slope.norm(dim=1, keepdim=True)
        return slope / torch.where(length > 0, length, 1.0)

    def project(self, x: Tensor, move: Tensor) -> Tensor:
        """Bring displacements into the ball, and moved inputs into the range of the data."""
        if self.norm == "inf":
            inside: Tensor = move.clamp(-self.epsilon, self.epsilon)
        else:
            length = move.norm(dim=1, keepdim=True)
            inside = move * torch.where(length > self.epsilon, self.epsilon / length, 1.0)
        if self.clamp is not None:  # x itself is in the range, so that this shortens the displacement
            inside = (x + inside).clamp(*self.clamp) - x
        return inside

    def random(self, size: int, stream: torch.Generator) -> Tensor:
        """A displacement (d,), uniform in the ball."""
        if self.norm == "inf":
            return self.epsilon * (2 * torch.rand(size, generator=stream, dtype=torch.float64) - 1)
        drawn = torch.randn(size, generator=stream, dtype=torch.float64)
        radius = float(torch.rand((), generator=stream, dtype=torch.float64)) ** (1 / size)
        move: Tensor = drawn * (self.epsilon * radius / float(drawn.norm()))
        return move


def succeeded(scalars: ExampleScalars, move: Tensor | None = None) -> Tensor:
    """Whether the model's answer at x_i (+ displacement) is wrong, (N,) bool."""
    with scalars.running():
        return wrong(scalars.run(move), scalars.count)


def wrong(done: Pass, count: int) -> Tensor:
    """Whether each answer is wrong, (N,) bool.

    Raises:
        Refused: if the outputs are no scores of classes, or the targets no labels of theirs.
    """
    labels, predictions = labels_of(done.target, count), predictions_of(done.outputs, count)
    if labels is None or predictions is None:
        what = (
            "targets are no integer labels" if labels is None else "outputs are no scores (examples, classes)"
        )
        raise Refused(
            f"an attack needs right and wrong answers, but the {what}; leave attacks out with steps=0"
        )
    require_labels(labels, done.outputs.shape[1])
    found: Tensor = labels != predictions
    return found.cpu()


def require_inside(x: Tensor, clamp: tuple[float, float]) -> None:
    """Refuse a range that the data leave.

    Raises:
        Refused: naming the data's own range.
    """
    low, high = float(x.min()), float(x.max())
    if low < clamp[0] or high > clamp[1] or math.isnan(low + high):
        raise Refused(
            f"clamp is {clamp[0]:g} to {clamp[1]:g}, but the data go from {low:g} to {high:g}; give a range that "
            "holds them, in the unit in which the model sees them"
        )
