"""Small smooth networks in float64 with their dense H and G, by formulas that use no product of the package."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import landscape
from landscape.testbeds import nets


@dataclass(frozen=True)
class Smooth:
    """A problem and the dense matrices at its parameters.

    Attributes:
        problem: in float64, in batches of unequal sizes.
        H: Hessian, by reverse-over-reverse rows of the whole data's loss.
        G: mean of Jᵀ (∂²ℓ/∂f²) J, from the dense Jacobian of all outputs.
    """

    problem: landscape.Problem
    H: Tensor
    G: Tensor

    def blocks(self, A: Tensor) -> np.ndarray:
        """The trace of each parameter tensor's diagonal block."""
        return np.array([float(part.sum()) for part in A.diagonal().split(self.problem.space.sizes)])


class Tied(nn.Module):
    """f(x) = Wᵀ tanh(W x + b): one weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(5, 7)), nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T + self.bias) @ self.weight


class ClassesSecond(nn.Module):
    """Logits (batch, time, classes) as (batch, classes, time)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).transpose(1, 2)


@functools.cache
def smooth(name: str, reduction: str = "mean") -> Smooth:
    """Build "gelu" (cross-entropy, 102 parameters), "tied" (squares, 40) or "gpt" (a tiny transformer)."""
    draws = torch.Generator().manual_seed(8)
    if name == "gelu":
        model: nn.Module = nets.mlp([6, 8, 4, 3], nn.GELU)
        x = torch.randn(40, 6, generator=draws, dtype=torch.float64)
        y = torch.randint(0, 3, (40,), generator=draws)
    elif name == "tied":
        model = Tied()
        x = torch.randn(40, 7, generator=draws, dtype=torch.float64)
        y = torch.randn(40, 7, generator=draws, dtype=torch.float64)
    else:
        model = ClassesSecond(nets.gpt(width=4, layers=1, heads=2, context=4, vocabulary=5))
        x = torch.randint(0, 5, (12, 4), generator=draws)
        y = torch.randint(0, 5, (12, 4), generator=draws)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn(p.shape, generator=draws, dtype=torch.float64))
    squares = name == "tied"
    loss = nn.MSELoss(reduction=reduction) if squares else nn.CrossEntropyLoss(reduction=reduction)
    first = len(x) // 3
    data = [(x[:first], y[:first]), (x[first:], y[first:])]
    problem = landscape.Problem(model, loss, data, reduction=reduction)
    with sdpa_kernel(SDPBackend.MATH):
        return Smooth(problem, *_dense(problem, model, x, y, squares))


def _dense(
    problem: landscape.Problem, model: nn.Module, x: Tensor, y: Tensor, squares: bool
) -> tuple[Tensor, Tensor]:
    theta = problem.parameters_vector()

    def outputs(vector: Tensor) -> Tensor:
        pieces = dict(zip(problem.names, problem.space.split(vector), strict=True))
        f = torch.func.functional_call(model, pieces, (x,))
        return f if squares or f.ndim == 2 else f.transpose(1, 2).reshape(-1, f.shape[1])

    def loss(vector: Tensor) -> Tensor:
        f = outputs(vector)
        if squares:
            return (f - y).square().mean()
        return nn.functional.cross_entropy(f, y.reshape(-1))

    H = torch.autograd.functional.hessian(loss, theta)
    J = torch.autograd.functional.jacobian(outputs, theta)
    if squares:
        flat = J.reshape(-1, len(theta))
        return H, flat.T @ flat * (2 / len(flat))
    p = outputs(theta).softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return H, torch.einsum("nci,ncd,ndj->ij", J, curvature, J) / len(p)
