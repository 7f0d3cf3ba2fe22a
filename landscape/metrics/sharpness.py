"""Sharpness: how far the loss rises near θ, at worst or on average.

The sets are {δ: ‖δ/c‖_p <= ε}. A searched maximum is a lower bound; what bounds it from above, or approximates it,
stands beside it under its own name. The function on these sets and the searches are in `landscape.sharpness`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from landscape import memory as footprint
from landscape.checks import Need
from landscape.errors import Refused
from landscape.estimators.regions import Norm, Region
from landscape.metrics.base import Round, SequentialMetric, State, Values, doubling, setting
from landscape.problem import Problem
from landscape.results import Record, Variable
from landscape.sharpness import curvature, estimate, function, noise, settings, trial
from landscape.sharpness.search import FOUND, Climb
from landscape.sharpness.trial import Trial

_MATRIX_BYTES = 24  # per entry of A: in float64, once more to solve with it, and in the working precision
_FIRST_ROUND = 16  # draws; with fewer a standard error says little


@dataclass(frozen=True)
class Sharpness(SequentialMetric):
    """How far the loss rises in a neighbourhood: Keskar's box, a ball, adaptive sets, or on average over noise.

    `keskar`: 100 (max L − L(θ)) / (1 + L(θ)) over the box |δ_i| <= ε (|θ_i| + 1), or with subspace=p over
    |y_i| <= ε (|(A⁺θ)_i| + 1), δ = A y, with a random n×p matrix A of the stated law, scale and seed. `ball`:
    (max L − L(θ)) / (1 + L(θ)) over ‖δ‖₂ <= ε. `adaptive`: max L − L(θ) over ‖δ/c‖_p <= ε with c = |θ| or filter
    lengths; with m the mean of the maxima of groups of m examples. `average`: E L(θ + ε c ⊙ ξ) − L(θ).

    The maxima are searched from several starts, each going from the smallest ε to the largest: lower bounds.
    Beside them: `first_order`, the rise of the linear model; for p = 2 `second_order`, ½ε² times the largest
    eigenvalue of diag(c) H diag(c), an approximation and no bound; with normalized logits and cross-entropy
    `upper_bound`, which is certain; `gap`, what the linear model at the point found could still gain;
    `slope_share`, first_order over sharpness at its largest; `at_minimum`, whether that, and the lowest loss seen below
    L(θ), are at most a tenth of the rise.

    Source: Keskar et al. 2017 (arXiv 1609.04836); Dinh et al. 2017 (arXiv 1703.04933); Kwon et al. 2021 (arXiv
    2102.11600); Andriushchenko et al. 2023 (arXiv 2302.07011).
    """

    name: ClassVar[str] = "sharpness"
    headline: ClassVar[str] = "sharpness"
    unit: ClassVar[str] = "trial"
    citation: ClassVar[str] = "Keskar et al. 2017, arXiv:1609.04836"
    told: ClassVar[tuple[str, ...]] = ("loss", "gradient_norm", "slope_share")
    keeps_graphs: ClassVar[bool] = False  # no product is made

    definition: Literal["keskar", "ball", "adaptive", "average"] = setting("keskar", "of what")
    epsilon: tuple[float, ...] = setting((5e-4, 1e-3), "sizes of the neighbourhood")
    subspace: int | None = setting(None, "keskar: dimensions of a random subspace")
    law: Literal["gaussian", "rademacher", "orthonormal"] = setting(
        "gaussian", "keskar: of the subspace's matrix A"
    )
    column_scale: float = setting(
        1.0, "keskar: factor of A, whose columns have length √n, or 1 if orthonormal"
    )
    norm: Literal[2, "inf"] = setting(2, "adaptive: p of the set")
    scaling: Literal["element", "filter", "none"] = setting(
        "element", "adaptive, average: how far each may move"
    )
    m: int | None = setting(None, "adaptive: mean over maxima of groups of that many examples")
    noise: Literal["gaussian", "uniform"] = setting(
        "gaussian", "average: law of ξ, N(0, 1) or uniform on [-1, 1]"
    )
    logit_normalized: bool = setting(False, "of outputs with mean 0 and length 1 over the classes")
    maximizer: Literal["ascent", "apgd", "lbfgsb"] = setting("ascent", "how maxima are searched")
    steps: int = setting(20, "evaluations of each search after its first; iterations of lbfgsb")
    restarts: int = setting(2, "searches of each set", grows=True)
    samples: int = setting(256, "average: the most draws, each with both signs", grows=True)
    rtol: float = setting(
        0.05, "average: stop when the standard error is below rtol * |sharpness|", grows=True
    )
    second_order: bool = setting(True, "ball, adaptive with p = 2: also from the largest eigenvalue")
    preset: Literal["none", "paper"] = setting(
        "none", "paper: maximizer, steps, restarts and m of the authors"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        settings.require(self.configuration(), defaults)

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings, with those of the preset in their place."""
        return settings.chosen(self.configuration())

    @property
    def region_norm(self) -> Norm:
        """The p of the sets."""
        return settings.norm_of(self.configuration())

    @property
    def ladder(self) -> tuple[float, ...]:
        """The sizes, ascending."""
        return settings.ladder_of(self.configuration())

    @property
    def _with_curvature(self) -> bool:
        searched = self.definition in {"ball", "adaptive"} and self.region_norm == 2
        return searched and self.second_order and self.chosen["m"] is None

    def needs(self) -> frozenset[Need]:
        """Gradients; products for the second order; outputs where they are normalized."""
        more = {Need.HESSIAN} if self._with_curvature else set()
        return frozenset(
            {Need.VALUE, Need.GRADIENT, *more, *({Need.OUTPUTS} if self.logit_normalized else ())}
        )

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Measure the loss and its slope at θ, and the largest curvature where p = 2."""
        whole = self._problem(problem)
        value, slope = whole.value_and_gradient()
        loss = float(value)
        if not math.isfinite(loss):
            raise Refused(f"the loss at θ is {loss}; sharpness needs a finite one")
        if self.definition in {"keskar", "ball"} and loss < 0:
            raise Refused(
                f"the loss at θ is {loss:.6g}, and definition {self.definition} divides by 1 + L, which supposes "
                "L >= 0. Take definition='adaptive' with scaling='none', which gives the rise itself"
            )
        around, scale = trial.neighbourhood(self.chosen, whole, seed)
        if around.A is not None:
            slope = around.A.T @ slope
        rises = [Region(e * scale, self.region_norm).rise(slope) for e in self.ladder]
        m = self.chosen["m"]
        variables = {
            "epsilon": Variable(("epsilon",), np.array(self.ladder), "1", "size of the neighbourhood"),
            "loss": Variable((), np.asarray(loss), "1", "L(θ)"),
            "gradient_norm": Variable((), np.asarray(float(slope.double().norm())), "1", "‖∇L(θ)‖₂ on the subspace"
                                      if around.A is not None else "‖∇L(θ)‖₂"),
            "slope_rise": Variable(("epsilon",), np.array(rises), "1", "rise of the linear model"),
        }  # fmt: skip
        attrs = {
            "trial_seed": seed, "definition": self.definition, "order": problem.size, "dimensions": len(scale),
            "batches": 1 if m is None else function.group_count(problem, m),
        }  # fmt: skip
        if self.logit_normalized:
            top = function.ceiling(whole)
            variables["ceiling"] = Variable(
                (), np.asarray(top), "1", "largest possible loss, NaN if not known"
            )
        if self._with_curvature:
            variables |= self._curvature(whole, scale, slope, seed)
        return Record(variables, attrs)

    def _curvature(self, whole: Problem, scale: torch.Tensor, slope: torch.Tensor, seed: int) -> Values:
        pair = curvature.largest(whole, scale, seed)
        start = scale * pair.vectors[:, 0].to(scale)
        start = start if float((start.double() * slope.double()).sum()) >= 0 else -start
        words = "largest eigenvalue of diag(c) H diag(c)"
        return {
            "scaled_eigenvalue": Variable((), pair.values[0].cpu().numpy(), "1", words),
            "scaled_eigenvalue_residual_norm": Variable(
                (), pair.residual_norms[0].cpu().numpy(), "1", "its residual"
            ),
            "start": Variable(
                ("parameter",), start.cpu().numpy(), "1", f"c times the {words[8:]}'s vector", sidecar=True
            ),
        }

    def block_size(self, problem: Problem, memory: int) -> int:
        """Draws are stored in blocks; a search stands alone.

        Raises:
            Refused: if the matrix of a subspace takes more than the memory.
        """
        if (needed := _MATRIX_BYTES * problem.size * (self.subspace or 0)) > memory:
            raise Refused(
                f"a subspace of {self.subspace} dimensions of {problem.size} parameters takes "
                f"{footprint.in_words(needed)}, and memory allows {footprint.in_words(memory)}; take fewer "
                "dimensions, or state more: memory=, --memory"
            )
        return self.block if self.definition == "average" else 1

    def units(self, record: Record) -> Round | None:
        """All restarts at once; draws in doubling rounds until the standard error is small enough."""
        done = record.attrs["stop"]
        if self.definition != "average":
            wanted = self.chosen["restarts"] * record.attrs["batches"]
            return Round(wanted) if wanted > done else None
        return doubling(done, _FIRST_ROUND, self.samples, lambda: self._precise(record))

    def start(
        self,
        problem: Problem,  # noqa: ARG002
        shared: Record,  # noqa: ARG002
        block: range,  # noqa: ARG002
        generators: Sequence[torch.Generator],  # noqa: ARG002
    ) -> Any:
        """Return the state before the first evaluation."""
        return Trial(Climb())

    def step(self, problem: Problem, shared: Record, block: range, state: Trial) -> Trial:
        """Make one evaluation of a search, or one draw of noise."""
        if state.work is None:
            state.work = trial.Work.of(self.chosen, self._problem(problem), shared, block.start)
        seed, climb = shared.attrs["trial_seed"], state.climb
        if self.definition != "average":
            if state.base is None:
                state.base = state.work.base(shared)
            if not state.base[1]:  # no example of the group has a weight
                return Trial(Climb(len(self.ladder), [[0.0] * len(FOUND)] * len(self.ladder)), state.base)
            climb = state.work.ladder.step(climb, lambda rung: trial.stream(seed, block.start, rung))
            return Trial(climb, state.base, state.work)
        stream = trial.stream(seed, block.start + climb.rung, 0)
        ladder, around = state.work.ladder, state.work.around
        loss = float(shared["loss"])
        row = noise.rises(around, ladder.scale, self.ladder, self.noise, loss, stream)
        return Trial(Climb(climb.rung + 1, [*climb.found, [*row]]), None, state.work)

    def result(self, problem: Problem, shared: Record, block: range, state: Trial) -> Values | None:  # noqa: ARG002
        """Return the block's values once all its sets are searched, or all its noise is drawn."""
        average = self.definition == "average"
        if state.climb.rung < (len(block) if average else len(self.ladder)):
            return None
        table = np.array(state.climb.found)
        dims = ("trial", "epsilon")
        if average:
            return {"rises": Variable(dims, table, "1", "mean rise of one draw and its opposite")}
        columns = dict(zip(FOUND, table.T[:, None, :], strict=True))
        base, weight, slopes = state.base[0], state.base[1], state.base[2:]  # type: ignore[index]
        return {
            "rises": Variable(dims, columns["value"] - base, "1", "highest loss found, less that at θ"),
            "lowest_rises": Variable(dims, columns["lowest"] - base, "1", "lowest loss seen, less that at θ"),
            "gaps": Variable(dims, columns["gap"], "1", "what the linear model there could still gain"),
            "trial_evaluations": Variable(dims, columns["evaluations"], "1", "evaluations"),
            "trial_nonfinite": Variable(dims, columns["nonfinite"], "1", "evaluations that were not finite"),
            "trial_slopes": Variable(
                dims, slopes[None], "1", "rise of the linear model on the group's examples"
            ),
            "trial_weight": Variable(("trial",), np.array([weight]), "1", "weight of the group's examples"),
        }

    def stored(self, state: Trial) -> State:
        """Turn a trial into arrays."""
        return state.climb.arrays() | ({} if state.base is None else {"base": state.base})

    def restored(self, problem: Problem, arrays: State) -> Trial:
        """Bring a trial back; what it works with is made anew at the next step."""
        return Trial(Climb.from_arrays(arrays, problem.device), arrays.get("base"))

    def summarize(self, record: Record) -> Values:
        """Take the largest rise of all searches, or the mean of all draws."""
        if self.definition == "average":
            return estimate.average(record, self._precise(record))
        return estimate.searched(record)

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """Rises scale; beside 1 + L they have no law."""
        return {"loss": 1.0, "gradient_norm": 1.0} | (
            {} if self.definition in {"keskar", "ball"} else {self.headline: 1.0}
        )

    @property
    def outlook_in(self) -> tuple[str, float]:
        """What `outlook` counts."""
        return ("losses", 0.35) if self.definition == "average" else ("gradients", 1.0)

    def outlook(self, problem: Problem) -> tuple[int, int]:  # noqa: ARG002
        """Predict the passes over the data."""
        sizes = len(self.ladder)
        if self.definition == "average":
            return 2 * sizes * min(_FIRST_ROUND, self.samples), 2 * sizes * self.samples
        passes = sizes * (self.chosen["steps"] + 1) * self.chosen["restarts"]
        return passes, passes + (100 if self._with_curvature else 0)

    def _precise(self, record: Record) -> bool:
        value, error = estimate.mean_and_error(record)
        return bool(np.all(error <= self.rtol * np.abs(value)))

    def _problem(self, problem: Problem) -> Problem:
        return function.with_normalized_logits(problem) if self.logit_normalized else problem
