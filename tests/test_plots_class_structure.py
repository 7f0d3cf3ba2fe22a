"""The picture of a class structure: that it shows what is stored, and can be read."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import assert_readable, drawn
from torch import nn

import landscape
from landscape import Problem, plots, testbeds
from landscape.class_structure import embedding
from landscape.metrics import ClassStructure
from landscape.plots import PlotError, class_structure
from landscape.plots.class_panels import colors
from landscape.record import Record

SPECTRA = ("hessian", "G", "hessian/G1", "G-G012")


@functools.cache
def measured(classes: int, *names: str) -> Record:
    draws = torch.Generator().manual_seed(0)
    y = torch.arange(5 * classes) % classes
    x = torch.randn(len(y), 6, generator=draws, dtype=torch.float64) + torch.eye(classes, 6)[y].double()
    problem = Problem(testbeds.mlp([6, 8, classes], nn.Tanh).double(), nn.CrossEntropyLoss(), [(x, y)])
    metric = ClassStructure(spectra=SPECTRA, probes=1, steps=24, attribution=False, class_names=names or None)
    with pytest.MonkeyPatch.context() as patched:  # the principal axes do for a picture
        patched.setattr(embedding, "embed", lambda gram, _: embedding._principal(gram))
        record = landscape.evaluate(metric, problem)
    record.attrs["metric"] = "class_structure"
    return record


@pytest.fixture
def record() -> Record:
    return measured(4, "cat", "dog", "hippopotamus", "owl")


def test_prepared_arrays_are_what_is_stored(record: Record) -> None:
    picture = class_structure.prepare(record, "mine")
    assert picture.run == "mine"
    assert picture.caption == "4 classes, 5 examples of each, weighting of 2019"
    assert picture.names == ["cat", "dog", "hippopotamus", "owl"]
    assert [one.name for one in picture.spectra] == ["Hessian", "G", "Hessian without G₁", "G − G₀₁₂"]
    assert np.array_equal(picture.parts["G1"], record["eigenvalues_G1"])
    assert np.array_equal(picture.top, record["eigenvalues_G"])
    assert np.array_equal(picture.cosines, record["class_cosine"])
    assert len(picture.points) == 4 + 16
    assert (picture.point_output < 0).sum() == 4
    for one, row in zip(picture.spectra, record["spectrum_density"], strict=True):
        assert np.array_equal(one.density, row[np.isfinite(row)])


@pytest.mark.parametrize("width", [7.0, 3.5])
@pytest.mark.parametrize("classes", [3, 10])
def test_texts_can_be_read(classes: int, width: float) -> None:
    figure = drawn(class_structure, [measured(classes)], width)
    assert_readable(figure)
    assert len(figure.axes) == 5  # four panels and a colour bar


def test_long_names_and_two_runs_can_be_read(record: Record) -> None:
    figure = drawn(class_structure, [record, record], 7.0)
    assert len(figure.axes) == 10
    assert_readable(figure)


def test_the_points_have_the_colour_of_their_class(record: Record) -> None:
    figure = drawn(class_structure, [record], 7.0)
    small, large = figure.axes[0].collections
    assert np.allclose(large.get_facecolors()[:, :3], colors(4))
    assert np.allclose(small.get_facecolors()[:, :3], np.repeat(colors(4), 4, axis=0))
    assert len({*map(tuple, colors(12))}) == 12


def test_what_is_not_there_yet_is_left_out() -> None:
    whole = measured(3)
    part = Record({**whole.variables}, dict(whole.attrs))
    for name in ("tsne", "spectrum_x"):
        del part.variables[name]
    figure = drawn(class_structure, [part], 7.0)
    assert len([axes for axes in figure.axes if axes.get_visible()]) == 3
    with pytest.raises(PlotError, match="run `landscape measure` again"):
        class_structure.prepare(Record({}, {}))


@pytest.mark.parametrize("ending", ["png", "svg", "html"])
def test_files_are_written_the_same_twice(ending: str, record: Record, tmp_path: Path) -> None:
    if ending == "html":
        pytest.importorskip("plotly")
    first, second = (plots.plot(record, tmp_path / f"{i}.{ending}").read_bytes() for i in range(2))
    assert first == second
    if ending == "html":
        assert b"towards" in first
