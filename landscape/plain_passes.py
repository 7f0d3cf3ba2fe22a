"""Passes without what a model does for its training's sake: autocast, and checkpoints that differentiate only once.

A model that computes in bfloat16 under autocast has a loss with steps of a hundredth: its curvature is that of the
same layers in the precision of the measurement. A reentrant activation checkpoint can neither be
differentiated with respect to chosen tensors nor twice; the other kind can, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint as checkpoints
from torch import nn


class Autocast(torch.autocast):
    """`torch.autocast` as our own probes use it, on within `plain` too."""

    __enter__ = torch.autocast.__enter__


@contextmanager
def plain(device: torch.device, *, autocast: bool, met: Callable[[], None]) -> Iterator[None]:
    """Answer reentrant checkpoints by the other kind, and keep autocast off.

    Args:
        device: where the model computes.
        autocast: whether autocast may be on, as where the measurement itself is in 16 bits.
        met: called where the model, or who called us, wanted autocast.
    """
    entering: Any = torch.autocast.__enter__
    reentrant = checkpoints.CheckpointFunction

    def entered(self: torch.autocast) -> Any:
        wanted = self._enabled
        if wanted:
            met()
        self._enabled = wanted and autocast
        try:
            return entering(self)
        finally:
            self._enabled = wanted

    known = torch.amp.is_autocast_available(device.type)
    if known and torch.is_autocast_enabled(device.type):
        met()
    off = Autocast(device.type, enabled=False) if known and not autocast else nullcontext()
    torch.autocast.__enter__ = entered  # type: ignore[method-assign]
    checkpoints.CheckpointFunction = _Checkpoint  # type: ignore[assignment, misc]
    try:
        with off:
            yield
    finally:
        torch.autocast.__enter__ = entering  # type: ignore[method-assign]
        checkpoints.CheckpointFunction = reentrant  # type: ignore[misc]


class _Checkpoint:
    """What `torch.utils.checkpoint.checkpoint` calls where it is asked for the reentrant kind."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *inputs: Any) -> Any:
        return checkpoints.checkpoint(
            function, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )


def precision(model: nn.Module) -> str:
    """The floating-point types of a model's parameters and buffers, in words: "float32" or "bfloat16, float32"."""
    tensors = [*model.parameters(), *model.buffers()]
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}))
