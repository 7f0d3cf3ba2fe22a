"""Softmax regression on the digits, at its minimum: a real loss whose Hessian is known to all digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape.testbeds.digits import batches, digits
from landscape.testbeds.nets import own_stream

PENALTY = 1e-3
"""Factor of ||W||^2 / 2; it makes the minimum unique and is the smallest eigenvalue of the Hessian."""


def step(model: nn.Linear, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy of a batch plus the penalty of the weight, for `Problem(forward=...)`.

    The penalty is the same in every batch, so its mean over all examples is the penalty itself.
    """
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets) + 0.5 * PENALTY * (model.weight**2).sum()


def softmax_regression(size: int = 1797) -> tuple[nn.Linear, list[tuple[Tensor, Tensor]]]:
    """Return the float64 softmax regression of the digits at its minimum, and its data.

    L(W) = mean cross-entropy of softmax(W x) over all 1797 digits + (1e-3 / 2) ||W||^2, W of shape (10, 64),
    no bias. Newton's method from zero, to a gradient that is rounding. With the data,
    `landscape.Problem(model, forward=landscape.testbeds.golden.step, data=data)` is the loss L.

    Known of its Hessian: trace 3.152857175749, largest eigenvalue 0.4387837249785, smallest 1e-3,
    squared Frobenius norm 0.502918809949, log-determinant -4117.18776645; L = 0.2645544391190.

    Args:
        size: examples per batch.

    Returns:
        The model, one `nn.Linear(64, 10, bias=False)`, and the batches.
    """
    inputs, targets = digits(torch.float64)
    with own_stream(0, "softmax_regression"):
        model = nn.Linear(64, 10, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(_newton(inputs, F.one_hot(targets, 10).double()))
    return model.eval(), batches(inputs, targets, size)


def _newton(inputs: Tensor, labels: Tensor) -> Tensor:
    """Minimize by Newton steps until the gradient stops shrinking; returns W, (classes, features)."""
    weight = inputs.new_zeros(labels.shape[1], inputs.shape[1])
    best, smallest = weight, float("inf")
    for _ in range(50):
        gradient, hessian = _derivatives(weight, inputs, labels)
        size = gradient.norm().item()
        if size < 1e-15 or (size >= smallest and size < 1e-12):
            break
        best, smallest = weight, size
        weight = weight - torch.linalg.solve(hessian, gradient.flatten()).view_as(weight)
    return weight if size < smallest else best


def _derivatives(weight: Tensor, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradient (classes, features) and Hessian (n, n) in closed form.

    The Hessian is mean of (diag(p) - p p^T) x (x x^T) plus the penalty, p the class probabilities.
    """
    classes, features = weight.shape
    p = torch.softmax(inputs @ weight.T, dim=1)
    gradient = (p - labels).T @ inputs / len(inputs) + PENALTY * weight
    blocks = -torch.einsum("ia,ib,ix,iy->axby", p, p, inputs, inputs) / len(inputs)
    for a in range(classes):
        blocks[a, :, a, :] += (inputs.T * p[:, a]) @ inputs / len(inputs)
    size = classes * features
    hessian = blocks.reshape(size, size) + PENALTY * torch.eye(size, dtype=weight.dtype)
    return gradient, hessian
