"""The trace: its running estimate with a 95 % band, and the traces of the parameter tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape.plots import PlotError, plus_minus, power_of_ten

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from landscape.results import Record

# Okabe & Ito's palette, told apart with every kind of colour vision.
_BLUE, _VERMILLION, _GREY = "#0072B2", "#D55E00", "#555555"
_NORMAL_95 = 1.96
_MOST_BARS = 20
_LONGEST_NAME, _LONGEST_IN_A_COLUMN = 30, 22
_SIDE_BY_SIDE = 5.0  # inches: a narrower figure has its panels one above the other
_TEXT, _SMALL = 8.0, 7.0  # points: the sizes of captions in print
_TITLE_HEIGHT, _PLOT_HEIGHT = 0.4, 2.4  # inches
_MATRICES = {"hessian": "Hessian", "ggn": "Gauss–Newton matrix"}


@dataclass(frozen=True)
class TracePicture:
    """What a picture of a trace shows; every band is 95 % (value ± 1.96 stderr).

    Attributes:
        title: matrix, run and size.
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

    title: str
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
        title=_title(record, name),
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


def figure_size(picture: TracePicture, width: float) -> tuple[float, float]:
    """Return width and height in inches, with room for the names of the tensors."""
    bars = _bars_height(picture)
    if len(picture.counts) and picture.layers and width < _SIDE_BY_SIDE:
        return width, _TITLE_HEIGHT + _PLOT_HEIGHT + max(_PLOT_HEIGHT / 2, bars)
    return width, _TITLE_HEIGHT + max(_PLOT_HEIGHT, bars)


def draw(figure: Figure, picture: TracePicture) -> None:
    """Draw the picture into an empty figure: one panel, or two side by side or stacked.

    Args:
        figure: a `matplotlib.figure.Figure`.
        picture: what `prepare` returned.
    """
    column = figure.get_figwidth() < _SIDE_BY_SIDE
    panels = [draw_running] * bool(len(picture.counts)) + [draw_layers] * bool(picture.layers)
    if column:
        heights = [_PLOT_HEIGHT, max(_PLOT_HEIGHT / 2, _bars_height(picture))]
        # each its own subfigure: long names of tensors then do not narrow the other panel
        parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights[: len(panels)])
        places = [part.subplots() for part in parts.flat]
    else:
        grid = figure.subplots(
            1, len(panels), squeeze=False, gridspec_kw={"width_ratios": [1.0, 1.15][: len(panels)]}
        )
        places = list(grid.flat)
    for panel, axes in zip(panels, places, strict=True):
        panel(axes, picture, column)
    title = picture.title if len(picture.counts) else f"{picture.title}\n{picture.result}"
    figure.suptitle(title.replace(" (", "\n(") if column else title, fontsize=_TEXT + 1)


def draw_running(axes: Axes, picture: TracePicture, column: bool = False) -> None:  # noqa: ARG001
    """Draw the running estimate against the number of probes, its band, and the final value."""
    factor, unit = _scale(picture.running)
    counts, running, half = picture.counts, picture.running * factor, picture.running_half_width * factor
    axes.axhline(
        picture.value * factor, color=_VERMILLION, linewidth=1, linestyle="--", zorder=1, label="final value"
    )
    axes.fill_between(counts, running - half, running + half, color=_BLUE, alpha=0.18, linewidth=0, zorder=2)
    axes.errorbar(counts, running, yerr=half, color=_BLUE, marker="o", markersize=3.5, linewidth=1.2,
                  elinewidth=0.8, capsize=2, zorder=3, label="estimate, 95 % interval")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(_few(counts), [f"{count:g}" for count in _few(counts)])
    axes.minorticks_off()
    axes.margins(x=0.08)
    low, high = float((running - half).min()), float((running + half).max())
    room = (high - low) or abs(high) or 1.0
    axes.set_ylim(low - 0.06 * room, high + 0.3 * room)  # the legend stands in the room above
    axes.set_xlabel(f"number of {picture.unit}", fontsize=_TEXT)
    axes.set_ylabel(f"trace ({unit})", fontsize=_TEXT)
    axes.set_title(picture.result, fontsize=_TEXT)
    axes.legend(fontsize=_SMALL, frameon=False, loc="upper right")
    _dress(axes)


def draw_layers(axes: Axes, picture: TracePicture, column: bool = False) -> None:
    """Draw the traces of the parameter tensors as bars with 95 % intervals; first tensor on top."""
    shown = picture.largest()
    factor, unit = _scale(picture.layer_values)
    places, values = np.arange(len(shown)), picture.layer_values[shown] * factor
    axes.barh(places, values, color=_BLUE, alpha=0.75, height=0.72)
    half = picture.layer_half_width[shown] * factor
    if np.any(half > 0):
        axes.errorbar(values, places, xerr=half, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
    axes.axvline(0, color=_GREY, linewidth=0.6)
    longest = _LONGEST_IN_A_COLUMN if column else _LONGEST_NAME
    axes.set_yticks(places, shortened([picture.layers[i] for i in shown], longest))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel(f"trace per tensor ({unit})", fontsize=_TEXT)
    axes.set_title(_heading(picture, len(shown)), fontsize=_TEXT, loc="right" if column else "center")
    _dress(axes)


def interactive(picture: TracePicture) -> plotly.graph_objects.Figure:
    """Return the same picture as a plotly figure, with every tensor.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    both = bool(len(picture.counts)) and bool(picture.layers)
    heading = f"{len(picture.layers)} parameter tensors" if picture.layers else ""
    titles = [
        text for text, wanted in ((picture.result, len(picture.counts)), (heading, picture.layers)) if wanted
    ]
    figure = make_subplots(rows=1, cols=2 if both else 1, subplot_titles=titles, horizontal_spacing=0.2)
    if len(picture.counts):
        figure.add_trace(
            go.Scatter(x=picture.counts, y=picture.running, mode="lines+markers", name="estimate, 95 % interval",
                       error_y={"type": "data", "array": picture.running_half_width}, line={"color": _BLUE}),
            row=1, col=1,
        )  # fmt: skip
        figure.add_hline(y=picture.value, line={"color": _VERMILLION, "dash": "dash"}, row=1, col=1)
        ticks = [int(count) for count in picture.counts]
        figure.update_xaxes(type="log", tickvals=ticks, title_text=f"number of {picture.unit}", row=1, col=1)
        figure.update_yaxes(title_text="trace (loss / parameter²)", row=1, col=1)
    if picture.layers:
        column = 2 if both else 1
        figure.add_trace(
            go.Bar(x=picture.layer_values, y=picture.layers, orientation="h", name="trace of the tensor's block",
                   marker={"color": _BLUE}, error_x={"type": "data", "array": picture.layer_half_width}),
            row=1, col=column,
        )  # fmt: skip
        figure.update_xaxes(title_text="trace of the tensor's block (loss / parameter²)", row=1, col=column)
        figure.update_yaxes(autorange="reversed", automargin=True, row=1, col=column)
    title = picture.title if len(picture.counts) else f"{picture.title}<br>{picture.result}"
    height = 380 + max(0, 18 * (len(picture.layers) - 10))
    figure.update_layout(title=title, showlegend=False, template="plotly_white", height=height)
    return figure


def shortened(names: list[str], longest: int = _LONGEST_NAME) -> list[str]:
    """Return the names cut to a length at which they can still be told apart.

    What all have in front is left out, then words are shortened; numbers and the last word stay.

    >>> shortened([f"model.layers.{i}.self_attn.q_proj.weight" for i in (3, 11)], 20)
    ['…3.sel.q_p.weight', '…11.sel.q_p.weight']
    """
    if all(len(name) <= longest for name in names):
        return names
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts) and len(names) > 1:
        common += 1
    mark = "…" if common else ""
    for letters in (99, 6, 3, 1):
        cut = [
            mark + ".".join([*(w if w.isdigit() else w[:letters] for w in p[common:-1]), p[-1]])
            for p in parts
        ]
        if all(len(name) <= longest for name in cut) and len(set(cut)) == len(set(names)):
            return cut
    return [name if len(name) <= longest else f"…{name[1 - longest :]}" for name in names]


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


def _title(record: Record, name: str) -> str:
    configuration = record.attrs.get("configuration")
    fields: Any = json.loads(configuration) if isinstance(configuration, str) else configuration
    curvature = fields.get("curvature", "hessian") if isinstance(fields, Mapping) else "hessian"
    matrix = _MATRICES.get(str(curvature), str(curvature))
    run = str(record.attrs.get("model") or name)
    title = f"Trace of the {matrix}" + (f" of {run}" if run else "")
    if "layer_size" in record:
        title += f" ({_grouped(int(record['layer_size'].sum()))} parameters)"
    return title


def _result(record: Record, value: float, stderr: float) -> str:
    """Return for example `trace = 42.5 ± 0.6, 64 probes`; the error is one standard error."""
    method = record.attrs.get("method")
    done = int(record["done"].sum()) if "done" in record else 0
    if method == "exact":
        spent, kind = "matvecs", "products"
        if "backward_passes" in record:
            spent, kind = "backward_passes", "backward passes"
        count = int(record[spent]) if spent in record else done
        text = f"trace = {plus_minus(value, None)}: exact, {_grouped(count)} {kind}"
    else:
        units = "estimates" if method in {"hutchpp", "xtrace"} else "probes"
        text = f"trace = {plus_minus(value, stderr)}, {_grouped(done)} {units}"
    return text if record.attrs.get("complete", True) else f"{text} (not finished)"


def _heading(picture: TracePicture, shown: int) -> str:
    total = len(picture.layers)
    if shown == total:
        return f"{total} parameter tensor" + "s" * (total > 1)
    return f"largest {shown} of {total} tensors ({total - shown} left out)"


def _bars_height(picture: TracePicture) -> float:
    """Return inches: a line of text for each bar, and the axis."""
    return 0.7 + 0.16 * min(len(picture.layers), _MOST_BARS) if picture.layers else 0.0


def _scale(values: np.ndarray) -> tuple[float, str]:
    """Return a factor that brings values to a readable size, and the unit they then have."""
    largest = float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0))
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    if -3 <= power <= 3:
        return 1.0, "loss / parameter²"
    return 10.0**-power, f"{power_of_ten(power)} loss / parameter²"


def _few(counts: np.ndarray) -> np.ndarray:
    """Return at most seven of the counts, the last among them, for the ticks."""
    step = -(-len(counts) // 7)
    return counts[::-1][::step][::-1]


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ") if number >= 10_000 else str(number)


def _dress(axes: Axes) -> None:
    axes.tick_params(labelsize=_SMALL, width=0.6, length=2.5)
    axes.yaxis.get_offset_text().set_fontsize(_SMALL)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_linewidth(0.6)
