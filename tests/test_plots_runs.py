"""Several measurements in one picture: their names, their colours, and what cannot be drawn together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from landscape_cli import app
from pictures import assert_readable, drawn
from test_plots import LONG, SMALL, trace_record
from test_plots_spectrum import bend, eigenvalues_record

from landscape import plots, results
from landscape.plots import PlotError, style, trace, words
from landscape.results import Record, Variable

RUNS = [trace_record(SMALL), trace_record(SMALL, rounds=6, scale=1.4), trace_record(SMALL, method="exact")]


@pytest.mark.parametrize("width", [7.0, 3.4])
@pytest.mark.parametrize(
    "records",
    [RUNS, [trace_record(LONG), trace_record(LONG, method="exact")], [trace_record(SMALL), trace_record(LONG)],
     [trace_record(SMALL, method="exact"), trace_record(SMALL, method="exact", curvature="ggn")],
     [trace_record(SMALL, method="xtrace"), *RUNS]],
    ids=["some", "many tensors", "other tensors", "exact", "methods"],
)  # fmt: skip
def test_traces_of_several_runs_can_be_read(records: list[Record], width: float):
    assert_readable(drawn(trace, records, width))


def test_running_estimates_lie_over_each_other_and_tensors_beside_each_other():
    left, right = drawn(trace, RUNS, 7).axes
    for record, container in zip(RUNS[:2], left.containers, strict=True):
        np.testing.assert_allclose(container.lines[0].get_ydata(), record["running_trace"])
    exact = [line for line in left.lines if line.get_label() == "final value"]
    assert [list(line.get_ydata()) for line in exact] == [[float(RUNS[2]["trace"])] * 2]
    for record, container in zip(RUNS, right.containers, strict=True):
        np.testing.assert_allclose(container.lines[0].get_xdata(), record["layer_trace"])
    assert left.get_xticks().max() == 512
    (legend,) = left.figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert [name.partition(",")[0] for name in names] == [
        "digits_mlp",
        "digits_mlp_batch_2",
        "digits_mlp_batch_4",
    ]
    stderr = float(RUNS[0]["trace_stderr"])
    assert names[0].endswith(words.plus_minus(float(RUNS[0]["trace"]), stderr))
    colors = [handle.lines[0].get_color() for handle in left.containers]
    assert colors == [style.look(0).color, style.look(1).color]


def test_the_legend_shows_the_colour_that_each_run_is_drawn_in():
    figure = drawn(trace, [RUNS[2], RUNS[0]], 7)
    (legend,) = figure.legends
    assert [line.get_color() for line in legend.get_lines()] == [style.look(0).color, style.look(1).color]


def test_tensors_that_differ_are_left_out_and_exact_traces_of_them_refused():
    assert len(drawn(trace, [trace_record(SMALL), trace_record(LONG)], 7).axes) == 1
    with pytest.raises(PlotError, match="exact traces of different tensors"):
        drawn(trace, [trace_record(SMALL, method="exact"), trace_record(LONG, method="exact")], 7)


def test_the_interactive_picture_has_every_run():
    prepared = [trace.prepare(record, f"run{i}") for i, record in enumerate(RUNS)]
    figure = trace.interactive(prepared)
    bars = [part for part in figure.data if part.type == "bar"]
    for record, bar in zip(RUNS, bars, strict=True):
        np.testing.assert_allclose(bar.x, record["layer_trace"])
    named = [part.name.partition(",")[0] for part in figure.data if part.showlegend is not False]
    assert named == ["run0", "run1", "run2"]


def test_no_two_runs_look_the_same_and_no_colour_is_pale():
    looks = [style.look(i) for i in range(style.MOST_RUNS)]
    assert len(set(looks)) == len(looks) == 14
    for look in looks:
        channels = np.array([int(look.color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert channels @ [0.2126, 0.7152, 0.0722] < 0.7


def test_runs_are_named_by_as_much_of_their_paths_as_tells_them_apart(tmp_path: Path):
    def name(*paths: str) -> list[str]:
        files = [tmp_path / path for path in paths]
        for file in files:
            results.write(file, eigenvalues_record(bend(12)))
        return plots._read(files)[1]

    assert name("a/x.h5") == ["a"]
    assert name("a/x.h5", "b/x.h5") == ["a", "b"]
    assert name("a/x.h5", "a/y.h5") == ["a/x", "a/y"]
    assert name("p/a/x.h5", "q/a/x.h5") == ["p/a/x", "q/a/x"]
    twice = name("a/x.h5", "a/x.h5", "b/x.h5")
    assert twice == ["a", "a", "b"]
    assert words.labels([words.Subject("the Hessian", run) for run in twice]) == ["a (1)", "a (2)", "b (3)"]
    assert words.labels([words.Subject("the Hessian", "")] * 2) == ["run 1", "run 2"]


def test_plot_takes_a_sequence_of_files_and_records(tmp_path: Path):
    results.write(tmp_path / "a" / "x.h5", eigenvalues_record(bend(12)))
    several = [tmp_path / "a" / "x.h5", eigenvalues_record(bend(12), curvature="ggn")]
    plots.plot(several, tmp_path / "x.svg")
    page = (tmp_path / "x.svg").read_text()
    assert "a: Hessian" in page
    assert "run 2: Gauss–Newton matrix" in page
    plots.plot(several[:1], tmp_path / "one.png")
    plots.plot(several[0], tmp_path / "same.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "same.png").read_bytes()
    with pytest.raises(ValueError, match="no measurement to draw"):
        plots.plot([], tmp_path / "x.png")
    with pytest.raises(PlotError, match="15 runs cannot be told apart in one picture; draw at most 14"):
        plots.plot([several[1]] * 15, tmp_path / "x.png")
    with pytest.raises(
        PlotError, match=r"one metric, but these are eigenvalues of a, trace of run 2; draw the 2"
    ):
        plots.plot([several[0], RUNS[0]], tmp_path / "x.png")


def landscape(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app.app, [str(word) for word in words])
    return result.exit_code, result.stderr


def test_the_command_draws_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for run in ("a", "b"):
        results.write(Path(run) / "eigenvalues.h5", eigenvalues_record(bend(12)))
    assert landscape("plot", "a/eigenvalues.h5", "b", "-o", "x.png") == (0, "landscape: wrote x.png\n")
    assert Path("x.png").read_bytes()[:4] == b"\x89PNG"
    code, line = landscape("plot", "a", "b")
    assert code == 2
    assert "2 measurements in one picture: say where it goes, -o picture.png" in line
    results.write(Path("b/trace.h5"), RUNS[0])
    code, line = landscape("plot", "a", "b/trace.h5", "-o", "x.png")
    assert code == 3
    assert line == (
        "landscape: one picture shows one metric, but these are eigenvalues of a, trace of b; "
        "draw the 2 metrics apart\n"
    )
    code, line = landscape("plot", "a", "b", "-o", "x.png")
    assert code == 2
    assert "b holds 2 measurements; name one" in line
    results.write(Path("b/other.h5"), Record({"x": Variable((), 1.0)}, {"metric": "volume"}))
    code, line = landscape("plot", "b/other.h5", "-o", "x.png")
    assert code == 3
    assert "there are pictures of density, eigenvalues, " in line
    assert landscape("plot")[0] == 2
