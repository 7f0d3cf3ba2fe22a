"""Curvature matrices as operators: `A.shape`, `A.dtype`, `A.device`, `A @ V`, `A.to_scipy()`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from landscape.problem import Problem

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True)
class Operator:
    """A symmetric matrix known by its products.

    Attributes:
        shape: (n, n).
        dtype: of the products.
        device: where the products are made.
        product: V -> A V, for a vector (n,) or a block (n, k).
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    product: Callable[[Tensor], Tensor]

    def __matmul__(self, V: Tensor) -> Tensor:
        return self.product(V)

    def to_scipy(self) -> LinearOperator:
        """The same operator for `scipy.sparse.linalg` (`eigsh`, `lobpcg`)."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(V: np.ndarray) -> np.ndarray:
            block = torch.from_numpy(np.ascontiguousarray(V)).to(self.device, self.dtype)
            return self.product(block).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape, matvec=matmat, matmat=matmat, rmatvec=matmat, rmatmat=matmat, dtype=dtype
        )


def hessian(problem: Problem) -> Operator:
    """H = ∇²L(θ), the Hessian of the loss.

    >>> import torch, landscape
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = [(torch.eye(2), torch.zeros(2, 1))]
    >>> H = landscape.hessian(landscape.Problem(model, torch.nn.MSELoss(), data))
    >>> H @ torch.eye(2)
    tensor([[1., 0.],
            [0., 1.]])
    """
    return _of(problem, problem.hvp)


def ggn(problem: Problem) -> Operator:
    """G = mean of Jᵀ (∂²ℓ/∂f²) J, the generalized Gauss-Newton matrix (Schraudolph 2002).

    Raises:
        Refused: on a problem with `forward=`, whose outputs are unknown.
    """
    problem.require_outputs("the generalized Gauss-Newton matrix")
    return _of(problem, problem.ggn_vp)


def _of(problem: Problem, product: Callable[[Tensor], Tensor]) -> Operator:
    return Operator((problem.size, problem.size), problem.dtype, problem.device, product)
