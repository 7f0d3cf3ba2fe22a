"""Pictures of surfaces: the arrays they show against the record, and that the drawn text can be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pictures import assert_readable, drawn
from scipy.interpolate import RegularGridInterpolator

from landscape import plots, results
from landscape.plots import PlotError, contours, profile, surface
from landscape.results import Record, Variable


def surface_record(
    shape: tuple[int, ...] = (9, 7), *, scale: float = 1.0, offset: float = 0.05, broken: int = 0, left: int = 0,
    path: bool = False, refined: int = 0, curvature: int = 0, accuracy: bool = True, directions: str = "filter",
) -> Record:  # fmt: skip
    """A surface as the metric stores it: a bowl, of which some points are not finite or not measured."""
    names = ("x", "y")[: len(shape)]
    axes = [np.linspace(-1, 1.0, n) for n in shape]
    at = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    loss = np.ascontiguousarray((offset + scale * (at**2 @ np.array([1.0, 0.4])[: len(shape)])).T)
    dims = names[::-1]
    measured = np.ones(loss.shape, bool)
    loss.ravel()[:broken] = [np.nan, np.inf, -np.inf, np.nan][:broken]
    loss.ravel()[loss.size - left :] = np.nan
    measured.ravel()[loss.size - left :] = False
    fine = np.where(np.isfinite(loss), loss, np.inf)
    best = np.unravel_index(fine.argmin(), loss.shape)[::-1]
    variables = {
        **{n: Variable((n,), axis) for n, axis in zip(names, axes, strict=True)},
        "loss": Variable(dims, loss),
        "measured": Variable(dims, measured),
        "loss_origin": Variable((), np.asarray(offset)),
        "loss_lowest": Variable((), np.asarray(fine.min())),
        **{f"lowest_{n}": Variable((), np.asarray(a[i])) for n, a, i in zip(names, axes, best, strict=True)},
    }
    if accuracy:
        variables["accuracy"] = Variable(dims, np.exp(-loss))
    rng = np.random.default_rng(0)
    for prefix, count, more in (
        ("trajectory", 6 * path, ()),
        ("refined", refined, ("loss",)),
        ("curvature", curvature**2, ("lambda_max", "lambda_min")),
    ):
        for name in (*names, *more) if count else ():
            variables[f"{prefix}_{name}"] = Variable((f"{prefix}_point",), rng.uniform(-0.9, 0.9, count))
    if curvature:
        for name, part in zip(names, np.meshgrid(*[np.linspace(-1, 1, curvature)] * 2), strict=False):
            variables[f"curvature_{name}"] = Variable(("curvature_point",), part.ravel())
    if refined:
        x, y = (variables[f"refined_{n}"].data for n in names)
        variables["refined_loss"] = Variable(("refined_point",), offset + scale * (x**2 + 0.4 * y**2))
    if path:
        variables["explained_variance"] = Variable(("component",), np.array([0.83, 0.11]))
    attrs = {
        "metric": "surface",
        "headline": "loss",
        "configuration": json.dumps({"directions": directions}),
        "direction_labels": [f"filter-normalized direction {i + 1}" for i in range(len(shape))],
        "direction_norms": [13.2, 0.00123][: len(shape)],
        "parameter_ranges": {"a": [0, 100], "b": [100, 26122]},
        "complete": not left,
    }
    return Record(variables, attrs)


# --- prepare ------------------------------------------------------------------------------------------


def test_prepare_returns_what_is_stored() -> None:
    record = surface_record((9, 9), path=True, refined=5, curvature=3, broken=2, left=4)
    picture = surface.prepare(record, "mine")
    assert np.array_equal(picture.loss, record["loss"], equal_nan=True)
    assert np.array_equal(picture.axes[0], record["x"])
    assert np.array_equal(picture.path, np.stack([record["trajectory_x"], record["trajectory_y"]], 1))
    assert np.array_equal(picture.refined[:, 2], record["refined_loss"])
    assert picture.curvature.shape == (9, 4)
    assert picture.subject.size == 26122
    assert picture.caption.replace("\u00a0", " ") == (
        "loss at θ (+) 0.0500; lowest (○) 0.0500; training path (line), 6 checkpoints, explained 83 % and 11 %; "
        "5 points added where it bends; 2 points not finite (grey); 4 not measured yet (white)"
    )
    assert picture.labels == (
        "x: filter-normalized direction 1 (unit: distance 13.2)",
        "y: filter-normalized direction 2 (unit: distance 0.00123)",
    )


def test_the_scale_is_logarithmic_where_losses_span_much_or_on_request() -> None:
    wide, narrow = surface_record(offset=0.01), surface_record(offset=1.0)
    assert surface.prepare(wide).logarithmic
    assert not surface.prepare(wide, log=False).logarithmic
    assert not surface.prepare(narrow).logarithmic
    assert surface.prepare(narrow, log=True).logarithmic
    negative = surface_record(offset=-0.5)
    assert not surface.prepare(negative).logarithmic
    with pytest.raises(PlotError, match="a logarithmic scale needs positive ones"):
        surface.prepare(negative, log=True)


def test_nothing_measured_yet_is_said() -> None:
    with pytest.raises(PlotError, match="no finite loss is measured yet"):
        surface.prepare(Record({}, {"metric": "surface"}))
    with pytest.raises(PlotError, match="no finite loss is measured yet"):
        surface.prepare(surface_record(left=63))


# --- draw ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [7.0, 3.4])
@pytest.mark.parametrize(
    "records",
    [
        [surface_record()],
        [surface_record(scale=0.0)],
        [surface_record((2, 2), accuracy=False)],
        [surface_record(offset=-1e-9, scale=1e-8)],
        [surface_record(path=True, broken=3, left=9, offset=1e-4)],
        [surface_record(refined=30, curvature=3, directions="hessian")],
        [surface_record(), surface_record(offset=3.0)],
        [surface_record(offset=i) for i in range(1, 5)],
        [surface_record((30,))],
        [surface_record((30,), broken=2, left=3, accuracy=False)],
        [surface_record((30,)), surface_record((20,), offset=2.0), surface_record((9,), accuracy=False)],
    ],
    ids=["one", "flat", "small", "tiny", "path", "all", "two", "four", "line", "partial line", "lines"],
)
def test_pictures_can_be_read(records: list[Record], width: float) -> None:
    assert_readable(drawn(surface, records, width))


def test_runs_side_by_side_have_one_scale() -> None:
    records = [surface_record(offset=0.1), surface_record(offset=2.0)]
    figure = drawn(surface, records, 7)
    left, right = (axes for axes in figure.axes if axes.get_title())
    scales = {axes.collections[0].norm.vmin for axes in (left, right)}
    scales |= {axes.collections[0].norm.vmax for axes in (left, right)}
    every = np.concatenate([record["loss"].ravel() for record in records])
    assert len(scales) == 2
    assert min(scales) <= every.min()
    assert max(scales) >= every.max()


def test_contours_stand_where_the_losses_are() -> None:
    """The level lines of the picture, read off the figure, lie at their levels."""
    record = surface_record((41, 31))
    figure = drawn(surface, [record], 7)
    lines = figure.axes[0].collections[1]
    inside = RegularGridInterpolator((record["y"], record["x"]), record["loss"])
    assert len(lines.levels) > 8
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        if len(path.vertices):
            assert np.allclose(inside(path.vertices[:, ::-1]), level, rtol=0.05)


def test_the_origin_the_lowest_point_and_the_path_are_marked() -> None:
    record = surface_record(path=True)
    drawn_lines = drawn(surface, [record], 7).axes[0].lines
    path, origin, lowest = (np.stack(line.get_data(), -1) for line in drawn_lines)
    assert np.array_equal(path[:, 0], record["trajectory_x"])
    assert np.ravel(origin).tolist() == [0, 0]
    assert np.ravel(lowest).tolist() == [record["lowest_x"], record["lowest_y"]]


def test_masked_points_are_grey_and_others_are_not() -> None:
    record = surface_record(broken=3, left=5)
    mask = drawn(surface, [record], 7).axes[0].collections[0].get_array()
    expected = np.zeros((6, 8), bool)  # cells, of which those with such a corner are left out of the contours
    expected[0, :3] = True
    assert np.array_equal(~mask.mask, expected)


def test_lines_show_losses_and_accuracies() -> None:
    record = surface_record((30,))
    left, right = drawn(surface, [record], 7).axes
    assert np.array_equal(left.lines[0].get_ydata(), record["loss"])
    assert np.allclose(right.lines[0].get_ydata(), 100 * record["accuracy"])


def test_a_line_and_a_plane_are_not_drawn_together() -> None:
    with pytest.raises(PlotError, match="some of these are lines"):
        drawn(surface, [surface_record(), surface_record((9,))], 7)


# --- files --------------------------------------------------------------------------------------------


def test_every_format(tmp_path: Path) -> None:
    results.write(tmp_path / "run/surface.h5", surface_record(path=True, broken=1))
    for ending in ("png", "pdf", "svg", "html", "vtk"):
        out = plots.plot(tmp_path / "run/surface.h5", tmp_path / f"s.{ending}")
        assert out.stat().st_size > 2000
        again = plots.plot(tmp_path / "run/surface.h5", tmp_path / f"again.{ending}")
        assert again.read_bytes() == out.read_bytes()
    plots.plot([surface_record(), surface_record()], tmp_path / "two.html")
    plots.plot(surface_record((9,)), tmp_path / "line.html")
    with pytest.raises(PlotError, match="this is a line"):
        plots.plot(surface_record((9,)), tmp_path / "line.vtk")
    with pytest.raises(PlotError, match="export them one by one"):
        plots.plot([surface_record(), surface_record()], tmp_path / "two.vtk")
    other = Record({}, {"metric": "trace"})
    with pytest.raises(PlotError, match="is for surfaces"):
        plots.plot(other, tmp_path / "x.vtk")
    with pytest.raises(PlotError, match="is for surfaces"):
        plots.plot(other, tmp_path / "x.png", log=True)


def test_paraview_reads_the_coordinates_and_the_losses(tmp_path: Path) -> None:
    record = surface_record((4, 3), broken=2)
    lines = plots.plot(record, tmp_path / "s.vtk").read_text().splitlines()
    assert lines[0] == "# vtk DataFile Version 3.0"
    assert lines[2:6] == ["ASCII", "DATASET STRUCTURED_GRID", "DIMENSIONS 4 3 1", "POINTS 12 double"]
    points = np.array([list(map(float, line.split())) for line in lines[6:18]])
    x, y = np.meshgrid(record["x"], record["y"])
    assert np.array_equal(points[:, 0], x.ravel())
    assert np.array_equal(points[:, 1], y.ravel())
    assert np.isfinite(points).all()
    assert lines[18:21] == ["POINT_DATA 12", "SCALARS loss double 1", "LOOKUP_TABLE default"]
    assert np.array_equal(np.array(list(map(float, lines[21:33]))), record["loss"].ravel(), equal_nan=True)
    assert list(map(float, lines[35:47])) == [0.0, 0.0, *[1.0] * 10]


def test_html_is_one_surface_in_space_with_the_stored_losses() -> None:
    record = surface_record(path=True, broken=2)
    figure = surface.interactive([surface.prepare(record, "mine", log=False)])
    made, path = figure.data
    assert np.array_equal(np.asarray(made.customdata, float), record["loss"], equal_nan=True)
    assert np.isnan(np.asarray(made.z, float)).sum() == 2
    assert len(path.x) == 6


def test_parts_stand_alone() -> None:
    assert contours.height([surface.prepare(surface_record())], 3.4) > contours.height(
        [surface.prepare(surface_record())], 7
    )
    assert profile.height([surface.prepare(surface_record((9,)))], 7) > 2
