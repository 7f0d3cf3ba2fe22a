"""Normalized sharpness 2 Σ |θᵢ| √Gᵢᵢ: curvature against squared weights, at the best scale of each parameter."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from landscape import ggn_trace
from landscape.checks import Need
from landscape.errors import Refused
from landscape.metrics.base import Round, SequentialMetric, State, Values
from landscape.problem import Problem
from landscape.results import Record, Variable

_BATCHES = 16  # that a step adds up


@dataclass(frozen=True)
class NormalizedSharpness(SequentialMetric):
    """Normalized sharpness with a scale for each parameter, min_σ Σ Gᵢᵢσᵢ² + θᵢ²/σᵢ² = 2 Σ |θᵢ| √Gᵢᵢ, exactly.

    σ is the spread of a Gaussian posterior: the first term is its loss to second order, the second its distance
    to the prior. G is the Gauss-Newton matrix, whose diagonal is not negative for a convex loss, and is the
    Hessian's where the network is piecewise linear in each parameter tensor. Tsuzuku et al. give the scales
    of a matrix only a factor for each row and each column, with a minimum that is not smaller.

    Source: Tsuzuku, Sato & Sugiyama 2020 (arXiv 1901.04653).
    """

    name: ClassVar[str] = "normalized_sharpness"
    headline: ClassVar[str] = "normalized_sharpness"
    unit: ClassVar[str] = "pass"
    citation: ClassVar[str] = "Tsuzuku et al. 2020, arXiv:1901.04653"

    def needs(self) -> frozenset[Need]:
        """Outputs: the diagonal is made from per-example gradients."""
        return frozenset({Need.OUTPUTS})

    def prepare(self, problem: Problem, seed: int) -> Record:  # noqa: ARG002
        """Name the parameter tensors, count batches and columns."""
        names, sizes = np.array(problem.names), np.array(problem.space.sizes)
        return Record(
            {
                "layer": Variable(("layer",), names, long_name="parameter tensor"),
                "layer_size": Variable(("layer",), sizes, long_name="number of parameters"),
            },
            {
                "parameters": problem.size,
                "columns": ggn_trace.columns(problem),
                "batches": sum(1 for _ in problem.batches),
            },
        )

    def units(self, record: Record) -> Round | None:
        """One pass, once."""
        return Round(1) if record.attrs["stop"] == 0 else None

    def start(
        self,
        problem: Problem,
        shared: Record,  # noqa: ARG002
        block: range,  # noqa: ARG002
        generators: Sequence[torch.Generator],  # noqa: ARG002
    ) -> State:
        """No batch yet."""
        return {"diagonal": np.zeros(problem.size), "weight": np.zeros(()), "batches": np.zeros((), np.int64)}

    def step(self, problem: Problem, shared: Record, block: range, state: Any) -> State:  # noqa: ARG002
        """Add the squared gradients of a few batches."""
        first = int(state["batches"])
        batches = itertools.islice(problem.batches, first, first + _BATCHES)
        sums, weight = ggn_trace.diagonal_by_batch(problem, batches)
        return {
            "diagonal": state["diagonal"] + sums.cpu().numpy(),
            "weight": state["weight"] + weight,
            "batches": np.asarray(min(first + _BATCHES, shared.attrs["batches"])),
        }

    def result(self, problem: Problem, shared: Record, block: range, state: Any) -> Values | None:  # noqa: ARG002
        """Return each tensor's part once all batches are added."""
        if int(state["batches"]) < shared.attrs["batches"]:
            return None
        diagonal = state["diagonal"] / state["weight"]
        floor = -10 * float(torch.finfo(problem.dtype).eps) * np.abs(diagonal).max()
        if diagonal.min() < floor:
            raise Refused(
                f"a diagonal entry of the Gauss-Newton matrix is {diagonal.min():.3g} < 0: the loss is not convex in "
                "the outputs, and normalized sharpness has no minimum over scales; use adaptive_trace"
            )
        theta = problem.parameters_vector().double().cpu().numpy()
        terms = 2 * np.abs(theta) * np.sqrt(np.maximum(diagonal, 0.0))
        parts = np.array([[terms[a:b].sum() for a, b in problem.space.ranges.values()]])
        return {"parts": Variable(("pass", "layer"), parts, "1", "2 Σ |θᵢ| √Gᵢᵢ of a tensor")}

    def summarize(self, record: Record) -> Values:
        """Add up the parts."""
        parts = record["parts"].sum(axis=0)
        return {
            "normalized_sharpness": Variable((), parts.sum(), "1", "normalized sharpness"),
            "layer_normalized_sharpness": Variable(("layer",), parts, "1", "part of the parameter tensor"),
            "backward_passes": Variable(
                (), np.asarray(record.attrs["columns"]), "1", "backward passes over all data"
            ),
            "converged": Variable((), np.asarray(bool(record["done"].all())), "1", "whether it is measured"),
        }

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """A sum of roots of curvatures."""
        return {self.headline: 0.5}

    @property
    def outlook_in(self) -> tuple[str, float]:
        """What `outlook` counts."""
        return "backward passes", 1.0

    def outlook(self, problem: Problem) -> tuple[int, int]:
        """As many passes as the loss's curvature has columns."""
        count = ggn_trace.columns(problem)
        return count, count
