"""Pictures: the arrays they show against the record, and that the drawn text can be read."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pictures
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from landscape import plots, results
from landscape.plots import PlotError, plus_minus, trace, words
from landscape.results import Record, ResultsError, Variable

LONG = [f"transformer.h.{i // 4}.attention.{'qkvo'[i % 4]}_proj.weight" for i in range(48)]


def trace_record(
    names: list[str],
    *,
    method: str = "hutchinson",
    rounds: int = 4,
    scale: float = 1.0,
    curvature: str = "hessian",
    complete: bool = True,
) -> Record:
    """A trace as the metric stores it, with made-up numbers of which all are known."""
    rng = np.random.default_rng(7)
    layer_trace = scale * rng.lognormal(0, 1.3, len(names)) * rng.choice([-1, 1, 1, 1], len(names))
    counts = 16 * 2 ** np.arange(rounds)
    exact = method == "exact"
    done = np.ones(330 if exact else counts[-1], bool)
    stderr = 0.2 * scale * len(names) / np.sqrt(counts)
    running = layer_trace.sum() + stderr * rng.normal(size=rounds)
    variables = {
        "layer": Variable(("layer",), np.array(names)),
        "layer_size": Variable(("layer",), np.arange(1, len(names) + 1) * 100),
        "trace": Variable((), np.asarray(layer_trace.sum() if exact else running[-1])),
        "trace_stderr": Variable((), np.asarray(0.0 if exact else stderr[-1])),
        "converged": Variable((), np.asarray(True)),
        "matvecs": Variable((), np.asarray(len(done))),
        "layer_trace": Variable(("layer",), layer_trace),
        "layer_trace_stderr": Variable(
            ("layer",), np.zeros(len(names)) if exact else 0.1 * np.abs(layer_trace)
        ),
        "done": Variable(("probe",), done),
    }
    if not exact:
        variables |= {
            "round": Variable(("round",), counts),
            "running_trace": Variable(("round",), running),
            "running_trace_stderr": Variable(("round",), stderr),
        }
    attrs = {
        "metric": "trace",
        "headline": "trace",
        "method": method,
        "configuration": json.dumps({"curvature": curvature, "rtol": 0.02}),
        "complete": complete,
    }
    return Record(variables, attrs)


SMALL = [f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]


def drawn(record: Record, width: float) -> Figure:
    return pictures.drawn(trace, [record], width)


# --- prepare ------------------------------------------------------------------------------------------


def test_prepare_returns_the_stored_numbers_with_95_percent_bands():
    record = trace_record(SMALL)
    picture = trace.prepare(record, "digits_mlp")
    assert picture.value == float(record["trace"])
    assert picture.half_width == pytest.approx(1.96 * float(record["trace_stderr"]))
    np.testing.assert_array_equal(picture.counts, [16, 32, 64, 128])
    np.testing.assert_array_equal(picture.running, record["running_trace"])
    np.testing.assert_allclose(picture.running_half_width, 1.96 * record["running_trace_stderr"])
    assert picture.layers == SMALL
    np.testing.assert_array_equal(picture.layer_values, record["layer_trace"])
    np.testing.assert_allclose(picture.layer_half_width, 1.96 * record["layer_trace_stderr"])
    assert words.title("Trace", [picture.subject]) == "Trace of the Hessian of digits_mlp (2100 parameters)"
    assert picture.result.endswith(", 128 probes")
    assert picture.running[-1] == picture.value


def test_titles_name_matrix_method_and_state():
    assert trace.prepare(trace_record(SMALL, curvature="ggn")).subject.matrix == "the Gauss–Newton matrix"
    exact = trace.prepare(trace_record(SMALL, method="exact"))
    assert exact.result.endswith(": exact, 330 products")
    assert exact.half_width == 0
    assert len(exact.counts) == 0
    assert trace.prepare(trace_record(SMALL, complete=False)).result.endswith("(not finished)")
    assert trace.prepare(trace_record(SMALL, method="xtrace")).unit == "estimates"


def test_rounds_that_are_not_measured_and_unknown_errors_are_left_out():
    record = trace_record(SMALL)
    record["running_trace"][2:] = np.nan
    record["layer_trace_stderr"][1:3] = np.nan, np.inf
    record["running_trace_stderr"][1] = np.inf
    picture = trace.prepare(record)
    np.testing.assert_array_equal(picture.counts, [16, 32])
    assert list(picture.layer_half_width[1:3]) == [0, 0]
    assert picture.running_half_width[1] == 0
    drawn(record, 7)


def test_the_largest_tensors_are_shown_in_the_models_order():
    picture = trace.prepare(trace_record(LONG))
    shown = picture.largest(20)
    assert len(shown) == 20
    assert list(shown) == sorted(shown)
    left_out = np.setdiff1d(np.arange(48), shown)
    assert np.abs(picture.layer_values[shown]).min() >= np.abs(picture.layer_values[left_out]).max()
    figure = drawn(trace_record(LONG), 7)
    assert figure.axes[1].get_title() == "largest 20 of 48 tensors (28 left out)"


def test_nothing_measured_is_refused():
    record = trace_record(SMALL)
    record.variables["trace"] = Variable((), np.asarray(np.nan))
    with pytest.raises(PlotError, match="again to go on"):
        trace.prepare(record)
    with pytest.raises(PlotError, match="again to go on"):
        trace.prepare(Record({}, {"metric": "trace"}))


def test_names_that_are_cut_can_be_told_apart():
    for longest in (30, 22, 14):
        cut = words.shortened(LONG, longest)
        assert max(map(len, cut)) <= longest
        if longest > 14:
            assert len(set(cut)) == len(LONG)
    assert words.shortened(SMALL) == SMALL
    assert words.shortened(["x" * 50], 20) == ["…" + "x" * 19]


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (42.53, 0.61, "42.53 ± 0.61"), (42.53, 12.0, "43 ± 12"), (-0.5, 0.001, "−0.5000 ± 0.0010"),
        (-360276.0, 2249.0, "(−3.603 ± 0.022) × 10⁵"), (8.06e-5, 3.8e-6, "(8.06 ± 0.38) × 10⁻⁵"),
        (0.0, 0.5, "0.00 ± 0.50"), (3.25, 0.0, "3.25"), (1.5, None, "1.5"), (float("nan"), 1.0, "nan"),
        (float("inf"), 1.0, "inf"), (1.0, float("nan"), "1"),
    ],
)  # fmt: skip
def test_a_number_has_as_many_digits_as_its_error_allows(value: float, stderr: float | None, text: str):
    assert plus_minus(value, stderr) == text


# --- draw ---------------------------------------------------------------------------------------------

CASES = {
    "few tensors": trace_record(SMALL),
    "many tensors": trace_record(LONG, scale=1e4, rounds=7),
    "one round, tiny": trace_record(SMALL, rounds=1, scale=1e-5),
    "exact": trace_record(SMALL, method="exact"),
    "exact, many": trace_record(LONG, method="exact"),
    "not finished": trace_record(SMALL, complete=False),
    "one tensor": trace_record(["weight"]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [7.0, 3.4])
def test_every_text_lies_in_the_figure_is_large_enough_and_apart(case: str, width: float):
    pictures.assert_readable(drawn(CASES[case], width), least=8)


def test_what_is_drawn_is_what_was_prepared():
    record = trace_record(SMALL)
    left, right = drawn(record, 7).axes
    line = left.containers[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), record["running_trace"])
    np.testing.assert_array_equal(line.get_xdata(), record["round"])
    final = [ln for ln in left.lines if ln.get_label() == "final value"]
    assert list(final[0].get_ydata()) == [float(record["trace"])] * 2
    (segments,) = (c.get_segments() for c in left.collections if hasattr(c, "get_segments"))
    np.testing.assert_allclose(
        [[s[0][1], s[1][1]] for s in segments],
        np.stack(
            [record["running_trace"] + k * 1.96 * record["running_trace_stderr"] for k in (-1, 1)], axis=1
        ),
    )
    np.testing.assert_allclose([bar.get_width() for bar in right.patches], record["layer_trace"])
    assert [label.get_text() for label in right.get_yticklabels()] == SMALL
    assert right.get_ylim()[0] > right.get_ylim()[1]  # the first tensor is on top
    assert "probes" in left.get_xlabel()
    assert "loss / parameter²" in left.get_ylabel()
    assert "loss / parameter²" in right.get_xlabel()


def test_a_power_of_ten_is_taken_out_of_the_axis_and_stands_in_its_unit():
    record = trace_record(SMALL)
    for name in ("running_trace", "running_trace_stderr", "layer_trace", "layer_trace_stderr"):
        record.variables[name] = Variable(
            record.variables[name].dims, record[name] / np.abs(record[name]).max() * 4e-5
        )
    left, right = drawn(record, 7).axes
    assert left.get_ylabel() == "trace (10⁻⁵ loss / parameter²)"
    assert right.get_xlabel() == "trace per tensor (10⁻⁵ loss / parameter²)"
    np.testing.assert_allclose([b.get_width() for b in right.patches], record["layer_trace"] * 1e5)
    np.testing.assert_allclose(left.containers[0].lines[0].get_ydata(), record["running_trace"] * 1e5)


def test_panels_stand_side_by_side_or_in_a_column():
    wide, narrow = drawn(trace_record(SMALL), 7), drawn(trace_record(SMALL), 3.4)
    a, b = (axes.get_window_extent() for axes in wide.axes)
    assert a.x1 < b.x0
    a, b = (axes.get_window_extent() for axes in narrow.axes)
    assert a.y0 > b.y1
    assert len(drawn(trace_record(SMALL, method="exact"), 7).axes) == 1
    record = trace_record(SMALL, method="xtrace")
    del record.variables["layer_trace"], record.variables["layer_trace_stderr"]
    assert len(drawn(record, 7).axes) == 1


# --- plot ---------------------------------------------------------------------------------------------


def test_plot_writes_every_format_the_same_each_time(tmp_path: Path):
    stored = tmp_path / "mine" / "trace.h5"
    results.write(stored, trace_record(SMALL))
    for ending in ("png", "pdf", "html"):
        first, again = tmp_path / f"a.{ending}", tmp_path / "new" / f"b.{ending}"
        assert plots.plot(stored, first) == first
        plots.plot(str(stored), str(again))
        assert first.read_bytes() == again.read_bytes()
    image = imread(tmp_path / "a.png")
    assert image.shape[1] == 7 * 200
    assert 0.05 < (image[..., :3].min(axis=2) < 0.9).mean() < 0.5  # neither empty nor black
    assert (tmp_path / "a.pdf").read_bytes()[:5] == b"%PDF-"
    plots.plot(stored, tmp_path / "a.svg", width=3.4)
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    page = (tmp_path / "a.html").read_text()
    assert "layers.2.weight" in page
    assert "Trace of the Hessian of mine" in page
    plots.plot(stored, tmp_path / "small.png", width=3.4, dpi=100)
    assert imread(tmp_path / "small.png").shape[1] == 340


def test_the_interactive_picture_has_every_tensor():
    picture = trace.prepare(trace_record(LONG))
    figure = trace.interactive([picture])
    bars = figure.data[1]
    assert list(bars.y) == LONG
    np.testing.assert_allclose(bars.x, picture.layer_values)
    np.testing.assert_allclose(bars.error_x.array, picture.layer_half_width)
    np.testing.assert_allclose(figure.data[0].y, picture.running)
    assert len(trace.interactive([trace.prepare(trace_record(SMALL, method="exact"))]).data) == 1


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = trace_record(SMALL)
    with pytest.raises(ValueError, match=r"allowed endings are .html, .pdf, .png, .svg"):
        plots.plot(record, tmp_path / "x.jpg")
    with pytest.raises(PlotError, match=r"no picture of metric 'no_picture'; there are pictures of .*trace"):
        plots.plot(Record({}, {"metric": "no_picture"}), tmp_path / "x.png")
    with pytest.raises(ResultsError, match="no such file"):
        plots.plot(tmp_path / "none.h5", tmp_path / "x.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot write"):
        plots.plot(record, tmp_path / "file" / "x.png")
    for name in [n for n in sys.modules if n.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(PlotError, match=r'pip install "landscape-toolkit\[interactive\]"'):
        plots.plot(record, tmp_path / "x.html")


def test_drawing_needs_neither_torch_nor_pyplot_and_changes_no_setting(tmp_path: Path):
    results.write(tmp_path / "trace.h5", trace_record(SMALL))
    code = (
        "import sys, matplotlib; before = str(matplotlib.rcParams.copy()); from landscape import plots; "
        "plots.plot(sys.argv[1], sys.argv[2]); "
        "assert not {'torch', 'matplotlib.pyplot', 'xarray'} & set(sys.modules); "
        "assert before == str(matplotlib.rcParams.copy())"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "trace.h5", tmp_path / "x.png"], check=True)
    assert (tmp_path / "x.png").stat().st_size > 10_000
