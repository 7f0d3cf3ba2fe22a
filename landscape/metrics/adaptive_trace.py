"""The adaptive trace Σ θᵢ² Hᵢᵢ: the trace of the Hessian in the units of the parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from landscape.linear_maps import Maps, Scale
from landscape.metrics.base_trace import MappedTrace
from landscape.problem import Problem


@dataclass(frozen=True)
class AdaptiveTrace(MappedTrace):
    """Σ θᵢ² Hᵢᵢ over all measured parameters, biases included: the Hessian's trace in their own units.

    It is the trace of diag(θ) H diag(θ), which a change of units of any parameter leaves as it is (the scales
    of layers and of nodes are such); ½ρ² of it is the adaptive average sharpness E L(θ + ρ θ ⊙ N(0, I)) - L(θ) to
    second order. Exact, from per-example gradients, for the Gauss-Newton matrix, and for the Hessian of
    networks that are piecewise linear in each parameter tensor; else by Hutchinson's probes, independent ones
    for each micro-batch.

    Source: Kwon et al. 2021 (arXiv 2102.11600) and Andriushchenko et al. 2023 (arXiv 2302.07011), with |θ| as
    the scale of biases too; Hutchinson 1990 (doi 10.1080/03610919008812866).
    """

    name: ClassVar[str] = "adaptive_trace"
    headline: ClassVar[str] = "adaptive_trace"
    citation: ClassVar[str] = "Andriushchenko et al. 2023, arXiv:2302.07011"

    def measured(self, problem: Problem) -> Problem:
        """All of it."""
        return problem

    def maps(self, part: Problem) -> Maps:
        """Multiplication with θ."""
        return Maps([Scale(leaf.detach().reshape(-1)) for leaf in part.leaves()])
