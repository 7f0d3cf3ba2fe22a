"""The picture of volumes: the arrays it shows against the record, and that the drawn text can be read."""

from __future__ import annotations

import json

import numpy as np
import pictures
import pytest

from landscape.plots import PlotError, volume
from landscape.results import Record, Variable


def record(
    levels: tuple[float, ...] = (1.0, 0.01, 0.1),
    *,
    size: int = 26122,
    unbounded: float = 0.0,
    errors: bool = True,
    complete: bool = True,
    cost: str = "loss",
) -> Record:
    """A volume as the metric stores it, with made-up numbers."""
    rng = np.random.default_rng(3)
    rays, count = 40, len(levels)
    radii = np.sqrt(levels) * rng.lognormal(0, 0.3, (rays, 1))
    status = (rng.random((rays, count)) < unbounded) * 2.0
    radii[status == 2] = 1422.5
    done = np.arange(rays) < (rays if complete else 25)
    values = -2.9e4 + 1e3 * np.log(levels)
    dims = ("epsilon",)
    variables = {
        "epsilon": Variable(dims, np.array(levels)),
        "log_volume": Variable(dims, values),
        "log_volume_stderr": Variable(dims, np.where(errors, 0.2, np.nan) * np.ones(count)),
        "effective_samples": Variable(dims, np.linspace(1.234, 33.3, count)),
        "unbounded_fraction": Variable(dims, (status == 2).mean(axis=0)),
        "truncation_radius": Variable((), np.asarray(1422.5)),
        "radius": Variable(("ray", "epsilon"), radii),
        "status": Variable(("ray", "epsilon"), status),
        "done": Variable(("ray",), done),
    }
    configuration = json.dumps({"cost": cost, "preconditioner": "ggn_diagonal", "curvature": "ggn"})
    attrs = {"metric": "volume", "configuration": configuration, "complete": complete, "order": size}
    return Record(variables, attrs)


def test_prepare_sorts_levels_and_keeps_the_rays_that_are_done():
    stored = record(unbounded=0.2, complete=False)
    picture = volume.prepare(stored, "mine")
    assert picture.levels.tolist() == [0.01, 0.1, 1.0]
    assert picture.values.tolist() == stored["log_volume"][[1, 2, 0]].tolist()
    assert picture.half_widths == pytest.approx(1.96 * 0.2)
    assert picture.radii.shape == (25, 3)
    assert np.array_equal(picture.radii, stored["radius"][:25][:, [1, 2, 0]])
    assert np.array_equal(picture.unbounded, stored["status"][:25][:, [1, 2, 0]] == 2)
    assert picture.subject.matrix == "the set L < L(θ) + ε"
    assert picture.result.startswith(
        "40 rays" if stored.attrs["complete"] else "25 rays, effectively 1.2 to 33"
    )
    assert "unbounded" in picture.result
    assert picture.result.endswith("(not finished)")
    assert volume.prepare(record(cost="kl")).subject.matrix == "the set KL < ε"


def test_nothing_measured_is_said():
    empty = record()
    empty["done"][:] = False
    for nothing in (empty, Record({}, {"metric": "volume"})):
        with pytest.raises(PlotError, match="no ray is measured yet"):
            volume.prepare(nothing)


@pytest.mark.parametrize("width", [7.0, 3.4])
@pytest.mark.parametrize(
    "records",
    [
        [record()],
        [record((0.1,), errors=False)],
        [record(tuple(np.geomspace(1e-6, 10, 12)), unbounded=0.4)],
        [record(), record(errors=False), record((0.1, 1.0))],
    ],
    ids=["three levels", "one without error", "many", "several runs"],
)
def test_text_can_be_read(records: list[Record], width: float):
    figure = pictures.drawn(volume, records, width)
    pictures.assert_readable(figure)
    assert volume.interactive([volume.prepare(r) for r in records]).to_json()


def test_hollow_markers_have_no_error():
    left = pictures.drawn(volume, [record(errors=False)], 7.0).axes[0]
    hollow = [line for line in left.lines if line.get_markerfacecolor() == "white"]
    assert sum(len(line.get_xdata()) for line in hollow) == 3
    assert left.get_legend() is not None
    assert pictures.drawn(volume, [record()], 7.0).axes[0].get_legend() is None


def test_bins_hold_every_radius():
    lists = [[2.0]], [[1.0, 1.0, 1.0]], [np.geomspace(1e-3, 1e3, 50)], [[1.0, 1.2], [0.1, 0.11, 0.12], [50.0]]
    for histograms in lists:
        edges = volume.bins([np.array(radii) for radii in histograms])
        assert 8 <= len(edges) - 1 <= 60
        for radii in histograms:
            assert np.histogram(radii, edges)[0].sum() == len(radii)


def test_rays_of_radius_0_leave_an_empty_histogram():
    nothing = record()
    nothing["radius"][:] = 0.0
    nothing["log_volume"][:] = -np.inf
    pictures.drawn(volume, [nothing], 7.0)
