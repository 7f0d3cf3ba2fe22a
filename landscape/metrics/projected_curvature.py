"""Principal curvatures of the loss in random planes, from losses alone, and what they say of the Hessian.

A plane is spanned by η, δ ~ N(0, I_n), not normalised. There L(θ + αη + βδ) has the Hessian [[A, B], [B, C]] =
[[ηᵀHη, ηᵀHδ], [ηᵀHδ, δᵀHδ]] with the eigenvalues κ± = (A + C ± √((A − C)² + 4B²)) / 2. Its mean over planes is
tr(H) I: a plane shows the mean curvature, and hides the saddle that H may be. With unit directions all numbers
are smaller by n, to first order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from landscape import loss_differences, operators, seeds
from landscape.checks import Need
from landscape.errors import Refused
from landscape.estimators.eigen import eigsh
from landscape.estimators.planes import estimate, principal_curvatures, share_interval
from landscape.estimators.probes import draw, inner, rounding
from landscape.loss_differences import CENTRE_WEIGHT, Losses, Step, projected_hessian
from landscape.metrics.base import Metric, Round, Values, setting, vector_bytes
from landscape.problem import Problem
from landscape.results import Record, Variable

_PILOT = 4
# A participation below which few eigenvalues dominate: with ten equal ones the limit says 0.06 where 0 is true.
_MANY = 10.0
# Error of differences, relative to the curvatures, above which a measurement has not converged.
_ALLOWED_ERROR = 0.05
_WHICH = np.array(["minus", "plus"])


@dataclass(frozen=True)
class ProjectedCurvature(Metric):
    """Principal curvatures κ± of the loss in random planes, from losses alone; trace, and share of saddles.

    `losses` takes each plane from twelve losses (second differences at two steps along three directions): no
    derivative is needed. `products` takes the same planes from Hessian products. Variables: kappa(plane, which)
    with kappa_error(plane), what a difference may be off by; trace, the mean of (κ₊ + κ₋)/2; frobenius_norm F,
    with mean (κ₊ − κ₋)² = 8F²; saddle_fraction with its exact (Clopper-Pearson) 95 % interval, widened by planes
    whose κ is not told from 0; saddle_limit exp(−t²/4F²)/√2, the probability of a saddle where many comparable
    eigenvalues contribute; participation (tr H²)²/tr H⁴, the number of those, and `dominated` where it is below
    10 (below √planes for fewer than 100): the limit is then not to be trusted. `hessian_plane` adds the plane of
    the eigenvectors of the largest and the smallest eigenvalue, of unit length.

    Source: Böttcher & Wheeler 2022 (arXiv 2208.13219). The limit, and the estimates of F and of the
    participation from κ, are ours.
    """

    name: ClassVar[str] = "projected_curvature"
    headline: ClassVar[str] = "trace"
    unit: ClassVar[str] = "plane"
    citation: ClassVar[str] = "Böttcher & Wheeler 2022, arXiv:2208.13219"
    told: ClassVar[tuple[str, ...]] = ("saddle_fraction", "saddle_fraction_low", "saddle_fraction_high")

    planes: int = setting(64, "random planes", grows=True)
    step: float | None = setting(
        None, "displacement of a second difference, in units of the directions; none: what a pilot chooses"
    )
    method: Literal["losses", "products"] = setting("losses", "second differences, or products with H")
    precision: Literal["float64", "working"] = setting(
        "float64", "of losses; float64 where the model runs in it, for kinks of ReLU it has to be"
    )
    hessian_plane: bool = setting(False, "add the plane of the two extremal eigenvectors (takes products)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.planes < 2:
            raise ValueError(f"planes is {self.planes}; allowed is a number >= 2")
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"step is {self.step}; allowed is a number > 0, or none")
        if self.step is not None and self.method == "products":
            raise ValueError("step is for method='losses'; products take no step, leave it out")

    def needs(self) -> frozenset[Need]:
        """Values alone, or products too."""
        products = self.method == "products" or self.hessian_plane
        return frozenset({Need.HESSIAN if products else Need.VALUE})

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Choose the step, and find the plane of the Hessian."""
        if problem.size < 2:
            raise Refused(f"a plane needs two parameters, but {problem.size} is measured")
        record = Record(attrs={"order": problem.size, "method": self.method})
        if self.method == "losses":
            self._prepare_losses(problem, seed, record)
        if self.hessian_plane:
            self._prepare_plane(problem, seed, record)
        return record

    def units(self, record: Record) -> Round | None:
        """All planes at once."""
        return Round(self.planes) if record.attrs["stop"] < self.planes else None

    def block_size(self, problem: Problem, memory: int) -> int:
        """As many planes as have room for both of their directions."""
        return max(1, min(self.block, memory // (4 * vector_bytes(problem))))

    def measure(
        self,
        problem: Problem,
        shared: Record,
        block: range,  # noqa: ARG002
        generators: Sequence[torch.Generator],
    ) -> Values:
        """Measure the projected Hessians [[A, B], [B, C]] of a block of planes."""
        if self.method == "products":
            return _as_values(*_forms_by_products(problem, generators))
        losses, centre, step = self._losses(problem, shared)
        with losses.problem.session():
            drawn = (draw(g, problem.size, 2, "gaussian", device=problem.device) for g in generators)
            found = [projected_hessian(losses, centre, plane, step) for plane in drawn]
        values = _as_values(np.array([p.form for p in found]), np.array([p.error for p in found]))
        words = "what extrapolation added to the plane's mean curvature"
        return {**values, "shift": Variable(("plane",), np.array([p.shift for p in found]), "1", words)}

    def summarize(self, record: Record) -> Values:
        """Turn projected Hessians into curvatures, trace, Frobenius norm, and the share of saddles."""
        done = record["done"]
        forms, errors = record["projected_hessian"][: len(done)], record["kappa_error"][: len(done)]
        kappa = np.full((len(done), 2), np.nan)
        kappa[done] = principal_curvatures(forms[done])
        relative = _relative(errors[done], kappa[done])
        settled = bool(record["settled"]) if "settled" in record else True
        fine = bool(done.all() and settled and relative <= _ALLOWED_ERROR)
        found, text = _estimates(record, forms[done], done), "error of κ by differences, root mean square"
        few = _few_dominate(record, found, int(done.sum()))
        record.attrs["warning"] = _warning(settled, relative, few, float(found["participation"].data))
        words = "whether all planes are done, and differences are right"
        return {
            "which": Variable(("which",), _WHICH, long_name="principal curvature"),
            "kappa": Variable(
                ("plane", "which"), kappa, "1", "principal curvatures, unnormalised directions"
            ),
            **found,
            **_saddles(kappa[done], errors[done]),
            "dominated": Variable(
                (), np.asarray(few), "1", "whether few eigenvalues dominate: the limit is off"
            ),
            "difference_error": Variable((), np.asarray(relative), "1", f"{text}, relative to κ"),
            "converged": Variable((), np.asarray(fine), "1", words),
        }

    @property
    def outlook_in(self) -> tuple[str, float]:
        """What `outlook` counts."""
        return super().outlook_in if self.method == "products" else ("losses", 0.7)  # in float64

    def outlook(self, problem: Problem) -> tuple[int, int]:  # noqa: ARG002
        """Predict the evaluations of the loss, or the products."""
        if self.method == "products":
            return 2 * self.planes, 2 * self.planes
        return 12 * self.planes, 24 * self.planes

    def _losses(self, problem: Problem, shared: Record) -> tuple[Losses, float, Step]:
        size, noise, scale = (float(shared[name]) for name in ("step", "loss_rounding", "pilot_scale"))
        step = Step(size, noise, scale)
        return Losses(problem, self.precision), float(shared["loss"]), step

    def _prepare_losses(self, problem: Problem, seed: int, record: Record) -> None:
        losses = Losses(problem, self.precision)
        streams = [seeds.generator(seed, f"{self.name}/pilot", i) for i in range(_PILOT)]
        pilot = [draw(g, problem.size, 1, "gaussian", device=problem.device)[:, 0] for g in streams]
        with losses.problem.session():
            centre = losses.centre()
            step = loss_differences.choose(losses, centre, pilot, self.step)
        words = {
            "loss": (centre, "L(θ)"),
            "step": (step.size, "h of the second differences, in units of the directions"),
            "loss_rounding": (step.noise, "standard deviation of the rounding of a loss"),
            "pilot_scale": (step.scale, "root mean square of vᵀHv over the pilot"),
            "settled": (step.settled, "whether second differences come to rest as the step shrinks"),
        }
        record.variables |= {
            name: Variable((), np.asarray(value), "1", text) for name, (value, text) in words.items()
        }
        record.attrs["losses_in"] = str(losses.dtype).removeprefix("torch.")

    def _prepare_plane(self, problem: Problem, seed: int, record: Record) -> None:
        pairs = eigsh(operators.hessian(problem), 1, "both", seed=seed)
        values, residuals = (t.cpu().numpy()[::-1].copy() for t in (pairs.values, pairs.residual_norms))
        basis = pairs.vectors.flip(1).double()  # minus, plus
        if self.method == "losses":
            losses, centre, step = self._losses(problem, record)
            longer = Step(step.size * math.sqrt(problem.size), step.noise, float(np.abs(values).max()))
            with losses.problem.session():
                found = projected_hessian(losses, centre, basis, longer)
            form, error = found.form, found.error
        else:
            form, error = inner(basis, operators.hessian(problem) @ pairs.vectors.flip(1)).cpu().numpy(), 0.0
        kappa = principal_curvatures(form[None])[0]
        which, text = ("which",), "of the plane of the extremal eigenvectors"
        record.variables |= {
            "hessian_kappa": Variable(which, kappa, "1", f"principal curvatures {text}"),
            "hessian_kappa_error": Variable((), np.asarray(error), "1", "what these may be off by"),
            "hessian_eigenvalues": Variable(which, values, "1", "smallest and largest eigenvalue"),
            "hessian_residual_norm": Variable(which, residuals, "1", "‖H u - λ u‖ of each"),
            "hessian_directions": Variable(
                ("which", "parameter"), basis.T.cpu().numpy().copy(), "1", "their eigenvectors", sidecar=True
            ),
        }


def _forms_by_products(
    problem: Problem, generators: Sequence[torch.Generator]
) -> tuple[np.ndarray, np.ndarray]:
    """The forms of planes by products with both directions at once, and their rounding."""
    size = problem.size
    drawn = [draw(g, size, 2, "gaussian", dtype=problem.dtype, device=problem.device) for g in generators]
    V = torch.cat(drawn, dim=1)
    HV = problem.hvp(V)
    forms, errors = [], []
    for i in range(0, V.shape[1], 2):
        v, hv = V[:, i : i + 2], HV[:, i : i + 2]
        form = inner(v, hv).cpu().numpy()
        forms.append((form + form.T) / 2)
        errors.append(rounding(v, hv))
    return np.array(forms), np.array(errors)


def _as_values(forms: np.ndarray, errors: np.ndarray) -> Values:
    words = "[[ηᵀHη, ηᵀHδ], [ηᵀHδ, δᵀHδ]] of a plane"
    return {
        "projected_hessian": Variable(("plane", "row", "column"), forms, "1", words),
        "kappa_error": Variable(("plane",), errors, "1", "what the curvatures of a plane may be off by"),
    }


def _estimates(record: Record, forms: np.ndarray, done: np.ndarray) -> Values:
    """Trace, Frobenius norm, participation and limit, as variables."""
    nothing = len(forms) < 2
    if nothing:
        numbers = dict.fromkeys(_WORDS, math.nan)
    else:
        numbers = dataclasses.asdict(estimate(forms, record.attrs["order"]))
        numbers["trace_stderr"] = math.hypot(numbers["trace_stderr"], _systematic(record, done))
    return {name: Variable((), np.asarray(numbers[name]), "1", words) for name, words in _WORDS.items()}


_WORDS = {
    "trace": "trace of the Hessian",
    "trace_stderr": "standard error of the trace",
    "frobenius_norm": "Frobenius norm of the Hessian",
    "frobenius_norm_stderr": "standard error of the Frobenius norm",
    "participation": "number of comparable eigenvalues, (tr H²)² / tr H⁴",
    "saddle_limit": "exp(-t²/4F²)/√2, the share of saddles for many comparable eigenvalues",
    "saddle_limit_stderr": "standard error of saddle_limit",
}


def _few_dominate(record: Record, found: Values, count: int) -> bool:
    """Whether the planes say so by two standard errors, or the two extremal eigenvalues alone make it sure.

    The estimate of 4 / participation scatters by 2/√k, so that of k planes it says little beyond √k.
    """
    norm = float(found["frobenius_norm"].data)
    few = float(found["participation"].data) < min(_MANY, math.sqrt(count))
    if "hessian_eigenvalues" in record and norm > 0:
        few = few or float(((record["hessian_eigenvalues"] / norm) ** 4).sum()) > 1 / _MANY
    return few


def _systematic(record: Record, done: np.ndarray) -> float:
    """What differences may be off by in all planes alike: what was extrapolated, and the rounding of L(θ)."""
    if "shift" not in record:
        return 0.0
    centre = CENTRE_WEIGHT * float(record["loss_rounding"]) / float(record["step"]) ** 2
    return math.hypot(float(record["shift"][: len(done)][done].mean()), centre)


def _saddles(kappa: np.ndarray, errors: np.ndarray) -> Values:
    """The share of planes with κ₋ < 0 < κ₊; those whose sign is not sure stand in the interval only."""
    low, high = kappa.T
    sure = (low < -errors) & (high > errors)
    none = (low > errors) | (high < -errors)
    count = len(kappa)
    ends = share_interval(int(sure.sum()), int(count - none.sum()), count)
    words = "share of planes that are saddles"
    return {
        "saddle_fraction": Variable((), np.asarray(float(sure.mean())), "1", words),
        "saddle_fraction_low": Variable((), np.asarray(ends[0]), "1", "lower end of its 95 % interval"),
        "saddle_fraction_high": Variable((), np.asarray(ends[1]), "1", "upper end of its 95 % interval"),
    }


def _relative(errors: np.ndarray, kappa: np.ndarray) -> float:
    """Errors beside curvatures, root mean squares; 0 where both are."""
    unit = max(float(np.abs(kappa).max()), float(errors.max()))
    if unit == 0:
        return 0.0
    error, size = (math.sqrt(float(np.mean((x / unit) ** 2))) for x in (errors, kappa))
    return error / size if size > 0 else math.inf


def _warning(settled: bool, relative: float, few: bool, participation: float) -> str:
    """What a reader of the result has to know; empty if nothing."""
    found = []
    if not settled:
        found.append(
            "second differences do not settle as the step shrinks (kinks, as of ReLU, or losses too round for a "
            "smaller step), so curvatures are partly those of the loss smoothed over the step; "
            "precision='float64' helps, method='products' sees the smooth pieces"
        )
    elif relative > _ALLOWED_ERROR:
        found.append(
            f"differences are uncertain by {relative:.0%} of the curvatures: losses are too round, or vary within "
            "the step; try precision='float64', another step, or method='products'"
        )
    if few:
        found.append(
            f"few eigenvalues dominate (participation {participation:.1f}): saddle_limit, which is for many "
            "comparable ones, is not to be trusted"
        )
    return "; ".join(found)
