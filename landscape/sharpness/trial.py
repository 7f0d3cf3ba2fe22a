"""One trial: a climb from one start through sets of growing size, or a block of draws of noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape import seeds
from landscape.errors import Refused
from landscape.estimators.regions import Region
from landscape.problem import Problem
from landscape.record import Record
from landscape.sharpness import function, scaling, settings
from landscape.sharpness.function import Around
from landscape.sharpness.search import Climb, Ladder


def neighbourhood(chosen: Mapping[str, Any], problem: Problem, seed: int) -> tuple[Around, Tensor]:
    """Return the function of δ, and the scale c of its sets, (d,).

    Args:
        chosen: the settings.
        problem: at θ.
        seed: of a random subspace.

    Raises:
        Refused: if the subspace has more dimensions than there are parameters.
    """
    definition, dimensions = chosen["definition"], chosen["subspace"]
    if definition != "keskar":
        scaled: scaling.Scaling = "none" if definition == "ball" else chosen["scaling"]
        return Around.of(problem), scaling.parameter_scale(problem, scaled)
    if dimensions is None:
        around = Around.of(problem)
        return around, around.centre.abs() + 1
    if dimensions > problem.size:
        raise Refused(f"subspace is {dimensions}, but there are {problem.size} parameters; ask for fewer")
    A = scaling.subspace_matrix(problem.size, dimensions, chosen["law"], chosen["column_scale"], seed)
    around = Around.of(problem, A)
    return around, (scaling.coordinates(A, around.centre).abs() + 1).to(around.centre)


@dataclass
class Work:
    """What a trial works with, made anew where a run goes on: a function and its sets."""

    around: Around
    ladder: Ladder
    grouped: bool

    @classmethod
    def of(cls, chosen: Mapping[str, Any], problem: Problem, shared: Record, trial: int) -> Work:
        """Return that of one trial: of a restart, on one group of examples."""
        restart, part = divmod(trial, shared.attrs["batches"])
        around, scale = neighbourhood(chosen, problem, shared.attrs["trial_seed"])
        grouped = chosen["m"] is not None
        if grouped:
            around = Around.of(function.group(problem, part, chosen["m"]))
        start = None
        if "start" in shared and restart < 2:  # along the eigenvector, to either side
            start = torch.from_numpy(shared["start"]).to(scale) * (1 - 2 * restart)
        ladder = Ladder(
            around, scale, settings.norm_of(chosen), settings.ladder_of(chosen), chosen["maximizer"],
            chosen["steps"], warm=restart % 2 == 0, start=start,
        )  # fmt: skip
        return cls(around, ladder, grouped)

    def base(self, shared: Record) -> np.ndarray:
        """Return loss, weight, and rises of the linear model, at θ on the trial's examples."""
        if not self.grouped:
            return np.array([float(shared["loss"]), 1.0, *shared["slope_rise"]])
        problem, ladder = self.around.problem, self.ladder
        weight = sum(problem.evaluator.weigh(batch) for batch in problem.batches)
        if not weight:
            return np.zeros(2 + len(ladder.epsilon))
        value, slope = problem.value_and_gradient()
        rises = [Region(e * ladder.scale, ladder.norm).rise(slope) for e in ladder.epsilon]
        return np.array([float(value), weight, *rises])


@dataclass
class Trial:
    """The state of a block.

    Attributes:
        climb: how far it is.
        base: what `Work.base` returned.
        work: what it works with; not stored.
    """

    climb: Climb
    base: np.ndarray | None = None
    work: Work | None = None


def stream(seed: int, trial: int, rung: int) -> torch.Generator:
    """Return the random stream of one set of one trial."""
    return seeds.generator(seed, f"sharpness/{rung}", trial)
