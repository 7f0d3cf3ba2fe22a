"""Lets go wrong what can, one thing after the other, and prints what came of it.

    python tests/faults.py

Each fault meets a measurement in the middle. What was written before must stay readable, the message must say what
happened, and what a later run comes to must be what an uninterrupted one gives, bit for bit. Faults that take a mount
or another user are left out where that is not possible, and say so.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork after a parallel operation hangs for ever

import contextlib
import errno
import functools
import io
import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import every
import forks
import kills
import numpy as np
import torch
from landscape_cli import app

import landscape
from landscape import lock, results
from landscape.atomic import ResultsError
from landscape.errors import Refused
from landscape.metrics import Sharpness

# A solve before the first unit, an array of parameter length beside the file, and two searches with states.
METRIC = Sharpness(definition="ball", epsilon=(0.05, 0.1), steps=4, restarts=2)
_CRASHED = 7
_NOBODY = 65534


class SkippedError(Exception):
    """A fault that cannot be made here, and why."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: in words.
        run: lets it happen in a directory, and says what came of it.
        mounts: whether it changes the system (mounts, attributes): not for a suite of tests.
    """

    name: str
    run: Callable[[Path], str]
    mounts: bool = False


FAULTS: list[Fault] = []


def fault(name: str, *, mounts: bool = False) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    """Enter a function into the list."""

    def enter(run: Callable[[Path], str]) -> Callable[[Path], str]:
        FAULTS.append(Fault(name, run, mounts))
        return run

    return enter


def measured(path: Path) -> Any:
    """Measure, or go on."""
    return landscape.measure(METRIC, every.problem(), out=path, seed=3)


@functools.cache
def uninterrupted() -> Any:
    """What it must come to."""
    return landscape.measure(METRIC, every.problem(), seed=3)


def expect(true: bool, words: str) -> None:
    """Fail in words."""
    if not true:
        raise AssertionError(words)


def still_good(path: Path) -> None:
    """What there is can be read, and the next run ends as if nothing had happened."""
    if path.exists():
        results.read(path)
    expect(not every.differing(uninterrupted(), measured(path)), "the resumed result is another one")
    expect(not every.differing(uninterrupted(), landscape.open(path)), "the stored result is another one")
    left = [
        p.name for p in path.parent.rglob("*") if p.name.endswith((".tmp", ".lock")) or ".state-" in p.name
    ]
    expect(not left, f"there remains {left}")


def in_child(work: Callable[[], int | None]) -> int | str:
    """Run in a process of its own, which writes after every step; return its exit code."""

    def child() -> int:
        torch.set_num_threads(1)
        kills.eagerly()
        return work() or 0

    return forks.run(child, 60.0)


def refused_with(path: Path, words: str) -> int:
    """Measure in vain; 0 if the message says why, as one line."""
    try:
        measured(path)
    except ResultsError as error:
        return 0 if words in str(error) and "\n" not in str(error) and ";" in str(error) else 1
    return 2


# --- signals ----------------------------------------------------------------------------------------------


@fault("SIGKILL at five moments")
def sigkill(place: Path) -> str:
    tally = kills.campaign(5, 0, ["sharpness"])
    expect(not tally.faults, "; ".join(tally.faults))
    return "resumed, bit-identical"


def _signalled(place: Path, number: int) -> str:
    """The command line gets a signal while it solves; then it goes on with fewer digits to find."""
    said, path = place / "said", place / "adaptive_trace.h5"
    words = f"measure --metric adaptive_trace --curvature hessian --method hutchinson --rtol 0 --out {place}".split()

    def command() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
        torch.set_num_threads(1)
        kills.eagerly()
        with said.open("w") as file, redirect_stderr(file), redirect_stdout(io.StringIO()):
            code: int = app.app.main(words, standalone_mode=False)
        return code

    child = forks.start(command)
    end = time.monotonic() + 60.0
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    expect(code == 130, f"exit code {code}: {said.read_text()}")
    expect("run the same command again to go on" in said.read_text(), said.read_text())
    expect(results.read(path).attrs["exit_code"] == 130, "the file does not say so")
    expect(not lock.lock_path(path).exists(), "the lock remains")
    return "exit code 130, says how to go on; the file says so too"


@fault("SIGTERM to the command line")
def sigterm(place: Path) -> str:
    return _signalled(place, signal.SIGTERM)


@fault("SIGINT (Ctrl-C) to the command line")
def sigint(place: Path) -> str:
    return _signalled(place, signal.SIGINT)


# --- crashes and failing calls of the system ---------------------------------------------------------------


@contextlib.contextmanager
def broken(call: str, at: int, act: Callable[[], None]) -> Iterator[None]:
    """Let a function of `os` act otherwise at its `at`-th call."""
    real, count = getattr(os, call), 0

    def instead(*words: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            act()
        return real(*words, **named)

    setattr(os, call, instead)
    try:
        yield
    finally:
        setattr(os, call, real)


def _crashes(place: Path, call: str) -> str:
    """The process ends without a trace at one of its calls, each later than the one before."""
    path = place / "sharpness.h5"
    for at in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89):

        def work(at: int = at) -> int:
            with broken(call, at, lambda: os._exit(_CRASHED)):
                measured(path)
            return 0

        code = in_child(work)
        expect(code in {0, _CRASHED}, f"a resumed run ended with {code}")
        if path.exists():
            results.read(path)
        if code == 0:
            break
    expect(code == 0, "it does not get on")
    still_good(path)
    return f"at calls up to {at}: old or new file whole; resumed, bit-identical"


@fault("crash between writing and flushing")
def crash_fsync(place: Path) -> str:
    return _crashes(place, "fsync")


@fault("crash between flushing and renaming")
def crash_replace(place: Path) -> str:
    return _crashes(place, "replace")


def _errors(place: Path, number: int, words: str) -> str:
    """Writing, flushing and renaming fail, early and late."""
    for call in ("fsync", "replace"):
        for at in (1, 3, 7, 20):
            path = place / f"{call}-{at}" / "sharpness.h5"

            def fail() -> None:
                raise OSError(number, os.strerror(number))

            def work(call: str = call, at: int = at, path: Path = path) -> int:
                with broken(call, at, fail):
                    return refused_with(path, words)

            code = in_child(work)
            expect(code == 0, f"{call} {at}: ended with {code}")
            still_good(path)
    return f'told ("{words}"), old file whole; resumed, bit-identical'


@fault("full disk (ENOSPC), early and late")
def no_space(place: Path) -> str:
    return _errors(place, errno.ENOSPC, "the disk is full")


@fault("quota (EDQUOT), early and late")
def no_quota(place: Path) -> str:
    return _errors(place, errno.EDQUOT, "quota is used up")


@fault("input/output error (EIO), early and late")
def io_error(place: Path) -> str:
    return _errors(place, errno.EIO, "input/output error")


@fault("limit on file sizes (RLIMIT_FSIZE)")
def file_limit(place: Path) -> str:
    path = place / "sharpness.h5"
    _first_part(path)

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
        return refused_with(path, "limit on file sizes")

    expect(in_child(work) == 0, "not told")
    still_good(path)
    return "told, old file whole; resumed, bit-identical"


def _first_part(path: Path) -> None:
    """Measure until the first search is done."""

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        landscape.measure(METRIC, every.problem(), out=path, seed=3, progress=stop)
    expect(bool(results.read(path)["done"].sum() == 1), "one of two searches should be done")


# --- places that cannot be written ---------------------------------------------------------------------------


def _unwritable(path: Path, words: str, *, as_nobody: bool = False) -> str:
    before = {p.name: p.read_bytes() for p in path.parent.glob("*") if p.is_file()}

    def work() -> int:
        if as_nobody and os.getuid() == 0:
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
        return refused_with(path, words)

    code = in_child(work)
    expect(code == 0, f"not told: {code}")
    expect(
        before == {p.name: p.read_bytes() for p in path.parent.glob("*") if p.is_file()}, "something changed"
    )
    return f'told at the start ("{words}"), nothing changed; resumed, bit-identical'


@fault("directory without permission")
def no_permission(place: Path) -> str:
    path = place / "run" / "sharpness.h5"
    _first_part(path)
    for directory in (place, path.parent):
        directory.chmod(0o755)
    path.parent.chmod(0o555)
    try:
        said = _unwritable(path, "permission denied", as_nobody=True)
    finally:
        path.parent.chmod(0o755)
    still_good(path)
    return said


@fault("immutable directory (chattr +i)", mounts=True)
def immutable(place: Path) -> str:
    path = place / "run" / "sharpness.h5"
    _first_part(path)
    _system("chattr", "+i", path.parent)
    try:
        said = _unwritable(path, "not permitted")
    finally:
        _system("chattr", "-i", path.parent)
    still_good(path)
    return said


@fault("file system remounted read-only", mounts=True)
def read_only(place: Path) -> str:
    with _mounted(place, "-t", "tmpfs", "-o", "size=20m", "tmpfs") as there:
        path = there / "sharpness.h5"
        _first_part(path)
        _system("mount", "-o", "remount,ro", there)
        said = _unwritable(path, "read-only")
        _system("mount", "-o", "remount,rw", there)
        still_good(path)
    return said


@fault("full file system (tmpfs of 300 kB)", mounts=True)
def full(place: Path) -> str:
    with _mounted(place, "-t", "tmpfs", "-o", "size=300k", "tmpfs") as there:
        path = there / "sharpness.h5"
        _first_part(path)
        filler = there / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            for _ in range(400):
                file.write(b"x" * 1024)
                file.flush()
        expect(in_child(lambda: refused_with(path, "the disk is full")) == 0, "not told")
        results.read(path)
        filler.unlink()
        still_good(path)
    return "told, old file whole; resumed, bit-identical"


@fault("power cut (copies of a mounted disk at random moments)", mounts=True)
def power_cut(place: Path) -> str:
    """An ext4 on a file, copied while measurements are written to it; each copy is what a cut leaves."""
    disk = place / "disk"
    with disk.open("wb") as file:
        file.truncate(48 << 20)
    _system("mkfs.ext4", "-q", "-F", disk)
    whole, count = uninterrupted(), 0

    def work() -> None:
        kills.eagerly()
        measured(place / "mounted" / "run" / "sharpness.h5")

    with _mounted(place, "-o", "loop,noauto_da_alloc,commit=1", disk) as there:
        for moment in np.random.default_rng(0).uniform(0.05, 1.0, 12):
            shutil.rmtree(there / "run", ignore_errors=True)
            (there / "run").mkdir()
            os.sync()
            child = forks.start(work)
            time.sleep(float(moment))
            copy = place / "copy"
            _system("cp", "--sparse=always", disk, copy)
            os.waitpid(child, 0)
            with _mounted(place, "-o", "loop", copy, name="after") as after:
                path = after / "run" / "sharpness.h5"
                if path.exists():
                    results.read(path)
                    count += 1
                expect(not every.differing(whole, measured(path)), "the resumed result is another one")
    expect(count > 0, "no copy held a file")
    return f"12 cuts, {count} with a file, all whole; resumed, bit-identical"


@contextlib.contextmanager
def _mounted(place: Path, *words: Any, name: str = "mounted") -> Iterator[Path]:
    there = place / name
    there.mkdir(exist_ok=True)
    _system("mount", *words, there)
    try:
        yield there
    finally:
        _system("umount", there)


def _system(*words: Any) -> None:
    """Run a command of the system.

    Raises:
        SkippedError: if it is not there or not allowed.
    """
    try:
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    except OSError as error:
        raise SkippedError(f"{words[0]}: {error.strerror}") from error
    if done.returncode:
        raise SkippedError(f"{words[0]}: {' '.join(done.stderr.split())[:80]}")


# --- locks --------------------------------------------------------------------------------------------------


@fault("another process measures into the file")
def live_lock(place: Path) -> str:
    path = place / "sharpness.h5"
    _first_part(path)
    before = path.read_bytes()
    with lock.held(path):

        def work() -> int:
            try:
                measured(path)
            except Refused as error:
                return 0 if f"process {os.getppid()}" in str(error) else 1
            return 2

        expect(in_child(work) == 0, "not refused")
        expect(path.read_bytes() == before, "the file changed")
    still_good(path)
    return "refused, naming the process; with --wait it waits"


@fault("its process was killed, a forked worker lives (stale lock)")
def stale_lock(place: Path) -> str:
    path, ready = place / "sharpness.h5", place / "ready"
    _first_part(path)

    def work() -> None:
        with lock.held(path):
            worker = forks.start(signal.pause)
            (place / "number").write_text(str(worker))
            (place / "number").rename(ready)
            signal.pause()

    child = forks.start(work)
    while not ready.exists():
        time.sleep(0.001)
    forks.kill(child)
    expect(lock.lock_path(path).exists(), "there is no lock file")
    try:
        still_good(path)
    finally:
        os.kill(int(ready.read_text()), signal.SIGKILL)
    return "free at once; resumed, bit-identical"


@fault("lock taken on another machine")
def foreign_lock(place: Path) -> str:
    path = place / "sharpness.h5"
    _first_part(path)
    holder = {
        "host": f"not-{socket.gethostname()}",
        "boot": "",
        "pid": 1,
        "started": "",
        "time": "",
        "command": "",
    }
    lock.lock_path(path).write_text(json.dumps(holder))
    try:
        measured(path)
    except Refused as error:
        expect(holder["host"] in str(error) and "delete" in str(error), str(error))
    else:
        raise AssertionError("the lock was broken")
    lock.lock_path(path).unlink()
    still_good(path)
    return "refused, naming machine and process, and what to delete"


# --- damaged files --------------------------------------------------------------------------------------------


def _damages(raw: bytes) -> Iterator[bytes]:
    yield b""
    yield raw[: len(raw) // 2]
    yield raw[:-1]
    for i in range(0, len(raw), max(1, len(raw) // 20)):
        yield raw[:i] + bytes([raw[i] ^ 0xFF]) + raw[i + 1 :]


@fault("damaged result (cut short, bytes changed)")
def damaged_file(place: Path) -> str:
    path = place / "sharpness.h5"
    _first_part(path)
    raw, refused, same = path.read_bytes(), 0, 0
    for bad in _damages(raw):
        path.write_bytes(bad)

        def work() -> int:
            try:
                found = measured(path)
            except (ResultsError, Refused):
                return 3
            return 0 if not every.differing(uninterrupted(), found) else 4

        code = in_child(work)
        expect(code in {0, 3}, f"ended with {code}")
        refused, same = refused + (code == 3), same + (code == 0)
        if code == 3:
            expect(path.read_bytes() == bad, "a file that cannot be read was overwritten")
    path.write_bytes(raw)
    still_good(path)
    return f"{refused} refused and left alone, {same} harmless"


def interrupted(path: Path) -> None:
    """Let the process that measures end without a trace in the middle of a writing."""

    def work() -> int:
        with broken("replace", 12, lambda: os._exit(_CRASHED)):
            measured(path)
        return 0

    expect(in_child(work) == _CRASHED, "it was not interrupted")


@fault("damaged state of an unfinished unit")
def damaged_state(place: Path) -> str:
    path = place / "sharpness.h5"
    interrupted(path)
    states = list((place / ".parts").glob("*.state-*"))
    expect(bool(states), "there is no state")
    for state in states:
        raw = bytearray(state.read_bytes())
        raw[-9] ^= 0xFF
        state.write_bytes(raw)
    still_good(path)
    return "not used: the unit starts again; bit-identical"


@fault("damaged or missing array beside the result")
def damaged_sidecar(place: Path) -> str:
    path = place / "sharpness.h5"
    measured(path)
    beside = place / "sharpness.arrays.safetensors"
    raw = bytearray(beside.read_bytes())
    raw[-9] ^= 0xFF
    beside.write_bytes(raw)
    expect(in_child(lambda: refused_with(path, "is damaged")) == 0, "not told")
    beside.unlink()
    expect(in_child(lambda: refused_with(path, "is missing")) == 0, "not told")
    return "told, with what to do; nothing overwritten"


@fault("temporary files of killed runs")
def leftovers(place: Path) -> str:
    path = place / "sharpness.h5"
    interrupted(path)
    expect(any(p.name.endswith(".tmp") for p in place.rglob("*")), "nothing was left")
    still_good(path)
    return "never read, deleted at the next start"


def outcomes(*, mounts: bool) -> Iterator[tuple[Fault, str, bool]]:
    """Let every fault happen; yield it, what came of it, and whether that is as it must be."""
    for entry in FAULTS:
        if entry.mounts and not mounts:
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                yield entry, entry.run(Path(place)), True
            except SkippedError as reason:
                yield entry, f"not possible here: {reason}", True
            except Exception as error:  # noqa: BLE001  (whatever it is: the list goes on)
                yield entry, f"FAILED: {type(error).__name__}: {error}", False


def main() -> int:
    """Print the list."""
    torch.set_num_threads(1)
    failed = 0
    for entry, outcome, fine in outcomes(mounts=True):
        print(f"{entry.name:60} {outcome}", flush=True)
        failed += not fine
    print(f"{len(FAULTS)} faults, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
