"""Sums over data that several ranks have divided: each adds up its micro-batches, all get the whole sum.

Before the sums themselves, ranks exchange a row of numbers each: whether they got through, what they did, and now
and then a hash of what they did it with. So the failure of one is one message that names it, and ranks that went
different ways say so in place of adding up different things.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from landscape.errors import RankLost, Refused
from landscape.ranks import Team

T = TypeVar("T")

_OK, _FAILED, _NOT_FINITE = 0.0, 1.0, 2.0
_NUMBERS = 3  # that can be added up beside a tensor
_COMPARED_EVERY = 64
_ON_ITS_WAY = 0.5  # seconds
# Ours tells of a rank that is gone; the group's own limit is for what that does not see.
_GROUP_PATIENCE = 3.0


@contextlib.contextmanager
def group(team: Team, device: torch.device) -> Iterator[Shard]:
    """Make the process groups meanwhile; the default one of torch.distributed is used where it is there.

    Args:
        team: the ranks.
        device: where sums lie.
    """
    ours = not dist.is_initialized()
    patience = timedelta(seconds=_GROUP_PATIENCE * team.timeout)
    if ours:
        dist.init_process_group(
            "gloo", store=team.store_for("group"), rank=team.rank, world_size=team.size, timeout=patience
        )
    talk = dist.new_group(backend="gloo", timeout=patience)
    # nccl wants a GPU for each rank; gloo sums what lies on a shared one, by way of the CPU.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", team.size))
    apart = device.type == "cuda" and torch.cuda.device_count() >= local
    sums = dist.new_group(backend="nccl", timeout=patience) if apart else talk
    yield Shard(team, talk, sums)
    # Only now: after a failure a broken group may end the process in its own way.
    if ours:
        dist.destroy_process_group()
    else:
        for one in {talk, sums}:
            dist.destroy_process_group(one)


class Shard:
    """This rank's part of every pass over the data.

    Args:
        team: the ranks.
        talk: process group of a few numbers, on the CPU.
        sums: process group of the sums, on their device.
    """

    def __init__(self, team: Team, talk: Any, sums: Any):
        self.team, self._talk, self._sums = team, talk, sums
        self._calls = 0

    def own(self, pieces: Iterable[T]) -> Iterator[T]:
        """Of all micro-batches, yield this rank's: every so many-th."""
        return itertools.islice(pieces, self.team.rank, None, self.team.size)

    def add(
        self,
        what: str,
        fill: Callable[[], Sequence[float]],
        total: Tensor | None = None,
        *,
        of: Callable[[], Tensor] | None = None,
        finite: bool = False,
    ) -> list[float]:
        """Add up over all ranks.

        Args:
            what: what is done, in words; all ranks must do the same.
            fill: does this rank's part: writes it into `total`, and returns up to three numbers.
            total: summed in place.
            of: what it is done with, which all ranks must have alike; asked for now and then.
            finite: refuse what is not.

        Returns:
            The sums of the numbers.

        Raises:
            RankLost: naming a rank that failed, died or stopped.
            Refused: naming a rank whose part is not finite, or that does something else.
        """
        self._calls += 1
        compared = self._calls & (self._calls - 1) == 0 or self._calls % _COMPARED_EVERY == 0
        row = torch.zeros(3 + _NUMBERS, dtype=torch.float64)
        row[1] = _digest(f"{self._calls} {what} {() if total is None else tuple(total.shape)}".encode())
        failure: Exception | None = None
        try:
            numbers = fill()
            row[3 : 3 + len(numbers)] = torch.tensor(list(numbers), dtype=torch.float64)
            if compared and of is not None:
                row[2] = _digest(of().detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            if finite and total is not None and not bool(total.isfinite().all()):
                row[0] = _NOT_FINITE
        except RankLost:
            raise
        except Exception as error:  # noqa: BLE001  (whatever it is, the others must hear of it)
            failure, row[0] = error, _FAILED
            self.team.post(f"failure/{self._calls}/{self.team.rank}", f"{type(error).__name__}: {error}")
        table = torch.zeros(self.team.size, len(row), dtype=torch.float64)
        table[self.team.rank] = row
        self._reduce(table, self._talk)
        self._judge(table, what, failure)
        if total is not None:
            self._reduce(total, self._sums if total.device.type == "cuda" else self._talk)
        return [float(s) for s in table[:, 3:].sum(dim=0)]

    def _judge(self, table: Tensor, what: str, failure: Exception | None) -> None:
        if failure is not None:
            raise failure
        if failed := _where(table[:, 0] == _FAILED):
            text = " ".join(self.team.wait(f"failure/{self._calls}/{failed[0]}").split())
            raise RankLost(f"rank {failed[0]} failed with its part of the data: {text[:300]}")
        for column, different in ((1, "do different things"), (2, "have different numbers")):
            if odd := _where(table[:, column] != table[0, column]):
                raise Refused(
                    f"rank {odd[0]} and rank 0 {different} ({what}): every rank has to make the same measurements, "
                    "on machines of one type"
                )
        if bad := _where(table[:, 0] == _NOT_FINITE):
            raise Refused(f"{what} is not finite (nan or inf) on the part of the data that rank {bad[0]} has")

    def _reduce(self, tensor: Tensor, among: Any) -> None:
        work = dist.all_reduce(tensor, group=among, async_op=True)
        if work is None:
            return
        try:
            for _ in self.team.watching():
                if work.is_completed():
                    break
        except RankLost as lost:  # who left after this sum has sent its part: it is on its way
            time.sleep(_ON_ITS_WAY)
            if not work.is_completed() or work.exception() is not None:
                raise lost from None
        work.wait()


def _digest(content: Any) -> float:
    """A hash as a whole number that float64 holds exactly."""
    return float(int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "little"))


def _where(flags: Tensor) -> list[int]:
    return [int(rank) for rank in flags.nonzero().flatten()]
