"""`landscape compare`: numbers of several runs side by side, their differences, and what keeps them apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from landscape_cli.app import app

from landscape import results
from landscape.results import Record, Variable


def measured(value: float, stderr: float | None = None, metric: str = "trace", **attrs: object) -> Record:
    variables = {metric: Variable((), value)}
    if stderr is not None:
        variables[f"{metric}_stderr"] = Variable((), stderr)
    configuration = json.dumps(attrs.pop("configuration", {"rtol": 0.01}))
    base = {
        "metric": metric, "headline": metric, "configuration": configuration, "data_fingerprint": "d", "seed": 0,
    }  # fmt: skip
    return Record(variables, {**base, **attrs})


def compare(*words: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, words)])


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    results.write(Path("a/trace.h5"), measured(10.0, 0.3))
    results.write(Path("b/trace.h5"), measured(12.0, 0.4))
    results.write(Path("a/path_norm.h5"), measured(3.0, metric="path_norm"))
    results.write(Path("b/path_norm.h5"), measured(2.5, metric="path_norm"))
    results.write(Path("b/fisher_rao.h5"), measured(1.0, metric="fisher_rao"))
    return tmp_path


def test_two_runs_with_their_differences(runs: Path):
    found = compare("a", "b")
    assert found.exit_code == 0, found.output
    rows = {line.split("  ")[0]: line.split() for line in found.stdout.splitlines()}
    assert list(rows) == ["measure", "path_norm", "trace", "fisher_rao"]
    assert rows["trace"][-2:] == ["2", "4.0"]  # 2 / √(0.3² + 0.4²)
    assert rows["path_norm"][-1] == "-0.5"
    assert rows["fisher_rao"][1:] == ["-", "1"]


def test_three_runs_and_files(runs: Path):
    results.write(Path("c.h5"), measured(11.0, 0.1))
    found = compare("a/trace.h5", "b/trace.h5", "c.h5")
    assert found.exit_code == 0
    head, row = (line.split() for line in found.stdout.splitlines())
    assert head == ["measure", "a/trace.h5", "b/trace.h5", "c.h5"]
    assert row[0] == "trace"
    assert next(word for word in row if word[0].isdigit()).startswith("10")


def test_what_differs_is_said(runs: Path):
    results.write(
        Path("b/trace.h5"),
        measured(12.0, configuration={"rtol": 0.1}, data_fingerprint="e", seed=1),
    )
    said = compare("a", "b").stdout
    assert "trace: rtol differs: 0.01, 0.1" in said
    assert "trace: the data differ" in said
    assert "trace: the seed differs" in said
    assert "path_norm: " not in said


def test_as_json(runs: Path):
    found = json.loads(compare("a", "b", "--json").stdout)
    assert [one["run"] for one in found] == ["a", "b"]
    values = [
        m["estimates"]["trace"]["value"]
        for one in found
        for m in one["measurements"]
        if m["metric"] == "trace"
    ]
    assert values == [10.0, 12.0]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("a",), 2, "two runs or more"),
        (("a", "nowhere"), 3, "nowhere"),
        (("a", "b", "-o", "x.bmp"), 2, "allowed are .png"),
        (("a/path_norm.h5", "b/path_norm.h5", "-o", "x.png"), 2, "one measurement that all runs have"),
    ],
)
def test_bad_input_is_one_line(runs: Path, words: tuple[str, ...], code: int, said: str):
    found = compare(*words)
    assert found.exit_code == code, found.output
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
