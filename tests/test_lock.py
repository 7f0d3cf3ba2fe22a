"""One process per result file: who waits, who is told what, and which locks are stale."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import pytest
from click.testing import CliRunner
from landscape_cli import app
from test_run import Draws, small_problem

import landscape
from landscape import lock
from landscape.errors import Refused
from landscape.results import ResultsError


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


_STARTED: list[int] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    while _STARTED:
        with contextlib.suppress(OSError):
            forks.kill(_STARTED.pop())


def holder(path: Path, then: Callable[[], None] = signal.pause) -> int:
    """Start a process that holds the lock of `path`; return its number when it does."""
    ready = path.with_name("ready")

    def child() -> None:
        with lock.held(path):
            ready.write_text("")
            then()

    number = forks.start(child)
    _STARTED.append(number)
    until(ready.exists)
    ready.unlink()
    return number


def free(path: Path) -> bool:
    try:
        with lock.held(path):
            return True
    except Refused:
        return False


def test_a_second_process_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "trace.h5"
    other = holder(path)
    with pytest.raises(Refused, match=rf"trace\.h5 is being measured by process {other} on .*--wait"):
        lock.held(path).__enter__()
    note = json.loads(lock.lock_path(path).read_text())
    assert note["pid"] == other
    assert {"host", "started", "time", "command"} < set(note)
    assert free(tmp_path / "density.h5")
    forks.kill(other)
    assert free(path)
    assert not lock.lock_path(path).exists()


def test_a_lock_is_free_at_once_when_its_process_was_killed_though_a_worker_lives(tmp_path: Path) -> None:
    path, worker = tmp_path / "trace.h5", tmp_path / "worker"

    def with_worker() -> None:
        worker.write_text(str(forks.start(signal.pause)))
        worker.rename(tmp_path / "worker.pid")
        signal.pause()

    ready = tmp_path / "worker.pid"
    other = holder(path, with_worker)
    until(ready.exists)
    assert not free(path)
    forks.kill(other)
    assert lock.lock_path(path).exists()
    assert free(path)
    os.kill(int(ready.read_text()), signal.SIGKILL)  # it lived


def test_a_worker_that_ends_does_not_free_the_lock_of_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "trace.h5"
    with lock.held(path):

        def worker() -> int:
            return 0 if not free(path) else 1

        assert forks.run(worker) == 0
        assert forks.run(lambda: 1 if free(path) else 0) == 0
        assert lock.lock_path(path).exists()

        def unwound() -> int:  # a forked child that leaves the block itself
            lock._release(lock.lock_path(path), 99)
            return 0 if lock.lock_path(path).exists() else 1

        assert forks.run(unwound) == 0
    assert free(path)


def test_waiting_ends_when_the_holder_does_and_names_it(tmp_path: Path) -> None:
    path, told = tmp_path / "trace.h5", []
    other = holder(path)

    def tell(text: str) -> None:
        told.append(text)
        os.kill(other, signal.SIGKILL)

    with lock.held(path, wait=True, tell=tell):
        os.waitpid(other, 0)
    assert len(told) == 1
    assert f"process {other}" in told[0]


def test_processes_that_wait_are_never_inside_together(tmp_path: Path) -> None:
    """The lock file is deleted and made anew all the time meanwhile."""
    path, count = tmp_path / "trace.h5", tmp_path / "count"
    count.write_text("0")

    def child() -> None:
        lock._SECONDS_BETWEEN_LOOKS = 0.0
        for _ in range(40):
            with lock.held(path, wait=True):
                before = int(count.read_text())
                time.sleep(0.0005)
                count.write_text(str(before + 1))

    children = [forks.start(child) for _ in range(4)]
    assert [os.waitpid(number, 0)[1] for number in children] == [0] * 4
    assert count.read_text() == "160"
    assert not lock.lock_path(path).exists()


def test_two_threads_of_a_process_do_not_share_a_lock(tmp_path: Path) -> None:
    path, seen = tmp_path / "trace.h5", []
    with lock.held(path):
        thread = threading.Thread(target=lambda: seen.append(free(path)))
        thread.start()
        thread.join()
        with pytest.raises(Refused, match="this process itself"):
            lock.held(path).__enter__()
        assert forks.run(lambda: 1 if free(path) else 0) == 0  # the attempts did not drop it
    assert seen == [False]


def note(path: Path, **changes: object) -> str:
    with lock.held(path):
        found = json.loads(lock.lock_path(path).read_text())
    text = json.dumps({**found, **changes})
    lock.lock_path(path).write_text(text)
    return text


def test_the_lock_of_another_machine_is_never_broken(tmp_path: Path) -> None:
    path = tmp_path / "trace.h5"
    text = note(path, host="elsewhere", boot="another", pid=1)
    with pytest.raises(Refused, match=r"process 1 on elsewhere.*delete .*trace\.h5\.lock"):
        lock.held(path).__enter__()
    assert lock.lock_path(path).read_text() == text
    lock.lock_path(path).unlink()
    assert free(path)


@pytest.mark.parametrize("left", ["", "{", '{"host": 1}', "[1, 2]", "\x00" * 50])
def test_a_note_that_was_cut_short_is_no_holder(left: str, tmp_path: Path) -> None:
    lock.lock_path(tmp_path / "trace.h5").write_text(left)
    assert free(tmp_path / "trace.h5")


def test_a_renamed_machine_knows_its_own_locks_and_a_rebooted_one_too(tmp_path: Path) -> None:
    path = tmp_path / "trace.h5"
    note(path, host="renamed")
    assert free(path)
    note(path, boot="before")
    assert free(path)


def test_where_the_file_system_offers_no_locks_the_note_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.h5"

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    other = holder(path)
    with pytest.raises(Refused, match=f"process {other}"):
        lock.held(path).__enter__()
    forks.kill(other)
    assert free(path)
    note(path, pid=os.getppid(), started="1")  # an earlier process with that number
    assert free(path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_disk_leaves_nothing_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "trace.h5"

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(ResultsError, match="cannot write in"):
            lock.held(path).__enter__()
    assert free(path)


def test_measurements_into_one_file_follow_one_another(tmp_path: Path) -> None:
    other = holder(tmp_path / "draws.h5")
    with pytest.raises(Refused, match=f"process {other}"):
        landscape.measure(Draws(), small_problem(), out=tmp_path)
    told: list[landscape.Progress] = []

    def progress(step: landscape.Progress) -> None:
        if step.total is None:
            os.kill(other, signal.SIGKILL)
        told.append(step)

    found = landscape.measure(Draws(), small_problem(), out=tmp_path, wait=True, progress=progress)
    os.waitpid(other, 0)
    assert f"waiting for process {other}" in told[0].message
    assert bool(found["done"].all())


def test_the_command_line_refuses_and_waits(tmp_path: Path) -> None:
    other = holder(tmp_path / "path_norm.h5")
    words = ["measure", "--metric", "path_norm", "--out", str(tmp_path)]
    refused = CliRunner().invoke(app.app, words)
    assert refused.exit_code == 3
    assert f"process {other}" in refused.stderr
    assert "Traceback" not in refused.stderr
    killer = threading.Timer(0.5, os.kill, (other, signal.SIGKILL))
    killer.start()
    waited = CliRunner().invoke(app.app, [*words, "--wait"])
    os.waitpid(other, 0)
    assert waited.exit_code == 0, waited.stderr
    assert f"path_norm: waiting for process {other}" in waited.stderr
