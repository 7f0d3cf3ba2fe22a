"""Processes of this machine and others, told apart for good: a number alone is used again and again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Any


def this() -> dict[str, Any]:
    """Return what this process is known by: host, pid, where that number holds, and when it started.

    The last two are None where they cannot be told.
    """
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "space": _space(),
        "started": _started(os.getpid()),
    }


def is_gone(who: dict[str, Any]) -> bool:
    """Whether a process of this machine runs no more; False for what cannot be seen from here."""
    return _is_here(who) and _started(who["pid"]) != who["started"]


def end(who: dict[str, Any]) -> None:
    """Kill a process of this machine, and no other that has its number by now."""
    if _is_here(who) and not is_gone(who):
        with contextlib.suppress(OSError):
            os.kill(who["pid"], signal.SIGKILL)


def _started(pid: int) -> str | None:
    """When a process of this machine started; None where there is none, or nothing but its exit status."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_here(who: dict[str, Any]) -> bool:
    return bool(who) and None not in {who["space"], who["started"]} and who["space"] == _space()


def _space() -> str | None:
    """The run of this machine and the container within which numbers of processes hold."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
