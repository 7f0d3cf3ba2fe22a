"""Extremal eigenvalues of a curvature matrix, with residuals, and eigenvectors on request.

A v = λ v. Within the residual ‖A v - θ v‖ of each value θ given lies an eigenvalue of A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from landscape import operators
from landscape.checks import Need
from landscape.errors import Refused
from landscape.estimators.eigen import Lanczos
from landscape.estimators.krylov import Krylov
from landscape.metrics.base import Round, SequentialMetric, State, Values, curvature_power, setting
from landscape.problem import Problem
from landscape.results import Record, Variable

_NEEDS = {
    "hessian": Need.HESSIAN,
    "ggn": Need.GGN,
    "fisher": Need.GGN,
    "empirical_fisher": Need.OUTPUTS,
    "input_hessian": Need.INPUTS,
}


@dataclass(frozen=True)
class Eigenvalues(SequentialMetric):
    """The k largest or smallest eigenvalues, or both, with residuals; eigenvectors on request.

    Thick-restart Lanczos with full reorthogonalisation (`landscape.estimators.eigsh`); "smallest" is
    algebraic. A pair has converged when its residual is at most max(rtol·|θ|, 10·eps·‖A‖).

    Source: Wu & Simon 2000 (doi 10.1137/S0895479898334605).
    """

    name: ClassVar[str] = "eigenvalues"
    headline: ClassVar[str] = "eigenvalues"
    unit: ClassVar[str] = "eigenvalue"
    citation: ClassVar[str] = "Wu & Simon 2000, doi:10.1137/S0895479898334605"

    k: int = setting(10, "how many; with which=both at each end")
    which: Literal["largest", "smallest", "both"] = setting(
        "largest", "which end of the spectrum, sign included"
    )
    curvature: Literal["hessian", "ggn", "fisher", "empirical_fisher", "input_hessian"] = setting(
        "hessian", "of which matrix"
    )
    layer: str | None = setting(
        None, "only the diagonal block of these parameter tensors, a name or a pattern"
    )
    example: int = setting(0, "for input_hessian, of which example")
    rtol: float = setting(1e-3, "residual that is asked for, relative to the eigenvalue", grows=True)
    max_matvecs: int | None = setting(None, "where the search ends unconverged (100 k + 1000)", grows=True)
    vectors: bool = setting(False, "store the eigenvectors too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"k is {self.k}; allowed is a number >= 1")
        if not 0 <= self.rtol < 1:
            raise ValueError(f"rtol is {self.rtol}; allowed is 0 <= rtol < 1")

    def needs(self) -> frozenset[Need]:
        """Products of the chosen matrix."""
        return frozenset({_NEEDS[self.curvature]})

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Note the matrix's size and where each parameter tensor stands in an eigenvector."""
        A = self._matrix(problem)
        if self.k > A.shape[0]:
            raise Refused(
                f"k is {self.k}, but the matrix has {A.shape[0]} eigenvalues; ask for at most as many"
            )
        part = problem if self.layer is None else problem.only(self.layer)
        ranges = {} if self.curvature == "input_hessian" else part.space.ranges
        found = min(A.shape[0], 2 * self.k if self.which == "both" else self.k)
        return Record(
            attrs={
                "order": A.shape[0],
                "found": found,
                "solver_seed": seed,
                "eigenvector_ranges": {name: list(span) for name, span in ranges.items()},
            }
        )

    def block_size(self, problem: Problem, memory: int) -> int:  # noqa: ARG002
        """All pairs are found together."""
        return self.k * (2 if self.which == "both" else 1)

    def units(self, record: Record) -> Round | None:
        """Solve once, and again for a smaller tolerance than that of the solve that is stored."""
        if record.attrs["stop"] == 0:
            return Round(record.attrs["found"])
        missed = not record["pair_converged"].all() and _more(self.max_matvecs, record["limit"][0])
        again = missed or self.rtol < record["asked"][0]
        return Round(record.attrs["found"], again=True) if again else None

    def start(
        self,
        problem: Problem,
        shared: Record,
        block: range,  # noqa: ARG002
        generators: Sequence[torch.Generator],  # noqa: ARG002
    ) -> Krylov:
        """Return random chains without a product."""
        A = self._matrix(problem)
        return self._solver(A, shared).init(A.device)

    def step(self, problem: Problem, shared: Record, block: range, state: Krylov) -> Krylov:  # noqa: ARG002
        """Make one product with all chains."""
        A = self._matrix(problem)
        return self._solver(A, shared).step(A, state)

    def result(self, problem: Problem, shared: Record, block: range, state: Krylov) -> Values | None:
        """Return the pairs once all residuals are small enough, or products have run out."""
        solver = self._solver(self._matrix(problem), shared)
        if (found := solver.result(state)) is None:
            return None
        dims = ("eigenvalue",)
        every = np.ones(len(block))
        values = {
            "eigenvalues": Variable(dims, found.values.cpu().numpy(), "1", "eigenvalues, descending"),
            "residual_norm": Variable(dims, found.residual_norms.cpu().numpy(), "1", "‖A v - θ v‖"),
            "pair_converged": Variable(dims, found.converged.cpu().numpy(), "1", "whether rtol was reached"),
            "asked": Variable(dims, every * self.rtol, "1", "rtol of the solve"),
            "limit": Variable(dims, every * solver.max_matvecs, "1", "products allowed to the solve"),
        }
        if self.vectors:
            rows = found.vectors.T.cpu().numpy()
            words = "eigenvectors of length 1, in the order of the flat parameter vector"
            values["eigenvectors"] = Variable(("eigenvalue", "parameter"), rows, "1", words, sidecar=True)
        return values

    def standing(self, state: Krylov) -> str:
        """Say which ends of the spectrum were found so far."""
        return state.words()

    def stored(self, state: Krylov) -> State:
        """Turn the Krylov space into arrays."""
        return state.arrays()

    def restored(self, problem: Problem, arrays: State) -> Krylov:
        """Bring the Krylov space back."""
        return Krylov.from_arrays(arrays, problem.device)

    def summarize(self, record: Record) -> Values:
        """Say whether all pairs have converged."""
        done = record["done"]
        fine = bool(done.all() and record["pair_converged"][done].all())
        return {"converged": Variable((), np.asarray(fine), "1", "whether all pairs reached rtol")}

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """Those of the matrix."""
        return {self.headline: curvature_power(self.curvature)}

    def outlook(self, problem: Problem) -> tuple[int, int]:
        """Predict the products: not fewer than the pairs, at most the limit."""
        solver = self._solver(self._matrix(problem), Record(attrs={"solver_seed": 0, "memory": None}))
        return solver.wanted, solver.max_matvecs

    def _matrix(self, problem: Problem) -> operators.Operator:
        return operators.named(problem, self.curvature, layer=self.layer, example=self.example)

    def _solver(self, A: operators.Operator, shared: Record) -> Lanczos:
        memory: dict[str, Any] = (
            {} if shared.attrs["memory"] is None else {"memory": shared.attrs["memory"] // 2}
        )
        return Lanczos.for_operator(
            A,
            self.k,
            self.which,
            self.rtol,
            shared.attrs["solver_seed"],
            max_matvecs=self.max_matvecs,
            **memory,
        )


def _more(limit: int | None, before: float) -> bool:
    return limit is not None and limit > before
