"""Whole-file writing that a kill, a full disk or a power cut cannot leave half done.

A file is written under a temporary name in its own directory, flushed to the disk, and moved over the old
file. A process that is killed leaves either the old file or the new one, and at most a temporary file that
`clean_leftovers` recognises.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_SUFFIX = ".landscape.tmp"
_LEFTOVER = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-(?P<run>[0-9a-f]{8})\.landscape\.tmp")
# Two machines may share a directory and two processes may, one after the other, have the same number.
_HOST = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
_RUN = secrets.token_hex(4)
_STALE_SECONDS = 86_400.0
_PIECE = 1 << 26  # bytes per call of write: some kernels cut calls above 2 GiB short
# A network or FUSE file system may not offer fsync on a directory; the file itself was flushed.
_NO_DIRECTORY_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}

_ADVICE = {
    errno.ENOSPC: ("the disk is full", "free some space or write to another place, then run again"),
    errno.EDQUOT: ("the disk quota is used up", "delete something or write to another place, then run again"),
    errno.EFBIG: (
        "the file would be larger than the limit on file sizes",
        "raise it (`ulimit -f unlimited`) or write to another file system",
    ),
    errno.EIO: ("the storage reported an input/output error", "check the disk, or use another place"),
    errno.EROFS: ("the file system is mounted read-only", "use a place that can be written"),
    errno.EACCES: ("permission denied", "change the permissions or use another place"),
    errno.EPERM: ("operation not permitted", "the place may be marked immutable; use another one"),
    errno.ENOENT: ("there is no such file or directory", "check the path"),
    errno.ENOTDIR: ("a part of the path is a file, not a directory", "check the path"),
    errno.EEXIST: ("a part of the path is a file, not a directory", "check the path"),
    errno.EISDIR: ("this is a directory, not a file", "name a file, such as trace.h5 in it"),
    errno.ENOTEMPTY: ("this is a directory, not a file", "name a file, such as trace.h5 in it"),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "choose a shorter one"),
    errno.ELOOP: ("the path runs through a circle of symbolic links", "check the path"),
    errno.EMFILE: ("too many files are open", "raise the limit (`ulimit -n`) or open fewer files at once"),
    errno.ESTALE: ("the network file system lost the file", "try again, or use a local disk"),
}


class ResultsError(Exception):
    """A file of results that cannot be read or written: the message says what and what to do."""


def explain(action: str, path: Path, error: OSError) -> ResultsError:
    """Return the error to raise for `error`, met when `action` ("write", "read", …) was tried on `path`."""
    default = (error.strerror or str(error) or type(error).__name__, "check the path and the storage")
    what, advice = _ADVICE.get(error.errno or 0, default)
    return ResultsError(f"cannot {action} {path}: {what}; {advice}")


def replace(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write `pieces` one after the other to `path`, as a whole or not at all.

    Args:
        path: the file; missing directories are made.
        pieces: the contents, in order.

    Raises:
        ResultsError: if the file cannot be written. The old file, if any, is then as it was and no
            temporary file is left. (Only an error of the directory's flush, the last step, comes after the
            move: the new file is then complete and in place, and the message says so.)
    """
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{_RUN}{_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_through(temporary, pieces)
        temporary.replace(path)
    except OSError as error:
        _remove(temporary)
        raise explain("write", path, error) from error
    except BaseException:
        _remove(temporary)
        raise
    try:
        _flush_directory(path.parent)
    except OSError as error:
        reason = explain("flush the directory of", path, error)
        raise ResultsError(f"{reason} (the new file is in place, but a power cut could undo it)") from error


def require_writable(directory: Path) -> None:
    """Find out now whether a file can be written there, not after an hour of measuring.

    Raises:
        ResultsError: if the directory cannot be made or written.
    """
    trial = directory / f".trial.{_HOST}-{os.getpid()}-{_RUN}{_SUFFIX}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_through(trial, [b"landscape"])
    except OSError as error:
        raise explain("write in", directory, error) from error
    finally:
        _remove(trial)


def remove(path: Path) -> None:
    """Delete a file of ours that nothing refers to any more.

    Raises:
        ResultsError: if it exists and cannot be deleted.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise explain("delete", path, error) from error


def clean_leftovers(directory: Path) -> list[Path]:
    """Delete the temporary files that killed processes of ours left in `directory`, and nothing else.

    A temporary file is stale when the process that its name states runs no more on this machine, or, if it
    comes from another machine, when it is older than a day.

    Returns:
        The files that were deleted; what cannot be read or deleted is passed over.
    """
    deleted = []
    for path in _leftovers(Path(directory)):
        with contextlib.suppress(OSError):
            if path.is_symlink() or not path.is_file() or not _is_stale(path):
                continue
            path.unlink()
            deleted.append(path)
    return sorted(deleted)


def _leftovers(directory: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from [path for path in directory.iterdir() if _LEFTOVER.fullmatch(path.name)]


def _is_stale(path: Path) -> bool:
    match = _LEFTOVER.fullmatch(path.name)
    if match is None:
        return False
    if match["host"] == _HOST:
        pid = int(match["pid"])
        if pid == os.getpid():
            return match["run"] != _RUN
        if not is_alive(pid):
            return True
    return time.time() - path.stat().st_mtime > _STALE_SECONDS


def is_alive(pid: int) -> bool:
    """Whether a process with this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _write_through(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            rest = memoryview(piece).cast("B")
            while len(rest):
                written = file.write(rest[:_PIECE])
                rest = rest[written or 0 :]
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_FSYNC:
            raise
    finally:
        os.close(descriptor)
