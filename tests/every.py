"""Every registered metric on a tiny problem: settings, variants, and an interruption at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import landscape
from landscape import Problem
from landscape.errors import Refused
from landscape.metrics import registry
from landscape.metrics.base import Journal, Metric, State
from landscape.record import Record

# A demand that a metric may grow, and any other count, is at most this here.
_MOST, _LEAST = 6, 2
# What may differ between two runs of the same measurement.
MOMENTARY = {"wall_seconds"}


def network(*, seed: int = 0, smooth: bool = False) -> nn.Module:
    """A small classifier, piecewise linear unless it is to be smooth."""
    draws = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh() if smooth else nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) * 0.6)
    return model


def data(sizes: tuple[int, ...] = (6, 6), *, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and labels, in batches of these sizes."""
    draws = torch.Generator().manual_seed(seed)
    x, y = torch.randn(12, 4, generator=draws), torch.arange(12) % 3
    return list(zip(torch.split(x, list(sizes)), torch.split(y, list(sizes)), strict=True))


def problem(model: nn.Module | None = None, batches: Any = None, **options: Any) -> Problem:
    """The tiny problem of all common tests."""
    loss = options.pop("loss", nn.CrossEntropyLoss())
    return Problem(
        network() if model is None else model, loss, data() if batches is None else batches, **options
    )


def names() -> list[str]:
    """The registered metrics."""
    return list(registry.registered())


def tiny(name: str, **chosen: Any) -> Metric:
    """A metric with settings that cost little, found by the types of its fields; those that it refuses are left out.

    Raises:
        ValueError: if it refuses what was chosen.
    """
    metric = registry.load(name)
    made = metric(**chosen)
    for field in dataclasses.fields(metric):
        if field.name not in chosen and (small := _smaller(field.default)) is not None:
            with contextlib.suppress(ValueError):
                made = dataclasses.replace(made, **{field.name: small})
    return made


def _smaller(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and value > _MOST:
        return _MOST
    if isinstance(value, tuple) and len(value) > _LEAST:
        return value[:_LEAST]
    return None


def variants(name: str) -> Iterator[tuple[str, Metric]]:
    """The metric with one field after the other changed: each word of a choice, each switch, each count that is 0.

    Those that the metric or the problem refuses are left out.
    """
    yield name, tiny(name)
    metric = registry.load(name)
    hints = typing.get_type_hints(metric)
    for field in dataclasses.fields(metric):
        for value in _others(field.default, hints[field.name]):
            try:
                yield f"{name}:{field.name}={value}", tiny(name, **{field.name: value})
            except ValueError:
                continue


def _others(default: Any, hint: Any) -> list[Any]:
    if typing.get_origin(hint) is Literal:
        return [word for word in typing.get_args(hint) if word != default]
    if isinstance(default, bool):
        return [not default]
    return [_LEAST] if isinstance(default, int) and default == 0 else []


def evaluated(metric: Metric, measured: Problem, seed: int = 0, **options: Any) -> Record | None:
    """The record, or None where metric and problem do not go together."""
    try:
        return landscape.evaluate(metric, measured, seed, **options)
    except Refused:
        return None


class StoppedError(Exception):
    """What an interruption raises."""


class Memory(Journal):
    """Keeps a record and states as files would, and interrupts at one of the moments at which it keeps something.

    Args:
        after: how many moments pass before; None for all.
    """

    def __init__(self, after: int | None = None):
        self.left = after
        self.record: Record | None = None
        self.states: dict[int, State] = {}
        self.moments = 0

    def commit(self, record: Record, *, final: bool = False) -> None:
        self.record = Record(
            {name: dataclasses.replace(v, data=v.data.copy()) for name, v in record.variables.items()},
            dict(record.attrs),
        )
        if not final:
            self._passed()

    def load_state(self, block: range) -> State | None:
        found = self.states.get(block.start)
        return None if found is None else {name: array.copy() for name, array in found.items()}

    def save_state(self, block: range, state: Callable[[], State]) -> None:
        self.states[block.start] = {name: np.array(array, order="C") for name, array in state().items()}
        self._passed()

    def _passed(self) -> None:
        self.moments += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise StoppedError


def differing(a: Any, b: Any) -> list[str]:
    """Names of variables (of records or datasets) that do not agree to the bit, time apart."""
    names = (set(a.variables) | set(b.variables)) - MOMENTARY
    return sorted(name for name in names if name not in a or name not in b or not _same(a[name], b[name]))


def _same(a: Any, b: Any) -> bool:
    x, y = np.asarray(a), np.asarray(b)
    return x.dtype.kind == y.dtype.kind and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
