"""The reader process: one fork for each file, with little memory, little time, and no way to open anything.

It is started by `landscape.reading` and never has torch loaded. A request is an open file and a pipe for the
answer; the process itself never looks into the file, so that it survives whatever the file does.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket

import h5py
import numpy as np

from landscape import parcel, strict

SPARE_MEMORY = 512 << 20  # bytes beside those that grow with the file
COPIES = 4  # of the file in memory: its bytes, libhdf5's, the arrays, and one to spare
READY = b"+"
DONE, OVERTIME, CRASHED = b"0", b"T", b"C"
_LAST_WORD_SECONDS = 10.0


def serve(channel: socket.socket, seconds: float) -> None:
    """Answer requests until the other side is gone.

    Args:
        channel: brings a byte with two descriptors: the file, and where the answer goes.
        seconds: that the reading of a file may take.
    """
    _warm_up()
    own = _address_space()
    channel.sendall(READY)
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1, 2)
        if not message:
            return
        if len(descriptors) == 2:
            file, reply = descriptors
            _answer(file, reply, seconds, own)


def _warm_up() -> None:
    """Let libhdf5 set up its tables once, not in each child (a quarter of a child's time)."""
    with h5py.File("warm-up", "w", driver="core", backing_store=False) as file:
        file.create_dataset("x", data=np.zeros(1)).attrs["units"] = np.bytes_(b"1")
        file.flush()
        strict.contents(file.id.get_file_image())


def _answer(file: int, reply: int, seconds: float, own: int) -> None:
    """Let a child read the file; end the answer with one byte that says how that went."""
    alive, held = os.pipe()
    try:
        child = os.fork()
    except OSError:
        child = -1
    if child == 0:
        _read_and_leave(file, reply, seconds, own)
    os.close(held)
    os.close(file)
    outcome = CRASHED if child < 0 else _ended(child, alive, seconds)
    os.close(alive)
    with contextlib.suppress(OSError):  # nobody waits for it any more
        if select.select([], [reply], [], _LAST_WORD_SECONDS)[1]:
            os.write(reply, outcome)
    os.close(reply)


def _ended(child: int, alive: int, seconds: float) -> bytes:
    """Wait for the child, whose end closes the pipe `alive`; kill it when its time is up."""
    in_time = bool(select.select([alive], [], [], seconds)[0])
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not in_time or os.waitstatus_to_exitcode(status) == -signal.SIGXCPU:
        return OVERTIME
    return DONE if status == 0 else CRASHED


def _read_and_leave(file: int, reply: int, seconds: float, own: int) -> None:
    code = 1
    try:
        size = os.fstat(file).st_size
        _limit(resource.RLIMIT_AS, own + SPARE_MEMORY + COPIES * size)
        _limit(resource.RLIMIT_CPU, int(seconds) + 1)
        _limit(resource.RLIMIT_FSIZE, 0)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_NOFILE, 0)  # what is open stays so; nothing else can be opened
        for piece in _found(file, size):
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(reply, rest) :]
        code = 0
    finally:
        os._exit(code)


def _found(file: int, size: int) -> list[bytes | memoryview]:
    try:
        image = bytearray()
        while len(image) < size and (piece := os.pread(file, 1 << 26, len(image))):
            image += piece
        return list(parcel.pack(strict.contents(bytes(image))))
    except strict.Refusal as refusal:
        return [parcel.refusal(str(refusal))]
    except Exception as error:  # noqa: BLE001  (whatever h5py raises for it)
        reason = " ".join(str(error).split())[:200]
        return [parcel.refusal(f"not a readable HDF5 file ({type(error).__name__}: {reason})")]


def _limit(what: int, value: int) -> None:
    # what the machine already limits further stays so; systems that know no such limit refuse it
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(what)
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (lower, lower))


def _address_space() -> int:
    """Return the bytes of address space that this process has."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  (cheaper)
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 30
