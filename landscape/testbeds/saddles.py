"""Quadratic saddles with a known spectrum, in many dimensions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Saddle(nn.Module):
    """L(w) = (Σ_{i <= p} w_i² − Σ_{i > p} w_i²) / 2, times whatever it is given, at w = 0.

    Args:
        positive: p, the number of eigenvalues +1 of its Hessian.
        negative: the number of eigenvalues −1.
    """

    signs: Tensor

    def __init__(self, positive: int, negative: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(positive + negative, dtype=torch.float64))
        signs = torch.cat([torch.ones(positive), -torch.ones(negative)])
        self.register_buffer("signs", signs.double())

    def forward(self, factors: Tensor) -> Tensor:
        """Return L(w) times each factor."""
        return factors * (self.weight**2 @ self.signs) / 2


def mean_output(output: Tensor, target: Tensor) -> Tensor:  # noqa: ARG001  (as losses are called)
    """Return the mean of the outputs, as a loss."""
    return output.mean()


def saddle(
    positive: int = 500, negative: int = 500
) -> tuple[Saddle, Callable[[Tensor, Tensor], Tensor], list[tuple[Tensor, Tensor]]]:
    """Return a quadratic saddle at its critical point, a loss, and data, as `landscape.Problem` takes them.

    Its Hessian has the eigenvalues +1 and −1, as often as said: trace p − q, squared Frobenius norm p + q. A
    random plane with directions of length √(p + q) has the expected principal curvatures
    p − q ± √(π/2 (p + q)), to first order in 1/(p + q), and is a saddle with probability
    exp(−(p − q)²/4(p + q))/√2.

    Args:
        positive: p, the number of directions that go up.
        negative: q, of those that go down.

    Raises:
        ValueError: if one is negative, or both are 0.

    After the synthetic losses of Böttcher & Wheeler 2022 (arXiv 2208.13219); the numbers are ours.
    """
    if min(positive, negative) < 0 or positive + negative == 0:
        raise ValueError(
            f"got {positive} directions up and {negative} down; allowed are numbers >= 0, not both 0"
        )
    one = torch.ones(1, 1, dtype=torch.float64)
    return Saddle(positive, negative), mean_output, [(one, one)]
