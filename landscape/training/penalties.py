"""Penalties on the curvature of each example's loss in its input, for any training loop.

Each is a mean over examples of something of one example alone, so that it does not depend on the size of the
batch: `losses` must be a function x -> (N,), as with reduction="none".

    losses = lambda x: F.cross_entropy(model(x), y, reduction="none")
    (losses(x).mean() + 0.1 * curvature_penalty(losses, x, step=0.3)).backward()

Layers that mix examples (BatchNorm in training mode) make an example's gradient depend on its batch; nothing
here can undo that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]


def gradient_penalty(losses: Losses, x: Tensor) -> Tensor:
    """Mean of ‖∇ℓ_i(x_i)‖² over examples, 0-d, with a graph to the parameters.

    Args:
        losses: x -> ℓ, (N,).
        x: inputs, examples first.

    Raises:
        ValueError: if `losses` does not return a number for each example.

    Source: Drucker & LeCun 1992 (doi 10.1109/72.165600).
    """
    return input_gradients(losses, x).flatten(1).square().sum(dim=1).mean()


def curvature_penalty(losses: Losses, x: Tensor, step: float) -> Tensor:
    """Mean of Curv(x_i) = ‖∇ℓ_i(x_i + h z_i) - ∇ℓ_i(x_i)‖, 0-d, z_i = sign(∇ℓ_i) / ‖sign(∇ℓ_i)‖ held fixed.

    Args:
        losses: x -> ℓ, (N,).
        x: inputs, examples first.
        step: h, in the unit of the input.

    Raises:
        ValueError: if `losses` does not return a number for each example.

    Source: Garg & Roy 2023 (arXiv 2205.15943).
    """
    square = _squared_changes(losses, x, step)
    # The root has no slope at 0, where an example is flat: it is left alone.
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0).mean()


def cure_penalty(losses: Losses, x: Tensor, step: float) -> Tensor:
    """Mean of ‖∇ℓ_i(x_i + h z_i) - ∇ℓ_i(x_i)‖², 0-d; arguments as `curvature_penalty`.

    Source: Moosavi-Dezfooli et al. 2019 (arXiv 1811.09716), without their factor 1/h².
    """
    return _squared_changes(losses, x, step).mean()


def input_gradients(losses: Losses, x: Tensor) -> Tensor:
    """∇ℓ_i(x_i), shaped like x, with a graph to the parameters.

    Raises:
        ValueError: if `losses` does not return a number for each example.
    """
    leaf = x.detach().requires_grad_()
    found = losses(leaf)
    if found.shape != (len(x),):
        raise ValueError(
            f"losses(x) has shape {tuple(found.shape)}; allowed is ({len(x)},), one number for each example: "
            "reduction='none'"
        )
    return torch.autograd.grad(found.sum(), leaf, create_graph=True)[0]


def _squared_changes(losses: Losses, x: Tensor, step: float) -> Tensor:
    gradient = input_gradients(losses, x)
    sign = gradient.detach().sign()
    length = sign.flatten(1).norm(dim=1).clamp(min=1.0)
    move = step * sign / length.view(-1, *[1] * (x.ndim - 1))
    change = input_gradients(losses, x.detach() + move) - gradient
    return change.flatten(1).square().sum(dim=1)
