"""The share of right answers, where outputs and targets say what is right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from landscape import losses

_BINARY = {"binary_cross_entropy_with_logits": 0.0, "binary_cross_entropy": 0.5}


class Judge:
    """Counts right answers: the largest of the classes' outputs, or a binary output beyond its threshold.

    Args:
        loss: of the problem; binary cross-entropy says that outputs are binary.
        ignored: the label that marks what has no target.
    """

    def __init__(self, loss: Any, ignored: int):
        self._threshold = _BINARY.get(losses.describe(loss)[0] or "")
        self._ignored = ignored

    def can(self, outputs: Any, target: Any) -> bool:
        """Whether there are right and wrong answers among these outputs."""
        if not (isinstance(outputs, Tensor) and isinstance(target, Tensor)):
            return False
        if self._threshold is not None:
            return outputs.shape == target.shape
        whole = not target.is_floating_point() and target.dtype != torch.bool
        return (
            whole
            and outputs.ndim == target.ndim + 1
            and outputs.shape[:1] + outputs.shape[2:] == target.shape
        )

    def right(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The number of right answers, 0-d."""
        if self._threshold is not None:
            return ((outputs > self._threshold) == (target > 0.5)).sum()
        return (outputs.argmax(dim=1) == target).sum()  # an ignored label is no class

    def judged(self, target: Tensor) -> int:
        """The number of answers that can be right or wrong."""
        if self._threshold is not None:
            return target.numel()
        return int((target != self._ignored).sum())
