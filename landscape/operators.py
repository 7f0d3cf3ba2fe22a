"""Curvature matrices as operators: `A.shape`, `A.dtype`, `A.device`, `A @ V`, `A.to_scipy()`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from landscape import inputs, losses
from landscape.errors import Refused
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

    def __add__(self, other: Operator | float) -> Operator:
        """A + B, or A + s I for a number s."""
        if isinstance(other, Operator):
            _require_alike(self, other)
            return self._made(lambda V: self.product(V) + other.product(V))
        return self._made(lambda V: self.product(V) + other * V)

    def __sub__(self, other: Operator | float) -> Operator:
        """A - B, or A - s I for a number s."""
        return self + -1.0 * other

    def __mul__(self, factor: float) -> Operator:
        """Every entry times a number."""
        return self._made(lambda V: factor * self.product(V))

    __rmul__ = __mul__

    def __neg__(self) -> Operator:
        return -1.0 * self

    def deflated(self, values: Tensor, vectors: Tensor) -> Operator:
        """A - U diag(λ) Uᵀ: with eigenpairs of A, what is left has 0 in their place.

        Args:
            values: λ, (k,).
            vectors: U, (n, k), orthonormal.

        Raises:
            ValueError: if the shapes do not fit.
        """
        if vectors.ndim != 2 or vectors.shape != (self.shape[0], *values.shape):
            raise ValueError(
                f"got values of shape {tuple(values.shape)} and vectors of shape {tuple(vectors.shape)}; allowed is "
                f"(k,) and ({self.shape[0]}, k)"
            )
        U, scaled = (t.to(self.device, self.dtype) for t in (vectors, vectors * values))
        return self._made(lambda V: self.product(V) - scaled @ (U.T @ V))

    def scaled(self, factors: Tensor) -> Operator:
        """D A D with D = diag(factors): A in the units in which parameter i is measured by factor i.

        Args:
            factors: (n,).

        Raises:
            ValueError: if there are not n of them.
        """
        if factors.shape != self.shape[:1]:
            raise ValueError(f"got factors of shape {tuple(factors.shape)}; allowed is ({self.shape[0]},)")
        d = factors.to(self.device, self.dtype)

        def product(V: Tensor) -> Tensor:
            column = d if V.ndim == 1 else d[:, None]
            return column * self.product(column * V)

        return self._made(product)

    def block(self, start: int, stop: int) -> Operator:
        """The diagonal block of rows and columns start to stop; a product costs as much as one with A.

        `problem.space.ranges` has the rows of each parameter tensor; the Hessian of some tensors alone costs
        less as `hessian(problem.only(names))`.

        Raises:
            ValueError: if these are no rows of A.
        """
        if not 0 <= start < stop <= self.shape[0]:
            raise ValueError(f"got rows {start} to {stop}; allowed is 0 <= start < stop <= {self.shape[0]}")

        def product(v: Tensor) -> Tensor:
            V = torch.zeros(self.shape[0], *v.shape[1:], dtype=self.dtype, device=self.device)
            V[start:stop] = v
            return self.product(V)[start:stop]

        return Operator((stop - start, stop - start), self.dtype, self.device, product)

    def _made(self, product: Callable[[Tensor], Tensor]) -> Operator:
        return Operator(self.shape, self.dtype, self.device, product)

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


def fisher(problem: Problem) -> Operator:
    """F = E_x E_{y ~ p(y|x)} g gᵀ with g = ∇ log p(y|x), the Fisher information of the model's own predictions.

    Where the loss is the negative log-likelihood of an exponential family in its natural parameters, F is
    the generalized Gauss-Newton matrix (Martens 2020, arXiv 1412.1193, §9.2), and is computed as that. A mean
    squared error is taken as the likelihood of a Gaussian whose variance makes the two equal up to a constant.

    Raises:
        Refused: for any other loss, or with `forward=`.
    """
    problem.require_outputs("the Fisher information")
    if obstacle := losses.no_likelihood(problem.evaluator.loss):
        raise Refused(
            f"the Fisher information needs a loss that is a negative log-likelihood; {obstacle}. Allowed are "
            "cross_entropy, binary_cross_entropy_with_logits, mse_loss and poisson_nll_loss of logits, without "
            "weights or label smoothing. ggn(problem) takes any loss."
        )
    return _of(problem, problem.ggn_vp)


def empirical_fisher(problem: Problem) -> Operator:
    """E = mean of g_i g_iᵀ over the examples' gradients g_i at the data's own labels.

    It is no estimate of the Fisher information away from a perfect fit (Kunstner et al. 2019, arXiv
    1905.12558).

    Raises:
        Refused: on a problem with `forward=`.
    """
    problem.require_outputs("per-example gradients")
    return _of(problem, problem.empirical_fisher_vp)


def input_hessian(problem: Problem, example: int) -> Operator:
    """∇²ₓℓ(x), the Hessian of one example's loss with respect to its input, d numbers.

    Args:
        problem: on whatever data.
        example: its index in the order of the data.

    Raises:
        IndexError: if there are fewer examples.
        Refused: if the input has no floating-point number.
    """
    loss = inputs.example_loss(problem, example)
    return Operator((loss.size, loss.size), problem.dtype, problem.device, loss.hvp)


def named(problem: Problem, curvature: str, *, layer: str | None = None, example: int = 0) -> Operator:
    """A curvature matrix by its name.

    Args:
        problem: of which.
        curvature: one of `CURVATURES`.
        layer: only the diagonal block of these parameter tensors (a name or a pattern).
        example: for "input_hessian", of which example.

    Raises:
        Refused: if the problem does not have that matrix, parameter tensor or example.
    """
    try:
        if curvature != "input_hessian":
            return CURVATURES[curvature](problem if layer is None else problem.only(layer))
        if layer is not None:
            raise ValueError(f"layer is {layer!r}, but the input Hessian has no parameters; leave it out")
        return input_hessian(problem, example)
    except (IndexError, ValueError) as error:
        raise Refused(str(error)) from error


def _of(problem: Problem, product: Callable[[Tensor], Tensor]) -> Operator:
    return Operator((problem.size, problem.size), problem.dtype, problem.device, product)


def _require_alike(A: Operator, B: Operator) -> None:
    if (A.shape, A.dtype, A.device) != (B.shape, B.dtype, B.device):
        raise ValueError(
            f"got operators of shape {A.shape} ({A.dtype}, {A.device}) and {B.shape} ({B.dtype}, {B.device}); a sum "
            "needs two alike"
        )


CURVATURES: dict[str, Callable[[Problem], Operator]] = {
    "hessian": hessian,
    "ggn": ggn,
    "fisher": fisher,
    "empirical_fisher": empirical_fisher,
}
