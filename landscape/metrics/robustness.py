"""How far a model's gradients and answers hold when its inputs are moved by ε."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from landscape import input_checks
from landscape.attacks import Attack, require_inside, succeeded
from landscape.checks import Need
from landscape.errors import Refused
from landscape.estimators.calibration import calibrated_stderr
from landscape.example_scalars import ExampleScalars, Setup, by_example
from landscape.example_streams import streams
from landscape.metrics.base import Metric, Round, Values, setting
from landscape.problem import Problem
from landscape.results import Record, Variable

_BLOCK = 512


@dataclass(frozen=True)
class Robustness(Metric):
    """Relative change of input gradients at distance ε, and accuracy under projected gradient attacks of size ε.

    `gradient_robustness` is E ‖∇f(x + e) - ∇f(x)‖ / ‖∇f(x)‖ over directions e of length ε (norm 2: uniform on
    the sphere; inf: random signs times ε), examples with a zero gradient, or none that is
    finite, left out and counted.
    `adversarial_accuracy` is the share of examples for which no attack was found: an upper bound of the robust
    accuracy, as an attack that is not found may exist. What is found within a smaller ε counts at a larger
    one too. f is the loss; an example's result does not depend on its batch.

    Source: Madry et al. 2018 (arXiv 1706.06083); Srinivas et al. 2022 (arXiv 2206.07144).
    """

    name: ClassVar[str] = "robustness"
    headline: ClassVar[str] = "gradient_robustness"
    unit: ClassVar[str] = "example"
    block: ClassVar[int] = _BLOCK
    citation: ClassVar[str] = "Madry et al. 2018, arXiv:1706.06083"
    told: ClassVar[tuple[str, ...]] = ("adversarial_accuracy", "accuracy", "zero_gradients", "not_finite")

    epsilon: tuple[float, ...] = setting((0.05, 0.1, 0.15, 0.2), "ε, in the unit of the input")
    norm: Literal[2, "inf"] = setting(2, "of the displacement")
    steps: int = setting(10, "of an attack; 0 leaves attacks out")
    step_size: float = setting(2.5, "length of a step, in ε / steps")
    restarts: int = setting(1, "attacks from random places, beside one from the example itself", grows=True)
    clamp: tuple[float, float] | None = setting(None, "range of the data, low,high, that attacks stay in")
    directions: int = setting(4, "random directions for the change of gradients", grows=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon or not all(0 < e < math.inf for e in self.epsilon):
            raise ValueError(f"epsilon is {self.epsilon}; allowed is one number > 0 or more")
        if list(self.epsilon) != sorted(set(self.epsilon)):
            raise ValueError(f"epsilon is {self.epsilon}; allowed are numbers that ascend")
        if min(self.steps, self.restarts) < 0 or self.directions < 1:
            raise ValueError(
                f"steps, restarts and directions are {self.steps}, {self.restarts} and {self.directions}; allowed "
                "is at least 0, 0 and 1"
            )
        if not self.step_size > 0:
            raise ValueError(f"step_size is {self.step_size}; allowed is a number > 0")
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            raise ValueError(f"clamp is {self.clamp}; allowed is low,high with low < high")

    def needs(self) -> frozenset[Need]:
        """Gradients in the inputs; outputs and labels for attacks."""
        return frozenset({Need.INPUTS} | ({Need.OUTPUTS, Need.LABELS} if self.steps else set()))

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Find out whether examples decouple."""
        if (count := problem.examples()) is None:
            raise Refused(
                "the batches do not tell how many examples they hold, so none can be attacked alone"
            )
        found = input_checks.examine(problem, Setup(), products=False)
        if self.steps:
            for piece in problem.evaluator.cut(problem.batches):
                scalars = ExampleScalars(problem, piece, found.setup)
                succeeded(scalars)
                if self.clamp is not None:
                    require_inside(scalars.points(), self.clamp)
        epsilon = Variable(("epsilon",), np.array(self.epsilon), "1", "length of displacements")
        attrs = {"count": count, "input_check": found.as_dict(), "probe_seed": seed}
        return Record({"epsilon": epsilon}, attrs)

    def unit_bytes(self, problem: Problem) -> int:
        """A handful of rows of gradients and displacements."""
        size = input_checks.numbers_of_an_example(problem)
        return (8 + self.directions) * max(size, 1) * max(problem.dtype.itemsize, 4)

    def units(self, record: Record) -> Round | None:
        """All examples once, and again for a larger demand."""
        count = record.attrs["count"]
        if record.attrs["stop"] == 0:
            return Round(count)
        more = self.restarts > record["restarts_used"].min() and self.steps > 0
        return Round(count, again=True) if more or self.directions > record["directions_used"].min() else None

    def measure(
        self,
        problem: Problem,
        shared: Record,
        block: range,
        generators: Sequence[torch.Generator],  # noqa: ARG002  (streams follow from the examples' content)
    ) -> Values:
        """Measure a block of examples, batch by batch."""
        setup, seed = Setup(**shared.attrs["input_check"]["setup"]), shared.attrs["probe_seed"]
        found = by_example(
            problem,
            block,
            setup,
            lambda scalars: {**self._gradients(scalars, seed), **self._attacks(scalars, seed)},
        )
        if block.start == 0:  # the cost is counted in passes over all data
            problem.cost.gradients += self.outlook(problem)[1]
        every = np.ones(len(block))
        found |= {"restarts_used": every * self.restarts, "directions_used": every * self.directions}
        return {
            name: Variable(("example", "epsilon")[: data.ndim], data, "1", _WORDS[name])
            for name, data in found.items()
        }

    def _gradients(self, scalars: ExampleScalars, seed: int) -> dict[str, np.ndarray]:
        gradient = scalars.gradient().double()
        length = gradient.norm(dim=1)
        found = {"gradient_norm": length.cpu().numpy()}
        change = torch.zeros(scalars.count, len(self.epsilon), dtype=torch.float64, device=gradient.device)
        for U in self._directions(scalars, seed):
            for k, epsilon in enumerate(self.epsilon):
                moved = scalars.gradient((epsilon * U).to(scalars.problem.dtype)).double()
                change[:, k] += (moved - gradient).norm(dim=1) / length / self.directions
        change[length == 0] = math.nan  # 0/0: no direction to lose
        return {**found, "gradient_change": change.cpu().numpy()}

    def _directions(self, scalars: ExampleScalars, seed: int) -> Tensor:
        """Displacements of length one, (directions, N, d)."""
        found = []
        for stream in streams(scalars.piece, seed, f"{self.name}/directions"):
            drawn = torch.randn(self.directions, scalars.size, generator=stream, dtype=torch.float64)
            unit = drawn.sign() if self.norm == "inf" else drawn / drawn.norm(dim=1, keepdim=True)
            found.append(unit)
        return torch.stack(found, dim=1).to(scalars.problem.device)

    def _attacks(self, scalars: ExampleScalars, seed: int) -> dict[str, np.ndarray]:
        if not self.steps:
            return {}
        wrong = succeeded(scalars)
        found = torch.zeros(scalars.count, len(self.epsilon), dtype=torch.bool)
        broken = wrong.clone()
        for k, epsilon in enumerate(self.epsilon):
            attack = Attack(epsilon, self.norm, self.steps, self.step_size * epsilon / self.steps, self.clamp)
            for restart in range(self.restarts + 1):
                left = (~broken).nonzero()[:, 0]
                if not len(left):
                    break
                some = scalars.take(left.to(scalars.problem.device))
                start = self._start(some, attack, restart, seed)
                broken[left] |= attack.finds(some, start)
            found[:, k] = broken
        return {"correct": (~wrong).numpy(), "attacked": found.numpy()}

    def _start(self, scalars: ExampleScalars, attack: Attack, restart: int, seed: int) -> Tensor:
        zero = torch.zeros(scalars.count, scalars.size, dtype=scalars.problem.dtype)
        if restart:
            for i, stream in enumerate(streams(scalars.piece, seed, f"{self.name}/restart/{restart}")):
                zero[i] = attack.random(scalars.size, stream)
        return zero.to(scalars.problem.device)

    def summarize(self, record: Record) -> Values:
        """Take means over the examples that are done."""
        done = record["done"]
        slope = record["gradient_norm"][done]
        found: Values = {
            "zero_gradients": Variable(
                (), np.asarray(int((slope == 0).sum())), "1", "examples without a gradient"
            )
        }
        words = "examples without a finite gradient; left out of the means of changes"
        bad = np.asarray(int((~np.isfinite(slope)).sum()))
        found["not_finite"] = Variable((), bad, "1", words)
        change = record["gradient_change"][done]
        change = change[np.isfinite(change).all(axis=1)]
        mean = change.mean(axis=0) if len(change) else np.full(len(self.epsilon), np.nan)
        error = calibrated_stderr(change) if len(change) else mean
        words = "E ‖∇f(x + e) - ∇f(x)‖ / ‖∇f(x)‖, ‖e‖ = ε"
        found["gradient_robustness"] = Variable(("epsilon",), mean, "1", words)
        found["gradient_robustness_stderr"] = Variable(("epsilon",), error, "1", "over examples")
        if "attacked" in record:
            correct, attacked = record["correct"][done], record["attacked"][done]
            found["accuracy"] = Variable((), np.asarray(correct.mean()), "1", "accuracy without attack")
            held = 1 - attacked.mean(axis=0)
            words = "share of examples for which no attack was found: an upper bound of the robust accuracy"
            found["adversarial_accuracy"] = Variable(("epsilon",), held, "1", words)
            error = share_stderr(held, len(attacked))
            found["adversarial_accuracy_stderr"] = Variable(("epsilon",), error, "1", "over examples")
        found["converged"] = Variable((), np.asarray(bool(done.all())), "1", "whether every example is done")
        return found

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """Changes are relative."""
        return {self.headline: 0.0, "gradient_norm": 1.0}

    @property
    def outlook_in(self) -> tuple[str, float]:
        """What `outlook` counts."""
        return "gradients", 1.0

    def outlook(self, problem: Problem) -> tuple[int, int]:  # noqa: ARG002
        """Predict the fewest and the most gradients: an attack ends where it succeeds."""
        plain = 1 + self.directions * len(self.epsilon)
        return plain, plain + len(self.epsilon) * (self.restarts + 1) * self.steps


def share_stderr(share: np.ndarray, count: int) -> np.ndarray:
    """The standard error of a share of so many examples, from two more of each kind.

    Source: Agresti & Coull 1998 (doi 10.1080/00031305.1998.10480550).

    >>> share_stderr(np.array([1.0, 0.5]), 96).round(3)
    array([0.014, 0.05 ])
    """
    whole = count + 4
    near = (share * count + 2) / whole
    return np.asarray(np.sqrt(near * (1 - near) / whole))


_WORDS = {
    "gradient_norm": "‖∇f(x)‖",
    "gradient_change": "‖∇f(x + e) - ∇f(x)‖ / ‖∇f(x)‖, mean over directions",
    "correct": "whether the example is classified right",
    "attacked": "whether it is classified wrong, or an attack within ε was found",
    "restarts_used": "attacks from random places",
    "directions_used": "random directions",
}
