"""The Fisher-Rao norm θᵀFθ: how much of the Fisher information lies along the parameters themselves.

Of a bias-free rectifier network with K weight matrices, f is homogeneous of degree K in θ, so that Jθ = K f and
θᵀFθ = K² E⟨∂ℓ/∂f, f⟩². Here it is one product with F, which holds for any network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from landscape import operators
from landscape.checks import Need
from landscape.metrics.base import Metric, Round, Values, setting
from landscape.problem import Problem
from landscape.results import Record, Variable

_NEEDS = {"fisher": Need.GGN, "empirical_fisher": Need.OUTPUTS}


@dataclass(frozen=True)
class FisherRao(Metric):
    """The squared Fisher-Rao norm θᵀFθ, exactly, from one product with the Fisher information.

    `fisher` is the expectation over the model's own predictions, `empirical_fisher` that over the labels of
    the data; Liang et al. leave it open which. `layer_fisher_rao` is θ_l·(Fθ)_l of each parameter tensor: these
    add up to the whole, and are equal for all the weights of a bias-free rectifier network.

    Source: Liang et al. 2019 (arXiv 1711.01530), definition 2.
    """

    name: ClassVar[str] = "fisher_rao"
    headline: ClassVar[str] = "fisher_rao"
    unit: ClassVar[str] = "product"
    citation: ClassVar[str] = "Liang et al. 2019, arXiv:1711.01530"

    curvature: Literal["fisher", "empirical_fisher"] = setting(
        "fisher", "labels drawn from the model's predictions, or those of the data"
    )

    def needs(self) -> frozenset[Need]:
        """One product."""
        return frozenset({_NEEDS[self.curvature]})

    def prepare(self, problem: Problem, seed: int) -> Record:  # noqa: ARG002
        """Name the parameter tensors; refuse a loss that is no likelihood."""
        operators.named(problem, self.curvature)
        names, sizes = np.array(problem.names), np.array(problem.space.sizes)
        return Record(
            {
                "layer": Variable(("layer",), names, long_name="parameter tensor"),
                "layer_size": Variable(("layer",), sizes, long_name="number of parameters"),
            }
        )

    def units(self, record: Record) -> Round | None:
        """One product, once."""
        return Round(1) if record.attrs["stop"] == 0 else None

    def measure(
        self,
        problem: Problem,
        shared: Record,  # noqa: ARG002
        block: range,  # noqa: ARG002
        generators: Sequence[torch.Generator],  # noqa: ARG002
    ) -> Values:
        """Multiply θ with F, and read off each tensor's part."""
        theta = problem.parameters_vector()
        terms = theta.double() * (operators.named(problem, self.curvature) @ theta).double()
        parts = [float(terms[a:b].sum()) for a, b in problem.space.ranges.values()]
        return {"parts": Variable(("product", "layer"), np.array([parts]), "1", "θ_l·(Fθ)_l")}

    def summarize(self, record: Record) -> Values:
        """Add up the parts."""
        parts = record["parts"].sum(axis=0)
        return {
            "fisher_rao": Variable((), parts.sum(), "1", "squared Fisher-Rao norm θᵀFθ"),
            "layer_fisher_rao": Variable(("layer",), parts, "1", "each tensor's part θ_l·(Fθ)_l"),
            "converged": Variable((), np.asarray(bool(record["done"].all())), "1", "whether it is measured"),
        }

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """Squared gradients; the Fisher information is of a likelihood, and has no other scale."""
        return {self.headline: 2.0} if self.curvature == "empirical_fisher" else {}

    def outlook(self, problem: Problem) -> tuple[int, int]:  # noqa: ARG002
        """One product."""
        return 1, 1
