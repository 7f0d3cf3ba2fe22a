"""One process per result: a lock file beside it, which says who holds it.

`<file>.lock` is locked by `lockf` and holds a note in JSON. The system lifts such a lock when its process ends,
killed or not, and forked workers do not inherit it (those of `flock` they keep). It does so whenever the process
closes *any* descriptor of the file; hence a file of its own, and a table of what this process holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from landscape import atomic
from landscape.errors import Refused
from landscape.provenance import command_line

_TAKEN = {errno.EACCES, errno.EAGAIN}
# Network and FUSE file systems may offer no locks: there the note alone is believed.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_NOTE_LIMIT = 1 << 16
_SECONDS_BETWEEN_LOOKS = 0.2
_OURS: dict[str, int] = {}  # lock files that this process holds, and its number (a forked child holds none)
_GUARD = threading.Lock()


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: its name.
        boot: of its kernel's run, empty where that is not known.
        pid: number of the process.
        started: when the process started, in the kernel's ticks; empty where that is not known.
        time: when the lock was taken, UTC.
        command: the command line.
    """

    host: str
    boot: str
    pid: int
    started: str
    time: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command}), since {self.time}"


def lock_path(path: Path) -> Path:
    """Return the lock file of a result."""
    return path.with_name(f"{path.name}.lock")


@contextlib.contextmanager
def held(
    path: Path | None, *, wait: bool = False, tell: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold the lock of a result meanwhile.

    A lock whose process runs no more is free at once. One that was taken on another machine, whose
    processes cannot be seen from here, is never broken.

    Args:
        path: the result; None locks nothing.
        wait: wait for the lock, in place of refusing.
        tell: told whom it waits for.

    Raises:
        Refused: if another process holds it, which is named.
        ResultsError: if there is no place for the lock file.
    """
    if path is None:
        yield
        return
    place, told = lock_path(path), ""
    while isinstance(found := _try(place), str):
        if not wait:
            raise Refused(f"{path} is being measured by {found}")
        if tell is not None and found != told:
            tell(f"waiting for {found}")
        told = found
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    try:
        yield
    finally:
        _release(place, found)


def _try(place: Path) -> int | str:
    """Return the descriptor of the lock, or who holds it and what to do."""
    key = _key(place)
    with _GUARD:
        if _OURS.get(key) == os.getpid():
            return "this process itself; measure one thing after the other, or under another name (out=...)"
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            found = _open(place)
        except OSError as error:
            raise atomic.explain("write in", place.parent, error) from error
        if isinstance(found, int):
            _OURS[key] = os.getpid()
        return found


def _open(place: Path) -> int | str:
    while True:
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            obstacle = _obstacle(descriptor, place)
            if obstacle is None and _is_at(descriptor, place):
                _write_note(descriptor)
                kept, descriptor = descriptor, -1
                return kept
            if obstacle is not None:
                return obstacle
        finally:  # not ours, or deleted by its last holder when we had just opened it
            if descriptor >= 0:
                os.close(descriptor)


def _obstacle(descriptor: int, place: Path) -> str | None:
    """Say who holds the lock; None once it is locked for us."""
    locks = True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return (
                f"{_read_note(descriptor) or 'another process'}; wait for it (wait=True, --wait), or stop it"
            )
        if error.errno not in _NO_LOCKS:
            raise
        locks = False
    holder = _read_note(descriptor)
    if holder is None:
        return None
    here = _self()
    if holder.host != here.host and (not holder.boot or holder.boot != here.boot):
        return (
            f"{holder}, or was, if that was killed: this cannot be seen from {here.host}. Wait for it (wait=True, "
            f"--wait), or if it runs no more, delete {place}"
        )
    if not locks and _runs(holder, here):
        return f"{holder}; wait for it (wait=True, --wait), or stop it"
    return None


def _release(place: Path, descriptor: int) -> None:
    with _GUARD:
        if _OURS.get(_key(place)) != os.getpid():  # a forked child on its way out
            return
        del _OURS[_key(place)]
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)  # before it is unlocked: nobody else's can be at this place yet
        os.close(descriptor)


def _key(place: Path) -> str:
    return str(place.parent.resolve() / place.name)


def _is_at(descriptor: int, place: Path) -> bool:
    """Whether the open file is the one at this place."""
    try:
        return os.path.samestat(os.fstat(descriptor), place.stat())
    except FileNotFoundError:
        return False


def _write_note(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(dataclasses.asdict(_self())).encode(), 0)


def _read_note(descriptor: int) -> Holder | None:
    """Return who wrote the note; None where it is empty or cut short."""
    try:
        found = Holder(**json.loads(os.pread(descriptor, _NOTE_LIMIT, 0)))
        return dataclasses.replace(found, pid=int(found.pid))
    except (ValueError, TypeError, RecursionError):
        return None


def _self() -> Holder:
    return Holder(
        host=socket.gethostname(),
        boot=_text("/proc/sys/kernel/random/boot_id").strip(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command_line(),
    )


def _runs(holder: Holder, here: Holder) -> bool:
    """Whether that process of this machine lives, and is no later one with its number."""
    if holder.boot != here.boot or holder.pid == here.pid:
        return False
    return atomic.is_alive(holder.pid) and _started(holder.pid) in {"", holder.started}


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did (field 22 of proc(5)'s stat)."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
