"""Which share of a measurement this process has: all of it, or a part of a job array; `landscape.sharing` has ranks.

Whole blocks of units are dealt. What the others need of a round, and what they measured, goes through files beside
the measurement's own (`landscape.parts`); ranks tell each other when these are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from landscape import identity, lock, parts, results, rounds
from landscape.problem import Problem
from landscape.record import Record

Write = Callable[[], None]


class Share:
    """All of it: this process is alone.

    Attributes:
        path: the measurement's file; None writes nothing.
        main: whether this process writes that file.
        world: how many processes measure together.
        writes: whether this process writes anything.
    """

    main = True
    world = 1
    writes = True

    def __init__(self, path: Path | None):
        self.path = path

    @property
    def locked(self) -> Path | None:
        """The file that nobody else may write meanwhile."""
        return self.path if self.main else None

    def begin(self, *, overwrite: bool) -> None:
        """Make the place ready.

        Raises:
            ResultsError: if it cannot be written.
        """
        if self.path is None:
            return
        for folder in (self.path.parent, self.path.parent / rounds.FOLDER):
            results.clean_leftovers(folder)
        results.require_writable(self.path.parent)
        if overwrite:
            self._remove_parts()

    def divided(self, problem: Problem) -> Problem:
        """The problem with this process's part of the data, where these are divided."""
        return problem

    def agree(self, about: dict[str, Any]) -> None:
        """Make sure that the others measure the same.

        Raises:
            Refused: naming who does not, and what differs.
        """

    def prepare(self, record: Record, make: Callable[[], None], write: Write) -> None:  # noqa: ARG002
        """Put what all units share into the record."""
        make()

    def deal(self, record: Record, write: Write) -> Sequence[range]:
        """Take in what parts measured of the round before; return the blocks to be measured here."""
        if found := self._leftovers(record):
            for _, part in found:
                parts.adopt(record, part)
            write()
            for path, _ in found:
                parts.remove(path)
        return rounds.open_blocks(record)

    def gather(self, record: Record, write: Write) -> bool:  # noqa: ARG002
        """Take in what others measured of the round; False where some of it is still to come."""
        return True

    def write(self, record: Record) -> None:
        """Write what is done here."""
        if self.path is not None:
            results.write(self.path, record)
            if record.attrs["complete"]:
                self._remove_parts()

    def meet(self) -> None:
        """Wait until all processes are here, where they go on together."""

    def _leftovers(self, record: Record) -> list[tuple[Path, Record]]:
        """The parts that lie there of the round that is open."""
        if self.path is None:
            return []
        found = [(path, parts.read(path)) for path in parts.paths(self.path)]
        return [(path, part) for path, part in found if parts.fits(record, part)]

    def _remove_parts(self) -> None:
        if self.path is not None:
            for path in parts.paths(self.path):
                parts.remove(path)


class PartShare(Share):
    """Part `index` of `count`: a job of its own that hears of no other; `landscape.merging` brings them together.

    The first to be prepared makes the measurement's file, which all others begin with.
    """

    main = False

    def __init__(self, path: Path, index: int, count: int):
        super().__init__(path)
        self.result, self.index, self.count = path, index, count
        self.file = parts.path_of(path, index, count)
        self._base: parts.Base | None = None

    @property
    def locked(self) -> Path:
        """The part's own file."""
        return self.file

    def begin(self, *, overwrite: bool) -> None:
        """Make the place ready.

        Raises:
            ValueError: if the others' work were to be overwritten.
        """
        if overwrite:
            raise ValueError("overwrite=True with a part would undo the other parts; delete the run instead")
        super().begin(overwrite=False)

    def prepare(self, record: Record, make: Callable[[], None], write: Write) -> None:  # noqa: ARG002
        """Prepare, unless another part was sooner."""
        make()
        with lock.held(self.result, wait=True):
            if self.result.exists():
                first = results.read(self.result)
                identity.require_same(self.result, first, record.attrs)
                replace(record, first)
            else:
                results.write(self.result, record)

    def deal(self, record: Record, write: Write) -> Sequence[range]:  # noqa: ARG002
        """The blocks whose number leaves this part's remainder, less what an earlier run of it measured."""
        self._base = parts.Base.of(record)
        if self.file.exists() and parts.fits(record, earlier := parts.read(self.file)):
            parts.adopt(record, earlier)
        size = record.attrs["block_size"]
        return [b for b in rounds.open_blocks(record) if b.start // size % self.count == self.index - 1]

    def gather(self, record: Record, write: Write) -> bool:  # noqa: ARG002
        """Keep the part; the rest is not known here."""
        write()
        return False

    def write(self, record: Record) -> None:
        """Write the part."""
        if self._base is not None:
            parts.write(self.file, record, self._base, self.index, self.count)


def replace(record: Record, other: Record) -> None:
    """Make a record what another is; who holds it sees the change."""
    record.variables, record.attrs = other.variables, other.attrs
