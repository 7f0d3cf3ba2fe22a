"""Processes of this machine and others, told apart for good: a number alone is used again and again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Any


def this() -> dict[str, Any]:
    """Return what this process is known by: host, pid, and when it started (None where that cannot be told)."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


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
    return bool(who) and who["host"] == socket.gethostname() and who["started"] is not None
