"""What goes into a file of results comes out, whoever reads it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from records import SCALAR, assert_same, names_in, sample

from landscape import results
from landscape.results import Record, ResultsError, Variable, read, write


def test_all_kinds_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run" / "trace.h5"
    write(path, sample())
    assert_same(read(path), sample())
    assert names_in(path.parent) == ["trace.arrays.safetensors", "trace.h5"]
    write(path, read(path))
    assert_same(read(path), sample())


_NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_KINDS = [
    np.float64,
    np.float32,
    np.int8,
    np.int16,
    np.int32,
    np.int64,
    np.uint8,
    np.uint32,
    np.uint64,
    np.bool_,
]
_LENGTHS = {"a": 0, "b": 1, "c": 3, "d": 4}


@st.composite
def variables(draw: st.DrawFn) -> Variable:
    dims = tuple(draw(st.lists(st.sampled_from(sorted(_LENGTHS)), max_size=3, unique=True)))
    shape = tuple(_LENGTHS[d] for d in dims)
    if draw(st.integers(0, 4)) == 0:
        size = math.prod(shape)
        texts = draw(st.lists(_TEXT, min_size=size, max_size=size))
        return Variable(dims, np.array(texts, dtype=object).reshape(shape), "1", draw(_TEXT))
    data = draw(hnp.arrays(draw(st.sampled_from(_KINDS)), shape))
    return Variable(dims, data, "1", draw(_TEXT), sidecar=draw(st.booleans()))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(_NAMES.map(lambda n: f"v_{n}"), variables(), max_size=5),
    st.dictionaries(_NAMES.map(lambda n: f"k_{n}"), _JSON, max_size=5),
    st.booleans(),
)
def test_any_record_comes_back(
    tmp_path: Path, body: dict[str, Variable], attrs: dict[str, object], coordinate: bool
) -> None:
    if coordinate:
        body = body | {
            "c": Variable(("c",), np.array([3.0, 1.0, np.nan])),
            "a": Variable(("a",), np.zeros(0)),
        }
    record = Record(body, attrs)
    path = tmp_path / "any.h5"
    write(path, record)
    assert_same(read(path), record)
    record.to_xarray()


def test_array_layouts_do_not_matter(tmp_path: Path) -> None:
    values = np.arange(24.0).reshape(4, 6)
    forms = {
        "fortran": np.asfortranarray(values),
        "strided": np.repeat(values, 2, 0)[::2],
        "big": values.astype(">f8"),
    }
    record = Record(
        {f"{k}_{s}": Variable(("y", "x"), v, sidecar=s) for k, v in forms.items() for s in (False, True)}
    )
    write(tmp_path / "a.h5", record)
    for variable in read(tmp_path / "a.h5").variables.values():
        np.testing.assert_array_equal(variable.data, values)


def test_numpy_scalars_and_string_subclasses_in_attributes(tmp_path: Path) -> None:
    class Version(str):
        __slots__ = ()

    attrs = {
        "a": np.float32(0.5),
        "b": np.int32(7),
        "c": np.bool_(True),
        "d": np.str_("x"),
        "e": Version("2.13"),
    }
    write(tmp_path / "a.h5", Record({}, attrs))
    assert read(tmp_path / "a.h5").attrs == {"a": 0.5, "b": 7, "c": True, "d": "x", "e": "2.13"}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (Record({"..": SCALAR}), "cannot name a variable"),
        (Record({"CLASS": SCALAR}), "cannot name a variable"),
        (Record({"x": Variable(("string3",), np.zeros(2))}), "cannot name a variable"),
        (Record({"x": Variable(("a", "a"), np.zeros((2, 2)))}), "dimension twice"),
        (
            Record({"x": Variable(("a",), np.zeros(2)), "y": Variable(("a",), np.zeros(3))}),
            "length 2, but 3 in y",
        ),
        (Record({"a": SCALAR, "x": Variable(("a",), np.zeros(2))}), "a is a dimension"),
        (Record({"a": Variable(("a",), np.zeros(2), sidecar=True)}), "coordinate"),
        (Record({"x": Variable((), 1.0, "seconds")}), "write 's'"),
        (Record({"x": Variable((), 1.0, "hours since 1970-01-01")}), "turns into times"),
        (Record({"x": Variable((), 1j)}), "complex128"),
        (Record({"x": Variable((), 1j, sidecar=True)}), "complex128"),
        (Record({"x": Variable((), np.float16(1))}), "float16"),
        (Record({"x": Variable(("a",), np.array([None, "a"]))}), "else than texts"),
        (Record({"x": Variable(("a",), np.array(["\udc80"], object))}), "else than texts"),
        (Record({}, {"schema_version": 3}), "cannot name an attribute"),
        (Record({}, {"_x": 3}), "cannot name an attribute"),
        (Record({}, {"x": object()}), "attribute x cannot be stored"),
        (Record({}, {"x": "y" * (1 << 25)}), "make x a variable"),
        (Record({}, {f"x{k}": k for k in range(500)}), "500 attributes"),
        (Record({f"x{k}": SCALAR for k in range(501)}), "501 variables"),
    ],
)
def test_a_record_that_breaks_a_rule_is_refused(tmp_path: Path, record: Record, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        write(tmp_path / "a.h5", record)
    assert names_in(tmp_path) == []


def test_a_variable_needs_a_name_per_axis() -> None:
    with pytest.raises(ValueError, match="one name per axis"):
        Variable(("a",), np.zeros((2, 2)))
    with pytest.raises(KeyError, match="there are: trace"):
        Record({"trace": SCALAR})["tracee"]
    assert "trace" in Record({"trace": SCALAR})


# --- other readers --------------------------------------------------------------------------------


def test_h5py_reads_it_and_no_string_has_variable_length(tmp_path: Path) -> None:
    write(tmp_path / "trace.h5", sample())
    with h5py.File(tmp_path / "trace.h5") as file:
        assert file["trace"][()] == 12.5
        assert file["layer_trace"].attrs["units"] == b"1" or file["layer_trace"].attrs["units"] == "1"
        assert file.attrs["schema_version"] == 1
        owners = [file, *file.values()]
        kinds = [owner.attrs.get_id(k).get_type() for owner in owners for k in owner.attrs]
        kinds += [file[k].id.get_type() for k in file]
        texts = [k for k in kinds if isinstance(k, h5py.h5t.TypeStringID)]
        assert len(texts) > 40
        assert not any(k.is_variable_str() for k in texts)
        for name in ("trace", "layer", "samples", "nothing"):
            assert {"units", "long_name", "dims"} <= set(file[name].attrs)


@pytest.mark.parametrize("engine", ["h5netcdf", "netcdf4"])
def test_xarray_reads_it(tmp_path: Path, engine: str) -> None:
    xarray = pytest.importorskip("xarray")
    if engine == "netcdf4":
        pytest.importorskip("netCDF4")
    write(tmp_path / "trace.h5", sample())
    with xarray.open_dataset(tmp_path / "trace.h5", engine=engine) as got:
        expected = sample().to_xarray().drop_vars(["direction_x", "mask"])
        assert set(got.variables) == set(expected.variables)
        assert set(got.coords) == {"layer", "round"}
        for name in expected.variables:
            assert got[name].dims == expected[name].dims, name
            assert got[name].values.tolist() == expected[name].values.tolist() or name == "layer_trace"
            assert got[name].attrs["long_name"] == expected[name].attrs["long_name"], name
        np.testing.assert_array_equal(got["layer_trace"], expected["layer_trace"])
        assert got["done"].dtype == bool
        assert got["samples"].dtype == np.float32
        assert got["wall_time"].dtype == np.float64
        assert got.attrs["cite"] == "Škoda & λ"
        assert got.attrs["seed"] == 3
        assert json.loads(got.attrs["config"]) == sample().attrs["config"]
        assert len(got.attrs["long"]) == 300_000


def test_netcdf4_reads_it(tmp_path: Path) -> None:
    netCDF4 = pytest.importorskip("netCDF4")
    write(tmp_path / "trace.h5", sample())
    with netCDF4.Dataset(tmp_path / "trace.h5") as file:
        assert {k: len(d) for k, d in file.dimensions.items() if not k.startswith("string")} == {
            "layer": 4,
            "probe": 3,
            "round": 0,
            "none": 0,
        }
        np.testing.assert_array_equal(file["samples"][:], sample()["samples"])
        assert file["samples"].long_name == "vᵀHv"
        assert file["layer"][:].tolist() == sample()["layer"].tolist()
        assert file.cite == "Škoda & λ"


@pytest.mark.skipif(shutil.which("ncdump") is None, reason="ncdump is not installed")
def test_ncdump_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "trace.h5", sample())
    done = subprocess.run(["ncdump", tmp_path / "trace.h5"], capture_output=True, check=True, text=True)
    assert 'samples:long_name = "vᵀHv"' in done.stdout


def test_open_gives_datasets(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    run = tmp_path / "run"
    write(run / "trace.h5", sample())
    write(run / "density.h5", Record({"x": Variable(("x",), np.arange(3.0))}))
    write(run / ".parts" / "part.h5", sample())
    write(run / ".hidden.h5", sample())
    (run / ".trace.h5.0123abcd-1-0123abcd.landscape.tmp").write_bytes(b"half")
    one = results.open(run / "trace.h5")
    assert isinstance(one, xarray.Dataset)
    assert one["layer"].dims == ("layer",)
    np.testing.assert_array_equal(one["direction_x"], np.arange(7.0))
    both = results.open(str(run))
    assert isinstance(both, dict)
    assert list(both) == ["density", "trace"]
    assert list(results.read_run(run)) == ["density", "trace"]


def test_open_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no such file or directory; check the path"):
        results.open(tmp_path / "absent.h5")
    with pytest.raises(ResultsError, match="no measurement"):
        results.open(tmp_path)
    with pytest.raises(ResultsError, match="is a directory"):
        read(tmp_path)
    with pytest.raises(ResultsError, match="no such file or directory"):
        results.read_run(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(ResultsError, match="not a regular file"):
        read(tmp_path / "pipe.h5")


def test_importing_results_needs_neither_torch_nor_xarray_nor_matplotlib() -> None:
    code = "import sys, landscape.results; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    loaded = set(done.stdout.split())
    assert "landscape.results" in loaded
    assert not loaded & {"torch", "xarray", "matplotlib", "pandas"}


def test_writing_leaves_no_trace_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    write(tmp_path / "out" / "a.h5", sample())
    read(tmp_path / "out" / "a.h5")
    assert names_in(tmp_path / "cwd") == []
