"""Texts become values and flags of metrics; progress and tables."""

from __future__ import annotations

import doctest
from dataclasses import dataclass
from typing import Any, Literal

import click
import numpy as np
import pytest
from landscape_cli import flags, progress, report, values

from landscape.metrics.base import setting
from landscape.results import Record, Variable


def test_examples_in_docstrings():
    for module in (values, report, flags):
        assert doctest.testmod(module).failed == 0


# --- values and flags ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3), ("1e4", int, 10_000), ("2.0", int, 2), ("5e-4", float, 5e-4), ("none", str | None, None),
        ("mean", str | None, "mean"), ("yes", bool, True), ("GGN", Literal["hessian", "ggn"], "ggn"),
        ("saddle-free", Literal["saddle_free"], "saddle_free"), ("1e-3,5e-4", tuple[float, ...], (1e-3, 5e-4)),
        ("0.1", tuple[float, ...], (0.1,)), ("0.1,", tuple[float, ...], (0.1,)), ("", tuple[float, ...], ()),
        ("1:100:3", tuple[float, ...], (1.0, 10.0, 100.0)), ("100:1:3", tuple[float, ...], (100.0, 10.0, 1.0)),
        ("0.5,1:4:3", tuple[float, ...], (0.5, 1.0, 2.0, 4.0)), ("1:4:3", tuple[int, ...], (1, 2, 4)),
        ("61", int | tuple[int, ...], 61), ("61,", int | tuple[int, ...], (61,)),
        ("51,31", int | tuple[int, ...], (51, 31)), ("a,b", tuple[str, ...], ("a", "b")),
        ("-1:1,-0.3:0.9", tuple[tuple[float, float], ...], ((-1.0, 1.0), (-0.3, 0.9))),
        ("-1,2", tuple[float, float], (-1.0, 2.0)), ("none", tuple[float, ...] | None, None),
    ],
)  # fmt: skip
def test_texts_become_values(text: str, hint: Any, value: Any):
    found = values.parse(text, hint)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "hint", "words"),
    [
        ("many", int, "'many' is no integer"), ("1.5", int, "is no integer"), ("inf", int, "is no integer"),
        ("x", float, "is no number"), ("maybe", bool, "neither yes nor no"),
        ("gnn", Literal["hessian", "ggn"], "none of hessian, ggn (did you mean ggn?)"),
        ("1:2", tuple[float, ...], "is no range a:b:n"), ("0:1:3", tuple[float, ...], "is no range a:b:n"),
        ("1:2:3:4", tuple[float, ...], "is no range a:b:n"), ("1:2:1", tuple[float, ...], "is no range a:b:n"),
        ("1,2,3", tuple[float, float], "has 3 values; allowed are 2"), ("1,x", tuple[float, ...], "'x' is no number"),
    ],
)  # fmt: skip
def test_texts_that_are_no_values(text: str, hint: Any, words: str):
    with pytest.raises(ValueError, match=r".") as error:
        values.parse(text, hint)
    assert words in str(error.value)


def test_sizes_of_memory():
    assert [values.size(t) for t in ("8GiB", "8 GB", "1.5k", "1024")] == [8 << 30, 8 * 10**9, 1536, 1024]
    for bad in ("lots", "-1GB", "0", "8 gallons", ""):
        with pytest.raises(ValueError, match="is no amount of memory"):
            values.size(bad)


@dataclass(frozen=True)
class First:
    """The first."""

    rtol: float = setting(0.1, "how exact", grows=True)
    kind: Literal["a", "b"] = setting("a", "which")
    both: bool = setting(False, "a switch")


@dataclass(frozen=True)
class Second:
    """The second."""

    rtol: float = 0.2
    max_probes: int = 8
    epsilon: tuple[float, ...] = (1e-3, 5e-4)
    both: int = 3


def settings(*words: str) -> dict[str, dict[str, Any]]:
    known = flags.MetricFlags({"first": First, "second": Second})
    params: list[click.Parameter] = list(known.options())
    command = click.Command(
        "x", params=params, context_settings={"token_normalize_func": lambda name: name.replace("_", "-")}
    )
    return known.settings(command.make_context("x", list(words)).params)


def test_a_flag_goes_to_every_named_metric_that_has_the_field():
    assert settings() == {"first": {}, "second": {}}
    assert settings("--rtol", "0.5") == {"first": {"rtol": 0.5}, "second": {"rtol": 0.5}}
    assert settings("--first.rtol", "0.5") == {"first": {"rtol": 0.5}, "second": {}}
    assert settings("--rtol", "0.5", "--second.rtol=0.25") == {
        "first": {"rtol": 0.5},
        "second": {"rtol": 0.25},
    }
    assert settings("--epsilon", "1:100:3", "--kind", "b") == {
        "first": {"kind": "b"}, "second": {"epsilon": (1.0, 10.0, 100.0)},
    }  # fmt: skip


def test_hyphens_and_underscores_are_the_same():
    for flag in ("--max-probes", "--max_probes", "--second.max-probes", "--second.max_probes"):
        assert settings(flag, "4") == {"first": {}, "second": {"max_probes": 4}}


def test_a_field_that_is_a_switch_in_one_metric_and_a_number_in_another_has_only_the_long_form():
    assert settings("--first.both", "--second.both", "5") == {"first": {"both": True}, "second": {"both": 5}}
    assert settings("--first.no-both") == {"first": {"both": False}, "second": {}}
    with pytest.raises(click.NoSuchOption):
        settings("--both")


def test_a_flag_that_no_named_metric_has_lists_what_they_have():
    known = flags.MetricFlags({"first": First}, {"first": First, "second": Second})
    text = known.no_such("--rtoll", ["--out"]).message
    assert "did you mean --rtol?" in text
    assert "first has --rtol, --kind, --both" in text
    assert "second has it, which is not among the named metrics" in known.no_such("--max-probes", []).message
    assert "add --metric second" in known.no_such("--second.rtol", []).message
    assert "metric first has no rtl (did you mean rtol?)" in known.no_such("--first.rtl", []).message
    assert "did you mean --out?" in known.no_such("--outt", ["--out"]).message


def test_a_mistyped_metric_is_one_line_and_not_every_flag_of_every_metric():
    everything = dict.fromkeys("abcd", First)
    text = flags.MetricFlags(everything, everything).no_such("--metrik", ["--metric", "--out"]).message
    assert text == "no flag --metrik (did you mean --metric?). landscape measure --help lists all"


def test_a_field_with_the_name_of_an_option_is_refused():
    with pytest.raises(click.UsageError, match=r"metric second has a field 'epsilon', which is an option"):
        flags.MetricFlags({"second": Second}, taken=["epsilon"])


# --- progress and tables ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    metric: str
    done: int
    total: int | None
    message: str


def test_progress_is_a_line_a_minute_without_a_terminal(capsys: pytest.CaptureFixture[str]):
    now = 0.0
    with progress.Reporter(terminal=False, clock=lambda: now) as reporter:
        for second in range(0, 200, 5):
            now = float(second)
            reporter(Step("trace", second, 256, "trace 4.2 ± 0.1"))
        reporter(Step("trace", 0, None, "waiting for process 7"))
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.splitlines() == [
        "landscape: trace: 60 of 256 done, trace 4.2 ± 0.1, 60 s",
        "landscape: trace: 120 of 256 done, trace 4.2 ± 0.1, 120 s",
        "landscape: trace: 180 of 256 done, trace 4.2 ± 0.1, 180 s",
        "landscape: trace: waiting for process 7",
    ]


def test_progress_is_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str]):
    with progress.Reporter(terminal=True) as reporter:
        reporter(Step("trace", 8, 16, "trace 4.2 [red]"))
        reporter(Step("trace", 16, 16, ""))
    reporter.close()
    assert capsys.readouterr().out == ""


def test_tables_of_lists_and_of_measurements_without_error():
    variables = {
        "epsilon": Variable(("epsilon",), np.array([1e-3, 5e-4])),
        "sharpness": Variable(("epsilon",), np.array([0.5, -0.25])),
        "converged": Variable(("epsilon",), np.array([True, False])),
    }
    record = Record(variables, {"metric": "sharpness", "headline": "sharpness"})
    for found in (record, record.to_xarray()):
        summary = report.summarize(found)
        assert [(e.name, e.text) for e in summary.estimates] == [
            ("sharpness(epsilon=0.001)", "0.5"), ("sharpness(epsilon=0.0005)", "-0.25"),
        ]  # fmt: skip
        assert summary.converged is False
        assert len(report.table([summary]).splitlines()) == 3
    picture = Record(
        {"loss": Variable(("y", "x"), np.zeros((3, 3)))}, {"metric": "surface", "headline": "loss"}
    )
    assert report.summarize(picture).estimates == []
