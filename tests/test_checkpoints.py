"""Checkpoints from strangers: what they do to memory, time and the file system before and after they are read."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from landscape import checkpoint_files, checkpoints
from landscape.errors import Refused

HEAD = b"\x80\x02"
REGISTER: list[tuple[str, str, Callable[[Path], None]]] = []


def hostile(says: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def add(function: Callable[[Path], None]) -> Callable[[Path], None]:
        REGISTER.append((function.__name__, says, function))
        return function

    return add


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def packed(path: Path, pickled: bytes, **more: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        for name, content in ({"a/version": b"3\n", "a/byteorder": b"little"} | more).items():
            archive.writestr(name, content)


def saved(**options: Any) -> bytes:
    image = io.BytesIO()
    torch.save(net().state_dict(), image, **options)
    return image.getvalue()


def called(name: str, argument: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return HEAD + f"c{module}\n{function}\n".encode() + argument + b"\x85R."


@hostile("needs code to be read (builtins.bytearray)")
def a_terabyte_by_bytearray(path: Path) -> None:
    packed(path, called("builtins.bytearray", b"\x8a\x06" + (10**12).to_bytes(6, "little")))


@hostile("needs code to be read (torch.Tensor)")
def a_terabyte_by_the_constructor(path: Path) -> None:
    packed(path, called("torch.Tensor", b"\x8a\x06" + (10**12).to_bytes(6, "little")))


@hostile("needs code to be read (_codecs.encode)")
def bytes_doubled_thirty_times(path: Path) -> None:
    packed(path, HEAD + b"c_codecs\nencode\nq\0" * 30 + b"U\1aU\3hex\x86R" + b"U\3hex\x86R" * 29 + b".")


@hostile("needs code to be read (posix.system)")
def a_command(path: Path) -> None:
    packed(path, called("posix.system", b"U\x0dmkdir EXECUTED"))


@hostile("needs code to be read (STACK_GLOBAL)")
def a_command_by_names_on_the_stack(path: Path) -> None:
    packed(path, b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0dmkdir EXECUTED\x85R.")


@hostile("needs code to be read (torch._utils._rebuild_wrapper_subclass)")
def a_tensor_of_an_own_class(path: Path) -> None:
    packed(path, called("torch._utils._rebuild_wrapper_subclass", b"K\1"))


@hostile("takes more than 20000 steps")
def millions_of_numbers(path: Path) -> None:
    packed(path, HEAD + b"](" + b"K\1" * 20_001 + b"e.")


@hostile("takes more than 20000 steps")
def millions_of_lists_in_an_old_file(path: Path) -> None:
    old = saved(_use_new_zipfile_serialization=False)
    start = old.index(b"ccollections")
    path.write_bytes(old[: start - 2] + HEAD + b"]" * 20_001 + b"." + old[start:])


@hostile("has a description of")
def a_description_of_100_megabytes(path: Path) -> None:
    packed(path, HEAD + b"N." + bytes(100 << 20))


@hostile("is damaged")
def a_description_that_claims_a_long_text(path: Path) -> None:
    old = saved(_use_new_zipfile_serialization=False)
    start = old.index(b"ccollections")
    path.write_bytes(old[: start - 2] + HEAD + b"X\xff\xff\xff\x7f" + old[start:])


@hostile("names that torch.save never gives")
def one_member_under_many_names(path: Path) -> None:
    packed(path, HEAD + b"N.", **{"a/data/abc": bytes(1000)})


@hostile("names that torch.save never gives")
def two_descriptions_that_differ_in_case(path: Path) -> None:
    packed(path, HEAD + b"N.", **{"a/DATA.PKL": called("posix.system", b"U\x0dmkdir EXECUTED")})


@hostile("needs code to be read (posix.system)")
def a_second_description(path: Path) -> None:
    packed(path, HEAD + b"N.", **{"b/data.pkl": called("posix.system", b"U\x0dmkdir EXECUTED")})


@hostile("or something was added")
def a_comment_at_the_end(path: Path) -> None:
    path.write_bytes(saved() + b"more")


@hostile("has a table of contents of")
def a_giant_table_of_contents(path: Path) -> None:
    raw = bytearray(saved())
    struct.pack_into("<I", raw, len(raw) - 10, 1 << 30)
    path.write_bytes(raw)


@hostile("has a table of contents of")
def a_giant_table_of_contents_in_64_bits(path: Path) -> None:
    whole = saved()
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 9, 9, 1 << 40, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(whole) - 22, 1)
    path.write_bytes(whole[:-22] + record + locator + whole[-22:])


@hostile("in the file")
def shapes_without_bytes(path: Path) -> None:
    torch.save({k: torch.zeros(1).expand(10**12) for k in net().state_dict()}, path)


@hostile("is damaged or no checkpoint")
def a_shape_beyond_its_bytes(path: Path) -> None:
    path.write_bytes(
        saved(_use_new_zipfile_serialization=False).replace(b"K\x04K\x03\x86", b"K\xf0K\xf3\x86")
    )


@hostile("could not be copied")
def a_sparse_giant_in_place_of_extra_state(path: Path) -> None:
    torch.save(dict(net().state_dict()) | {"0._extra_state": 7}, path)


@hostile("is damaged or no checkpoint: Unsupported operand 108")
def an_operation_that_torch_does_not_know(path: Path) -> None:
    packed(path, HEAD + b"(K\1l.")


@hostile("no state dict")
def methods_of_a_dict_replaced(path: Path) -> None:
    # OrderedDict() whose `items` and `keys` are numbers
    packed(path, HEAD + b"ccollections\nOrderedDict\n)R}(U\5itemsK\1U\4keysK\1ub.")


@hostile("it was cut")
def an_archive_of_text(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + b"text" * 100 + b"PK\x05\x06" + bytes(4) + b"\1" * 14 + bytes(2))


def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@hostile("more than the allowed 100000")
def many_empty_tensors(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path.write_bytes(header(json.dumps({f"{k}": entry for k in range(120_000)}).encode()))


@hostile("header claims")
def a_header_of_an_exabyte(path: Path) -> None:
    path.write_bytes(header(b"{}", length=1 << 60))


@hostile("is not JSON")
def a_header_nested_too_deep(path: Path) -> None:
    path.write_bytes(header(b'{"a":' * 500_000))


@hostile("contradicts itself")
def a_shape_that_overflows(path: Path) -> None:
    shape = [1 << 32, 1 << 32]
    entry = {"0.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    path.write_bytes(header(json.dumps(entry).encode()))


@hostile("overlap, or leave gaps")
def arrays_that_overlap(path: Path) -> None:
    entries = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}
    path.write_bytes(header(json.dumps(entries).encode(), bytes(8)))


@hostile("the file at")
def bytes_after_the_last_array(path: Path) -> None:
    entry = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    path.write_bytes(header(json.dumps(entry).encode(), bytes(9)))


@hostile("does not describe")
def an_unknown_type(path: Path) -> None:
    entry = {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}
    path.write_bytes(header(json.dumps(entry).encode(), bytes(8)))


@pytest.mark.parametrize(("says", "make"), [r[1:] for r in REGISTER], ids=[r[0] for r in REGISTER])
def test_a_hostile_checkpoint_is_refused_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, make: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint_files, "STEPS_LIMIT", 20_000)
    make(tmp_path / "w.file")
    model = net()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(Refused) as error:
        checkpoints.load_into(model, tmp_path / "w.file", lambda _: None)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1200
    assert all(map(torch.equal, before, model.state_dict().values()))
    if make is not a_sparse_giant_in_place_of_extra_state:
        with pytest.raises(Refused):
            checkpoints.read(tmp_path / "w.file", wanted)
    assert not (tmp_path / "EXECUTED").exists()


def test_files_of_every_age_and_type_are_read(tmp_path: Path) -> None:
    path, wanted = tmp_path / "w.pt", net()
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        beside = {"epoch": 3, "sizes": torch.Size([2]), "device": torch.device("cpu"), "dtype": torch.float32,
                  "more": {1, 2}, "optimizer": torch.optim.Adam(wanted.parameters()).state_dict()}  # fmt: skip
        torch.save({"state_dict": wanted.state_dict(), **beside}, path, **options)
        model, said = net(), []
        nn.init.zeros_(model[0].weight)
        checkpoints.load_into(model, path, said.append)
        assert all(map(torch.equal, wanted.state_dict().values(), model.state_dict().values()))
        assert "found under 'state_dict'" in said[0]
    types = [
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int32,
        torch.bool,
        torch.uint8,
    ]
    types += [torch.float8_e4m3fn, torch.uint16]
    tensors = {str(t): torch.ones(2, 3).to(t) for t in types} | {
        "none": torch.zeros(0, 3),
        "one": torch.tensor(1),
    }
    torch.save({key: nn.Parameter(t, requires_grad=False) for key, t in tensors.items()}, path)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "w.safetensors")
    for file in (path, tmp_path / "w.safetensors"):
        found = checkpoints.read(file, {key: tuple(t.shape) for key, t in tensors.items()})
        for there, here in zip(found, tensors.values(), strict=True):
            assert there.dtype == here.dtype
            assert there.float().tolist() == here.float().tolist()


class Own:
    pass


def test_what_the_user_allowed_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": net().state_dict(), "own": Own()}, tmp_path / "w.pt")
    with pytest.raises(Refused, match=r"test_checkpoints\.Own"):
        checkpoints.load_into(net(), tmp_path / "w.pt", lambda _: None)
    with torch.serialization.safe_globals([Own]):
        checkpoints.load_into(net(), tmp_path / "w.pt", lambda _: None)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pt")
    with pytest.raises(Refused, match="not a regular file"):
        checkpoints.load_into(net(), tmp_path / "w.pt", lambda _: None)


def test_looking_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, landscape.checkpoint_files; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert checkpoint_files.kind(Path(__file__)) == "pickle"
    assert pickle.HIGHEST_PROTOCOL >= 4
