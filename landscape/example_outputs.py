"""What the outputs of a batch say of each example: a logit, a loss, a label, a predicted class."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from landscape import batches as batching
from landscape.errors import Refused

LOGIT = re.compile(r"logit:(\d+)")


def logits(outputs: Any, target: Any, scalar: str, count: int) -> Tensor:
    """One logit of each example, (N,).

    Args:
        outputs: of the model.
        target: of the batch.
        scalar: "logit" of the label, "prediction" (the largest) or "logit:k".
        count: N.

    Raises:
        Refused: if the outputs are no logits, or the targets no labels of theirs.
    """
    if not (isinstance(outputs, Tensor) and outputs.ndim == 2):
        got = f"of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise Refused(f"the outputs are {got}; scalar={scalar!r} needs logits (examples, classes)")
    if scalar == "prediction":
        return outputs.max(dim=1).values
    if chosen := LOGIT.fullmatch(scalar):
        if int(chosen[1]) >= outputs.shape[1]:
            raise Refused(f"scalar is {scalar!r}, but there are {outputs.shape[1]} logits, from 0 on")
        return outputs[:, int(chosen[1])]
    if (labels := labels_of(target, count)) is None:
        raise Refused(
            "scalar='logit' is that of the example's label, and the targets are no integer labels; take "
            "'prediction' or 'logit:0'"
        )
    require_labels(labels, outputs.shape[1])
    return outputs.gather(1, labels[:, None])[:, 0]


def require_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that no output stands for.

    Raises:
        Refused: naming their range.
    """
    if labels.min() < 0 or labels.max() >= classes:
        raise Refused(
            f"labels go from {int(labels.min())} to {int(labels.max())}, but there are {classes} logits; leave "
            "out examples without a label"
        )


def losses_of(loss: Callable[[Any, Any], Tensor], outputs: Any, target: Any, count: int) -> Tensor | None:
    """The loss of each example as a batch of one, (N,) float64, all at once; None where that has no way."""

    def alone(output: Any, wanted: Any) -> Tensor:
        return loss(*(batching.tree_map(lambda t: t[None], tree) for tree in (output, wanted)))

    try:
        with torch.no_grad():
            found: Tensor = torch.vmap(alone)(outputs, target).double()
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError):
        return None  # a loss that cannot be vectorized
    return found if found.shape == (count,) else None


def one_by_one(loss: Callable[[Any, Any], Tensor], outputs: Any, target: Any, count: int) -> Tensor:
    """The loss of each example as a batch of one, (N,) float64, one after the other."""
    with torch.no_grad():
        parts = ([batching.cut(tree, i, i + 1) for tree in (outputs, target)] for i in range(count))
        return torch.stack([loss(*part).double() for part in parts])


def labels_of(target: Any, count: int) -> Tensor | None:
    """The integer labels of examples (N,), None where the target is something else."""
    fine = isinstance(target, Tensor) and not target.is_floating_point() and not target.is_complex()
    if not fine or target.dtype == torch.bool or target.numel() != count:
        return None
    flat: Tensor = target.reshape(-1).long()
    return flat


def predictions_of(outputs: Any, count: int) -> Tensor | None:
    """The most likely class of each example (N,), None where the outputs are no scores of classes."""
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != (count,):
        return None
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return outputs.argmax(dim=1)
    return None
