"""The strict reader against files that nobody should open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from records import sample

from landscape import reading
from landscape.results import Record, ResultsError, read, write

REGISTER: list[tuple[str, str, Callable[[h5py.File, Path], None]]] = []


def hostile(says: str) -> Callable[[Callable[[h5py.File, Path], None]], Callable[[h5py.File, Path], None]]:
    def add(function: Callable[[h5py.File, Path], None]) -> Callable[[h5py.File, Path], None]:
        REGISTER.append((function.__name__, says, function))
        return function

    return add


def ours(path: Path, **options: object) -> h5py.File:
    """A file that is in order so far."""
    file = h5py.File(path, "w", **options)
    file.attrs["schema_version"] = np.int64(1)
    file.attrs["json_attributes"] = np.bytes_(b"[]")
    file.attrs["sidecar"] = np.bytes_(b"{}")
    return file


def label(dataset: h5py.Dataset, dims: bytes = b'["a"]') -> None:
    for key, value in {"dims": dims, "units": b"1", "long_name": b"x"}.items():
        dataset.attrs[key] = np.bytes_(value)


def test_the_plain_file_of_these_tests_is_read(tmp_path: Path) -> None:
    with ours(tmp_path / "a.h5") as file:
        label(file.create_dataset("x", data=np.arange(5.0)))
        label(file.create_dataset("none", (0,), "f8", maxshape=(None,)), b'["b"]')
    record = read(tmp_path / "a.h5")
    assert record["x"].tolist() == [0, 1, 2, 3, 4]
    assert record["none"].shape == (0,)


@hostile("link to somewhere else")
def external_link(file: h5py.File, folder: Path) -> None:
    write(folder / "other.h5", Record())
    file["x"] = h5py.ExternalLink(str(folder / "other.h5"), "/x")


@hostile("link to somewhere else")
def soft_link(file: h5py.File, folder: Path) -> None:
    file["x"] = h5py.SoftLink("/y")


@hostile("not an array")
def cycle_of_hard_links(file: h5py.File, folder: Path) -> None:
    file.create_group("g")["up"] = file["/"]
    file["x"] = file["/"]


@hostile("not an array")
def deep_groups(file: h5py.File, folder: Path) -> None:
    group = file
    for _ in range(2000):
        group = group.create_group("g")


@hostile("not an array")
def named_type(file: h5py.File, folder: Path) -> None:
    file["x"] = np.dtype("f8")


@hostile("virtual")
def virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", (3,))
    label(file.create_virtual_dataset("x", layout))


@hostile("other files")
def external_storage(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", (10,), "u1", external=[("/etc/passwd", 0, 10)]))


@hostile("variable length")
def variable_strings(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("text", data=["a", "b"], dtype=h5py.string_dtype()))


@hostile("variable length")
def variable_string_attribute(file: h5py.File, folder: Path) -> None:
    file.attrs["x"] = "text"


@hostile("neither numbers nor characters")
def variable_arrays(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", (2,), dtype=h5py.vlen_dtype(np.int32)))


@hostile("neither numbers nor characters")
def object_references(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", (2,), dtype=h5py.ref_dtype))


@hostile("neither numbers nor characters")
def region_reference_attribute(file: h5py.File, folder: Path) -> None:
    file.attrs.create(
        "x", file.create_dataset("y", data=np.zeros(3)).regionref[:2], dtype=h5py.regionref_dtype
    )


@hostile("neither numbers nor characters")
def compound(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", (2,), dtype=[("a", "f8"), ("b", "i4")]))


@hostile("neither numbers nor characters")
def compound_attribute(file: h5py.File, folder: Path) -> None:
    file.attrs["x"] = np.zeros(2, [("a", "f8")])


@hostile("neither numbers nor characters")
def enumeration(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", data=np.zeros(2, bool)))


@hostile("neither numbers nor characters")
def complex_numbers(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", data=np.zeros(2, complex)))


@hostile("neither numbers nor characters")
def array_type(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", (2,), dtype=np.dtype(("f8", (3,)))))


@hostile("neither numbers nor characters")
def opaque(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", data=np.zeros(2, "V5")))


@hostile("strings of 7 bytes")
def long_strings(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", data=np.zeros(2, "S7")))


@hostile("floats of 2 bytes")
def half_floats(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", data=np.zeros(2, np.float16)))


@hostile("need more than the allowed")
def huge_fill_value(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", (10**12,), "f8", fillvalue=1.0))


@hostile("claims 800 bytes, but 0 are stored")
def never_filled(file: h5py.File, folder: Path) -> None:
    file.attrs["padding"] = np.zeros(1000)
    label(file.create_dataset("x", (100,), "f8", fillvalue=1.0))


@hostile("need more than the allowed")
def deflate_bomb(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", data=np.zeros(10**6), chunks=(10**6,), compression=1))


@hostile("is stored in chunks")
def chunks(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", data=np.arange(10.0), chunks=(3,), compression="gzip", shuffle=True))


@hostile("501 variables")
def too_many_names(file: h5py.File, folder: Path) -> None:
    for k in range(501):
        file.create_dataset(f"x{k}", data=0)


@hostile("not made of letters")
def dots(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("..", data=np.zeros(1)))


@hostile("not made of letters")
def odd_attribute(file: h5py.File, folder: Path) -> None:
    file.attrs["../x"] = 1


@hostile("has a type but no value")
def empty_attribute(file: h5py.File, folder: Path) -> None:
    file.attrs["x"] = h5py.Empty("f8")


@hostile("has a type but no value")
def empty_variable(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", data=h5py.Empty("f8")))


@hostile("bytes, more than the allowed")
def huge_attribute(file: h5py.File, folder: Path) -> None:
    file.attrs["x"] = np.zeros(3_000_000)


@hostile("need more than the allowed")
def many_large_attributes(file: h5py.File, folder: Path) -> None:
    for k in range(5):
        file.attrs[f"x{k}"] = np.bytes_(b"x" * 15_000_000)


@hostile("20000 entries, more than the allowed 1000")
def attribute_of_many_numbers(file: h5py.File, folder: Path) -> None:
    file.attrs["x"] = np.zeros(20_000, np.int8)


@hostile("more than 500 attributes")
def too_many_attributes(file: h5py.File, folder: Path) -> None:
    for k in range(501):
        file.attrs[f"x{k}"] = k


@hostile("no text attribute 'dims'")
def no_dims(file: h5py.File, folder: Path) -> None:
    file.create_dataset("x", data=np.zeros(3))


@hostile("does not fit dims")
def wrong_dims(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", data=np.zeros((3, 3))))


@hostile("not a list of names")
def dims_of_another_kind(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", data=np.zeros(3)), b'{"a": 1}')


@hostile("not JSON")
def dims_nested_too_deep(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", data=np.zeros(3)), b"[" * 100_000)


@hostile("not UTF-8")
def broken_text(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", data=np.full((1, 2), b"\xff", "S1")))


@hostile("texts of width 0")
def text_of_no_width(file: h5py.File, folder: Path) -> None:
    label(file.create_dataset("x", (3, 0), "S1"))


@hostile("sidecar's entry")
def sidecar_elsewhere(file: h5py.File, folder: Path) -> None:
    file.attrs["sidecar"] = np.bytes_(b'{"../x": {}}')


@hostile("sidecar is damaged")
def sidecar_of_another_kind(file: h5py.File, folder: Path) -> None:
    file.attrs["sidecar"] = np.bytes_(b"[1]")


@hostile("newer landscape")
def newer_schema(file: h5py.File, folder: Path) -> None:
    file.attrs["schema_version"] = np.int64(2)


@hostile("no schema_version")
def no_schema(file: h5py.File, folder: Path) -> None:
    del file.attrs["schema_version"]


@pytest.mark.parametrize(("says", "make"), [r[1:] for r in REGISTER], ids=[r[0] for r in REGISTER])
def test_a_hostile_file_is_refused_with_its_reason(
    tmp_path: Path, says: str, make: Callable[[h5py.File, Path], None]
) -> None:
    path = tmp_path / "a.h5"
    with ours(path, libver="latest") as file:
        make(file, tmp_path)
    with pytest.raises(ResultsError, match=says) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "; " in message
    assert "\n" not in message


def test_a_file_of_another_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.h5"
    for contents in (b"", b"text", b"\x89HDF\r\n\x1a\n" + bytes(500), bytes(5000)):
        path.write_bytes(contents)
        with pytest.raises(ResultsError, match="not a readable HDF5 file"):
            read(path)
    monkeypatch.setattr(reading, "FILE_LIMIT", 1000)
    with pytest.raises(ResultsError, match="5000 bytes, more than the allowed 1000"):
        read(path)


def bases(tmp_path: Path) -> list[bytes]:
    """Files to cut: two of ours, one in the oldest layout, one in the newest with much of what is refused."""
    whole = sample()
    del whole.attrs["long"]
    del whole.variables["direction_x"], whole.variables["mask"]
    write(tmp_path / "base.h5", whole)
    write(tmp_path / "small.h5", Record({k: whole.variables[k] for k in ("layer", "layer_trace")}))
    for name, oldest in (("old", "earliest"), ("new", "latest")):
        with ours(tmp_path / f"{name}.h5", libver=oldest) as file:
            for k in range(20):
                label(file.create_dataset(f"x{k}", data=np.arange(30.0).reshape(5, 6)), b'["a", "b"]')
            if name == "new":
                options = {"compression": "gzip", "shuffle": True, "fletcher32": True, "maxshape": (None, 30)}
                label(
                    file.create_dataset("y", data=np.ones((20, 30)), chunks=(4, 7), **options), b'["c", "d"]'
                )
                variable_strings(file, tmp_path)
    return [(tmp_path / f"{name}.h5").read_bytes() for name in ("base", "small", "old", "new")]


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    for whole in bases(tmp_path):
        path = tmp_path / "cut.h5"
        for length in np.linspace(0, len(whole) - 1, 25).astype(int):
            path.write_bytes(whole[:length])
            with pytest.raises(ResultsError):
                read(path)
