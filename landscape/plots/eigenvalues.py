"""The eigenvalues in order (scree), with residual bars, at one end of the spectrum or at both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape.plots import PlotError, style, words
from landscape.plots.style import BLUE, GREY, PLOT_HEIGHT, SMALL, TEXT
from landscape.plots.words import Subject

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from landscape.results import Record

_LOGARITHMIC_FROM = 1.5  # decades that the values span
_MARKER = 4.2  # points
_ENDS = {"largest": "index, from the largest", "smallest": "index, from the smallest"}


@dataclass(frozen=True)
class End:
    """Eigenvalues at one end of the spectrum, descending.

    Attributes:
        index: 1 for the outermost, (eigenvalues,).
        values: θ, (eigenvalues,).
        residuals: ‖A v - θ v‖, within which an eigenvalue lies, (eigenvalues,).
        converged: whether the residual asked for was reached, (eigenvalues,).
    """

    index: np.ndarray
    values: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray


@dataclass(frozen=True)
class EigenvaluesPicture:
    """What a picture of eigenvalues shows.

    Attributes:
        subject: matrix, run and size.
        result: how many there are, and how large their residuals, in words.
        ends: "largest", "smallest" or both; a whole spectrum is at the end "largest".
    """

    subject: Subject
    result: str
    ends: dict[str, End]


def prepare(record: Record, name: str = "") -> EigenvaluesPicture:
    """Turn stored eigenvalues into plain arrays.

    Args:
        record: the measurement.
        name: of the run, for the title.

    Raises:
        PlotError: if nothing is measured yet.
    """
    values = record["eigenvalues"] if "eigenvalues" in record else np.zeros(0)
    if not np.any(np.isfinite(values)):
        raise PlotError("no eigenvalue is found yet; run `landscape measure` again to go on")
    subject = words.subject(record, name)
    residuals, converged = record["residual_norm"], record["pair_converged"]
    residuals = np.where(np.isfinite(residuals), residuals, 0.0)  # no bar where it is not known
    which = str(words.configuration(record).get("which", "largest"))
    ends = {}
    for end in ("largest", "smallest"):
        if which == "both" and len(values) == subject.size:
            which = "largest"  # every eigenvalue is there: the two ends meet
        if which in {end, "both"}:
            half = len(values) // 2 if which == "both" else len(values)
            part = slice(0, half) if end == "largest" else slice(len(values) - half, None)
            index = np.arange(1, half + 1) if end == "largest" else np.arange(half, 0, -1)
            ends[end] = End(index, values[part], residuals[part], converged[part])
    return EigenvaluesPicture(subject, _result(record, values, residuals, converged), ends)


def figure_size(pictures: Sequence[EigenvaluesPicture], width: float) -> tuple[float, float]:
    """Return width and height in inches; the two ends stand side by side if there is room."""
    rows = len(_ends(pictures)) if width < style.SIDE_BY_SIDE else 1
    text = style.TITLE_HEIGHT + (0.3 if width < style.SIDE_BY_SIDE else 0.15)
    return width, text + style.legend_height(_labels(pictures), width) + rows * (PLOT_HEIGHT + 0.2)


def draw(figure: Figure, pictures: Sequence[EigenvaluesPicture]) -> None:
    """Draw the pictures into an empty figure: a panel for each end of the spectrum.

    Args:
        figure: a `matplotlib.figure.Figure`.
        pictures: what `prepare` returned, one for each run.
    """
    ends, width = _ends(pictures), figure.get_figwidth()
    shape = (len(ends), 1) if width < style.SIDE_BY_SIDE else (1, len(ends))
    grid = figure.subplots(*shape, squeeze=False)
    for axes, end in zip(grid.flat, ends, strict=True):
        draw_end(axes, pictures, end)
        if len(ends) > 1:
            axes.set_title(f"{end} eigenvalues", fontsize=TEXT)
    title = [words.title("Eigenvalues", [picture.subject for picture in pictures])]
    if len(pictures) == 1:
        title.append(pictures[0].result)
    figure.suptitle("\n".join(style.wrapped(line, width, TEXT + 0.5) for line in title), fontsize=TEXT + 0.5)
    style.run_legend(figure, _labels(pictures))


def draw_end(axes: Axes, pictures: Sequence[EigenvaluesPicture], end: str) -> None:
    """Draw the eigenvalues at one end against their index, with residual bars.

    A pair that has not converged is hollow, a negative eigenvalue a triangle that points down.
    """
    drawn = [
        (style.look(i), style.behind(_MARKER, i, len(pictures)), picture.ends[end])
        for i, picture in enumerate(pictures)
        if end in picture.ends
    ]
    every = np.concatenate([part.values for *_, part in drawn])
    kind = scale_of(every)
    subject = pictures[0].subject
    factor, unit = words.scale(every, subject.curvature) if kind == "linear" else (1.0, subject.curvature)
    for look, size, part in drawn:
        values = part.values * factor
        axes.plot(
            part.index, values, color=look.color, linestyle=look.line, linewidth=0.7, alpha=0.6, zorder=2
        )
        axes.errorbar(part.index, values, yerr=part.residuals * factor, fmt="none", ecolor=look.color,
                      elinewidth=0.9, capsize=2, zorder=3)  # fmt: skip
        for negative in (False, True):
            for converged in (False, True):
                mask = ((values < 0) == negative) & (part.converged == converged)
                axes.plot(
                    part.index[mask], values[mask], linestyle="none", markersize=size, color=look.color,
                    marker="v" if negative else look.marker, markeredgewidth=0.9,
                    markerfacecolor=look.color if converged else "white", zorder=4,
                )  # fmt: skip
    bars = np.concatenate([part.residuals for *_, part in drawn])
    _set_scale(axes, every * factor, bars * factor, kind)
    count = max(len(part.index) for *_, part in drawn)
    axes.set_xticks(style.index_ticks(count))
    axes.set_xlim(1 - 0.04 * count, count * 1.04)
    if end == "smallest":
        axes.xaxis.set_inverted(True)  # descending from left to right, as at the other end
    axes.set_xlabel(_ENDS[end], fontsize=TEXT)
    axes.set_ylabel(f"eigenvalue ({unit})", fontsize=TEXT)
    _legend(axes, [part for *_, part in drawn])
    style.dress(axes)


def scale_of(values: np.ndarray) -> str:
    """Return the axis on which values are read best: "linear", "log", or "symlog" where signs differ."""
    sizes = np.abs(values[values != 0])
    if not len(sizes) or np.log10(sizes.max() / sizes.min()) < _LOGARITHMIC_FROM:
        return "linear"
    return "log" if np.all(values > 0) else "symlog"


def interactive(pictures: Sequence[EigenvaluesPicture]) -> plotly.graph_objects.Figure:
    """Return the same as a plotly figure.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    ends, labels = _ends(pictures), _labels(pictures)
    figure = make_subplots(rows=1, cols=len(ends), subplot_titles=[f"{end} eigenvalues" for end in ends])
    for column, end in enumerate(ends, start=1):
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            if end not in picture.ends:
                continue
            part, look = picture.ends[end], style.look(i)
            symbols = [
                ("triangle-down" if value < 0 else "circle") + ("" if converged else "-open")
                for value, converged in zip(part.values, part.converged, strict=True)
            ]
            figure.add_trace(
                go.Scatter(x=part.index, y=part.values, mode="lines+markers", name=label, legendgroup=label,
                           showlegend=end == next(iter(picture.ends)),
                           line={"color": look.color, "dash": look.dash, "width": 1},
                           marker={"symbol": symbols, "size": 8},
                           error_y={"type": "data", "array": part.residuals}),
                row=1, col=column,
            )  # fmt: skip
        every = np.concatenate([picture.ends[end].values for picture in pictures if end in picture.ends])
        logarithmic = scale_of(every) == "log"  # plotly has no axis that is logarithmic at both sides of zero
        reverse: dict[str, Any] = {"autorange": "reversed"} if end == "smallest" else {}
        figure.update_xaxes(title_text=_ENDS[end], row=1, col=column, **reverse)
        figure.update_yaxes(type="log" if logarithmic else "linear", row=1, col=column,
                            title_text=f"eigenvalue ({pictures[0].subject.curvature})")  # fmt: skip
    title = words.title("Eigenvalues", [picture.subject for picture in pictures])
    title += f"<br>{pictures[0].result}" if len(pictures) == 1 else ""
    figure.update_layout(title=title, showlegend=len(pictures) > 1, template="plotly_white", height=450)
    return figure


def _result(record: Record, values: np.ndarray, residuals: np.ndarray, converged: np.ndarray) -> str:
    """Return for example `20 eigenvalues; bars are residuals, at most 5.8 × 10⁻⁵; 2 have not converged`."""
    largest = words.unbroken(words.number(float(residuals.max()), 2))
    plural = "s" * (len(values) > 1)
    text = f"{len(values)} eigenvalue{plural}; bars are residuals, at most {largest}"
    if missed := int(np.sum(~converged)):
        text += f"; {missed} {'has' if missed == 1 else 'have'} not converged"
    return text if record.attrs.get("complete", True) else f"{text} (not finished)"


def _set_scale(axes: Axes, values: np.ndarray, bars: np.ndarray, kind: str) -> None:
    if kind == "symlog":
        style.signed_log(axes, values, bars)
    elif kind == "log":
        style.log_axis(axes, values.min() / 1.5, values.max() * 1.5)
    else:
        low, high = float((values - bars).min()), float((values + bars).max())
        room = 0.08 * ((high - low) or 1.0)
        axes.set_ylim(low - room, high + room)
    if kind != "log" and values.min() < 0 < values.max():
        axes.axhline(0, color=GREY, linewidth=0.6, zorder=1)


def _legend(axes: Axes, parts: Sequence[End]) -> None:
    """Say what hollow markers and triangles are, where there are any."""
    from matplotlib.lines import Line2D

    color = BLUE if len(parts) == 1 else GREY
    marks = []
    if any(np.any(part.values < 0) for part in parts):
        marks.append(("v", color, "negative"))
    if any(not np.all(part.converged) for part in parts):
        marks.append(("o", "white", "not converged"))
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=marker,
            color=color,
            markerfacecolor=face,
            markersize=_MARKER,
            label=label,
        )
        for marker, face, label in marks
    ]
    if handles:
        axes.legend(handles=handles, fontsize=SMALL, frameon=False, loc="best")


def _ends(pictures: Sequence[EigenvaluesPicture]) -> list[str]:
    return [end for end in _ENDS if any(end in picture.ends for picture in pictures)]


def _labels(pictures: Sequence[EigenvaluesPicture]) -> list[str]:
    return words.labels([picture.subject for picture in pictures])
