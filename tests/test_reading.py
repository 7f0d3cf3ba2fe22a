"""The reader process: what a file does to it, it does to nobody else."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import forks
import numpy as np
import pytest
from records import assert_same, sample_small, with_vector

from landscape import parcel, reading
from landscape.results import ResultsError, read, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "a.h5", sample_small())
    return tmp_path / "a.h5"


def replaced(monkeypatch: pytest.MonkeyPatch, body: str, seconds: float = 1.0) -> None:
    """Start the reader anew, with something else in place of libhdf5."""
    lines = ["reading_server._warm_up = lambda: None", "def contents(image):"]
    lines += [f"    {line}" for line in body.splitlines()] + ["reading_server.strict.contents = contents"]
    code = "\n".join(f"    {line}" for line in lines)
    monkeypatch.setattr(reading, "_START", reading._START.replace("else:\n", f"else:\n{code}\n"))
    monkeypatch.setattr(reading, "SECONDS", seconds)
    monkeypatch.setattr(reading, "_reader", None)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("while True: pass", "took more than the allowed 1 s"),
        ("import time\ntime.sleep(60)", "took more than the allowed 1 s"),
        ("import os\nos.kill(os.getpid(), 11)", "crashed the reader"),
        ("import os\nos.kill(os.getpid(), 19)", "took more than the allowed 1 s"),
        ("import ctypes\nctypes.string_at(0)", "crashed the reader"),
        ("a = bytearray(5 << 30)", "MemoryError"),
        ("a = [bytearray(100 << 20) for _ in range(50)]", "MemoryError"),
        ("open('/etc/passwd')", "Too many open files"),
        ("import os\nos.write(int(reply), b'x')", "NameError"),
        ("raise SystemExit(0)", "crashed the reader"),
    ],
    ids=["loop", "sleep", "fault", "stopped", "null", "one_array", "many_arrays", "opens", "name", "exit"],
)  # fmt: skip
def test_whatever_reading_does_becomes_our_error(
    path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str
) -> None:
    replaced(monkeypatch, body, seconds=1.0 if "more than" in says else 20.0)
    before = time.monotonic()
    try:
        for _ in range(1 + (says == "crashed the reader")):  # and the process is there for the next one
            with pytest.raises(ResultsError, match=says) as caught:
                read(path)
            assert str(caught.value).startswith(str(path))
        assert time.monotonic() - before < 20
    finally:
        reading._at_end()


def test_what_a_file_left_behind_is_gone_with_its_process(path: Path) -> None:
    first = read(path)
    pid = reading._reader.process.pid
    assert_same(read(path), first)
    assert reading._reader.process.pid == pid
    (path.parent / "b.h5").write_bytes(b"nothing")
    with pytest.raises(ResultsError):
        read(path.parent / "b.h5")
    assert reading._reader.process.pid == pid


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_reader_that_was_killed_is_started_again(path: Path, how: signal.Signals) -> None:
    first = read(path)
    os.kill(reading._reader.process.pid, how)
    reading._reader.process.wait()
    assert_same(read(path), first)


def test_a_reader_that_does_not_answer_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(path)
    pid = reading._reader.process.pid
    monkeypatch.setattr(reading, "_GRACE_SECONDS", -19.0)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ResultsError, match="has not answered for 1 s"):
        read(path)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    monkeypatch.undo()
    read(path)


def test_forked_processes_and_threads_share_it(path: Path) -> None:
    expected = read(path)
    pid = reading._reader.process.pid

    def child() -> int:
        for _ in range(20):
            assert_same(read(path), expected)
        return reading._reader.process.pid != pid

    children = [forks.start(child) for _ in range(3)]
    threads = [threading.Thread(target=child) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert_same(read(path), expected)
    for thread in threads:
        thread.join()
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0, 0, 0]
    assert_same(read(path), expected)


def test_a_child_that_was_forked_before_the_first_word_has_its_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_reader", None)
    reading.start()
    ours = reading._reader.process.pid
    assert forks.run(lambda: int(len(read(path).variables) != 1 or reading._reader.process.pid == ours)) == 0
    read(path)
    assert reading._reader.process.pid == ours
    reading._at_end()


def test_it_ends_with_those_who_ask_and_loads_no_torch(path: Path, tmp_path: Path) -> None:
    (tmp_path / "cwd").mkdir()
    for name in ("numpy", "h5py", "json", "landscape"):  # what lies in the current directory is not imported
        (tmp_path / "cwd" / f"{name}.py").write_text("raise SystemExit(7)")
    code = (
        "import sys; from landscape import reading, results; results.read(sys.argv[1]); "
        "import os; from pathlib import Path; pid = reading._reader.process.pid; "
        "print(pid, 'torch' in Path(f'/proc/{pid}/maps').read_text() if os.path.exists('/proc') else False)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-P", "-c", code, str(path)],
        capture_output=True, text=True, check=True, cwd=tmp_path / "cwd",
    )  # fmt: skip
    assert done.stderr == ""
    pid, torch_loaded = done.stdout.split()
    assert torch_loaded == "False"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_process_that_cannot_start_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_reader", None)
    monkeypatch.setattr(reading, "_roots", lambda: [])
    with pytest.raises(ResultsError, match=r"could not be started .*ModuleNotFoundError"):
        read(path)
    monkeypatch.undo()
    read(path)


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", with_vector(1.0))
    beside = tmp_path / "a.arrays.safetensors"
    beside.unlink()
    for make in (os.mkfifo, lambda p: p.symlink_to("/dev/zero"), Path.mkdir):
        make(beside)
        with pytest.raises(ResultsError, match=r"a\.arrays\.safetensors"):
            read(tmp_path / "a.h5")
        (beside.rmdir if beside.is_dir() else beside.unlink)()


# --- the answer is not believed -----------------------------------------------------------------------


def message(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"abc",
        message(b"{}", length=1 << 60),
        message(b"[]"),
        message(b"{}"),
        message(b"[" * 100_000),
        message(b'{"attrs": [], "variables": [["x", "|O8", [1], []]]}', bytes(8)),
        message(b'{"attrs": [], "variables": [["x", "<f8", [-1], []]]}'),
        message(b'{"attrs": [], "variables": [["x", "<f8", [true], []]]}', bytes(8)),
        message(b'{"attrs": [], "variables": [["x", "<f8", [1000000000000], []]]}', bytes(8)),
        message(b'{"attrs": [], "variables": [["x", "<f8", [1], []]]}', bytes(16)),
        message(b'{"attrs": [], "variables": [["../x", "<f8", [1], []]]}', bytes(8)),
        message(b'{"attrs": [["x", "|S3", [2]]], "variables": []}', b"\xff" * 6),
        message(b'{"attrs": [["x", "|S0", [2]]], "variables": []}'),
        message(b'{"attrs": [["x", "|S99999999", [0, 99999999]]], "variables": []}', b"a"),
    ],
)
def test_an_answer_that_is_not_ours_is_refused(answer: bytes) -> None:
    with pytest.raises(parcel.Damaged):
        parcel.unpack(answer, 1000)


def test_an_answer_comes_back_whole() -> None:
    from landscape.strict import Contents

    found = Contents(
        {"a": np.array([1, 2]), "text": np.array(b"xy", "S2"), "none": np.zeros((0, 3), np.float32)},
        {
            "x": (np.arange(6, dtype=">f4").reshape(2, 3), {"units": np.array(b"1")}),
            "c": (np.array([[b"a", b"\0"]], "S1"), {}),
        },
    )
    attrs, variables = parcel.unpack(b"".join(parcel.pack(found)), 1000)
    assert attrs == {"a": [1, 2], "text": "xy", "none": []}
    assert {name: (a.tolist(), more) for name, (a, more) in variables.items()} == {
        "x": ([[0, 1, 2], [3, 4, 5]], {"units": "1"}),
        "c": ([[b"a", b""]], {}),
    }
    assert variables["x"][0].flags.writeable
