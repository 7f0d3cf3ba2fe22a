"""Where a result comes from: versions, command line, and the commit of the user's tree.

Nothing here names a machine or a person, and nothing needs torch.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from landscape._version import __version__

_GIT_SECONDS = 5.0  # a tree on a slow network drive must not hold up a measurement
# --no-optional-locks: a look must not write into the user's repository.
_GIT = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false")
_COMMIT = "# branch.oid "
# A repository's own settings may name programs that `git status` runs on files that changed.
_OWN_FILTERS = (
    *_GIT,
    "config",
    "--show-scope",
    "--name-only",
    "--get-regexp",
    r"^filter\..*\.(clean|process)$",
)
# Nor does a look fetch what a partial clone lacks.
_NO_TRANSPORT = {"GIT_ALLOW_PROTOCOL": "none"}


def provenance(directory: Path | None = None) -> dict[str, Any]:
    """Return what is known about this process, as attributes of a result.

    Args:
        directory: where to ask git; the current directory by default.

    Returns:
        landscape_version, python_version, numpy_version, h5py_version, hdf5_version, machine (such as
        "x86_64"), git_commit and git_dirty (None outside a git tree or without git; files that git does not
        know do not make a tree dirty), command (home directory as ~) and time (UTC).
    """
    with asked(directory) as answer:
        return answer()


@contextmanager
def asked(directory: Path | None = None) -> Iterator[Callable[[], dict[str, Any]]]:
    """Ask git, and let it work while the caller does; what is yielded returns what `provenance` does.

    Args:
        directory: where to ask git; the current directory by default.
    """
    with _git_asked(directory or Path()) as state:
        yield lambda: _known(*state())


def _known(commit: str | None, dirty: bool | None) -> dict[str, Any]:
    import h5py

    return {
        "landscape_version": str(__version__),
        "python_version": platform.python_version(),
        "numpy_version": str(np.__version__),
        "h5py_version": str(h5py.version.version),
        "hdf5_version": str(h5py.version.hdf5_version),
        "machine": platform.machine(),
        "git_commit": commit,
        "git_dirty": dirty,
        "command": command_line(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """Return the command line, with ~ for the home directory: a result that is passed on names nobody."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    try:
        home = str(Path.home()).rstrip("/")
    except RuntimeError:  # no home directory is known
        return command
    if not home:
        return command
    return re.sub(rf"(?<![^\s'\"=:,]){re.escape(home)}(?![^\s'\"/:,])", "~", command)


@contextmanager
def _git_asked(directory: Path) -> Iterator[Callable[[], tuple[str | None, bool | None]]]:
    """Start git; yield what waits for the commit and for whether tracked files differ from it.

    None, None if git is not there, fails or takes too long; where it is only slow, the commit is known.
    """
    status = (
        *_GIT, "status", "--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules=dirty",
    )  # fmt: skip
    silent, surroundings = subprocess.DEVNULL, os.environ | _NO_TRANSPORT
    if _runs_programs(directory):
        yield lambda: (_git_commit(directory), None)
        return
    try:
        process = subprocess.Popen(
            status, cwd=directory, stdin=silent, stdout=subprocess.PIPE, stderr=silent, env=surroundings
        )
    except OSError:
        yield lambda: (None, None)
        return
    with process:
        try:
            yield lambda: _git_state(process, directory)
        finally:
            process.kill()


def _runs_programs(directory: Path) -> bool:
    """Whether the repository's own settings, which come with it, name programs that comparing files would run."""
    code, scopes = _printed(_OWN_FILTERS, directory)
    return code > 1 or any(line.startswith(("local", "worktree")) for line in scopes.splitlines())


def _git_state(process: subprocess.Popen[bytes], directory: Path) -> tuple[str | None, bool | None]:
    try:
        printed, _ = process.communicate(timeout=_GIT_SECONDS)
    except subprocess.TimeoutExpired:
        return _git_commit(directory), None
    lines = printed.decode(errors="replace").splitlines()
    commit = "".join(line.removeprefix(_COMMIT) for line in lines if line.startswith(_COMMIT))
    if process.returncode or not re.fullmatch("[0-9a-f]+", commit):  # "(initial)" before the first one
        return None, None
    return commit, any(not line.startswith("#") for line in lines)


def _git_commit(directory: Path) -> str | None:
    code, found = _printed((*_GIT, "rev-parse", "--verify", "HEAD"), directory)
    return None if code else found.strip()


def _printed(command: Sequence[str], directory: Path) -> tuple[int, str]:
    """Return the exit status of a git command, 128 where it is slow or not there, and what it prints."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            capture_output=True,
            check=False,
            timeout=_GIT_SECONDS,
            stdin=subprocess.DEVNULL,
            env=os.environ | _NO_TRANSPORT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return 128, ""
    return done.returncode, done.stdout.decode(errors="replace")
