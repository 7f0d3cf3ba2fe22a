"""A kill, a full disk or a missing permission leaves whole files and a clear message."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
import time
from pathlib import Path
from random import Random

import forks
import numpy as np
import pytest
from records import SCALAR, assert_same, names_in, sample_small, with_vector

from landscape import atomic, results
from landscape.results import Record, ResultsError, Variable, read, write


def test_a_kill_at_any_moment_leaves_one_of_the_two_states(tmp_path: Path) -> None:
    path = tmp_path / "trace.h5"
    random = Random(0)

    def state(k: int) -> Record:
        # Every third state has other arrays in the sidecar.
        large = Variable(("parameter",), np.full(2000, k // 3), sidecar=True)
        body = {"samples": Variable(("probe", "layer"), np.full((100, 10), k)), "direction": large}
        return Record(body, {"k": k})

    def rewrite(first: int) -> None:
        for k in range(first, first + 10_000):
            write(path, state(k))

    write(path, state(0))
    last, moved, kills = 0, 0, 0
    while kills < 40 or (moved <= 10 and kills < 400):  # a busy machine needs more kills to see writes
        kills += 1
        child = forks.start(lambda first=last: rewrite(first))
        time.sleep(random.uniform(0.0, 0.1))
        forks.kill(child)
        got = read(path)
        k = got.attrs["k"]
        assert k >= last
        assert_same(got, state(k))
        moved += k > last
        last = k
    assert moved > 10, "the children were killed before they wrote anything"
    atomic.clean_leftovers(tmp_path)
    assert names_in(tmp_path) == ["trace.arrays.safetensors", "trace.h5"]


_SAYS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "quota is used up",
    errno.EIO: "input/output error",
    errno.EROFS: "read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
}


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("number", _SAYS)
def test_a_failing_disk_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = tmp_path / "surface.h5"
    write(path, with_vector(1.0))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for record in (with_vector(2.0), Record({"value": SCALAR})):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(ResultsError, match=_SAYS[number]) as caught:
                write(path, record)
        assert str(tmp_path) in str(caught.value)
        assert ";" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_failing_flush_of_the_directory_is_told_and_the_new_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "a.h5", os.fsync

    def fail_on_directories(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(errno.EIO, "I/O error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_on_directories)
    with pytest.raises(ResultsError, match="in place"):
        write(path, sample_small())
    assert_same(read(path), sample_small())


def test_a_limit_on_file_sizes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path, Record({"value": SCALAR}))

    def child() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            write(path, sample_small())
        except ResultsError as error:
            return 0 if "limit on file sizes" in str(error) else 1
        return 2

    assert forks.run(child) == 0
    assert names_in(tmp_path) == ["a.h5"]
    assert read(path)["value"] == 1.0


def test_a_directory_without_permission_is_told() -> None:
    # Not tmp_path: another user must be able to walk to it.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        write(directory / "a.h5", sample_small())
        directory.chmod(0o555)

        def child() -> int:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            try:
                write(directory / "a.h5", Record({"value": SCALAR}))
            except ResultsError as error:
                return 0 if "permission denied; change" in str(error) else 1
            return 2

        assert forks.run(child) == 0
        assert names_in(directory) == ["a.h5"]
        assert_same(read(directory / "a.h5"), sample_small())
        directory.chmod(0o755)


def test_a_file_in_place_of_a_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a.h5", tmp_path / "file" / "b" / "a.h5"):
        with pytest.raises(ResultsError, match="is a file, not a directory"):
            write(path, sample_small())
    (tmp_path / "d.h5").mkdir()
    with pytest.raises(ResultsError, match="is a directory"):
        write(tmp_path / "d.h5", sample_small())
    with pytest.raises(ResultsError, match="name is too long"):
        write(tmp_path / ("x" * 300), sample_small())
    assert names_in(tmp_path) == ["d.h5", "file"]


def test_only_stale_temporary_files_of_ours_are_deleted(tmp_path: Path) -> None:
    gone = forks.start(lambda: 0)
    os.waitpid(gone, 0)
    host, run = atomic._HOST, atomic._RUN
    other = "0" * 8 if host != "0" * 8 else "1" * 8
    stale = [
        f".trace.h5.{host}-{gone}-{run}.landscape.tmp",
        f".trace.h5.{host}-{os.getpid()}-{'0' * 8}.landscape.tmp",  # an earlier process with our number
        f".old.h5.{other}-{os.getpid()}-{run}.landscape.tmp",
    ]
    kept = [
        f".trace.h5.{host}-{os.getpid()}-{run}.landscape.tmp",  # being written now
        f".trace.h5.{host}-{os.getppid()}-{run}.landscape.tmp",
        f".trace.h5.{other}-{gone}-{run}.landscape.tmp",  # perhaps alive on another machine
        "trace.h5",
        "x.tmp",
        ".x.tmp",
        "notes.landscape.tmp",
    ]
    for name in stale + kept:
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / stale[2], (0, 0))
    (tmp_path / f".d.{host}-{gone}-{run}.landscape.tmp").mkdir()
    assert [p.name for p in results.clean_leftovers(tmp_path)] == sorted(stale)
    assert set(kept) < set(names_in(tmp_path))
    assert results.clean_leftovers(tmp_path / "absent") == []
