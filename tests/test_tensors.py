"""Arrays beside a result, and states of unfinished units: checked, and whole at any moment."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
from records import SCALAR, assert_same, names_in, with_vector

from landscape import atomic, tensors
from landscape.results import Record, ResultsError, Variable, read, read_state, write, write_state


def test_an_unchanged_sidecar_is_not_rewritten(tmp_path: Path) -> None:
    path, beside = tmp_path / "surface.h5", tmp_path / "surface.arrays.safetensors"
    write(path, with_vector(1.0))
    before = beside.stat()
    record = with_vector(1.0)
    record.variables["value"] = Variable((), 2.0)
    write(path, record)
    after = beside.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert_same(read(path), record)
    write(path, with_vector(2.0))
    assert beside.stat().st_ino != before.st_ino
    assert_same(read(path), with_vector(2.0))


def test_the_sidecar_is_a_plain_safetensors_file_of_what_is_stated(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    path, beside = tmp_path / "surface.h5", tmp_path / "surface.arrays.safetensors"
    write(path, with_vector(1.0, "direction_y"))
    write(path, with_vector(5.0, "direction_y"))
    loaded = load_file(beside)
    assert sorted(loaded) == ["direction_x", "direction_y"]
    np.testing.assert_array_equal(loaded["direction_y"], np.full(50, 6.0))
    write(path, with_vector(5.0))
    assert sorted(load_file(beside)) == ["direction_x"]
    write(path, Record({"value": SCALAR}))
    assert names_in(tmp_path) == ["surface.h5"]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_stop_between_the_two_files_leaves_a_whole_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    path = tmp_path / "surface.h5"
    old, new = with_vector(1.0, "direction_y"), with_vector(2.0, "direction_z")
    write(path, old)
    real, calls = atomic.replace, []

    def stopping(*arguments: object) -> None:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(arguments)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(atomic, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        write(path, new)
    monkeypatch.undo()
    assert_same(read(path), new if after == 2 else old)
    write(path, new)
    assert_same(read(path), new)
    assert sorted(tensors._stated(tmp_path / "surface.arrays.safetensors")) == ["direction_x", "direction_z"]


def test_a_missing_or_wrong_sidecar_is_named(tmp_path: Path) -> None:
    path, beside = tmp_path / "surface.h5", tmp_path / "surface.arrays.safetensors"
    write(path, with_vector(1.0))
    good = beside.read_bytes()
    beside.unlink()
    with pytest.raises(ResultsError, match=r"surface\.arrays\.safetensors is missing; it holds direction_x"):
        read(path)
    write(tmp_path / "other.h5", with_vector(2.0))
    shutil.copy(tmp_path / "other.arrays.safetensors", beside)
    with pytest.raises(ResultsError, match="holds another direction_x"):
        read(path)
    beside.write_bytes(good[:-3] + b"abc")
    with pytest.raises(ResultsError, match="differs from its hash"):
        read(path)
    for damaged in (good[:-9], good[:20], b"", b"\xff" * 100):
        beside.write_bytes(damaged)
        with pytest.raises(ResultsError, match="is damaged"):
            read(path)
    write(path, with_vector(1.0))  # a damaged sidecar does not stand in the way of a new one
    assert_same(read(path), with_vector(1.0))


def test_another_programs_file_is_not_overwritten(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    beside = tmp_path / "surface.arrays.safetensors"
    save_file({"w": np.ones(3)}, beside)
    before = beside.read_bytes()
    with pytest.raises(ResultsError, match="not written by landscape"):
        write(tmp_path / "surface.h5", with_vector(1.0))
    write(tmp_path / "surface.h5", Record({"value": SCALAR}))
    assert beside.read_bytes() == before
    with pytest.raises(ValueError, match=r"must be named \*\.h5"):
        write(tmp_path / "surface.nc", with_vector(1.0))


def test_states_come_back(tmp_path: Path) -> None:
    arrays = {
        "rng": np.arange(5056, dtype=np.uint8) % 251,
        "basis": np.random.default_rng(0).standard_normal((3, 17)),
        "single": np.float32(0.1) * np.ones((2, 3), np.float32),
        "step": np.array(7),
        "nothing": np.zeros((0, 4)),
        "mask": np.array([True, False]),
        "nan": np.array([np.nan, np.inf, -0.0]),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "zero_d": np.array(np.nan, np.float32),
    }
    metadata = {"steps": 3, "name": "λ", "nested": {"a": [1, None]}}
    write_state(tmp_path / "s" / "unit.state", arrays, metadata)
    found = read_state(tmp_path / "s" / "unit.state")
    assert found is not None
    assert found[1] == metadata
    assert set(found[0]) == set(arrays)
    for name, array in arrays.items():
        assert (found[0][name].dtype, found[0][name].shape) == (array.dtype, array.shape)
        assert found[0][name].tobytes() == array.tobytes()
    write_state(tmp_path / "empty.state", {}, {})
    assert read_state(tmp_path / "empty.state") == ({}, {})


def test_a_damaged_or_absent_state_is_none(tmp_path: Path) -> None:
    path = tmp_path / "unit.state"
    assert read_state(path) is None
    write_state(path, {"a": np.arange(40.0), "step": np.array(3)}, {"k": 1})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert read_state(path) is None
    random = Random(0)
    for _ in range(300):
        place = random.randrange(len(whole))
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << random.randrange(8)]) + whole[place + 1 :]
        )
        found = read_state(path)
        # A flip of a blank in the header changes nothing.
        assert found is None or (found[1] == {"k": 1} and found[0]["a"].tolist() == list(range(40)))
    write(tmp_path / "a.h5", with_vector(1.0))
    assert read_state(tmp_path / "a.arrays.safetensors") is None
    assert read_state(tmp_path) is None


def test_a_state_that_cannot_be_stored_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex128"):
        write_state(tmp_path / "s", {"a": np.ones(2, complex)}, {})
    with pytest.raises(TypeError):
        write_state(tmp_path / "s", {}, {"a": object()})
    assert names_in(tmp_path) == []
