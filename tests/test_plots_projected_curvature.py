"""The picture of curvatures in random planes, and the command line that measures and draws it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from landscape_cli import app as cli_app
from pictures import assert_readable, drawn

import landscape
from landscape import Problem, plots, testbeds
from landscape.metrics import ProjectedCurvature
from landscape.plots import PlotError, projected_curvature
from landscape.results import Record, Variable


def measured(positive: int, negative: int, planes: int = 60, scale: float = 1.0, **fields: object) -> Record:
    problem = Problem(*testbeds.saddle(positive, negative))
    record = landscape.evaluate(ProjectedCurvature(planes=planes, **fields), problem)
    for name in ("kappa", "trace", "trace_stderr", "frobenius_norm", "hessian_kappa"):
        if name in record:
            record[name][...] *= scale
    record.attrs |= {"metric": "projected_curvature", "configuration": json.dumps(fields)}
    return record


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [measured(50, 50, hessian_plane=True), measured(52, 48), measured(80, 20, hessian_plane=True)]


def test_prepare_returns_the_stored_numbers(records: list[Record]) -> None:
    record = records[0]
    picture = projected_curvature.prepare(record, "here")
    np.testing.assert_array_equal(picture.kappa, record["kappa"])
    t, norm = float(record["trace"]), float(record["frobenius_norm"])
    np.testing.assert_allclose(picture.expected, [t - 1.2533141373 * norm, t + 1.2533141373 * norm])
    assert picture.hessian is not None
    np.testing.assert_allclose(picture.hessian, [-100, 100])
    assert f"saddles {100 * float(record['saddle_fraction']):.3g} %" in picture.told
    assert "limit" in picture.told
    assert projected_curvature.prepare(records[1]).hessian is None
    few = measured(3, 1)
    assert projected_curvature.prepare(few).told.endswith("few eigenvalues dominate")
    assert "limit < 0.01 %" in projected_curvature.prepare(records[2]).told


@pytest.mark.parametrize("width", [7.0, 3.4])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_pictures_can_be_read(records: list[Record], count: int, width: float, scale: float) -> None:
    if scale != 1:
        records = [
            measured(50, 50, scale=scale, hessian_plane=True),
            measured(9, 1, 2, scale=scale),
            *records,
        ]
    assert_readable(drawn(projected_curvature, records[:count], width))


def test_every_plane_stands_in_the_histograms(records: list[Record]) -> None:
    figure = drawn(projected_curvature, records, 7.0)
    for axes in figure.axes:
        assert sum(patch.get_height() for patch in axes.patches) == 2 * 60
    low, high = figure.axes[0].get_xlim()
    every = np.concatenate([record["kappa"] for record in records])
    assert low < every.min() < every.max() < high


def test_the_hessian_plane_is_marked_where_it_lies_or_pointed_to(records: list[Record]) -> None:
    texts = [t.get_text() for t in drawn(projected_curvature, [records[0]], 7.0).axes[0].texts]
    assert texts == ["← Hessian plane −100", "Hessian plane 100 →"]
    inside = measured(1, 1, hessian_plane=True)
    inside["hessian_kappa"][:] = [0.5, 1.0]
    figure = drawn(projected_curvature, [inside], 7.0)
    assert not figure.axes[0].texts
    assert [t.get_text() for t in figure.legends[0].get_texts()][-1] == "Hessian plane"


def test_planes_without_curvature_are_drawn() -> None:
    flat = measured(5, 5, scale=0.0)
    flat["frobenius_norm"][...] = 0
    assert_readable(drawn(projected_curvature, [flat], 7.0), least=3)


def test_nothing_measured_is_refused() -> None:
    with pytest.raises(PlotError, match="again to go on"):
        projected_curvature.prepare(Record({}, {"metric": "projected_curvature"}))
    blank = Record({"kappa": Variable(("plane", "which"), np.full((4, 2), np.nan))})
    with pytest.raises(PlotError, match="again to go on"):
        projected_curvature.prepare(blank)


def test_interactive_pictures_hold_the_same(records: list[Record], tmp_path: Path) -> None:
    figure = projected_curvature.interactive([projected_curvature.prepare(r, "x") for r in records])
    bars = [trace for trace in figure.data if trace.type == "histogram"]
    np.testing.assert_array_equal(bars[0].x, records[0]["kappa"][:, 0])
    assert len(bars) == 6
    assert plots.plot(records, tmp_path / "x.html").stat().st_size > 1_000_000


# --- the command line ---------------------------------------------------------------------------------------


def command(*words: str) -> Result:
    return CliRunner().invoke(cli_app.app, list(words))


def test_measured_shown_and_drawn_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("measure", "--metric", "projected_curvature", "--planes", "4", "--out", "run")
    first = command(*words)
    assert first.exit_code == 0, first.output
    more = command(*words[:4], "64", *words[5:])
    assert more.exit_code == 0, more.output
    shown = command("show", "run").output
    for word in ("trace", "saddle_fraction", "warning", "few eigenvalues dominate", "64 of 64 planes"):
        assert word in shown
    assert command("plot", "run/projected_curvature.h5", "-o", "x.png").exit_code == 0
    assert (tmp_path / "x.png").stat().st_size > 10_000
    refused = command(*words, "--method", "products")
    assert refused.exit_code == 3
    assert "method" in refused.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--planes", "1"), "planes is 1; allowed is a number >= 2"),
        (("--step", "-2"), "step is -2.0; allowed is a number > 0, or none"),
        (("--plane", "9"), "--planes"),
        (("--method", "both"), "'both' is none of losses, products"),
        (("--planes", "4,8"), "'4,8' is no integer"),
    ],
)
def test_typos_are_named(words: tuple[str, ...], text: str) -> None:
    result = command("measure", "--metric", "projected_curvature", *words)
    assert result.exit_code == 2
    assert text in result.stderr.strip().splitlines()[-1]
