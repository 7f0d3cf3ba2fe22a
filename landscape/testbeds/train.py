"""A seeded trainer of a few lines, for the embedded default and for the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from landscape.seeds import generator
from landscape.testbeds.nets import own_stream


def train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    lr: float,
    seed: int = 0,
    weight_decay: float = 0.0,
    dtype: torch.dtype | None = None,
) -> list[float]:
    """Train a model in place with Adam and a step size that falls along half a cosine to zero.

    Each epoch re-cuts all examples, in a new random order, into batches of the first batch's size.
    All randomness (the order, dropout) comes from `seed`; the global random state is restored.
    The model is left in eval mode, its gradients cleared.

    Args:
        model: module whose output goes into `loss`.
        loss: (output, target) -> mean over the batch.
        batches: pairs of input and target, examples along the first axis.
        epochs: passes over the data, at least 1.
        lr: step size at the start.
        seed: of the order of the examples and of dropout.
        weight_decay: w adds (w / 2) ||theta||^2 to the loss.
        dtype: floating type of the arithmetic, by default the model's own. Training a float32 model in
            float64 keeps the rounding of different machines from growing into different weights.

    Returns:
        The mean training loss of each epoch, measured along the way.

    Raises:
        ValueError: if there is no batch, or no epoch.
    """
    if not batches or epochs < 1:
        raise ValueError(
            f"got {len(batches)} batches and {epochs} epochs; training needs at least one of each"
        )
    own = next(model.parameters()).dtype
    inputs = torch.cat([x for x, _ in batches])
    targets = torch.cat([y for _, y in batches])
    if dtype is not None:
        model.to(dtype)
        inputs, targets = (t.to(dtype) if t.is_floating_point() else t for t in (inputs, targets))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    order = generator(seed, "train", 0)
    history = []
    model.train()
    with own_stream(seed, "dropout"):
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
            shuffled = torch.split(torch.randperm(len(inputs), generator=order), len(batches[0][0]))
            history.append(
                sum(_step(model, loss, optimizer, inputs[i], targets[i]) for i in shuffled) / len(inputs)
            )
    optimizer.zero_grad(set_to_none=True)
    model.to(own).eval()
    return history


def _step(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
) -> float:
    """Take one step and return the batch's loss before it, times the number of examples."""
    optimizer.zero_grad(set_to_none=True)
    value = loss(model(inputs), targets)
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value.item() * len(inputs)
