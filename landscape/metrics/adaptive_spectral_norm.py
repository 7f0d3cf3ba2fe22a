"""The spectral norm of diag(θ) A diag(θ): curvature in the units of the parameters, with residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from landscape import operators
from landscape.metrics.base_ends import EndsOfSpectrum
from landscape.problem import Problem


@dataclass(frozen=True)
class AdaptiveSpectralNorm(EndsOfSpectrum):
    """The largest |eigenvalue| of diag(θ) H diag(θ), and both ends of that spectrum, each with its residual.

    θ are all measured parameters, biases and those of norms included: a change of units of any of them (the
    scales of layers and of nodes are such) leaves the matrix as it is. Half of the largest eigenvalue times
    ρ² is the adaptive sharpness max {L(θ + δ) - L(θ): ‖δ/θ‖₂ ≤ ρ} at a minimum, to second order.

    Source: Kwon et al. 2021 (arXiv 2102.11600), with |θ| as the scale of biases too.
    """

    name: ClassVar[str] = "adaptive_spectral_norm"
    headline: ClassVar[str] = "adaptive_spectral_norm"
    citation: ClassVar[str] = "Kwon et al. 2021, arXiv:2102.11600"

    def matrix(self, problem: Problem) -> operators.Operator:
        """The chosen matrix, or one layer's block of it, in the units of the parameters."""
        A = operators.named(problem, self.curvature, layer=self.layer)
        part = problem if self.layer is None else problem.only(self.layer)
        return A.scaled(part.parameters_vector())
