"""Kills measurements at random moments, and compares what the resumed ones come to with uninterrupted ones.

    python tests/kills.py --kills 500 --seed 0

Every registered metric is measured on a tiny problem, with its default settings and with each of its choices, in a
child that is forked after the imports and killed (SIGKILL) somewhere between its first and its last action. Then the
next one goes on, until one ends. Nothing that a child leaves may be unreadable, and what the last one writes must be
what an uninterrupted measurement gives, bit for bit. Children write after every block and every step, so that many
kills meet a writing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork after a parallel operation hangs for ever

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import every
import forks
import torch

import landscape
from landscape import journal, results
from landscape.metrics.base import Metric

_PATIENCE = 60.0  # seconds after which a child hangs
_KILLS_OF_ONE = 8  # before it may end
_MOMENTARY = {"time", "command"}  # attributes that differ between two runs of the same measurement


@dataclass
class Tally:
    """What a campaign came to.

    Attributes:
        kills: children that were killed while they measured, by metric.
        kept: of these, those that left something to go on from.
        writing: of these, those that were killed in the middle of a writing.
        ended: children that ended before their moment came.
        histories: measurements that were brought to their end.
        faults: what must not be, in words.
    """

    kills: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    writing: int = 0
    ended: int = 0
    histories: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = sum(self.kills.values())
        share = total / max(1, total + self.ended)
        return (
            f"{total} kills in {self.histories} histories of {len(self.kills)} metrics; {share:.0%} of the children "
            f"were killed in the middle, {self.kept} kills left something to go on from, {self.writing} met a writing; "
            f"{len(self.faults)} faults"
        )


def eagerly() -> None:
    """Write after every block and every step, in this process."""
    journal._UNWRITTEN_SECONDS, journal._WRITING_SHARE = 0.0, 1e9


def campaign(kills: int, seed: int, names: list[str] | None = None) -> Tally:
    """Kill that many measurements.

    Args:
        kills: how many.
        seed: of the moments, and of the order of the metrics.
        names: of metrics; by default all.
    """
    moments, tally = Random(seed), Tally()
    left: list[tuple[str, Metric]] = []
    while sum(tally.kills.values()) < kills:
        if not left:
            left = [pair for name in names or every.names() for pair in every.variants(name)]
            # Every metric comes up before any comes up again.
            rank = Counter[str]()
            order = []
            for pair in moments.sample(left, len(left)):
                rank[pair[1].name] += 1
                order.append((rank[pair[1].name], pair))
            left = [pair for _, pair in sorted(order, key=lambda entry: -entry[0])]
        label, metric = left.pop()
        whole = every.evaluated(metric, every.problem(), 3)
        if whole is None:
            continue
        with tempfile.TemporaryDirectory() as place:
            _history(label, metric, Path(place), moments, tally, kills)
    return tally


def _history(label: str, metric: Metric, place: Path, moments: Random, tally: Tally, most: int) -> None:
    """One measurement, killed again and again until a child ends; then compared."""
    whole = landscape.measure(metric, every.problem(), seed=3)
    length = _timed(metric, place / "timed.h5")
    path = place / f"{metric.name}.h5"
    most = min(most, sum(tally.kills.values()) + _KILLS_OF_ONE)
    while sum(tally.kills.values()) < most:
        child, begun = _child(metric, path)
        os.read(begun, 1)
        os.close(begun)
        time.sleep(moments.uniform(0.0, length))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            tally.ended += 1
            _must_have_ended(label, status, tally)
            break
        tally.kills[metric.name] += 1
        _look(label, path, tally)
    else:
        child, begun = _child(metric, path)
        _must_have_ended(label, _waited(child), tally)
        os.close(begun)
    tally.histories += 1
    _compare(label, whole, path, tally)


def _child(metric: Metric, path: Path) -> tuple[int, int]:
    """Start a measurement; return its number, and what it writes a byte to when it begins."""
    reading, writing = os.pipe()

    def measure() -> int:
        torch.set_num_threads(1)
        eagerly()
        os.write(writing, b".")
        landscape.measure(metric, every.problem(), out=path, seed=3)
        return 0

    child = forks.start(measure)
    os.close(writing)
    return child, reading


def _timed(metric: Metric, path: Path) -> float:
    """Seconds that a measurement takes."""
    child, begun = _child(metric, path)
    os.read(begun, 1)
    os.close(begun)
    start = time.monotonic()
    _waited(child)
    return time.monotonic() - start


def _waited(child: int) -> int:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.0005)
    forks.kill(child)
    return signal.SIGKILL


def _must_have_ended(label: str, status: int, tally: Tally) -> None:
    if status:
        tally.faults.append(f"{label}: a resumed run ended with status {os.waitstatus_to_exitcode(status)}")


def _look(label: str, path: Path, tally: Tally) -> None:
    """Read all that a killed child left."""
    states = list((path.parent / ".parts").glob("*.safetensors"))
    unfinished = [*path.parent.glob(".*.tmp"), *path.parent.glob(".parts/.*.tmp")]
    tally.kept += path.exists() or bool(states)
    tally.writing += bool(unfinished)
    for state in states:
        if results.read_state(state) is None:
            tally.faults.append(f"{label}: a killed run left a state that cannot be read")
    if path.exists():
        try:
            results.read(path)
        except results.ResultsError as error:
            tally.faults.append(f"{label}: a killed run left a file that cannot be read: {error}")


def _compare(label: str, whole: Any, path: Path, tally: Tally) -> None:
    try:
        resumed = landscape.open(path)
    except results.ResultsError as error:
        tally.faults.append(f"{label}: the result cannot be read: {error}")
        return
    other = every.differing(whole, resumed)
    there, here = (
        json.dumps({**ds.attrs, **dict.fromkeys(_MOMENTARY)}, sort_keys=True) for ds in (whole, resumed)
    )
    other += [] if there == here else ["attributes"]
    if other:
        tally.faults.append(f"{label}: resumed and uninterrupted differ in {', '.join(other)}")
    left = [p.name for p in path.parent.glob(".*.tmp")] + [p.name for p in path.parent.glob(".parts/*")]
    left += [p.name for p in path.parent.glob(f"{path.name}.lock")]
    if left:
        tally.faults.append(f"{label}: the last run left {', '.join(left)}")


def main() -> int:
    """Run a campaign, and print what it came to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--metric", action="append", help="only this one; may be repeated")
    words = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    tally = campaign(words.kills, words.seed, words.metric)
    for name, count in sorted(tally.kills.items()):
        print(f"{count:5} {name}")
    print(f"{tally}; {time.monotonic() - began:.0f} s")
    for fault in tally.faults:
        print(fault)
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
