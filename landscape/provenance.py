"""Where a result comes from: versions, command line, and the commit of the user's tree.

Nothing here names a machine or a person, and nothing needs torch.
"""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from landscape._version import __version__

_GIT_SECONDS = 5.0  # a tree on a slow network drive must not hold up a measurement


def provenance(directory: Path | None = None) -> dict[str, Any]:
    """Return what is known about this process, as attributes of a result.

    Args:
        directory: where to ask git; the current directory by default.

    Returns:
        landscape_version, python_version, numpy_version, h5py_version, hdf5_version, machine (such as
        "x86_64"), git_commit and git_dirty (None outside a git tree or without git; files that git does not
        know do not make a tree dirty), command (home directory as ~) and time (UTC).
    """
    commit, dirty = _git_state(directory or Path())
    return {
        "landscape_version": str(__version__),
        "python_version": platform.python_version(),
        "numpy_version": str(np.__version__),
        "h5py_version": str(h5py.version.version),
        "hdf5_version": str(h5py.version.hdf5_version),
        "machine": platform.machine(),
        "git_commit": commit,
        "git_dirty": dirty,
        "command": _command(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _command() -> str:
    """Return the command line, with ~ for the home directory: a result that is passed on names nobody."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    try:
        home = str(Path.home()).rstrip("/")
    except RuntimeError:  # no home directory is known
        return command
    if not home:
        return command
    return re.sub(rf"(?<![^\s'\"=:,]){re.escape(home)}(?![^\s'\"/:,])", "~", command)


def _git_state(directory: Path) -> tuple[str | None, bool | None]:
    commit = _git(directory, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return commit.strip(), None if changes is None else bool(changes.strip())


def _git(directory: Path, *arguments: str) -> str | None:
    """Return what git prints; None if it is not there, fails or takes too long."""
    # --no-optional-locks: a look must not write into the user's repository.
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            capture_output=True,
            check=True,
            timeout=_GIT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")
