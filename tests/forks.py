"""Run a function in a child process that may hang, crash or be killed."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable


def start(function: Callable[[], int | None]) -> int:
    """Fork; the child calls `function` and exits with what it returns (99 if it raises). Return its number."""
    with warnings.catch_warnings():
        # From Python 3.12 on a fork next to threads warns; the child uses none of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 99
    try:
        code = function() or 0
    except BaseException as error:  # noqa: BLE001
        os.write(2, f"child: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def run(function: Callable[[], int | None], seconds: float = 20.0) -> int | str:
    """Return the exit code of `function` in a child, -number of a signal that ended it, or "hang"."""
    child = start(function)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    kill(child)
    return "hang"


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
