"""What a stranger's file says is not believed, shown or followed; and no code runs that nobody named."""

from __future__ import annotations

import contextlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from landscape_cli import app, progress
from records import sample
from torch import nn

import landscape
from landscape import Problem, metrics
from landscape.errors import UnknownMetric
from landscape.metrics import registry
from landscape.results import Record, ResultsError, Variable, read, write


def run(*words: str) -> Result:
    return CliRunner().invoke(app.app, list(words))


def problem() -> Problem:
    torch.manual_seed(0)
    x, y = torch.randn(12, 3), torch.randint(0, 2, (12,))
    return Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), [(x, y)])


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    chosen = metrics.Trace(method="hutchinson", max_probes=16, rtol=0.0)
    landscape.measure(chosen, problem(), out=tmp_path)
    return tmp_path / "trace.h5"


def changed(path: Path, **attrs: Any) -> None:
    record = read(path)
    record.attrs.update(attrs)
    write(path, record)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_size", 0), ("block_size", "8"), ("block_size", True), ("stop", -1), ("stop", 10**9), ("stop", None),
        ("complete", "yes"), ("memory_plan", [1]), ("check", 3), ("headline", 3), ("told", "trace"), ("listed", [3]),
        ("unit", None), ("configuration", "[1]"), ("configuration", "{"), ("configuration", 3), ("exit_code", "0"),
        ("parameter_ranges", {"a": [0]}), ("parameter_ranges", {"a": [0, -1]}), ("git_commit", 3), ("seed", 0.5),
        ("part", ["a", 2]), ("part", [1]),
        ("configuration", "[" * 100_000),
    ],
)  # fmt: skip
def test_an_attribute_of_another_type_is_refused_with_its_name(measured: Path, name: str, value: Any) -> None:
    changed(measured, **{name: value})
    with pytest.raises(ResultsError, match=f"{name}|units") as error:
        read(measured)
    assert len(str(error.value)) < 600
    chosen = metrics.Trace(method="hutchinson", max_probes=32, rtol=0.0)
    with pytest.raises(ResultsError, match=f"{name}|units"):
        landscape.measure(chosen, problem(), out=measured.parent)


@pytest.mark.parametrize("name", ["samples", "done", "plan", "method", "order", "told"])
def test_a_measurement_that_lacks_something_is_shown_or_refused(measured: Path, name: str) -> None:
    record = read(measured)
    record.variables.pop(name, None)
    record.attrs.pop(name, None)
    write(measured, record)
    for words in (["show", str(measured)], ["show", str(measured), "--json"], ["plot", str(measured)],
                  ["compare", str(measured), str(measured)]):  # fmt: skip
        done = run(*words)
        assert done.exit_code in {0, 3}, done.output
        assert "Traceback" not in done.output
    chosen = metrics.Trace(method="hutchinson", max_probes=16, rtol=0.0)
    with contextlib.suppress(ResultsError, landscape.Refused):
        landscape.measure(chosen, problem(), out=measured.parent)


def test_dimensions_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", Record({"x": Variable(("n",), np.zeros(3)), "y": Variable(("m",), np.zeros(2))}))
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["y"].attrs["dims"] = np.bytes_(b'["n"]')
    with pytest.raises(ResultsError, match="dimension n has length 3, but 2 in y"):
        read(tmp_path / "a.h5")


def test_a_terminal_is_not_steered_by_a_file(measured: Path) -> None:
    changed(measured, model="\x1b[2Jnet\u202e\x07", command="a\rb\udc80\x9b1m")
    shown = run("show", str(measured))
    assert shown.exit_code == 0
    assert not set("\x1b\u202e\x07\r\x9b\udc80") & set(shown.output)
    assert "\\u001b[2Jnet\\u202e" in shown.output
    assert progress.visible("λ ± 1\n\t层") == "λ ± 1\n\t层"


def test_formulas_in_a_file_are_no_stray_error(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    Path("matplotlibrc").write_text("text.usetex: True\nbackend: module://evil\n")
    Path("evil.py").write_text("raise SystemExit(9)")
    code = "import sys; from landscape_cli import main; sys.exit(main())"
    words = [sys.executable, "-P", "-c", code, "plot", str(measured), "-o", "a.png"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    odd = measured.parent / "$\\frac{$" / "trace.h5"
    write(odd, read(measured))
    failed = run("plot", str(odd))
    assert failed.exit_code == 3
    assert "holds what landscape does not write" in failed.output
    assert "Traceback" not in failed.output


def test_names_of_checkpoints_stay_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Linear(3, 2)\n"
        "x = torch.ones(4, 3)\ndata = [(x, torch.zeros(4, dtype=torch.long))]\n"
    )
    for name in ("...pt", ".hidden.pt", "w.pt"):
        torch.save(nn.Linear(3, 2).state_dict(), name)
    done = run("measure", "--metric", "trace", "--model", "nets.py:net", "--data", "nets.py:data", "--loss",
               "cross_entropy", "--out", "runs/deep", "--checkpoint", "...pt", "--checkpoint", ".hidden.pt",
               "--checkpoint", "w.pt")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert [p.name for p in Path("runs").iterdir()] == ["deep"]
    assert sorted(p.name for p in Path("runs/deep").iterdir()) == ["checkpoint", "hidden", "w"]


@pytest.mark.parametrize("name", ["../evil", "..", "a/b", "/tmp/evil", "", "a b"])
def test_a_metric_whose_name_is_a_path_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom landscape.metrics.trace import Trace\n"
        f"@dataclass(frozen=True)\nclass Mine(Trace):\n    name = {name!r}\n"
    )
    with pytest.raises(UnknownMetric, match="letters, digits and _"):
        registry.load(str(tmp_path / "mine.py"))


def test_what_is_installed_runs_only_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin_of_tests.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'RAN')!r}).touch()\n"
        "from dataclasses import dataclass\nfrom landscape.metrics.trace import Trace\n"
        "@dataclass(frozen=True)\nclass Plugged(Trace):\n    name = 'plugged'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        importlib.metadata.EntryPoint(name, "plugin_of_tests:Plugged", "landscape.metrics")
        for name in ("plugged", "trace")
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: points)
    for words in (
        ["--metric", "trace", "--dry-run"],
        ["--help"],
        ["--metric", "trcae"],
        ["--metric", "trace", "--x", "1"],
    ):
        done = run("measure", *words)
        assert not (tmp_path / "RAN").exists(), words
    assert "plugged" in run("measure", "--metric", "trcae").output
    assert registry.load("trace") is metrics.Trace
    assert done.exit_code == 2
    assert not (tmp_path / "RAN").exists()
    assert registry.load("plugged").__name__ == "Plugged"
    assert (tmp_path / "RAN").exists()


def test_a_name_in_the_file_and_in_its_sidecar(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", sample())
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        table = file.attrs["sidecar"]
        text = (table if isinstance(table, str) else table.decode()).replace('"mask"', '"trace"', 1)
        file.attrs["sidecar"] = np.bytes_(text.encode())
    with pytest.raises(ResultsError, match="trace"):
        read(tmp_path / "a.h5")
