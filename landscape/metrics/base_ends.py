"""Both ends of a matrix's spectrum with residuals: what the metrics of a spectral norm share."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from landscape import operators
from landscape.checks import Need
from landscape.estimators.eigen import Lanczos
from landscape.estimators.krylov import Krylov
from landscape.estimators.power import power_iteration
from landscape.metrics.base import Round, SequentialMetric, State, Values, curvature_power, setting
from landscape.problem import Problem
from landscape.results import Record, Variable

_NEEDS = {"hessian": Need.HESSIAN, "ggn": Need.GGN, "fisher": Need.GGN, "empirical_fisher": Need.OUTPUTS}
_MAX_MATVECS = 1000


@dataclass(frozen=True)
class EndsOfSpectrum(SequentialMetric):
    """The largest and the smallest eigenvalue of a matrix, and the larger modulus of the two.

    A metric says which matrix, and calls the modulus by its own name, which is its headline. `lanczos` finds
    both ends at once. `power` finds the value of largest modulus λ_a first and the other end as the largest
    of A - λ_a I; where λ_a and -λ_a are both there, which power iteration cannot tell apart, each end comes
    from a shift by the modulus.
    """

    unit: ClassVar[str] = "end"

    method: Literal["lanczos", "power"] = setting("lanczos", "how")
    curvature: Literal["hessian", "ggn", "fisher", "empirical_fisher"] = setting("hessian", "of which matrix")
    layer: str | None = setting(
        None, "only the diagonal block of these parameter tensors, a name or a pattern"
    )
    rtol: float = setting(1e-3, "residual that is asked for, relative to the eigenvalue", grows=True)
    max_matvecs: int = setting(_MAX_MATVECS, "products after which each end is given up", grows=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rtol < 1:
            raise ValueError(f"rtol is {self.rtol}; allowed is 0 <= rtol < 1")
        if self.max_matvecs < 2:
            raise ValueError(f"max_matvecs is {self.max_matvecs}; allowed is a number >= 2")

    @abc.abstractmethod
    def matrix(self, problem: Problem) -> operators.Operator:
        """The matrix whose spectrum is meant."""

    def needs(self) -> frozenset[Need]:
        """Products of the chosen matrix."""
        return frozenset({_NEEDS[self.curvature]})

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Note the matrix's size."""
        return Record(attrs={"order": self.matrix(problem).shape[0], "solver_seed": seed})

    def block_size(self, problem: Problem, memory: int) -> int:  # noqa: ARG002
        """Both ends are found together."""
        return 2

    def units(self, record: Record) -> Round | None:
        """Solve once, and again for a larger demand than that of the solve that is stored."""
        if record.attrs["stop"] == 0:
            return Round(2)
        missed = not record["end_converged"].all() and self.max_matvecs > record["limit"][0]
        return Round(2, again=True) if missed or self.rtol < record["asked"][0] else None

    def start(
        self,
        problem: Problem,
        shared: Record,
        block: range,  # noqa: ARG002
        generators: Sequence[torch.Generator],  # noqa: ARG002
    ) -> Any:
        """Return random chains without a product, or the list of ends that power iteration has found."""
        if self.method == "power":
            return {"found": np.zeros((0, len(_FOUND)))}
        A = self.matrix(problem)
        return self._solver(A, shared).init(A.device)

    def step(self, problem: Problem, shared: Record, block: range, state: Any) -> Any:  # noqa: ARG002
        """Make one product with all chains, or find one more end."""
        A = self.matrix(problem)
        if self.method == "lanczos":
            return self._solver(A, shared).step(A, state)
        found = state["found"]
        row = self._farthest(A, _next_shift(found), shared.attrs["solver_seed"])
        return {"found": np.vstack([found, row])}

    def _farthest(self, A: operators.Operator, shift: float, seed: int) -> list[float]:
        """Power iteration from a shift, until the residual is small beside the eigenvalue and not the shift."""
        floor = 10 * float(torch.finfo(A.dtype).eps)
        asked, start, left = self.rtol, None, self.max_matvecs
        while True:
            pair = power_iteration(A, asked, seed, shift=shift, start=start, max_matvecs=left)
            left -= pair.matvecs
            distance = abs(pair.value - shift)
            fine = pair.residual_norm <= max(self.rtol * abs(pair.value), floor * distance)
            if fine or not pair.converged or left < 1 or asked <= floor:
                return [pair.value, pair.residual_norm, float(fine and pair.converged), float(pair.opposite)]
            start = pair.vector
            asked = max(floor, min(asked / 2, self.rtol * abs(pair.value) / distance))

    def result(self, problem: Problem, shared: Record, block: range, state: Any) -> Values | None:  # noqa: ARG002
        """Return both ends once they are found, or products have run out."""
        if self.method == "power":
            found = state["found"]
            if len(found) < 2 or len(found) < _stages(found):
                return None
            ends = found[-2:]
            values, residuals, converged = ends[np.argsort(-ends[:, 0])][:, :3].T
        else:
            solver = self._solver(self.matrix(problem), shared)
            if (pairs := solver.result(state)) is None:
                return None
            values, residuals, converged = (
                t.cpu().numpy().astype(float)[[0, -1]]
                for t in (pairs.values, pairs.residual_norms, pairs.converged)
            )
        every = np.ones(2)
        return {
            "end_value": Variable(("end",), values, "1", "largest and smallest eigenvalue"),
            "end_residual_norm": Variable(("end",), residuals, "1", "‖A v - θ v‖ of each"),
            "end_converged": Variable(("end",), converged.astype(bool), "1", "whether rtol was reached"),
            "asked": Variable(("end",), every * self.rtol, "1", "rtol of the solve"),
            "limit": Variable(("end",), every * self.max_matvecs, "1", "products allowed to the solve"),
        }

    def standing(self, state: Any) -> str:
        """Say which ends of the spectrum were found so far."""
        return "" if self.method == "power" else state.words()

    def stored(self, state: Any) -> State:
        """Turn the Krylov space into arrays."""
        return dict(state) if self.method == "power" else state.arrays()

    def restored(self, problem: Problem, arrays: State) -> Any:
        """Bring the Krylov space back."""
        return arrays if self.method == "power" else Krylov.from_arrays(arrays, problem.device)

    def summarize(self, record: Record) -> Values:
        """Name the two ends, and the one of larger modulus."""
        values, residuals, converged = (
            record[name] for name in ("end_value", "end_residual_norm", "end_converged")
        )
        outer = int(np.argmax(np.abs(values)))
        return {
            self.headline: Variable((), np.abs(values[outer]), "1", "largest modulus of an eigenvalue"),
            "residual_norm": Variable(
                (), residuals[outer], "1", "‖A v - θ v‖ of the pair of largest modulus"
            ),
            "eigenvalue_max": Variable((), values[0], "1", "largest eigenvalue"),
            "eigenvalue_max_residual_norm": Variable((), residuals[0], "1", "‖A v - θ v‖ of the largest"),
            "eigenvalue_min": Variable((), values[1], "1", "smallest eigenvalue"),
            "eigenvalue_min_residual_norm": Variable((), residuals[1], "1", "‖A v - θ v‖ of the smallest"),
            "converged": Variable((), np.asarray(bool(converged.all())), "1", "whether both reached rtol"),
        }

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """Those of the matrix."""
        return {self.headline: curvature_power(self.curvature)}

    def outlook(self, problem: Problem) -> tuple[int, int]:  # noqa: ARG002
        """Predict the products: at best a few, at most the limit at each end."""
        return 2, 2 * self.max_matvecs

    def _solver(self, A: operators.Operator, shared: Record) -> Lanczos:
        return Lanczos.for_operator(
            A,
            k=1,
            which="both",
            rtol=self.rtol,
            seed=shared.attrs["solver_seed"],
            memory=shared.attrs["memory"] // 2,
            max_matvecs=max(2, 2 * self.max_matvecs),
        )


_FOUND = ("value", "residual_norm", "converged", "opposite")


def _stages(found: np.ndarray) -> int:
    """Power iterations that give both ends: two, or one in vain and two with shifts."""
    return 3 if found[0, -1] else 2


def _next_shift(found: np.ndarray) -> float:
    """The shift of the next power iteration."""
    if not len(found):
        return 0.0
    value, residual, _, opposite = found[0]
    if not opposite:
        return float(value)
    # v lies between two eigenvectors of about ±ρ, with ρ² = ‖A v‖² = θ² + ‖A v - θ v‖².
    modulus = math.hypot(value, residual)
    return modulus if len(found) == 1 else -modulus
