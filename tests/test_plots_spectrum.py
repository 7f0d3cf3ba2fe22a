"""Pictures of the spectrum: eigenvalues, both of its ends, and its density with outliers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from pictures import assert_readable, drawn

from landscape import plots, results
from landscape.plots import PlotError, density, eigenvalues, spectral_norm, style
from landscape.results import Record, Variable


def configured(metric: str, order: int | None, **fields: object) -> dict[str, object]:
    attrs = {"metric": metric, "headline": metric, "complete": True, "configuration": json.dumps(fields)}
    return attrs | ({} if order is None else {"order": order})


def eigenvalues_record(
    values: np.ndarray, which: str = "largest", order: int = 26122, missed: int = 0, **fields: object
) -> Record:
    """Eigenvalues as the metric stores them, the last `missed` not converged."""
    dims = ("eigenvalue",)
    residuals = 1e-4 * np.abs(values)
    residuals[len(values) - missed :] *= 1e3
    variables = {
        "eigenvalues": Variable(dims, values),
        "residual_norm": Variable(dims, residuals),
        "pair_converged": Variable(dims, np.arange(len(values)) < len(values) - missed),
        "converged": Variable((), np.asarray(missed == 0)),
    }
    return Record(variables, configured("eigenvalues", order, which=which, k=len(values), **fields))


def bend(k: int, scale: float = 1.0) -> np.ndarray:
    """Nine outliers, and a tail."""
    return scale * np.concatenate([np.geomspace(5.5, 0.8, 9), 0.3 / np.arange(1, k - 8)])


BOTH = np.concatenate([bend(20), -np.geomspace(0.032, 0.045, 20)])


def ends_record(low: float, high: float, converged: bool = True, order: int = 26122) -> Record:
    scalars = {
        "eigenvalue_min": low, "eigenvalue_max": high, "converged": converged,
        "eigenvalue_min_residual_norm": 0.2, "eigenvalue_max_residual_norm": 0.1,
    }  # fmt: skip
    return Record(
        {name: Variable((), np.asarray(value)) for name, value in scalars.items()},
        configured("spectral_norm", order, curvature="hessian"),
    )


def density_record(
    spectrum: np.ndarray, outliers: np.ndarray, *, log: bool = False, order: bool = True, probes: int = 8
) -> Record:
    """A density as the metric stores it: that of a known spectrum, smoothed with a Gaussian."""
    u = np.log10(np.abs(spectrum)) if log else spectrum
    width = 0.15 if log else 0.01 * np.ptp(spectrum)
    grid = np.linspace(u.min() - 4 * width, u.max() + 4 * width, 400)
    kernel = np.exp(-(((grid[:, None] - u) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
    smooth = kernel.mean(axis=1)
    error = 0.4 * smooth / np.sqrt(1 + smooth * len(spectrum))
    bulk = np.setdiff1d(spectrum, outliers)
    variables = {
        "x": Variable(("x",), 10**grid if log else grid),
        "density": Variable(("x",), smooth),
        "density_low": Variable(("x",), np.maximum(0, smooth - 3 * error)),
        "density_high": Variable(("x",), smooth + 3 * error),
        "ritz_values": Variable(("probe", "node"), np.zeros((probes, 100))),
        "weights": Variable(("probe", "node"), np.full((probes, 100), 0.01)),
        "width": Variable((), np.asarray(width)),
        "outliers": Variable(("outlier",), outliers),
        "outlier_count": Variable((), np.asarray(len(outliers))),
        "bulk_low": Variable((), np.asarray(bulk.min())),
        "bulk_high": Variable((), np.asarray(bulk.max())),
    }
    attrs = configured("density", len(spectrum) if order else None, curvature="hessian")
    attrs |= {
        "x_scale": "log" if log else "linear",
        "smoothing": "Gaussian kernel as wide as 100 nodes resolve",
    }
    return Record(variables, attrs)


def signed_record(values: np.ndarray, outliers: np.ndarray) -> Record:
    """A density over the signed logarithmic axis, as the metric stores it."""
    floor, decade, width = 1e-6 * float(np.abs(values).max()), np.log(10), 0.3 * np.log(10)
    u = np.arcsinh(values / (2 * floor))
    grid = np.linspace(u.min() - 8 * width, u.max() + 8 * width, 600)
    kernel = np.exp(-(((grid[:, None] - u) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
    record = density_record(values, outliers)
    smooth = decade * kernel.mean(axis=1)
    record.variables |= {
        "x": Variable(("x",), 2 * floor * np.sinh(grid)),
        "density": Variable(("x",), smooth),
        "density_low": Variable(("x",), 0.5 * smooth),
        "density_high": Variable(("x",), 2 * smooth),
        "width": Variable((), np.asarray(width / decade)),
    }
    record.attrs.update(x_scale="symlog", x_floor=floor, smoothing="Gaussian kernel")
    return record


def signed(scale: float = 1.0) -> Record:
    values, outliers = spectrum(scale)
    return signed_record(values, outliers)


def spectrum(scale: float = 1.0, n: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    outliers = scale * np.geomspace(5.5, 0.8, 9)
    bulk = scale * 0.02 * np.random.default_rng(3).standard_normal(n)
    return np.concatenate([outliers, bulk]), outliers


TWO_SIDED = np.array([6.0, 5.95, -4.0])
CASES = {
    "eigenvalues": (eigenvalues, [eigenvalues_record(bend(20))]),
    "few eigenvalues": (eigenvalues, [eigenvalues_record(bend(12)[:3], missed=1)]),
    "one eigenvalue": (eigenvalues, [eigenvalues_record(np.array([-2.0]))]),
    "tiny eigenvalues": (eigenvalues, [eigenvalues_record(bend(12, 1e-9), missed=3)]),
    "both ends": (eigenvalues, [eigenvalues_record(BOTH, "both")]),
    "smallest": (eigenvalues, [eigenvalues_record(BOTH[20:], "smallest", missed=1)]),
    "signs differ": (eigenvalues, [eigenvalues_record(BOTH, "both", order=40)]),
    "of a block": (eigenvalues, [eigenvalues_record(bend(64), layer="transformer.h.11.attention.q_proj.weight")]),
    "eigenvalues, runs": (
        eigenvalues,
        [eigenvalues_record(BOTH, "both"), eigenvalues_record(bend(20, 2), curvature="ggn"),
         eigenvalues_record(bend(15), missed=4)],
    ),
    "ends": (spectral_norm, [ends_record(-0.5, 5.5)]),
    "ends, not converged": (spectral_norm, [ends_record(0.5e-7, 5.5e-7, False)]),
    "ends, runs": (spectral_norm, [ends_record(-0.5 * i, 5.5 / i) for i in range(1, 7)]),
    "density": (density, [density_record(*spectrum())]),
    "density, tiny": (density, [density_record(*spectrum(1e-8), order=False)]),
    "density, logarithmic": (density, [density_record(*spectrum(), log=True)]),
    "density, signed": (density, [signed()]),
    "density, signed, tiny": (density, [signed(1e-8)]),
    "density, signed, runs": (density, [signed(), signed(2.0)]),
    "density, no outliers": (density, [density_record(np.linspace(-1, 3, 500), np.zeros(0))]),
    "density, outliers on both sides": (
        density, [density_record(np.concatenate([TWO_SIDED, np.linspace(-1, 1, 500)]), TWO_SIDED)],
    ),
    "density, runs": (density, [density_record(*spectrum(1.0 + i)) for i in range(4)]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [7.0, 3.4])
def test_every_text_lies_in_the_figure_is_large_enough_and_apart(case: str, width: float):
    module, records = CASES[case]
    assert_readable(drawn(module, records, width))


# --- eigenvalues --------------------------------------------------------------------------------------


def markers_of(axes):
    """x, y, filled and shape of every marker."""
    return sorted(
        (float(x), float(y), to_hex(line.get_markerfacecolor()) != "#ffffff", line.get_marker())
        for line in axes.lines
        if line.get_linestyle() == "None" and line.get_marker() not in {"_", "|", "None"}
        for x, y in line.get_xydata()
        if not isinstance(line.get_marker(), int)
    )


def test_eigenvalues_are_drawn_with_residual_bars_and_unconverged_ones_hollow():
    record = eigenvalues_record(np.array([3.0, 2.5, -2.0]), missed=1)
    (axes,) = drawn(eigenvalues, [record], 7).axes
    assert markers_of(axes) == [(1, 3.0, True, "o"), (2, 2.5, True, "o"), (3, -2.0, False, "v")]
    (bars,) = (c.get_segments() for c in axes.collections)
    np.testing.assert_allclose([(b[1][1] - b[0][1]) / 2 for b in bars], record["residual_norm"])
    np.testing.assert_allclose([b.mean(axis=0)[1] for b in bars], record["eigenvalues"])
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["negative", "not converged"]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylabel() == "eigenvalue (loss / parameter²)"


def test_the_axis_is_logarithmic_where_values_span_decades():
    assert eigenvalues.scale_of(np.array([1.0, 0.04])) == "linear"
    assert eigenvalues.scale_of(np.array([1.0, 0.02])) == "log"
    assert eigenvalues.scale_of(np.array([1.0, -0.02])) == "symlog"
    assert eigenvalues.scale_of(np.array([-1.0, -0.02])) == "symlog"
    assert eigenvalues.scale_of(np.array([1.0, 0.9, 0.0])) == "linear"
    assert eigenvalues.scale_of(np.zeros(3)) == "linear"
    # a whole spectrum has exact zeros
    singular = eigenvalues_record(np.array([1.0, 0.5, 1e-3, 0.0, 0.0]), "both", order=5)
    (axes,) = drawn(eigenvalues, [singular], 7).axes
    assert axes.get_yscale() == "symlog"
    low, high = axes.get_ylim()
    assert low <= 0
    assert high > 1


def test_both_ends_have_a_panel_each_that_descends_from_left_to_right():
    picture = eigenvalues.prepare(eigenvalues_record(BOTH, "both"), "a")
    np.testing.assert_array_equal(picture.ends["largest"].values, BOTH[:20])
    np.testing.assert_array_equal(picture.ends["smallest"].values, BOTH[20:])
    np.testing.assert_array_equal(picture.ends["largest"].index, np.arange(1, 21))
    np.testing.assert_array_equal(picture.ends["smallest"].index, np.arange(20, 0, -1))
    left, right = drawn(eigenvalues, [eigenvalues_record(BOTH, "both")], 7).axes
    assert left.get_yscale() == "log"
    assert left.get_xlim()[0] < left.get_xlim()[1]
    assert right.get_xlim()[0] > right.get_xlim()[1]
    # where every eigenvalue was found there is nothing between the ends
    whole = eigenvalues.prepare(eigenvalues_record(BOTH, "both", order=40))
    assert list(whole.ends) == ["largest"]
    np.testing.assert_array_equal(whole.ends["largest"].values, BOTH)


def test_titles_name_matrix_run_size_and_residuals():
    one = drawn(eigenvalues, [eigenvalues_record(bend(20), missed=2, curvature="ggn", layer="0.weight")], 7)
    first, second = one.get_suptitle().splitlines()
    assert (
        first == "Eigenvalues of block 0.weight of the Gauss–Newton matrix of digits_mlp (26 122 parameters)"
    )
    assert second.startswith("20 eigenvalues; bars are residuals, at most ")
    assert second.endswith("; 2 have not converged")
    record = eigenvalues_record(bend(20), order=64, curvature="input_hessian", example=7)
    figure = drawn(eigenvalues, [record], 7)
    assert figure.get_suptitle().startswith(
        "Eigenvalues of the input Hessian at example 7 of digits_mlp (64 inputs)"
    )
    assert figure.axes[0].get_ylabel() == "eigenvalue (loss / input²)"


def test_spectral_norm_shows_both_ends_with_their_residuals():
    records = [ends_record(-0.5, 5.5), ends_record(-1.5, 2.5, converged=False)]
    (axes,) = drawn(spectral_norm, records, 7).axes
    points = [
        (tuple(line.get_xdata()), to_hex(line.get_markerfacecolor()) == "#ffffff")
        for line in axes.lines
        if line.get_marker() == "o"
    ]
    assert points == [((-0.5, 5.5), False), ((-1.5, 2.5), True)]
    bars = [segment for c in axes.collections for segment in c.get_segments()]
    np.testing.assert_allclose([(b[1][0] - b[0][0]) / 2 for b in bars], [0.2, 0.1, 0.2, 0.1])
    words = [text.get_text() for text in axes.texts]
    assert words[0].endswith("λ min −0.500, λ max 5.50")
    assert words[1].endswith("(not converged)")


# --- density ------------------------------------------------------------------------------------------


def test_density_is_drawn_as_stored_with_its_band_and_outliers():
    record = density_record(*spectrum())
    whole, bulk = drawn(density, [record], 7).axes
    for axes in (whole, bulk):
        curve = axes.lines[0]
        np.testing.assert_allclose(curve.get_xdata(), record["x"])
        np.testing.assert_allclose(curve.get_ydata(), record["density"])
        corners = axes.collections[0].get_paths()[0].vertices
        for edge in (record["density_low"], record["density_high"]):
            assert np.isin(np.round(edge, 12), np.round(corners[:, 1], 12)).all()
    marks = next(line for line in whole.lines if line.get_label() == "outliers (9)")
    np.testing.assert_allclose(marks.get_xdata(), record["outliers"])
    assert [text.get_text() for text in whole.texts][-1] == "5.50"
    assert len(whole.texts) == 9
    assert whole.get_yscale() == "log"
    assert bulk.get_yscale() == "linear"
    assert whole.get_ylabel() == "density (parameter² / loss)"
    low, high = bulk.get_xlim()
    assert low < float(record["bulk_low"])
    assert float(record["bulk_high"]) < high < 0.8
    # the peak of a single eigenvalue is seen
    single = 1 / (3009 * float(record["width"]) * np.sqrt(2 * np.pi))
    assert whole.get_ylim()[0] == pytest.approx(single / 10)


def test_the_caption_states_probes_smoothing_and_outliers():
    caption = density.prepare(density_record(*spectrum())).caption.replace("\u00a0", " ")
    assert caption.startswith("8 probes of 100 nodes; Gaussian kernel as wide as 100 nodes resolve, σ = 0.05")
    assert caption.endswith(" loss / parameter²; 9 outliers")
    logarithmic = density.prepare(density_record(*spectrum(), log=True, probes=1)).caption.replace(
        "\u00a0", " "
    )
    assert "1 probe of" in logarithmic
    assert "σ = 0.15 decades" in logarithmic
    none = density.prepare(density_record(np.linspace(-1, 3, 500), np.zeros(0))).caption
    assert none.endswith("; no\u00a0outliers")


def test_a_logarithmic_axis_shows_the_modulus_and_labels_keep_the_sign():
    values = np.concatenate([[-7.0], np.geomspace(1e-3, 1, 300)])
    (axes,) = drawn(density, [density_record(values, np.array([-7.0]), log=True)], 7).axes
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "density per decade"
    marks = next(line for line in axes.lines if line.get_label() == "outliers (1)")
    assert list(marks.get_xdata()) == [7.0]
    assert [text.get_text() for text in axes.texts] == ["−7.00"]


def test_the_signed_axis_is_even_in_asinh_and_has_powers_of_ten_on_both_sides_of_zero():
    values = np.concatenate([[6.0, -3.0], np.geomspace(1e-4, 0.1, 200), -np.geomspace(1e-4, 0.1, 200), [0.0]])
    record = signed_record(values, np.array([6.0, -3.0]))
    (axes,) = drawn(density, [record], 7).axes
    assert axes.get_xscale() == "asinh"
    assert axes.xaxis.get_transform().linear_width == 2 * record.attrs["x_floor"]
    ticks = list(axes.get_xticks())
    assert ticks == sorted(ticks)
    assert {-1.0, 0.0, 1.0, 10.0} <= set(ticks)
    assert axes.get_ylabel() == "density per decade"
    assert axes.get_xlabel() == "eigenvalue (loss / parameter²)"
    marks = next(line for line in axes.lines if line.get_label() == "outliers (2)")
    assert list(marks.get_xdata()) == [6.0, -3.0]
    assert [text.get_text() for text in axes.texts] == ["−3.00", "6.00"]
    # the tails of the kernel reach decades beyond the spectrum, the axis does not
    assert np.abs(axes.get_xlim()).max() < 100 < record["x"].max()
    # plotly has no such axis: it shows the coordinate, and its ticks say eigenvalues
    figure = density.interactive([density.prepare(record)])
    curve = next(part for part in figure.data if part.name == "density")
    np.testing.assert_allclose(2 * record.attrs["x_floor"] * np.sinh(curve.x), record["x"])
    np.testing.assert_allclose(curve.customdata, record["x"])
    places = dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals, strict=True))
    assert places["0"] == 0
    assert places["−1"] == -places["1"] == np.arcsinh(-0.5 / record.attrs["x_floor"])


def test_runs_that_coincide_are_all_seen():
    axes = drawn(density, [density_record(*spectrum())] * 3, 7).axes[0]
    widths = [line.get_linewidth() for line in axes.lines if len(line.get_xdata()) == 400]
    assert sorted(widths, reverse=True) == widths
    assert len(set(widths)) == 3
    (axes,) = drawn(eigenvalues, [eigenvalues_record(bend(12))] * 3, 7).axes
    sizes = [
        line.get_markersize()
        for line in axes.lines
        if line.get_marker() in style._MARKERS
        if len(line.get_xdata())
    ]
    assert sorted(sizes, reverse=True) == sizes
    assert len(set(sizes)) == 3


def test_bars_of_residuals_lie_within_a_signed_axis():
    record = eigenvalues_record(np.array([1e-2, 1e-6, -1e-7]))
    record["residual_norm"][:] = 1e-5
    (axes,) = drawn(eigenvalues, [record], 7).axes
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "symlog"
    assert low < -1e-5 - 1e-7
    assert high > 1e-2 + 1e-5


def test_what_is_not_known_is_left_out():
    record = density_record(*spectrum())
    record["density_high"][5] = np.nan
    record["density_low"][5] = np.nan
    record["density"][:3] = np.nan
    for name in ("bulk_low", "bulk_high"):
        record.variables[name] = Variable((), np.asarray(np.nan))
    picture = density.prepare(record)
    assert len(picture.x) == 397
    assert picture.low[2] == picture.high[2] == picture.density[2]
    assert len(drawn(density, [record], 7).axes) == 1


def test_labels_of_outliers_are_moved_apart_as_little_as_possible():
    rng = np.random.default_rng(5)
    for _ in range(50):
        places = np.sort(rng.uniform(0, 5, 12))
        moved = style.spread(places, 0.3, 5.0)
        assert np.all(np.diff(moved) >= 0.3 - 1e-12)
        assert moved[0] >= -1e-12
        assert moved[-1] <= 5 + 1e-12
    assert style.spread(np.array([1.0, 2.0]), 0.5, 5.0).tolist() == [1.0, 2.0]
    # no other admissible pair lies closer: compared with all on a grid
    best = min(
        ((a - 1.0) ** 2 + (b - 1.1) ** 2, a, b)
        for a in np.arange(0, 3, 0.01) for b in np.arange(0, 3, 0.01) if b - a >= 0.5 - 1e-9
    )  # fmt: skip
    np.testing.assert_allclose(style.spread(np.array([1.0, 1.1]), 0.5, 5.0), best[1:], atol=0.011)
    many = np.linspace(0.5, 5.0, 200)
    picture = density.prepare(density_record(np.concatenate([many, np.zeros(9000)]), many))
    shown = density.label_places(picture, (0.0, 5.0), 1.0, 3.0)
    assert 20 <= len(shown) <= 24
    assert min(value for value, *_ in shown) > many[170]  # the outermost have labels


# --- all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["both ends", "eigenvalues, runs", "ends, runs", "density", "density, runs"])
def test_the_interactive_picture_has_every_number(case: str):
    module, records = CASES[case]
    prepared = [module.prepare(record, f"run{i}") for i, record in enumerate(records)]
    figure = module.interactive(prepared)
    key = {"eigenvalues": "eigenvalues", "density": "density"}.get(module.__name__.split(".")[-1])
    shown = np.concatenate([np.ravel(np.asarray(part.y if key else part.x, float)) for part in figure.data])
    for record in records:
        wanted = record[key] if key else [record["eigenvalue_min"], record["eigenvalue_max"]]
        assert np.isin(np.ravel(wanted), shown).all()


@pytest.mark.parametrize("case", ["both ends", "ends", "density"])
def test_pictures_are_written_in_every_format_the_same_each_time(case: str, tmp_path: Path):
    _, (record,) = CASES[case]
    stored = tmp_path / "mine" / "x.h5"
    results.write(stored, record)
    for ending in ("png", "pdf", "svg", "html"):
        first, again = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
        plots.plot(stored, first)
        plots.plot(stored, again)
        assert first.read_bytes() == again.read_bytes()
        assert first.stat().st_size > 2000


def test_nothing_measured_is_refused():
    for module in (eigenvalues, spectral_norm, density):
        with pytest.raises(PlotError, match="again to go on"):
            module.prepare(Record({}, {"metric": "x"}))
    record = eigenvalues_record(bend(12))
    record["eigenvalues"][:] = np.nan
    with pytest.raises(PlotError, match="no eigenvalue is found yet"):
        eigenvalues.prepare(record)
    assert {"density", "eigenvalues", "spectral_norm", "surface", "trace"} <= set(
        plots.metrics_with_a_picture()
    )


def test_densities_of_two_kinds_are_not_drawn_together(tmp_path: Path):
    both = [density_record(*spectrum()), density_record(*spectrum(), log=True)]
    for name in ("x.png", "x.html"):
        with pytest.raises(PlotError, match="are over linear and logarithmic axes; draw those of one kind"):
            plots.plot(both, tmp_path / name)
