"""The ranks of one job: who is there, who is gone, and what they tell each other, over the launcher's store.

A launcher such as torchrun starts one process per rank and says so in the environment. Each rank beats, in a
thread of its own, so that one that works for hours can be told from one that died or was stopped. Nothing here is a
collective: a rank may always leave.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist

from landscape import processes
from landscape.errors import RankLost, Refused

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TIMEOUT = 120.0  # seconds of silence after which a rank is lost
_BEAT = 0.25  # seconds between two beats
_SURE = 4.0  # seconds of silence that tell, once something has failed, whose fault it was
_GRACE = 2.0  # seconds that who keeps the store gives the others to read why it goes
_SHORT, _LONG = 2e-4, 0.02  # seconds between two looks, at first and after a while

_store: Store | None = None  # of this process: a launcher's can be joined once
_joined = 0
_team: Team | None = None


def place() -> tuple[int, int] | None:
    """Return (rank, number of ranks) of this process, None where it is alone.

    Raises:
        Refused: if the environment names ranks that cannot be.
    """
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    else:
        texts = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
        if None in texts:
            return None
        try:
            rank, size = (int(text or "") for text in texts)
        except ValueError:
            rank, size = 0, 0
        if not 0 <= rank < size:
            raise Refused(
                f"the environment says RANK={texts[0]}, WORLD_SIZE={texts[1]}; allowed is 0 <= RANK < WORLD_SIZE. "
                "Start ranks with torchrun, or measure alone: shard='none', --shard none"
            )
    return (rank, size) if size > 1 else None


def join(timeout: float = TIMEOUT) -> Team | None:
    """Join the other ranks of this job, as a context; None where this process is alone.

    Args:
        timeout: seconds of silence after which a rank is lost.

    Raises:
        Refused: if the launcher's store cannot be reached.
        ValueError: if the timeout is too short to tell anything.
    """
    global _joined, _team  # noqa: PLW0603  (ranks agree on names by counting)
    found = place()
    if found is None:
        return None
    if not timeout >= 2 * _BEAT:
        raise ValueError(f"timeout is {timeout}; allowed is a number of seconds >= {2 * _BEAT}")
    _joined += 1
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    job = _named(f"landscape/{attempt}", _job_store(timeout))
    _team = Team(*found, job, _named(str(_joined), job), timeout)
    return _team


def use_own_device() -> None:
    """Make "cuda" mean a GPU of its own for each rank of this machine, as far as they go round."""
    local = os.environ.get("LOCAL_RANK", "")
    if local.isdecimal() and place() is not None and torch.cuda.is_available():
        torch.cuda.set_device(int(local) % torch.cuda.device_count())


def current() -> Team | None:
    """Return the ranks that were joined last, None where this process is alone."""
    return _team


def _named(name: str, store: Store) -> Store:
    """The same store under names that begin so."""
    from torch._C._distributed_c10d import PrefixStore  # not every build of torch has it

    return PrefixStore(name, store)


def _job_store(timeout: float) -> Store:
    global _store  # noqa: PLW0603
    if _store is None:
        try:
            if dist.is_initialized():
                _store = dist.distributed_c10d._get_default_store()
            else:
                from datetime import timedelta

                from torch.distributed.rendezvous import rendezvous

                _store = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))[0]
        except (RuntimeError, ValueError) as error:
            raise Refused(
                f"RANK and WORLD_SIZE are set, but the other ranks cannot be reached: {_line(error)[:200]}. Start "
                "them with torchrun, or measure alone: shard='none', --shard none"
            ) from error
    return _store


class Team:
    """The ranks that measure together; a context that beats meanwhile.

    Attributes:
        rank: of this process.
        size: how many ranks there are.
        timeout: seconds of silence after which a rank is lost.
        leaving: whether this rank is on its way out, so that a further signal means nothing.
    """

    def __init__(self, rank: int, size: int, job: Store, store: Store, timeout: float):
        self.rank, self.size, self.timeout, self.leaving = rank, size, timeout, False
        self._job, self._store, self._count, self._stop = job, store, 0, threading.Event()
        self._seen = dict.fromkeys(self.others, ("", 0))  # the last beat, and when, in beats of ours
        self._syncs = 0
        self._looked = -1
        self._who: dict[int, dict[str, Any]] = {}
        self._thread = threading.Thread(target=self._beat, name="landscape-beat", daemon=True)

    @property
    def others(self) -> list[int]:
        """The other ranks."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def __enter__(self) -> Self:
        self.post(f"who/{self.rank}", json.dumps(processes.this()))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._part()
            else:
                self.leave(error)
                self._see_off()
        finally:
            self._stop.set()
            self._thread.join()

    def post(self, key: str, text: str = "") -> None:
        """Tell the others."""
        try:
            self._store.set(key, text)
        except RuntimeError as error:
            raise self._unreachable(error) from error

    def wait(self, key: str) -> str:
        """Return what another rank posts, once it has.

        Raises:
            RankLost: if a rank dies, stops or leaves meanwhile.
        """
        try:
            for _ in self.watching():
                if (text := self._read(key)) is not None:
                    return text
        except RankLost:  # who left may have told this first
            if (text := self._read(key)) is not None:
                return text
            raise
        raise AssertionError  # watching ends only by raising

    def sync(self) -> None:
        """Wait until every rank is here."""
        self.exchange("")

    def exchange(self, text: str) -> list[str]:
        """Return what each rank says at this point, in their order."""
        self._syncs += 1
        name = f"sync/{self._syncs}"
        self.post(f"{name}/{self.rank}", text)
        return [self.wait(f"{name}/{rank}") for rank in range(self.size)]

    def watching(self) -> Iterator[None]:
        """Yield, ever less often, as long as all other ranks are there.

        Raises:
            RankLost: naming the one that is not.
        """
        pause = _SHORT
        while True:
            yield
            self._watch()
            time.sleep(pause)
            pause = min(1.2 * pause, _LONG)

    def store_for(self, purpose: str) -> Store:
        """The launcher's store, under a name of its own."""
        return _named(purpose, self._store)

    def leave(self, error: BaseException) -> None:
        """Tell the others that this rank goes, and why."""
        self.leaving = True
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        kind = "interrupted" if interrupted else "lost" if isinstance(error, RankLost) else "failed"
        with contextlib.suppress(RuntimeError, RankLost):
            if self._read(f"left/{self.rank}") is None:
                self.post(f"left/{self.rank}", json.dumps([kind, _line(error)]))

    def lost(self, error: BaseException) -> RankLost | None:
        """Find out whether `error` came of another rank's end, within the seconds that a launcher leaves us."""
        self.leaving = True
        if isinstance(error, RankLost):
            return error
        if isinstance(error, KeyboardInterrupt):
            self.leave(error)
        elif not isinstance(error, RuntimeError):
            return None
        end = self._count + _SURE / _BEAT
        while True:
            try:
                self._notice()
                if found := self._gone() or self._failed() or self._silent(_SURE):
                    return found
                if all(self._read(f"left/{rank}") is not None for rank in self.others):
                    return None
            except RankLost as unreachable:
                return None if isinstance(error, KeyboardInterrupt) else unreachable
            if self._count > end + 2 or not self._thread.is_alive():
                return None
            time.sleep(_LONG)

    def first_to_tell(self) -> bool:
        """Whether no rank has told the user yet why the job ends."""
        try:
            return bool(self._job.add("told", 1) == 1)
        except RuntimeError:
            return True

    # --- who is there -----------------------------------------------------------------------------

    def _beat(self) -> None:
        while True:
            self._count += 1
            try:
                self._store.set(f"beat/{self.rank}", str(self._count))
            except RuntimeError:  # the main thread meets the same at its next look
                return
            if self._stop.wait(_BEAT):
                return

    def _watch(self) -> None:
        if self._count == self._looked and self._thread.is_alive():
            return
        self._looked = self._count
        self._notice()
        if found := self._failed() or self._gone() or self._silent(self.timeout):
            self.leaving = True
            raise found

    def _notice(self) -> None:
        """Note whose beat has gone on."""
        for rank, (last, _) in self._seen.items():
            beat = self._read(f"beat/{rank}") or ""
            if beat != last:
                self._seen[rank] = beat, self._count

    def _silent(self, seconds: float) -> RankLost | None:
        """Those without a beat in that time, counted in beats of ours: a stopped process sees no time pass."""
        left = {rank for rank in self.others if self._read(f"left/{rank}") is not None}
        quiet = [
            r for r, (_, at) in self._seen.items() if (self._count - at) * _BEAT > seconds and r not in left
        ]
        if not quiet:
            return None
        if never := [rank for rank in quiet if not self._seen[rank][0]]:
            return RankLost(
                f"{self._named(never)} did not arrive within {seconds:g} s; every rank has to make the same "
                "measurements (or measure alone: shard='none', --shard none)",
                never,
            )
        self.leaving = True
        self._end(quiet)
        return RankLost(f"{self._named(quiet)} stopped: no sign of life for {seconds:g} s", quiet)

    def _gone(self) -> RankLost | None:
        """Those whose process is no more, where that can be seen from here."""
        gone = [rank for rank in self.others if processes.is_gone(self._process(rank))]
        gone = [r for r in gone if self._read(f"left/{r}") is None and self._read(f"gone/{r}") is None]
        return RankLost(f"{self._named(gone)} died", gone) if gone else None

    def _failed(self) -> RankLost | None:
        for rank in self.others:
            kind, text = json.loads(self._read(f"left/{rank}") or '["", ""]')
            if kind == "failed":
                return RankLost(f"rank {rank} failed: {text}", [rank])
            if kind == "lost":
                return RankLost(text, [])
            if kind == "interrupted" and not self.leaving:
                raise KeyboardInterrupt
        return None

    def _end(self, ranks: Iterable[int]) -> None:
        """End processes of this job that are stopped: they must not wake up and write, nor hold up the launcher."""
        for rank in ranks:
            processes.end(self._process(rank))

    def _part(self) -> None:
        """Wait, at the end, for who writes the file; and he for the others, who may need his store."""
        if self.rank == 0:
            self.post("end")
            with contextlib.suppress(RankLost):
                for rank in self.others:
                    self.wait(f"gone/{rank}")
            return
        self.wait("end")
        self._stop.set()
        self._thread.join()
        self.post(f"gone/{self.rank}")

    def _see_off(self) -> None:
        """Where a rank keeps the store, it lets the others read why it goes."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        end = self._count + _GRACE / _BEAT
        with contextlib.suppress(RankLost):
            if self.rank:
                self.post(f"gone/{self.rank}")
            while not self.rank and self._count < end and self._thread.is_alive():
                if all(
                    self._read(f"gone/{r}") is not None or processes.is_gone(self._process(r))
                    for r in self.others
                ):
                    return
                time.sleep(_LONG)

    def _process(self, rank: int) -> dict[str, Any]:
        """What a rank is known by; empty as long as it has not come."""
        if rank not in self._who and (told := self._read(f"who/{rank}")):
            self._who[rank] = json.loads(told)
        return self._who.get(rank, {})

    def _named(self, ranks: Iterable[int]) -> str:
        told = [(rank, self._process(rank)) for rank in ranks]
        return ", ".join(
            f"rank {rank}" + (f" (process {who['pid']} on {who['host']})" if who else "")
            for rank, who in told
        )

    def _read(self, key: str) -> str | None:
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> RankLost:
        return RankLost(
            f"the launcher, or the rank that others are reached by, is gone ({_line(error)[:120]})", [0]
        )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {text}"
        if text and not isinstance(error, RankLost | Refused)
        else (text or type(error).__name__)
    )
