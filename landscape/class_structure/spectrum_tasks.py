"""The top of the spectra of G and of the Hessian, and Lanczos chains for the densities."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape import operators, seeds
from landscape.class_structure import outliers
from landscape.class_structure.vectors import Source
from landscape.class_structure.work import NAME, Arrays, Limits, Task, under
from landscape.estimators import lanczos
from landscape.estimators.eigen import Lanczos
from landscape.estimators.krylov import Krylov
from landscape.estimators.probes import draw
from landscape.problem import Problem


class Top(Task):
    """The largest eigenvalues of G and of the Hessian, what their eigenvectors are made of, and how spans overlap.

    Args:
        source: of the mean vectors.
        limits: on memory, and what is wanted.
        plain: a problem whose G averages over examples, where that is another matrix.
    """

    def __init__(self, source: Source, limits: Limits, plain: Problem | None):
        self.source, self.limits = source, limits
        made: dict[str, Callable[[], operators.Operator]] = {
            "G": lambda: operators.ggn(source.problem),
            "hessian": lambda: operators.hessian(source.problem),
        }
        if plain is not None:
            made["ggn"] = lambda: operators.ggn(plain)
        self.matrices = list(made.items())
        self.passes = 2.0 + 2 * min(limits.eigenvalues, source.problem.size)

    def start(self) -> dict[str, Any]:
        """No product was made."""
        return {"stage": 0, "krylov": self._begun(0), "found": {}}

    def step(self, state: dict[str, Any]) -> dict[str, Any]:
        """One product; at the end of each matrix its pairs are taken down."""
        if state["stage"] == len(self.matrices):
            state["found"].update(self._structure(state["found"]))
            state["stage"] += 1
            return state
        name, made = self.matrices[state["stage"]]
        A = made()
        solver = self._solver(A)
        state["krylov"] = solver.step(A, state["krylov"])
        if (pairs := solver.result(state["krylov"])) is not None:
            found = {
                f"values_{name}": pairs.values.cpu().numpy(),
                f"residuals_{name}": pairs.residual_norms.cpu().numpy(),
                f"converged_{name}": pairs.converged.double().cpu().numpy(),
            }
            if name != "ggn":
                found[f"vectors_{name}"] = pairs.vectors.T.contiguous().cpu().numpy()
            state["found"].update(found)
            state["stage"] += 1
            state["krylov"] = self._begun(state["stage"])
        return state

    def result(self, state: dict[str, Any]) -> list[Arrays] | None:
        """All but the eigenvectors."""
        if state["stage"] <= len(self.matrices):
            return None
        return [{key: x for key, x in state["found"].items() if not key.startswith("vectors_")}]

    def stored(self, state: dict[str, Any]) -> Arrays:
        """Turn the Krylov space, and what was found, into arrays."""
        inner = {} if state["krylov"] is None else state["krylov"].arrays()
        return {
            "stage": np.array(state["stage"]),
            **{f"krylov.{key}": value for key, value in inner.items()},
            **{f"found.{key}": value for key, value in state["found"].items()},
        }

    def restored(self, arrays: Arrays) -> dict[str, Any]:
        """Bring them back."""
        inner, found = under(arrays, "krylov."), under(arrays, "found.")
        device = self.source.problem.device
        return {
            "stage": int(arrays["stage"]),
            "krylov": Krylov.from_arrays(inner, device) if inner else None,
            "found": {key: np.array(value, order="C") for key, value in found.items()},
        }

    def _solver(self, A: operators.Operator) -> Lanczos:
        wanted = min(self.limits.eigenvalues, A.shape[0])
        return Lanczos.for_operator(
            A, wanted, "largest", self.limits.rtol, self.limits.seed, memory=self.limits.memory
        )

    def _begun(self, stage: int) -> Krylov | None:
        if stage >= len(self.matrices):
            return None
        A = self.matrices[stage][1]()
        return self._solver(A).init(A.device)

    def _structure(self, found: Arrays) -> Arrays:
        source, problem = self.source, self.source.problem
        U = {name: torch.from_numpy(found[f"vectors_{name}"]).to(problem.device) for name in ("G", "hessian")}
        zeroth, first = source.part("G0"), source.part("G1")
        S = source.layout.classes
        spans = {"G": U["G"], "hessian": U["hessian"], "G1": outliers.leading(first, problem.dtype)}
        made = outliers.composition(source, found["values_hessian"], U["hessian"])
        for a, b in itertools.combinations(spans, 2):
            most = min(S, len(spans[a]), len(spans[b]))
            both = outliers.overlaps(spans[a][:most], spans[b][:most])
            made[f"overlap_{a}_{b}"] = np.pad(both, (0, S - most), constant_values=np.nan)
        F = torch.cat([zeroth, first])
        made["class_gram"] = (F @ F.T).cpu().numpy()
        return made


class Chains(Task):
    """Lanczos chains of one matrix, in lockstep.

    Args:
        made: makes the matrix.
        limits: how many, how long, and from which random vectors; the same for every matrix.
        passes: over all data that it takes to make the matrix.
    """

    def __init__(self, made: Callable[[], operators.Operator], limits: Limits, passes: float):
        self._make, self.limits, self.passes = made, limits, passes
        self._matrix: operators.Operator | None = None

    @property
    def matrix(self) -> operators.Operator:
        """The matrix, made when it is first needed."""
        if self._matrix is None:
            self._matrix = self._make()
        return self._matrix

    def start(self) -> dict[str, Tensor]:
        """Random directions."""
        A, limits = self.matrix, self.limits
        streams = [seeds.generator(limits.seed, f"{NAME}/chains", i) for i in range(limits.probes)]
        V = [draw(g, A.shape[0], 1, "gaussian", dtype=A.dtype, device=A.device) for g in streams]
        return lanczos.start(torch.cat(V, dim=1), min(limits.steps, A.shape[0]))

    def step(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One product with all chains."""
        return lanczos.step(self.matrix, state)

    def result(self, state: Mapping[str, Tensor]) -> list[Arrays] | None:
        """The tridiagonal matrices."""
        if (found := lanczos.result(state)) is None:
            return None
        self._matrix = None
        return [{"alpha": found.alpha, "beta": found.beta}]

    def stored(self, state: Mapping[str, Tensor]) -> Arrays:
        """Turn the chains into arrays."""
        return dict(lanczos.arrays(state))

    def restored(self, arrays: Arrays) -> dict[str, Tensor]:
        """Bring them back."""
        held = {name: torch.from_numpy(np.array(value, order="C")) for name, value in arrays.items()}
        held["basis"] = held["basis"].to(self.matrix.device)
        return held
