"""What a measurement writes while it runs: its file, and the states of what is not done."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from landscape import identity, results, rounds
from landscape._version import __version__
from landscape.errors import INTERRUPTED
from landscape.metrics.base import Journal, Metric, State
from landscape.metrics.base_journal import PREPARATION
from landscape.results import Record
from landscape.shares import Share

# Writing takes this share of the time at most (the file is rewritten whole); a kill loses 100 times a writing.
_WRITING_SHARE = 0.01
# Seconds before the first writing: a measurement that is done by then is written once.
_UNWRITTEN_SECONDS = 0.1


@dataclass(frozen=True)
class Progress:
    """How far a measurement is.

    Attributes:
        metric: its name.
        done: units measured.
        total: units of the current round; an adaptive metric may ask for more. None while it waits for another
            process, whom the message names.
        message: the estimate so far, in words.
    """

    metric: str
    done: int
    total: int | None
    message: str


class FileJournal(Journal):
    """Writes the record whole after a block, but spends at most 1 % of the time on it."""

    def __init__(
        self,
        metric: Metric,
        share: Share,
        about: dict[str, Any],
        progress: Callable[[Progress], None] | None,
    ):
        self.metric, self.share, self.path, self.tell = metric, share, share.path, progress
        # With its demands: what a block came to for smaller ones is not what it has to come to. With the version:
        # stages are known by their order.
        same = {key: about[key] for key in (*identity.SAME, "configuration")} | {"version": __version__}
        self.key = hashlib.blake2b(json.dumps(same, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.spacing, self.state_spacing = _Spacing(_UNWRITTEN_SECONDS), _Spacing(_UNWRITTEN_SECONDS)
        self.unwritten = False

    def prepare(self, record: Record, make: Callable[[], None]) -> None:
        """Prepare, or take over from who prepared."""
        self.share.prepare(record, make, functools.partial(self._write, record))
        self.commit(record)

    def deal(self, record: Record, blocks: Sequence[range]) -> Sequence[range]:  # noqa: ARG002
        """Ask the share for this process's blocks."""
        return self.share.deal(record, functools.partial(self._write, record))

    def gather(self, record: Record) -> bool:
        """Let the share take in what the others measured."""
        return self.share.gather(record, functools.partial(self._write, record))

    def commit(self, record: Record, *, final: bool = False) -> None:
        """Write, where that keeps within its share of the time."""
        self.unwritten = True
        if final:
            record.attrs["exit_code"] = rounds.exit_code(record)
        if self.path is not None and (final or self.spacing.due()):
            self._write(record)

    def keep(self, record: Record) -> None:
        """Write what is done, on the way out."""
        record.attrs["exit_code"] = INTERRUPTED
        # Also where all units are in the file: it does not say yet that this was an interruption.
        open_end = self.unwritten or not record.attrs["complete"]
        if self.path is not None and open_end and "block_size" in record.attrs:
            self._write(record)

    def progress(self, record: Record, done: int, total: int) -> None:
        """Tell how far the round is."""
        if self.tell is not None and (self.share.main or self.share.world == 1):
            self.tell(Progress(self.metric.name, done, total, _so_far(self.metric, record)))

    def step(self, record: Record, standing: Callable[[], str]) -> None:
        """Tell where a sequential block is."""
        if self.tell is not None and (self.share.main or self.share.world == 1) and (words := standing()):
            self.tell(Progress(self.metric.name, int(record["done"].sum()), record.attrs["stop"], words))

    def load_state(self, block: range) -> State | None:
        """Return the state of a block, if it is one of this measurement."""
        if self.path is None:
            return None
        self.share.meet()
        found = results.read_state(_state_path(self.path, block))
        self.share.meet()
        return found[0] if found is not None and found[1].get("key") == self.key else None

    def save_state(self, block: range, state: Callable[[], State]) -> None:
        """Write the state of a block, where that keeps within its share of the time."""
        if self.path is not None and self.share.writes and self.state_spacing.due():
            with self.state_spacing:
                results.write_state(_state_path(self.path, block), state(), {"key": self.key})

    def _write(self, record: Record) -> None:
        if self.path is None or not self.share.writes:
            return
        if self.share.main and "done" in record and record["done"].any():
            record.variables.update(self.metric.summarize(record))
        with self.spacing:
            self.share.write(record)
        self.unwritten = False
        delete_states(self.path, record)


def _state_path(path: Path, block: range) -> Path:
    which = "prepare" if block == PREPARATION else block.start
    return path.parent / rounds.FOLDER / f"{path.stem}.state-{which}.safetensors"


def kept_in(path: Path) -> Path | None:
    """Return where the work on a result is kept: its file, or the state of what comes before; None for nowhere."""
    return next((place for place in (path, _state_path(path, PREPARATION)) if place.exists()), None)


def delete_states(path: Path, record: Record | None = None) -> None:
    """Delete the states of what is in the record, which is stored, or all of them.

    A kill may have come between its writing and this.
    """
    every = record is None or bool(record.attrs["complete"])
    done = record["done"] if record is not None and "done" in record else np.zeros(0, bool)
    size = 0 if record is None else int(record.attrs["block_size"])
    with contextlib.suppress(OSError):
        for state in (path.parent / rounds.FOLDER).iterdir():
            found = re.fullmatch(rf"{re.escape(path.stem)}\.state-(prepare|[0-9]+)\.safetensors", state.name)
            if found is None:
                continue
            block = done[int(found[1]) :][:size] if found[1] != "prepare" else np.ones(1, bool)
            if every or (len(block) and block.all()):
                state.unlink()


class _Spacing:
    """Tells when writing again keeps it under its share of the time; measures each writing."""

    def __init__(self, first_after: float) -> None:
        self.ended, self.wait = time.monotonic(), first_after

    def due(self) -> bool:
        return time.monotonic() - self.ended >= self.wait

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.ended = time.monotonic()
        self.wait = (self.ended - self.began) / _WRITING_SHARE


def _so_far(metric: Metric, record: Record) -> str:
    values = metric.summarize(record)
    if metric.headline not in values or values[metric.headline].data.ndim:
        return ""
    text = f"{metric.headline} {float(values[metric.headline].data):.5g}"
    error = values.get(f"{metric.headline}_stderr")
    return text if error is None else f"{text} ± {float(error.data):.2g}"
