"""What ranks of one job share of a measurement: blocks of units, or the data of every product."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from landscape import identity, parts, ranks, results, rounds, sharded
from landscape.errors import INTERRUPTED, RankLost, Refused
from landscape.problem import Problem
from landscape.ranks import Team
from landscape.record import Record
from landscape.shares import PartShare, Share, Write, replace

_DIVIDED = ("units", "data", "none")


@contextlib.contextmanager
def of(path: Path | None, shard: str, part: tuple[int, int] | None, timeout: float) -> Iterator[Share]:
    """Find out which share is this process's, and join the others.

    Args:
        path: the measurement's file; None writes nothing.
        shard: what ranks divide: "units", "data" or "none".
        part: (i, n) for part i of n.
        timeout: seconds without a sign of life after which a rank is lost.

    Raises:
        RankLost: in place of an error that came of another rank's end.
        ValueError: for what cannot be.
    """
    if shard not in _DIVIDED:
        raise ValueError(f"shard is {shard!r}; allowed is {', '.join(map(repr, _DIVIDED))}")
    if part is not None:
        yield _part(path, part)
        return
    alone = shard == "none" or (shard == "units" and path is None)
    team = None if alone else ranks.join(timeout)
    if team is None:
        yield Share(path)
        return
    with team, contextlib.ExitStack() as groups:
        try:
            yield (
                RankShare(path, team)
                if path is not None and shard == "units"
                else DataShare(path, team, groups)
            )
        except BaseException as error:
            groups.pop_all()
            lost = team.lost(error)
            team.leave(lost or error)
            if lost is None:
                raise
            _stand_in(path, team, lost)
            raise lost from (None if lost is error else error)


def _part(path: Path | None, part: tuple[int, int]) -> Share:
    index, count = part
    if not 1 <= index <= count:
        raise ValueError(f"part is {index}/{count}; allowed is i/n with 1 <= i <= n, such as 3/16")
    if path is None:
        raise ValueError("a part needs a place for its file: out=..., --out")
    if ranks.place() is not None:
        raise ValueError(
            "ranks divide the work themselves; leave part out, or start parts without a launcher"
        )
    return PartShare(path, index, count)


class TeamShare(Share):
    """A rank's share."""

    def __init__(self, path: Path | None, team: Team):
        super().__init__(path)
        self.team, self.main, self.world = team, team.rank == 0, team.size

    def begin(self, *, overwrite: bool) -> None:
        """Let rank 0 make the place ready."""
        if self.main:
            super().begin(overwrite=overwrite)
        self.team.sync()

    def agree(self, about: dict[str, Any]) -> None:
        """Compare with rank 0, the metric's demands too; from here on it may write."""
        said = [json.loads(text) for text in self.team.exchange(json.dumps(about))]
        for rank, other in enumerate(said):
            found = identity.differing(said[0], other, "on rank 0", f"on rank {rank}")
            if not found and other["configuration"] != said[0]["configuration"]:
                found = [f"the metric's demands ({said[0]['configuration']} on rank 0)"]
            if found:
                raise Refused(
                    f"rank {rank} measures something else than rank 0; different: {'; '.join(found)}. Every rank needs "
                    "the same model and all of the data (no DistributedSampler): ranks divide the work themselves"
                )


class RankShare(TeamShare):
    """Every so many-th open block: rank 0 writes the measurement's file, the others part files that it takes in."""

    def __init__(self, path: Path, team: Team):
        super().__init__(path, team)
        self.result = path
        self.file = parts.path_of(path, team.rank + 1, team.size)
        self._base: parts.Base | None = None
        self._round = 0

    def prepare(self, record: Record, make: Callable[[], None], write: Write) -> None:
        """Let rank 0 prepare."""
        self._from_first("prepared", record, make, write)

    def deal(self, record: Record, write: Write) -> Sequence[range]:
        """Let rank 0 take in what was left of the round; each has then every so many-th of the open blocks."""
        self._round += 1
        self._from_first(f"dealt/{self._round}", record, lambda: self._take_leftovers(record), write)
        self._base = parts.Base.of(record)
        return rounds.open_blocks(record)[self.team.rank :: self.team.size]

    def gather(self, record: Record, write: Write) -> bool:
        """Write the parts; rank 0 takes them in."""
        name = f"measured/{self._round}"
        if not self.main:
            write()
            self.team.post(f"{name}/{self.team.rank}", parts.digest(self.file))
        self._from_first(f"gathered/{self._round}", record, lambda: self._take_parts(record, name), write)
        return True

    def write(self, record: Record) -> None:
        """Write the file, or the part."""
        if self.main:
            super().write(record)
        elif self._base is not None and not record.attrs["complete"]:
            parts.write(self.file, record, self._base, self.team.rank + 1, self.team.size)

    def _from_first(self, key: str, record: Record, make: Callable[[], None], write: Write) -> None:
        """Let rank 0 bring the record forward, and take it over from its file."""
        if self.main:
            make()
            write()
            if rounds.is_open(record):
                self._remove_parts()
            self.team.post(key, parts.digest(self.result))
        else:
            expected = self.team.wait(key)
            self._await(self.result, expected)
            replace(record, results.read(self.result))
        self.team.sync()  # nobody writes that file again before all have it

    def _take_leftovers(self, record: Record) -> None:
        for _, part in self._leftovers(record):
            parts.adopt(record, part)

    def _take_parts(self, record: Record, name: str) -> None:
        for rank in self.team.others:
            if expected := self.team.wait(f"{name}/{rank}"):
                file = parts.path_of(self.result, rank + 1, self.team.size)
                self._await(file, expected)
                parts.adopt(record, parts.read(file))

    def _await(self, path: Path, expected: str) -> None:
        """Wait until a file is seen here as its writer left it: network file systems take their time."""
        for _ in self.team.watching():
            if parts.digest(path) == expected:
                return


class DataShare(TeamShare):
    """All units, of a part of the data: every rank comes to the same numbers, rank 0 writes them."""

    def __init__(self, path: Path | None, team: Team, groups: contextlib.ExitStack):
        super().__init__(path, team)
        self.writes, self._groups = self.main, groups

    def divided(self, problem: Problem) -> Problem:
        """The problem whose sums run over all ranks."""
        if not problem.apart:
            return problem
        mine = problem.replace()
        mine.shard = self._groups.enter_context(sharded.group(self.team, problem.device))
        return mine

    def deal(self, record: Record, write: Write) -> Sequence[range]:
        """Take in what units over ranks left: each reads it, then rank 0 writes."""
        found = self._leftovers(record)
        self.team.sync()
        for _, part in found:
            parts.adopt(record, part)
        if self.main and found:
            write()
            self._remove_parts()
        return rounds.open_blocks(record)

    def write(self, record: Record) -> None:
        """Write the file, on rank 0."""
        if self.main:
            super().write(record)

    def meet(self) -> None:
        """Wait for all ranks, which have to go on from the same state."""
        self.team.sync()


def _stand_in(path: Path | None, team: Team, lost: RankLost) -> None:
    """Say in the file how it ended, where rank 0 is lost: the first of those that are left."""
    if path is None or 0 not in lost.ranks or not path.exists():
        return
    if team.rank == min(rank for rank in range(team.size) if rank not in lost.ranks):
        record = results.read(path)
        record.attrs["exit_code"] = INTERRUPTED
        results.write(path, record)
