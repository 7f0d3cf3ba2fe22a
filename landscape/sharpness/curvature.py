"""The largest curvature within a set: what a rise is to second order, and where to begin the search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from landscape import operators
from landscape.estimators.eigen import EigenResult, eigsh
from landscape.estimators.probes import Operator
from landscape.problem import Problem

_RTOL = 1e-3


@dataclass(frozen=True)
class Scaled:
    """diag(c) H diag(c), as an operator.

    Attributes:
        H: symmetric operator.
        scale: c, (n,).
    """

    H: Operator
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, n)."""
        return tuple(self.H.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.H.dtype

    @property
    def device(self) -> torch.device:
        """Of the products."""
        return self.H.device

    def __matmul__(self, V: Tensor) -> Tensor:
        scale = self.scale if V.ndim == 1 else self.scale[:, None]
        return scale * (self.H @ (scale * V))


def largest(problem: Problem, scale: Tensor, seed: int) -> EigenResult:
    """Return the largest eigenvalue of diag(c) H diag(c) with its eigenvector."""
    return eigsh(Scaled(operators.hessian(problem), scale), k=1, rtol=_RTOL, seed=seed)
