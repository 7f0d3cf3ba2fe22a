"""Passes without what a model does for its training's sake: autocast, and checkpoints that differentiate only once.

A model that computes in bfloat16 under autocast has a loss with steps of a hundredth: its curvature is that of the
same layers in the precision of the measurement. A reentrant activation checkpoint can neither be
differentiated with respect to chosen tensors nor twice; the other kind can, with the same numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint as checkpoints
from torch import nn


class Autocast(torch.autocast):
    """`torch.autocast` as our own probes use it, on within `plain` too."""

    __enter__ = torch.autocast.__enter__


@dataclass(frozen=True, eq=False)
class _Wish:
    """What one who is within `plain` wants."""

    autocast: bool
    met: Callable[[], None]


_wishes: list[_Wish] = []  # the last one counts; the backward passes of a GPU run in threads of their own
_lock = threading.Lock()
_autocast_enter: Any = torch.autocast.__enter__
_reentrant = checkpoints.CheckpointFunction


@contextmanager
def plain(device: torch.device, *, autocast: bool, met: Callable[[], None]) -> Iterator[None]:
    """Answer reentrant checkpoints by the other kind, and keep autocast off.

    Args:
        device: where the model computes.
        autocast: whether autocast may be on, as where the measurement itself is in 16 bits.
        met: called where the model, or who called us, wanted autocast.
    """
    known = torch.amp.is_autocast_available(device.type)
    if known and torch.is_autocast_enabled(device.type):
        met()
    off = Autocast(device.type, enabled=False) if known and not autocast else nullcontext()
    wish = _Wish(autocast, met)
    _stand_in(wish, begins=True)
    try:
        with off:
            yield
    finally:
        _stand_in(wish, begins=False)


def _stand_in(wish: _Wish, *, begins: bool) -> None:
    """Stand in for PyTorch's own from the first wish until the last has ended, in whatever order they end."""
    with _lock:
        _wishes.append(wish) if begins else _wishes.remove(wish)
        torch.autocast.__enter__ = _entered if _wishes else _autocast_enter  # type: ignore[method-assign]
        checkpoints.CheckpointFunction = _Checkpoint if _wishes else _reentrant  # type: ignore[assignment, misc]


def _entered(self: torch.autocast) -> Any:
    wanted, wishes = self._enabled, list(_wishes)
    if wanted and wishes:
        wishes[-1].met()
        self._enabled = wishes[-1].autocast
    try:
        return _autocast_enter(self)
    finally:
        self._enabled = wanted


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
