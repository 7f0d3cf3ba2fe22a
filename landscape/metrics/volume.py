"""The volume of the set where the loss stays below L(θ) + ε, along random rays, and its mass under a prior.

r(u) = sup{r : L(θ + s u) < L(θ) + ε for all s < r}; the star-shaped set that these radii span has the volume
V_D E_u[r(u)^D] over uniform directions u, V_D that of the unit ball: a lower bound of the connected set. All sums
are made of logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from landscape import preconditioners, seeds
from landscape.checks import Need
from landscape.divergence import Divergence
from landscape.errors import Refused
from landscape.estimators.log_mean import LogMean, log_mean
from landscape.estimators.radial import log_ball_volume, log_gaussian_mass
from landscape.estimators.radius import NOT_FINITE, STEP, UNBOUNDED, Radii, first_crossings
from landscape.metrics.base import MEMORY, Metric, Round, Values, setting
from landscape.preconditioners import Preconditioner
from landscape.problem import Problem
from landscape.results import Record, Variable

# Of the truncation radius: where the pilot ray, from which the others start, is evaluated first.
_PILOT_START = 1e-4
_PILOT_MEMORY = 1 << 28  # bytes for predictions at θ
# The others start this many steps of the scan before the pilot's radius: rays differ little in high dimensions.
_BEFORE = 2


@dataclass(frozen=True)
class Volume(Metric):
    """Star-shaped volume of the set where the loss stays below L(θ) + ε, and its mass under a Gaussian prior.

    Rays that are still in the set at the truncation radius end there: `unbounded_fraction`; the volume is then that
    of the truncated set. A ray also ends where the cost stops to be a number (`not_finite_fraction`). With
    `prior` σ the mass of N(0, σ²I), not centred at θ, comes from the same rays (`log_mass`). `preconditioner`
    bends the rays towards flat directions, with the weights that keep the estimate right. `cost=kl` takes the mean
    divergence KL(p_θ ‖ p_θ') of a classifier's predictions for the loss.

    A mean of r^D hangs on few rays where D is large and P far from right: the logarithm is then too low, as the
    number of effective samples shows. A standard error is stated only where the sample supports one; else
    it is NaN, and `stderr_reason` says why.

    Source: Dinh et al. 2017 (arXiv 1703.04933), Definition 1; Hochreiter & Schmidhuber 1997 (doi
    10.1162/neco.1997.9.1.1).
    """

    name: ClassVar[str] = "volume"
    headline: ClassVar[str] = "log_volume"
    unit: ClassVar[str] = "ray"
    block: ClassVar[int] = 4
    citation: ClassVar[str] = "Dinh et al. 2017, arXiv:1703.04933"
    told: ClassVar[tuple[str, ...]] = (
        "log_mass", "effective_samples", "unbounded_fraction", "truncation_radius", "lowest_excess"
    )  # fmt: skip

    epsilon: tuple[float, ...] = setting((0.1,), "rise of the cost that is still in the set")
    rays: int = setting(64, "random directions", grows=True)
    prior: float | None = setting(None, "σ of a Gaussian prior N(0, σ²I), whose mass of the set is told too")
    cost: Literal["loss", "kl"] = setting("loss", "what may rise: the loss, or the divergence of predictions")
    preconditioner: Literal["none", "ggn_diagonal", "eigenvectors"] = setting(
        "none", "what bends the rays towards flat directions"
    )
    curvature: Literal["ggn", "hessian"] = setting("ggn", "for eigenvectors, of which matrix")
    top: int = setting(10, "for eigenvectors, how many of the largest")
    damping: float = setting(0.1, "added to the preconditioner's curvatures, in units of their mean")
    truncation: float = setting(100.0, "radius at which a ray counts as unbounded, in units of 1 + ‖θ‖")
    tolerance: float = setting(1e-3, "error that the radii may add to the logarithm, in nats")
    scan: float = setting(STEP, "factor between the radii at which a ray is looked at")

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = self.epsilon
        if not isinstance(levels, tuple | list) or not levels or len(set(levels)) < len(levels) or not all(
            0 < level < math.inf for level in levels
        ):  # fmt: skip
            raise ValueError(f"epsilon is {levels!r}; allowed are different numbers > 0, as (0.1,)")
        for name, least in (("rays", 1), ("top", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is a number >= {least}")
        for name in ("damping", "truncation", "tolerance"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is a number > 0")
        if self.prior is not None and not 0 < self.prior < math.inf:
            raise ValueError(f"prior is {self.prior}; allowed is a number > 0, the prior's σ, or none")
        if not 1 < self.scan <= 4:
            raise ValueError(f"scan is {self.scan}; allowed is a factor above 1, at most 4")

    def needs(self) -> frozenset[Need]:
        """Values; outputs for the divergence and the Gauss-Newton diagonal; products for eigenvectors."""
        asked = {Need.VALUE}
        if self.cost == "kl" or self.preconditioner == "ggn_diagonal":
            asked.add(Need.OUTPUTS)
        if self.preconditioner == "eigenvectors":
            asked.add(Need.GGN if self.curvature == "ggn" else Need.HESSIAN)
        return frozenset(asked)

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Build the preconditioner, and find on a pilot ray where to start."""
        theta = problem.parameters_vector()
        distance = float(theta.double().norm())
        limit = self.truncation * (1 + distance)
        base = float(problem.value()) if self.cost == "loss" else 0.0
        if not math.isfinite(base):
            raise Refused(f"the loss at θ is {base}, so no set lies below it; take other parameters or data")
        bend = self._preconditioner(problem, seed)
        stream = seeds.generator(seed, "volume/pilot", 0)
        direction, _, _ = _ray(stream, bend, theta)
        pilot = self._radii(
            problem, self._rise(problem, base, _PILOT_MEMORY), direction, _PILOT_START * limit, limit
        )
        found = float(pilot.radii.min())
        start = found * self.scan**-_BEFORE if 0 < found < limit else _PILOT_START * limit
        words = "radius at which rays are truncated, in units of the parameters"
        levels = np.array(self.epsilon, float)
        # A relative error e of the radius is e ε of a cost that rises linearly, 2 e ε of one that rises as a square.
        rounding = problem.size * torch.finfo(problem.dtype).eps * (abs(base) + levels) / levels
        return Record(
            {
                "epsilon": Variable(("epsilon",), levels, "1", "rise of the cost"),
                "truncation_radius": Variable((), np.asarray(limit), "1", words),
                "cost_at_theta": Variable((), np.asarray(base), "1", "cost at θ"),
                "theta_norm": Variable((), np.asarray(distance), "1", "‖θ‖"),
                "rounding": _per_level(rounding, "nats that rounding of the cost may add"),
                **_stored(bend),
            },
            {"order": problem.size, "start_radius": start, "radius_rtol": self.tolerance / problem.size},
        )

    def units(self, record: Record) -> Round | None:
        """All rays at once."""
        return Round(self.rays) if record.attrs["stop"] < self.rays else None

    def block_size(self, problem: Problem, memory: int) -> int:  # noqa: ARG002
        """A few rays, one after the other: what an interruption may lose."""
        return self.block

    def measure(
        self,
        problem: Problem,
        shared: Record,
        block: range,  # noqa: ARG002
        generators: Sequence[torch.Generator],
    ) -> Values:
        """Follow a block of rays to where they leave the set."""
        theta, bend = problem.parameters_vector(), _restored(shared)
        memory = shared.attrs.get("memory", MEMORY) // 4
        rise = self._rise(problem, float(shared["cost_at_theta"]), memory)
        start, limit = shared.attrs["start_radius"], float(shared["truncation_radius"])
        rays = [_ray(stream, bend, theta) for stream in generators]
        found = [self._radii(problem, rise, direction, start, limit) for direction, _, _ in rays]
        dims = ("ray", "epsilon")
        return {
            "radius": Variable(dims, np.array([f.radii for f in found]), "1", "radius of the set along the ray"),
            "status": Variable(
                dims, np.array([f.status for f in found], float), "1",
                "0 crossed, 1 left where the cost is no number, 2 unbounded, 3 never inside",
            ),
            "log_weight": Variable(("ray",), np.array([w for _, w, _ in rays]), "1", "-D ln ‖P u‖, ‖u‖ = 1"),
            "along": Variable(("ray",), np.array([a for _, _, a in rays]), "1", "v·θ of the unit direction v"),
            "evaluations": Variable(
                ("ray",), np.array([f.evaluations for f in found]), "1", "evaluations of the cost"
            ),
            "not_finite": Variable(
                ("ray",), np.array([f.not_finite for f in found]), "1", "evaluations that gave no finite number"
            ),
            "lowest": Variable(("ray",), np.array([f.lowest for f in found]), "1", "least rise on the ray"),
        }  # fmt: skip

    def summarize(self, record: Record) -> Values:
        """Average the rays that are done."""
        done = record["done"]
        radii, status = record["radius"][done], record["status"][done]
        weights, dimension = record["log_weight"][done], record.attrs["order"]
        with np.errstate(divide="ignore"):
            logs = dimension * np.log(radii) + weights[:, None] + log_ball_volume(dimension)
        lowest = float(np.min(record["lowest"][done], initial=np.inf))
        values = {
            **self._estimates("volume", logs, record["rounding"], ""),
            "unbounded_fraction": _per_level(
                (status == UNBOUNDED).mean(axis=0), "share of the rays that do not leave the set"
            ),
            "not_finite_fraction": _per_level(
                (status == NOT_FINITE).mean(axis=0), "share of those that leave where the cost is no number"
            ),
            "lowest_excess": Variable(
                (), np.asarray(lowest), "1", "least rise found: θ is no minimum where it is negative"
            ),
            "converged": Variable((), np.asarray(bool(done.all())), "1", "whether all rays are done"),
        }
        if self.prior is not None:
            along, distance = record["along"][done], float(record["theta_norm"])
            masses = [log_gaussian_mass(r, along, distance, self.prior, dimension) for r in radii.T]
            cones = np.stack(masses, axis=1) + weights[:, None]
            values.update(self._estimates("mass", cones, record["rounding"], "mass_"))
        return values

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """None: ε is a rise of the loss as it is."""
        return {}

    @property
    def outlook_in(self) -> tuple[str, float]:
        """What `outlook` counts."""
        return "losses", 0.35

    def outlook(self, problem: Problem) -> tuple[int, int]:  # noqa: ARG002
        """Predict the evaluations of the cost, in place of products."""
        each = 4 + 2 * len(self.epsilon)
        return self.rays * each, self.rays * 10 * each

    def _estimates(self, quantity: str, logs: np.ndarray, rounding: np.ndarray, prefix: str) -> Values:
        found: list[LogMean] = [log_mean(column) for column in logs.T]
        errors = [math.hypot(f.stderr, self.tolerance, r) for f, r in zip(found, rounding, strict=True)]
        what = "star-shaped volume" if quantity == "volume" else "prior's mass of the set"
        return {
            f"log_{quantity}": _per_level([f.value for f in found], f"natural logarithm of the {what}"),
            f"log_{quantity}_stderr": _per_level(errors, "standard error; NaN where rays support none"),
            f"{prefix}effective_samples": _per_level([f.effective_samples for f in found], "(Σ w)² / Σ w²"),
            f"{prefix}tail_exponent": _per_level([f.tail_exponent for f in found], "k of the rays' weights"),
            f"{prefix}stderr_reason": Variable(
                ("epsilon",), np.array([f.reason for f in found]), "1", "why there is no standard error"
            ),
        }

    def _radii(
        self, problem: Problem, rise: Callable[[Tensor], float], direction: Tensor, start: float, limit: float
    ) -> Radii:
        theta = problem.parameters_vector()

        def along(radius: float) -> float:
            return rise(torch.add(theta, direction, alpha=radius))

        rtol = self.tolerance / problem.size
        return first_crossings(along, self.epsilon, start=start, limit=limit, rtol=rtol, step=self.scan)

    def _rise(self, problem: Problem, base: float, memory: int) -> Callable[[Tensor], float]:
        """The rise of the cost above θ, as a function of the parameters."""
        if self.cost == "kl":
            return Divergence(problem, memory).at
        return lambda vector: float(problem.at(vector).value()) - base

    def _preconditioner(self, problem: Problem, seed: int) -> Preconditioner:
        if self.preconditioner == "none":
            return Preconditioner()
        if self.preconditioner == "ggn_diagonal":
            return preconditioners.ggn(problem, self.damping, seed)
        return preconditioners.eigenvectors(problem, self.curvature, self.top, self.damping, seed)


def _ray(stream: torch.Generator, bend: Preconditioner, theta: Tensor) -> tuple[Tensor, float, float]:
    """Return a unit direction in the precision of θ, the logarithm of its weight, and its product with θ."""
    drawn = torch.randn(len(theta), generator=stream, dtype=torch.float64)
    direction, weight = bend.direction(drawn)
    along = float(direction @ theta.double().cpu())
    return direction.to(theta), weight, along


def _per_level(numbers: Any, words: str) -> Variable:
    return Variable(("epsilon",), np.asarray(numbers, float), "1", words)


def _stored(bend: Preconditioner) -> Values:
    parts = {
        "precondition_scale": (("parameter",), bend.scale, "ln of the preconditioner's diagonal"),
        "precondition_vectors": (("parameter", "direction"), bend.vectors, "its eigenvectors"),
        "precondition_factors": (("direction",), bend.factors, "ln of its factors along them"),
    }
    return {
        name: Variable(dims, tensor.cpu().numpy(), "1", words, sidecar=dims[0] == "parameter")
        for name, (dims, tensor, words) in parts.items()
        if tensor is not None
    }


def _restored(shared: Record) -> Preconditioner:
    parts = {
        key: torch.from_numpy(np.array(shared[f"precondition_{key}"], order="C"))
        for key in ("scale", "vectors", "factors")
        if f"precondition_{key}" in shared
    }
    return Preconditioner(**parts)
