"""The trace: its running estimate with a 95 % band, and the traces of the parameter tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from landscape.plots import PlotError, style, words
from landscape.plots.style import BLUE, GREY, PLOT_HEIGHT, SMALL, TEXT, VERMILLION
from landscape.plots.words import Subject

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from landscape.results import Record

_NORMAL_95 = 1.96
_MOST_BARS = 20
_LONGEST_NAME, _LONGEST_IN_A_COLUMN = 30, 22


@dataclass(frozen=True)
class TracePicture:
    """What a picture of a trace shows; every band is 95 % (value ± 1.96 stderr).

    Attributes:
        subject: matrix, run and size.
        result: the final value in words.
        unit: what is counted along the running estimate: "probes", or "estimates" of many products each.
        value: the final value.
        half_width: half of its band; 0 for an exact trace.
        counts: how many units each running estimate rests on, (rounds,); empty for an exact trace.
        running: the running estimates, (rounds,).
        running_half_width: halves of their bands, (rounds,).
        layers: names of the parameter tensors, in the model's order.
        layer_values: the traces of their blocks, (layers,).
        layer_half_width: halves of their bands, (layers,).
    """

    subject: Subject
    result: str
    unit: str
    value: float
    half_width: float
    counts: np.ndarray
    running: np.ndarray
    running_half_width: np.ndarray
    layers: list[str]
    layer_values: np.ndarray
    layer_half_width: np.ndarray

    def largest(self, most: int = _MOST_BARS) -> np.ndarray:
        """Return the indices of the `most` tensors of largest |trace|, in the model's order."""
        order = np.argsort(-np.abs(self.layer_values), kind="stable")[:most]
        return np.sort(order)


def prepare(record: Record, name: str = "") -> TracePicture:
    """Turn a stored trace into plain arrays.

    Args:
        record: the measurement.
        name: of the run, for the title.

    Raises:
        PlotError: if nothing is measured yet.
    """
    if "trace" not in record or not np.isfinite(record["trace"]):
        raise PlotError("no trace is measured yet; run `landscape measure` again to go on")
    value, stderr = float(record["trace"]), float(record["trace_stderr"])
    layers, layer_values, layer_half_width = _layers(record)
    counts, running, running_half_width = _rounds(record)
    return TracePicture(
        subject=words.subject(record, name),
        result=_result(record, value, stderr),
        unit="estimates" if record.attrs.get("method") in {"hutchpp", "xtrace"} else "probes",
        value=value,
        half_width=float(_half_width(np.asarray(stderr))),
        counts=counts,
        running=running,
        running_half_width=running_half_width,
        layers=layers,
        layer_values=layer_values,
        layer_half_width=layer_half_width,
    )


def figure_size(pictures: Sequence[TracePicture], width: float) -> tuple[float, float]:
    """Return width and height in inches, with room for the names of the tensors and of the runs."""
    bars = _bars_height(len(_common_layers(pictures)))
    rest = style.TITLE_HEIGHT + style.legend_height(_labels(pictures), width)
    if _has_running(pictures) and bars and width < style.SIDE_BY_SIDE:
        return width, rest + PLOT_HEIGHT + max(PLOT_HEIGHT / 2, bars)
    return width, rest + max(PLOT_HEIGHT, bars)


def draw(figure: Figure, pictures: Sequence[TracePicture]) -> None:
    """Draw the pictures into an empty figure: one panel, or two side by side or stacked.

    The tensors of several runs are shown where all runs have the same ones.

    Args:
        figure: a `matplotlib.figure.Figure`.
        pictures: what `prepare` returned, one for each run.
    """
    column = figure.get_figwidth() < style.SIDE_BY_SIDE
    bars = _bars_height(len(_common_layers(pictures)))
    panels = [draw_running] * _has_running(pictures) + [draw_layers] * bool(bars)
    if column:
        heights = [PLOT_HEIGHT, max(PLOT_HEIGHT / 2, bars)]
        # each its own subfigure: long names of tensors then do not narrow the other panel
        parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights[: len(panels)])
        places = [part.subplots() for part in parts.flat]
    else:
        grid = figure.subplots(
            1, len(panels), squeeze=False, gridspec_kw={"width_ratios": [1.0, 1.15][: len(panels)]}
        )
        places = list(grid.flat)
    for panel, axes in zip(panels, places, strict=True):
        panel(axes, pictures, column)
    title = words.title("Trace", [p.subject for p in pictures])
    title = title.replace(" (", "\n(") if column else title
    if not _has_running(pictures) and len(pictures) == 1:
        title += f"\n{pictures[0].result}"
    figure.suptitle(title, fontsize=TEXT + 1)
    style.run_legend(figure, _labels(pictures))


def draw_running(axes: Axes, pictures: Sequence[TracePicture], column: bool = False) -> None:  # noqa: ARG001
    """Draw the running estimates against the number of probes, their bands, and the final value."""
    every = np.concatenate([np.array([p.value]) if not len(p.counts) else p.running for p in pictures])
    factor, unit = words.scale(every, pictures[0].subject.curvature)
    single = len(pictures) == 1
    edges = []
    for index, picture in enumerate(pictures):
        look = style.look(index)
        running, half = picture.running * factor, picture.running_half_width * factor
        edges += [picture.value * factor, *(running - half), *(running + half)]
        if single or not len(picture.counts):
            axes.axhline(
                picture.value * factor, color=VERMILLION if single else look.color, linewidth=1,
                linestyle="--", zorder=1, label="final value",
            )  # fmt: skip
        if not len(picture.counts):
            continue
        axes.fill_between(
            picture.counts,
            running - half,
            running + half,
            color=look.color,
            alpha=style.BAND,
            linewidth=0,
            zorder=2,
        )
        axes.errorbar(picture.counts, running, yerr=half, color=look.color, marker=look.marker, markersize=3.5,
                      linestyle=look.line, linewidth=1.2, elinewidth=0.8, capsize=2, zorder=3,
                      label="estimate, 95 % interval")  # fmt: skip
    counts = np.unique(np.concatenate([picture.counts for picture in pictures]))
    axes.set_xscale("log", base=2)
    axes.set_xticks(_few(counts), [f"{count:g}" for count in _few(counts)])
    axes.minorticks_off()
    axes.margins(x=0.08)
    low, high = float(min(edges)), float(max(edges))
    room = (high - low) or abs(high) or 1.0
    axes.set_ylim(low - 0.06 * room, high + (0.3 if single else 0.06) * room)
    axes.set_xlabel(f"number of {_unit(pictures)}", fontsize=TEXT)
    axes.set_ylabel(f"trace ({unit})", fontsize=TEXT)
    if single:  # the legend stands in the room above
        axes.legend(fontsize=SMALL, frameon=False, loc="upper right")
    axes.set_title(pictures[0].result if single else "estimates, 95 % intervals", fontsize=TEXT)
    style.dress(axes)


def draw_layers(axes: Axes, pictures: Sequence[TracePicture], column: bool = False) -> None:
    """Draw the traces of the parameter tensors with 95 % intervals; first tensor on top.

    Those of one run are bars, those of several are markers beside each other.
    """
    shown = pictures[0].largest() if len(pictures) == 1 else _largest_of_all(pictures)
    factor, unit = words.scale(
        np.concatenate([p.layer_values for p in pictures]), pictures[0].subject.curvature
    )
    places = np.arange(len(shown))
    for index, picture in enumerate(pictures):
        values, half = picture.layer_values[shown] * factor, picture.layer_half_width[shown] * factor
        if len(pictures) == 1:
            axes.barh(places, values, color=BLUE, alpha=0.75, height=0.72)
            if np.any(half > 0):
                axes.errorbar(
                    values, places, xerr=half, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5
                )
            continue
        look = style.look(index)
        shift = 0.6 * ((index + 0.5) / len(pictures) - 0.5)
        axes.errorbar(values, places + shift, xerr=half, fmt=look.marker, color=look.color, markersize=3,
                      elinewidth=0.8, label=picture.subject.run)  # fmt: skip
    axes.axvline(0, color=GREY, linewidth=0.6)
    longest = _LONGEST_IN_A_COLUMN if column else _LONGEST_NAME
    axes.set_yticks(places, words.shortened([pictures[0].layers[i] for i in shown], longest))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel(f"trace per tensor ({unit})", fontsize=TEXT)
    axes.set_title(_heading(pictures[0], len(shown)), fontsize=TEXT, loc="right" if column else "center")
    style.dress(axes)


def interactive(pictures: Sequence[TracePicture]) -> plotly.graph_objects.Figure:
    """Return the same as a plotly figure, with every tensor.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    layers, single = _common_layers(pictures), len(pictures) == 1
    both = _has_running(pictures) and bool(layers)
    results = pictures[0].result if single else "estimates, 95 % intervals"
    headings = [results] * _has_running(pictures)
    headings += [f"{len(layers)} parameter tensors"] * bool(layers)
    figure = make_subplots(rows=1, cols=2 if both else 1, subplot_titles=headings, horizontal_spacing=0.2)
    place = {"row": 1, "col": 2 if both else 1}
    for index, (picture, label) in enumerate(zip(pictures, _labels(pictures), strict=True)):
        if _has_running(pictures):
            _add_running(figure, picture, index, "" if single else label)
        if layers:
            figure.add_trace(
                go.Bar(x=picture.layer_values, y=layers, orientation="h", legendgroup=label,
                       name="trace of the tensor's block" if single else label, showlegend=not len(picture.counts),
                       marker={"color": style.look(index).color},
                       error_x={"type": "data", "array": picture.layer_half_width}),
                **place,
            )  # fmt: skip
    unit = pictures[0].subject.curvature
    if _has_running(pictures):
        ticks = sorted({int(count) for picture in pictures for count in picture.counts})
        figure.update_xaxes(
            type="log", tickvals=ticks, title_text=f"number of {_unit(pictures)}", row=1, col=1
        )
        figure.update_yaxes(title_text=f"trace ({unit})", row=1, col=1)
    if layers:
        figure.update_xaxes(title_text=f"trace of the tensor's block ({unit})", **place)
        figure.update_yaxes(autorange="reversed", automargin=True, **place)
    title = words.title("Trace", [p.subject for p in pictures])
    if single and not _has_running(pictures):
        title += f"<br>{pictures[0].result}"
    height = 380 + max(0, 18 * (len(layers) - 10))
    figure.update_layout(title=title, showlegend=not single, template="plotly_white", height=height)
    return figure


def _add_running(figure: plotly.graph_objects.Figure, picture: TracePicture, index: int, label: str) -> None:
    import plotly.graph_objects as go

    look = style.look(index)
    if len(picture.counts):
        figure.add_trace(
            go.Scatter(x=picture.counts, y=picture.running, mode="lines+markers", legendgroup=label,
                       name=label or "estimate, 95 % interval", line={"color": look.color, "dash": look.dash},
                       error_y={"type": "data", "array": picture.running_half_width}),
            row=1, col=1,
        )  # fmt: skip
    if not label or not len(picture.counts):
        color = look.color if label else VERMILLION
        figure.add_hline(y=picture.value, line={"color": color, "dash": "dash"}, row=1, col=1)


def _labels(pictures: Sequence[TracePicture]) -> list[str]:
    """Return name and final value of each run."""
    names = words.labels([picture.subject for picture in pictures])
    values = [words.plus_minus(p.value, p.half_width / _NORMAL_95) for p in pictures]
    return [f"{name}, {value}" for name, value in zip(names, values, strict=True)]


def _has_running(pictures: Sequence[TracePicture]) -> bool:
    return any(len(picture.counts) for picture in pictures)


def _common_layers(pictures: Sequence[TracePicture]) -> list[str]:
    """Return the tensors, if all pictures have the same.

    Raises:
        PlotError: if they do not, and nothing else is there to draw.
    """
    first = pictures[0].layers
    if all(picture.layers == first for picture in pictures):
        return first
    if not _has_running(pictures):
        raise PlotError(
            "these are exact traces of different tensors; draw each one alone, or `landscape show` them"
        )
    return []


def _unit(pictures: Sequence[TracePicture]) -> str:
    return " or ".join(sorted({picture.unit for picture in pictures if len(picture.counts)}))


def _largest_of_all(pictures: Sequence[TracePicture]) -> np.ndarray:
    """Return the indices of the tensors whose |trace| is largest in any of the runs, in the model's order."""
    sizes = np.max([np.abs(picture.layer_values) for picture in pictures], axis=0)
    return np.sort(np.argsort(-sizes, kind="stable")[:_MOST_BARS])


def _layers(record: Record) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return names, traces and halves of bands of the tensors; empty where the method gives none."""
    if "layer_trace" not in record:
        return [], np.zeros(0), np.zeros(0)
    half = _half_width(record["layer_trace_stderr"])
    return [str(name) for name in record["layer"]], record["layer_trace"], half


def _rounds(record: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return counts, running estimates and halves of their bands of the rounds that are done."""
    if "running_trace" not in record:
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    known = np.isfinite(record["running_trace"])
    half = _half_width(record["running_trace_stderr"][known])
    return record["round"][known], record["running_trace"][known], half


def _half_width(stderr: np.ndarray) -> np.ndarray:
    """Return half of a 95 % band; 0, so that none is drawn, where the error is not known."""
    return np.where(np.isfinite(stderr), _NORMAL_95 * stderr, 0.0)


def _result(record: Record, value: float, stderr: float) -> str:
    """Return for example `trace = 42.5 ± 0.6, 64 probes`; the error is one standard error."""
    method = record.attrs.get("method")
    done = int(record["done"].sum()) if "done" in record else 0
    if method == "exact":
        spent, kind = "matvecs", "products"
        if "backward_passes" in record:
            spent, kind = "backward_passes", "backward passes"
        count = int(record[spent]) if spent in record else done
        text = f"trace = {words.plus_minus(value, None)}: exact, {words.grouped(count)} {kind}"
    else:
        units = "estimates" if method in {"hutchpp", "xtrace"} else "probes"
        text = f"trace = {words.plus_minus(value, stderr)}, {words.grouped(done)} {units}"
    return text if record.attrs.get("complete", True) else f"{text} (not finished)"


def _heading(picture: TracePicture, shown: int) -> str:
    total = len(picture.layers)
    if shown == total:
        return f"{total} parameter tensor" + "s" * (total > 1)
    return f"largest {shown} of {total} tensors ({total - shown} left out)"


def _bars_height(bars: int) -> float:
    """Return inches: a line of text for each bar, and the axis."""
    return 0.7 + 0.16 * min(bars, _MOST_BARS) if bars else 0.0


def _few(counts: np.ndarray) -> np.ndarray:
    """Return at most seven of the counts, the last among them, for the ticks."""
    step = -(-len(counts) // 7)
    return counts[::-1][::step][::-1]
