"""What the user names: objects, losses, data, checkpoints; and every way to get it wrong, in one line."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import click
import pytest
import torch
from landscape_cli import load
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from landscape import checkpoints
from landscape.checkpoint_files import expand
from landscape.errors import Refused

SOURCE = """
import torch

def make(width: int = 3, bias: bool = True):
    return torch.nn.Linear(width, 2, bias=bias)

class Holder:
    inner = make()

def needs_one(size):
    return torch.zeros(size)

def fails():
    raise KeyError("no such key")

def own_loss(output, target):
    return (output - target).abs().sum()

class OwnLoss(torch.nn.Module):
    def __init__(self, power=2):
        super().__init__()
        self.power = power

    def forward(self, output, target):
        return ((output - target).abs() ** self.power).mean()

ready = make(5)
number = 7
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory of the user's own with one file of code; imports are undone afterwards."""
    (tmp_path / "mynets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    random_state = torch.random.get_rng_state()
    yield tmp_path
    torch.random.set_rng_state(random_state)
    for name in set(sys.modules) - before:
        if name.startswith(("mynets", "broken", "leaves", "user_file")):
            del sys.modules[name]


def used_if_module(found: object) -> bool:
    return isinstance(found, nn.Module)


def model(spec: str, **arguments: object) -> nn.Module:
    return load.made(spec, "--model", arguments, used_as_is=used_if_module, argument_flag="--model-arg")


# --- objects ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["mynets", "mynets.py", "./mynets.py"])
def test_names_an_object_by_module_and_by_file(where: str):
    assert load.named(f"{where}:number", "--model") == 7
    assert isinstance(load.named(f"{where}:Holder.inner", "--model"), nn.Linear)


def test_a_file_is_run_once_for_all_flags():
    assert load.named("mynets.py:ready", "--model") is load.named("./mynets.py:ready", "--data")


def test_a_callable_is_called_and_another_object_is_used():
    assert model("mynets:make", width=4, bias=False).weight.shape == (2, 4)
    ready = model("mynets:ready")
    assert ready is load.named("mynets:ready", "--model")


def test_a_model_with_random_weights_is_the_same_again():
    torch.manual_seed(5)
    first = model("mynets.py:make")
    torch.manual_seed(6)
    assert torch.equal(first.weight, model("mynets.py:make").weight)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mynets:mkae", ["mynets has no 'mkae'", "did you mean make?"]),
        ("mynets.py:Holder.iner", ["no 'iner'", "did you mean inner?"]),
        ("mynet:make", ["no such module", "did you mean mynets"]),
        ("mynest.py:make", ["no such file", "did you mean mynets.py?"]),
        ("mynets.deeper:make", ["no such module"]),
        ("mynets", ["allowed is module:name or file.py:name"]),
        (":make", ["allowed is module:name or file.py:name"]),
        ("mynets:", ["allowed is module:name or file.py:name"]),
        ("mynets:fails", ["calling it failed: KeyError: 'no such key'", "mynets.py, line 14"]),
        (
            "mynets:needs_one",
            ["missing a required argument: 'size'", "--model-arg name=value", "it takes size"],
        ),
    ],
)
def test_a_wrong_name_is_one_line(spec: str, words: list[str]):
    with pytest.raises(click.UsageError) as error:
        model(spec)
    assert "\n" not in error.value.message
    for word in words:
        assert word in error.value.message


def test_arguments_must_fit():
    with pytest.raises(
        click.UsageError, match=r"does not take 'widht' \(did you mean width\?\); it takes width, bias"
    ):
        model("mynets:make", widht=4)
    with pytest.raises(click.UsageError, match="mynets:ready is a Linear and is used as it is"):
        model("mynets:ready", width=4)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "import nowhere_at_all\n",
            "ModuleNotFoundError: No module named 'nowhere_at_all' (broken.py, line 1)",
        ),
        ("x = 1\ny = (\n", "(broken.py, line 2)"),
        ("raise SystemExit(0)\n", "ended the program; put what runs under if __name__"),
        ("1 / 0\n", "ZeroDivisionError: division by zero (broken.py, line 1)"),
    ],
)
@pytest.mark.parametrize("where", ["broken", "broken.py"])
def test_a_file_that_cannot_be_imported_names_its_line(here: Path, source: str, words: str, where: str):
    (here / "broken.py").write_text(source)
    with pytest.raises(click.UsageError) as error:
        load.named(f"{where}:x", "--model")
    assert words in error.value.message
    assert "\n" not in error.value.message


def test_arguments_are_literals_or_texts():
    given = (
        "width=16",
        "shape=(3, 4)",
        "name=relu",
        "rate=1e-3",
        "flag=None",
        "empty=",
        "url=a=b",
        "with-hyphen=1",
    )
    assert load.arguments(given, "--model-arg") == {
        "width": 16, "shape": (3, 4), "name": "relu", "rate": 1e-3, "flag": None, "empty": "", "url": "a=b",
        "with_hyphen": 1,
    }  # fmt: skip
    for bad in ("width", "=3", "a b=3"):
        with pytest.raises(click.UsageError, match="allowed is name=value"):
            load.arguments((bad,), "--model-arg")


# --- losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("cross_entropy", F.cross_entropy), ("cross-entropy", F.cross_entropy), ("mse", F.mse_loss),
        ("mse_loss", F.mse_loss), ("bce_with_logits", F.binary_cross_entropy_with_logits),
        ("binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits), ("nll_loss", F.nll_loss),
        ("smooth_l1_loss", F.smooth_l1_loss),
    ],
)  # fmt: skip
def test_losses_of_torch_by_name(name: str, function: object):
    assert load.loss(name, {}) is function


def test_losses_of_the_user():
    output, target = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])
    assert load.loss("mynets:own_loss", {})(output, target) == 3
    assert load.loss("mynets:OwnLoss", {})(output, target) == 2.5
    assert load.loss("mynets.py:OwnLoss", {"power": 1})(output, target) == 1.5
    logits, classes = torch.zeros(2, 4), torch.tensor([1, 3])
    smoothed = load.loss("cross_entropy", {"ignore_index": 3})
    assert smoothed(logits, classes) == F.cross_entropy(logits[:1], classes[:1])


@pytest.mark.parametrize(
    ("spec", "given", "words"),
    [
        ("cross_entorpy", {}, "did you mean cross_entropy"),
        ("dropout", {}, "no such loss"),
        ("ctc_loss", {}, "no such loss"),
        ("mynets:number", {}, "is a int; allowed is a loss(output, target)"),
        ("cross_entropy", {"label_smooth": 0.1}, "did you mean label_smoothing?"),
    ],
)
def test_a_wrong_loss_is_one_line(spec: str, given: dict[str, object], words: str):
    with pytest.raises(click.UsageError) as error:
        load.loss(spec, given)
    assert words in error.value.message
    assert "\n" not in error.value.message


# --- the first N examples -----------------------------------------------------------------------------


def test_first_examples_cuts_batches_of_any_structure():
    x, y = torch.arange(24.0).reshape(12, 2), torch.arange(12)
    batches = [{"x": x[a:b], "more": [y[a:b], (y[a:b],)]} for a, b in ((0, 5), (5, 10), (10, 12))]
    for count, sizes in ((5, [5]), (7, [5, 2]), (11, [5, 5, 1]), (100, [5, 5, 2])):
        cut = load.FirstExamples(batches, count)
        for _ in range(2):  # read again, the same comes
            found = list(cut)
            assert [len(batch["x"]) for batch in found] == sizes
            assert torch.equal(torch.cat([batch["x"] for batch in found]), x[:count])
            assert torch.equal(torch.cat([batch["more"][0] for batch in found]), y[:count])
            assert torch.equal(torch.cat([batch["more"][1][0] for batch in found]), y[:count])


def test_first_examples_takes_a_pair_of_tensors_as_one_batch():
    ((x, y),) = load.FirstExamples((torch.arange(6.0), torch.arange(6)), 4)
    assert x.tolist() == y.tolist() == [0, 1, 2, 3]


def test_first_examples_reads_no_further_than_it_must():
    class Loader:
        read = 0

        def __iter__(self):
            for _ in range(10):
                Loader.read += 1
                yield torch.zeros(4, 1), torch.zeros(4)

    assert len(list(load.FirstExamples(Loader(), 8))) == 2
    assert Loader.read == 2


# --- checkpoints --------------------------------------------------------------------------------------


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def filled(seed: int = 3, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    made = net(width)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p))
    return made


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("place", ["", "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_loads_bare_and_nested_with_and_without_prefix(tmp_path: Path, place: str, prefix: str):
    wanted, model, said = filled(), net(), []
    state = OrderedDict((prefix + key, value) for key, value in wanted.state_dict().items())
    torch.save({place: state, "epoch": 3, "args": {"lr": 0.1}} if place else state, tmp_path / "w.pt")
    checkpoints.load_into(model, tmp_path / "w.pt", said.append)
    assert same(model, wanted)
    assert (repr(place) in said[0]) == bool(place)
    assert (prefix in said[0] and "taken off" in said[0]) == bool(prefix) or not prefix


def test_loads_safetensors_whatever_the_file_is_called(tmp_path: Path):
    wanted = filled()
    for name in ("w.safetensors", "w.pt"):
        model, said = net(), []
        save_file({"module." + key: value for key, value in wanted.state_dict().items()}, tmp_path / name)
        checkpoints.load_into(model, tmp_path / name, said.append)
        assert same(model, wanted)
        assert "'module.'" in said[0]


def test_a_model_whose_own_keys_begin_with_module_keeps_them(tmp_path: Path):
    wanted = nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save(wanted.state_dict(), tmp_path / "w.pt")
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    checkpoints.load_into(model, tmp_path / "w.pt", lambda _: None)
    assert same(model, wanted)


def test_old_batch_norm_without_its_counter_is_loaded(tmp_path: Path):
    wanted, model = filled(), net()
    torch.save({k: v for k, v in wanted.state_dict().items() if "num_batches" not in k}, tmp_path / "w.pt")
    checkpoints.load_into(model, tmp_path / "w.pt", lambda _: None)
    assert same(model, wanted)


def misfit(kind: str) -> dict[str, torch.Tensor]:
    state = dict(filled().state_dict())
    if kind == "missing":
        del state["2.weight"], state["2.bias"]
    elif kind == "unexpected":
        state["head.weight"] = torch.zeros(2)
    elif kind == "shape":
        state["2.weight"] = torch.zeros(2, 5)
    elif kind == "kind":
        state["1.num_batches_tracked"] = torch.tensor(0.5)
    else:
        state = {f"other{i}": torch.zeros(1) for i in range(9)}
    return state


MISFITS = {
    "missing": "missing: 2.weight, 2.bias",
    "unexpected": "unexpected: head.weight",
    "shape": "of another shape: 2.weight is (2, 5) in the file, (2, 4) in the model",
    "kind": "of another kind: 1.num_batches_tracked is torch.float32 in the file, torch.int64 in the model",
    "foreign": "unexpected: other0, other1, other2 and 6 more",
}


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_what_does_not_fit_is_named_and_the_model_untouched(tmp_path: Path, kind: str, form: str):
    path = tmp_path / "w.file"
    if form == "torch":
        torch.save(misfit(kind), path)
    else:
        save_file(misfit(kind), path)
    model, before = filled(1), filled(1)
    with pytest.raises(Refused) as error:
        checkpoints.load_into(model, path, lambda _: None)
    assert "does not fit the model" in str(error.value)
    assert MISFITS[kind] in str(error.value)
    assert same(model, before)


class Touch:
    """A pickle of this writes a file when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("EXECUTED",)


def test_hostile_files_are_refused_and_nothing_is_run(tmp_path: Path):
    def zipped(name: str, members: dict[str, bytes], how: int) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w", how) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return tmp_path / name

    torch.save({"state_dict": Touch()}, tmp_path / "code.pt")
    torch.save(filled(), tmp_path / "whole.pt")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Touch()))
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(filled().state_dict(), tmp_path / "good.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:900])
    zipped("deflated.pt", {"archive/data.pkl": b"\0" * 10**7}, zipfile.ZIP_DEFLATED)
    zipped("other.pt", {"readme.txt": b"hello"}, zipfile.ZIP_STORED)
    (tmp_path / "header.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    (tmp_path / "header2.safetensors").write_bytes((200 << 20).to_bytes(8, "little") + b"{" * 100)
    (tmp_path / "shape.safetensors").write_bytes(
        (72).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}'.ljust(72)
        + b"0000"
    )
    torch.save({k: torch.zeros(1).expand(10**12) for k in filled().state_dict()}, tmp_path / "stride.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "nothing.pt")
    expected = {
        "code.pt": "needs code to be read (", "whole.pt": "needs code to be read (torch.nn.modules",
        "raw.pkl": "is no checkpoint", "text.pt": "is no checkpoint",
        "empty.pt": "is empty", "cut.pt": "it was cut", "deflated.pt": "compressed members",
        "other.pt": "without data.pkl", "header.safetensors": "header claims", "header2.safetensors": "header claims",
        "shape.safetensors": "damaged", "stride.pt": "(1000000000000) in the file", "list.pt": "it holds a list",
        "nothing.pt": "it holds 'epoch', 'optimizer'",
    }  # fmt: skip
    for name, words in expected.items():
        model, before = filled(1), filled(1)
        with pytest.raises(Refused) as error:
            checkpoints.load_into(model, tmp_path / name, lambda _: None)
        assert words in str(error.value), name
        assert "\n" not in str(error.value)
        assert same(model, before)
    assert not Path("EXECUTED").exists()


def test_an_archive_that_overlaps_itself_is_refused(tmp_path: Path):
    """Two directory entries that point at the same bytes claim more than the file has."""
    path = tmp_path / "w.pt"
    torch.save(filled().state_dict(), path)
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"PK\x01\x02")
    for offset in (20, 24):  # compressed and real size of the last entry
        raw[entry + offset : entry + offset + 4] = (10**9).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(Refused, match="claims more bytes inside than the file has"):
        checkpoints.load_into(net(), path, lambda _: None)


def test_a_trusted_checkpoint_may_need_code(tmp_path: Path):
    wanted = filled()
    torch.save(wanted, tmp_path / "whole.pt")
    torch.save(wanted.state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("whole.pt", "legacy.pt"):
        model = net()
        checkpoints.load_into(model, tmp_path / name, lambda _: None, trust=True)
        assert same(model, wanted)


def test_patterns_are_expanded_in_natural_order_each_file_once(tmp_path: Path):
    for name in ("epoch10.pt", "epoch2.pt", "epoch1.pt", "last[1].pt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "epoch3.pt").mkdir()
    found = expand(("epoch*.pt", "epoch2.pt"))
    assert [path.name for path in found] == ["epoch1.pt", "epoch2.pt", "epoch10.pt"]
    assert [path.name for path in expand(("last[1].pt",))] == ["last[1].pt"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("epch1.pt", "no such file (did you mean epoch1.pt?)"),
        ("nowhere/epoch1.pt", "there is no directory nowhere"),
        ("step*.pt", "no file matches"),
        (".", "is a directory, allowed is a file or a pattern in quotes, 'epoch*.pt'; in it are epoch1.pt"),
    ],
)
def test_a_missing_checkpoint_is_one_line(tmp_path: Path, pattern: str, words: str):
    (tmp_path / "epoch1.pt").write_bytes(b"")
    with pytest.raises(Refused) as error:
        expand((pattern,))
    assert words in str(error.value)
