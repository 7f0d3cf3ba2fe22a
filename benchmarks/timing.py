"""Alternating medians: the only timings to be trusted on a shared machine."""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: busy waiting stalls where cores are shared

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def alternate(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run all tasks in turn, `rounds` times; return the seconds of each.

    With one thread, `clock=time.process_time` leaves out the time in which other processes had the core.
    """
    for _ in range(warmup):
        for task in tasks.values():
            task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            torch.cuda.synchronize() if torch.cuda.is_available() else None
            began = clock()
            task()
            torch.cuda.synchronize() if torch.cuda.is_available() else None
            seconds[name].append(clock() - began)
    return seconds


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles of each task's time over the base's, round by round."""
    found = {}
    for name, times in seconds.items():
        relative = [t / b for t, b in zip(times, seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(relative, n=4) if len(relative) > 1 else (relative[0],) * 3
        found[name] = (low, middle, high)
    return found
