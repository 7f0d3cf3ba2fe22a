"""The spectral norm max |λ| of a curvature matrix, and both ends of its spectrum, with residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from landscape import operators
from landscape.metrics.base_ends import EndsOfSpectrum
from landscape.problem import Problem


@dataclass(frozen=True)
class SpectralNorm(EndsOfSpectrum):
    """The largest and the smallest eigenvalue and the spectral norm max |λ|, each with its residual.

    Within the residual of each value lies an eigenvalue. `lanczos` finds both ends at once; `power` finds one
    after the other.

    Source: Wu & Simon 2000 (doi 10.1137/S0895479898334605); Böttcher & Wheeler 2022 (arXiv 2208.13219).
    """

    name: ClassVar[str] = "spectral_norm"
    headline: ClassVar[str] = "spectral_norm"
    citation: ClassVar[str] = "Wu & Simon 2000, doi:10.1137/S0895479898334605"

    def matrix(self, problem: Problem) -> operators.Operator:
        """The chosen matrix, or one layer's block of it."""
        return operators.named(problem, self.curvature, layer=self.layer)
