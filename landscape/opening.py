"""Opening a file that somebody else may have put there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def regular(path: Path | str) -> BinaryIO:
    """Open a file for reading, unbuffered; nothing that blocks (a pipe, a device) is read from.

    Raises:
        OSError: if it cannot be opened, or is a directory (EISDIR) or no regular file (EINVAL).
    """
    # without O_NONBLOCK, opening a pipe that nobody writes to never returns
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def size(file: BinaryIO) -> int:
    """Return the bytes of an open file."""
    return os.fstat(file.fileno()).st_size
