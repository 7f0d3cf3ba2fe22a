"""Layers whose curvature and Lipschitz constants are known and can be learned."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LINEAR_FROM = 30.0  # e^-30 is below the rounding of what is added to it, in float64 nearly


class CenteredSoftplus(nn.Module):
    """s₀(x) = log(1 + e^{βx})/β - log 2/β, a ReLU without kink: s₀(0) = 0, s''/s' = β(1 - s') < β.

    Args:
        beta: β at the start.
        learnable: whether log β is a parameter.

    Source: Srinivas et al. 2022 (arXiv 2206.07144).
    """

    def __init__(self, beta: float = 5.0, *, learnable: bool = True):
        super().__init__()
        if not 0 < beta < math.inf:
            raise ValueError(f"beta is {beta}; allowed is a number > 0")
        self.log_beta = nn.Parameter(torch.tensor(math.log(beta)), requires_grad=learnable)

    @property
    def beta(self) -> Tensor:
        """β, 0-d."""
        return self.log_beta.exp()

    def forward(self, x: Tensor) -> Tensor:
        """Apply to each number."""
        beta = self.beta
        return (F.softplus(beta * x, threshold=_LINEAR_FROM) - math.log(2)) / beta

    def extra_repr(self) -> str:
        """Say β."""
        return f"beta={float(self.beta.detach()):.4g}"


class LipschitzBatchNorm(nn.Module):
    """Batch normalization without affine map, scaled so that its Lipschitz constant is min(1, γ σ_min).

    In evaluation mode it divides channel c by σ_c = √(var_c + ε); the output is multiplied by
    σ_min min(1/σ_min, γ), σ_min the smallest σ_c. A bias of its own is kept.

    Args:
        features: channels.
        gamma: γ at the start; its logarithm is learned.
        eps: ε.
        momentum: of the running statistics.

    Source: Srinivas et al. 2022 (arXiv 2206.07144), §3.
    """

    def __init__(self, features: int, gamma: float = 10.0, eps: float = 1e-5, momentum: float | None = 0.1):
        super().__init__()
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma is {gamma}; allowed is a number > 0")
        self.log_gamma = nn.Parameter(torch.tensor(math.log(gamma)))
        self.bias = nn.Parameter(torch.zeros(features))
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.running_mean: Tensor
        self.running_var: Tensor

    @property
    def gamma(self) -> Tensor:
        """γ, 0-d."""
        return self.log_gamma.exp()

    @property
    def lipschitz(self) -> Tensor:
        """The Lipschitz constant in evaluation mode, 0-d."""
        smallest = (self.running_var + self.eps).sqrt().min()
        return torch.minimum(torch.ones_like(smallest), self.gamma * smallest)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize channels, the second dimension."""
        made = F.batch_norm(
            x, self.running_mean, self.running_var, training=self.training, momentum=self.momentum or 0.0,
            eps=self.eps,
        )  # fmt: skip
        shape = (1, -1, *[1] * (x.ndim - 2))
        return made * self.lipschitz + self.bias.view(shape)
