"""Reading HDF5 in a process of its own: a file that comes from a stranger cannot harm the one that asks.

Every file is read so, since nothing in a file or beside it tells who wrote it: a downloaded one belongs to the
user like any other. The process is started with the first file (0.1 s, no torch), stays, and forks for each
file (landscape.reading_server); what it answers is checked again (landscape.parcel).
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from landscape import opening
from landscape.atomic import ResultsError, explain
from landscape.limits import FILE_LIMIT

if TYPE_CHECKING:
    from landscape.parcel import Unpacked

SECONDS = 20.0
"""Wall limit for reading one file; a file of the largest size that is allowed takes three."""
_START_SECONDS = 120.0  # on a cluster whose shared disk is busy, importing numpy takes that long
_GRACE_SECONDS = 60.0  # beyond the limit, before the process itself is given up
_ENDINGS = {b"T": "reading it took more than the allowed {} s", b"C": "it crashed the reader"}
_FROM_COPY = "it is damaged or of another kind: restore it from a copy, or measure again"
_CHANGED = (
    "this is not a file that landscape wrote, or it was changed: restore it from a copy, or measure again"
)
_START = """
import socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
sys.path += sys.argv[3:]
try:
    from landscape import reading_server
except BaseException as error:
    channel.sendall(f"{type(error).__name__}: {error}".encode())
else:
    reading_server.serve(channel, float(sys.argv[2]))
"""


def read(path: Path) -> Unpacked:
    """Return the contents of an HDF5 file: root attributes, and name -> (array, its attributes).

    Raises:
        ResultsError: if it cannot be opened, or if anything in it is damaged, too large, or of a kind that
            we do not write; also where reading it would take too much memory or time.
    """
    start()
    from landscape import parcel  # NumPy, while the process loads its own

    try:
        with opening.regular(path) as file:
            size = opening.size(file)
            if size > FILE_LIMIT:
                raise ResultsError(
                    f"{path} has {size} bytes, more than the allowed {FILE_LIMIT}; "
                    "this is not a file that landscape wrote"
                )
            answer = _answer(file.fileno(), parcel.answer_limit(size))
    except OSError as error:
        raise explain("read", path, error) from error
    if answer[-1:] != b"0":
        reason = _ENDINGS.get(bytes(answer[-1:]), "the reader was killed").format(f"{SECONDS:g}")
        raise ResultsError(f"{path}: {reason}; {_FROM_COPY}")
    try:
        return parcel.unpack(memoryview(answer)[:-1], size)
    except parcel.Damaged as refusal:
        advice = _FROM_COPY if str(refusal).startswith("not a readable") else _CHANGED
        raise ResultsError(f"{path}: {refusal}; {advice}") from refusal


class _Reader:
    """The process, as those who ask see it; processes that are forked from them share it."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        flags = [sys.executable, "-I", "-S", "-c", _START, str(theirs.fileno()), str(SECONDS), *_roots()]
        # one thread: it forks. No plugins: libhdf5 would load code that a file asks for.
        surroundings = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        surroundings["HDF5_PLUGIN_PRELOAD"] = "::"
        with theirs:
            self.process = subprocess.Popen(
                flags,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | surroundings,
                cwd="/",
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for those who ask
            )
        self.owner = os.getpid()
        self.is_ready = False

    def require_ready(self) -> None:
        """Wait until it has loaded what it needs.

        Raises:
            OSError: if it has not.
        """
        if self.is_ready:
            return
        self.channel.settimeout(_START_SECONDS)
        said = self.channel.recv(1000)
        self.channel.settimeout(None)
        if said != b"+":
            raise OSError(f"the process that reads it could not be started ({said.decode(errors='replace')})")
        self.is_ready = True

    def stop(self) -> None:
        self.channel.close()
        if self.owner == os.getpid():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)  # it ends when its channel does
            self.process.kill()
            self.process.wait()
        self.process.returncode = (
            self.process.returncode or 0
        )  # of a parent's child nothing is to be collected


_reader: _Reader | None = None
_lock = threading.Lock()


def start() -> None:
    """Start the process now, so that it is there when the first file is to be read."""
    with contextlib.suppress(OSError):  # reading a file says what is wrong
        _started()


def _started() -> _Reader:
    global _reader  # noqa: PLW0603  (one for all who ask)
    with _lock:
        if _reader is None:
            _reader = _Reader()
        return _reader


def _answer(file: int, limit: int) -> bytearray:
    """Hand an open file to the process and return what it says, with its last byte on how it went."""
    for attempt in range(2):
        reader = _started()
        try:
            with _lock:
                reader.require_ready()
            return _asked(reader, file, limit)
        except (BrokenPipeError, ConnectionError) as error:
            # somebody killed it between two files
            _discard(reader)
            if attempt:
                raise OSError(f"the process that reads it has ended ({error})") from error
        except BaseException:
            _discard(reader)
            raise
    raise OSError("the process that reads it could not be started")


def _asked(reader: _Reader, file: int, limit: int) -> bytearray:
    taken, given = os.pipe()
    try:
        try:
            socket.send_fds(reader.channel, [b"?"], [file, given])
        finally:
            os.close(given)
        return _until_end(taken, limit)
    finally:
        os.close(taken)


def _until_end(pipe: int, limit: int) -> bytearray:
    found, deadline = bytearray(), time.monotonic() + SECONDS + _GRACE_SECONDS
    waiting = select.poll()  # select() knows only the first 1024 descriptors
    waiting.register(pipe, select.POLLIN)
    while len(found) <= limit:
        if not waiting.poll(max(0.0, 1e3 * (deadline - time.monotonic()))):
            raise TimeoutError(
                f"the process that reads it has not answered for {SECONDS + _GRACE_SECONDS:g} s"
            )
        piece = os.read(pipe, 1 << 20)
        if not piece:
            return found
        found += piece
    return bytearray(b"C")  # more than any honest answer


def _discard(reader: _Reader) -> None:
    global _reader  # noqa: PLW0603
    with _lock:
        if _reader is reader:
            _reader = None
    reader.stop()


def _roots() -> list[str]:
    """Return where the modules that it needs are found: nothing else can be imported there."""
    origins = [importlib.util.find_spec(name) for name in ("numpy", "h5py", "landscape")]
    files = [Path(found.origin) for found in origins if found is not None and found.origin]
    return list(dict.fromkeys(str(file.absolute().parent.parent) for file in files))


def _at_end() -> None:
    if _reader is not None:
        _reader.stop()


def _after_fork() -> None:
    global _lock, _reader  # noqa: PLW0603
    _lock = threading.Lock()  # the thread that held it is not here
    if _reader is not None:
        _reader.process.returncode = 0  # not our child: nothing to collect
        if not _reader.is_ready:  # its first word is for the parent
            _reader.channel.close()
            _reader = None


atexit.register(_at_end)
os.register_at_fork(after_in_child=_after_fork)
