"""How damaged files are read: as the commands do, down to the text and the picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from landscape_cli import compare, report, show

from landscape import foreign, plots, results


class Nothing(Exception):  # noqa: N818
    """A state that is damaged is not there; nothing is raised for it."""


def look(path: Path) -> None:
    """Read a measurement as `landscape.open`, `landscape show`, `show --json` and `compare` do."""
    path = path.with_name("result.h5")  # of a sidecar, the file beside it
    record = results.read(path)
    with foreign.understood(path):
        show.text(record, path)
        report.dump([report.as_json(record, path) | {"complete": show.completeness(record)[1]}])
        held = {"one": (path, record)}
        list(compare._lines((path, path), [held, held]))
        list(compare._differences((path, path), [held, held]))
    record.to_xarray()


def draw(path: Path) -> None:
    """Read a measurement as `landscape plot` does."""
    plots.plot(path, path.with_suffix(".png"), dpi=30)


def state(path: Path) -> None:
    """Read the state of an unfinished unit."""
    if results.read_state(path) is None:
        raise Nothing


def directions(path: Path) -> None:
    """Read directions as `--directions file` does."""
    from fuzz_make import problem

    from landscape import directions as made

    made.load(path, problem())


def checkpoint(path: Path) -> None:
    """Read weights as `--checkpoint` does."""
    from fuzz_make import network

    from landscape import checkpoints

    checkpoints.load_into(network(), path, lambda _: None)


WITH_TORCH: dict[str, Callable[[Path], None]] = {
    "directions": directions,
    "checkpoint": checkpoint,
    "checkpoint before 1.6": checkpoint,
    "checkpoint safetensors": checkpoint,
}
"""Kinds of files that need torch to be read; `state` has a reader of its own, all others are looked at."""


def reader(kind: str) -> Callable[[Path], None]:
    """Return what reads files of a kind."""
    return state if kind == "state" else WITH_TORCH.get(kind, look)


def has_picture(kind: str) -> bool:
    """Return whether there is a picture of this metric."""
    return kind in plots.metrics_with_a_picture()
