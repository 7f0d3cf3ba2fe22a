"""Progress on stderr: a bar on a terminal, a line a minute otherwise."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from landscape.journal import Progress

SECONDS_BETWEEN_LINES = 60.0
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def say(text: str) -> None:
    """Write one line to stderr."""
    click.echo(f"landscape: {visible(text)}", err=True)


def visible(text: str) -> str:
    """Return a text without what moves a terminal's cursor or the reading direction: a file may hold it."""
    plain = _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return plain.encode("utf-8", "backslashreplace").decode()


def emit(text: str) -> None:
    """Write a result to stdout; a reader that has seen enough (`| head`) is no error."""
    try:
        click.echo(visible(text))
    except BrokenPipeError:
        # what follows, and Python's own flush at the end, must not meet the broken pipe again
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Reporter:
    """The progress callback of one command; a context manager.

    Args:
        terminal: whether to draw a bar (default: whether stderr is a terminal).
        clock: seconds, rising.
    """

    def __init__(self, terminal: bool | None = None, clock: Any = time.monotonic):
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self.clock = clock
        self.started = self.last_line = clock()
        self._bar: RichProgress | None = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, step: Progress) -> None:
        """Take one report of the library."""
        if step.total is None:
            say(f"{step.metric}: {step.message}")
        elif self.terminal:
            self._draw(step)
        elif self.clock() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = self.clock()
            note = f", {step.message}" if step.message else ""
            say(
                f"{step.metric}: {step.done} of {step.total} done{note}, {self.last_line - self.started:.0f} s"
            )

    def close(self) -> None:
        """Take the bar away, so that what follows starts on a clean line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._tasks = None, {}

    def _draw(self, step: Progress) -> None:
        if self._bar is None:
            self._bar = _new_bar()
            self._bar.start()
        if step.metric not in self._tasks:
            for task in self._tasks.values():
                self._bar.update(task, visible=False)
            self._tasks[step.metric] = self._bar.add_task(step.metric, total=step.total, note="")
        self._bar.update(self._tasks[step.metric], completed=step.done, total=step.total, note=step.message)


def _new_bar() -> RichProgress:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=30),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
