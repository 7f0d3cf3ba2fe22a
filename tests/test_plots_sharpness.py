"""Pictures of sharpness."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pictures import assert_readable, drawn

from landscape import plots
from landscape.plots import PlotError, sharpness
from landscape.results import Record, Variable


def record(definition: str = "keskar", sizes: int = 4, scale: float = 1.0) -> Record:
    epsilon, dims = np.geomspace(1e-4, 1e-2, sizes) if sizes > 1 else np.array([1e-3]), ("epsilon",)
    value = scale * (1e3 * epsilon + 2e6 * epsilon**2)
    variables = {"epsilon": Variable(dims, epsilon), "sharpness": Variable(dims, value)}
    if definition == "average":
        variables["sharpness_stderr"] = Variable(dims, 0.1 * value)
    else:
        variables["spread"] = Variable(dims, 0.2 * value)
        variables["first_order"] = Variable(dims, scale * 1e3 * epsilon)
    if definition == "ball":
        variables["second_order"] = Variable(dims, scale * 1e6 * epsilon**2)
        variables["upper_bound"] = Variable(dims, np.full(sizes, 1e3 * scale))
    configuration = json.dumps({"definition": definition})
    return Record(variables, {"metric": "sharpness", "order": 26122, "configuration": configuration})


CASES = {
    "keskar": [record()],
    "ball": [record("ball")],
    "average": [record("average")],
    "one size": [record("adaptive", sizes=1)],
    "tiny": [record("ball", scale=1e-12)],
    "runs": [record(scale=10.0**i) for i in range(4)],
    "definitions": [record(), record("ball"), record("average")],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [7.0, 3.4])
def test_every_text_lies_in_the_figure_is_large_enough_and_apart(case: str, width: float):
    assert_readable(drawn(sharpness, CASES[case], width))


def test_what_is_drawn_is_what_is_stored():
    (axes,) = drawn(sharpness, [record("ball")], 7).axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    stored = record("ball")
    for label, name in (
        ("first order: the slope alone", "first_order"),
        ("certain upper bound", "upper_bound"),
    ):
        np.testing.assert_array_equal(lines[label][:, 1], stored[name])
    assert axes.get_xscale() == axes.get_yscale() == "log"
    picture = sharpness.prepare(record("average"))
    np.testing.assert_allclose(picture.high - picture.sharpness, 1.96 * 0.1 * picture.sharpness)
    assert "100" in sharpness.prepare(record()).unit
    assert axes.get_legend().get_texts()[0].get_text().startswith("measured")


def test_nothing_to_draw_is_said():
    with pytest.raises(PlotError, match="no sharpness is measured yet"):
        sharpness.prepare(Record())
    flat = record(scale=0.0)
    with pytest.raises(PlotError, match="rises nowhere"):
        sharpness.prepare(flat)


@pytest.mark.parametrize("ending", [".png", ".html"])
def test_a_file_is_written(tmp_path: Path, ending: str):
    out = plots.plot([record("ball"), record("ball", scale=2)], tmp_path / f"p{ending}")
    assert out.stat().st_size > 10_000
