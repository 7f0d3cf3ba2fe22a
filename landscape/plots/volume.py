"""Log-volume against ε with its error, and a histogram of the radii that it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from landscape.plots import PlotError, style, words
from landscape.plots.style import GREY, PLOT_HEIGHT, SMALL, TEXT
from landscape.plots.words import Subject

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from landscape.results import Record

_MOST_LEVELS = 5  # of which a histogram is drawn
_MARKER = 4.5  # points
_SETS = {"loss": "the set L < L(θ) + ε", "kl": "the set KL < ε"}
_RAYS_PER_BIN = 6
_MOST_BINS = 60


@dataclass(frozen=True)
class VolumePicture:
    """What a picture of a volume shows.

    Attributes:
        subject: set, run and size.
        result: rays, effective samples, what is unbounded, in words.
        levels: ε, ascending, (levels,).
        values: log-volumes, (levels,).
        half_widths: of their 95 % intervals, NaN where there is none, (levels,).
        radii: of the rays that are done, (rays, levels).
        unbounded: whether a ray does not leave the set, (rays, levels).
    """

    subject: Subject
    result: str
    levels: np.ndarray
    values: np.ndarray
    half_widths: np.ndarray
    radii: np.ndarray
    unbounded: np.ndarray


def prepare(record: Record, name: str = "") -> VolumePicture:
    """Turn stored volumes into plain arrays.

    Args:
        record: the measurement.
        name: of the run, for the title.

    Raises:
        PlotError: if no ray is measured yet.
    """
    if "log_volume" not in record or not record["done"].any():
        raise PlotError("no ray is measured yet; run `landscape measure` again to go on")
    order, done = np.argsort(record["epsilon"]), record["done"]
    fields = words.configuration(record)
    cost = str(fields.get("cost", "loss"))
    subject = words.subject(record, name)
    return VolumePicture(
        subject=Subject(_SETS.get(cost, cost), subject.run, subject.size),
        result=_result(record),
        levels=record["epsilon"][order],
        values=record["log_volume"][order],
        half_widths=1.96 * record["log_volume_stderr"][order],
        radii=record["radius"][done][:, order],
        unbounded=record["status"][done][:, order] == 2,
    )


def figure_size(pictures: Sequence[VolumePicture], width: float) -> tuple[float, float]:
    """Return width and height in inches; the panels stand side by side if there is room."""
    narrow = width < style.SIDE_BY_SIDE
    text = style.TITLE_HEIGHT + (0.35 if narrow else 0.2)
    legend = style.legend_height(words.labels([picture.subject for picture in pictures]), width)
    return width, text + legend + (2 if narrow else 1) * (PLOT_HEIGHT + 0.1)


def draw(figure: Figure, pictures: Sequence[VolumePicture]) -> None:
    """Draw the log-volumes and the histogram of the radii into an empty figure.

    Args:
        figure: a `matplotlib.figure.Figure`.
        pictures: what `prepare` returned, one for each run.
    """
    width = figure.get_figwidth()
    left, right = figure.subplots(*((2, 1) if width < style.SIDE_BY_SIDE else (1, 2)))
    draw_volumes(left, pictures)
    draw_radii(right, pictures)
    title = [words.title("Volume", [picture.subject for picture in pictures])]
    if len(pictures) == 1:
        title.append(pictures[0].result)
    figure.suptitle("\n".join(style.wrapped(line, width, TEXT + 0.5) for line in title), fontsize=TEXT + 0.5)
    style.run_legend(figure, words.labels([picture.subject for picture in pictures]))


def draw_volumes(axes: Axes, pictures: Sequence[VolumePicture]) -> None:
    """Draw log-volumes against ε with 95 % intervals; a value without an error is hollow."""
    for i, picture in enumerate(pictures):
        look, size = style.look(i), style.behind(_MARKER, i, len(pictures))
        shown = np.isfinite(picture.values)
        levels, values = picture.levels[shown], picture.values[shown]
        bars = picture.half_widths[shown]
        known = np.isfinite(bars)
        axes.plot(levels, values, color=look.color, linestyle=look.line, linewidth=0.8, alpha=0.6, zorder=2)
        axes.errorbar(levels, values, yerr=np.where(known, bars, 0.0), fmt="none", ecolor=look.color,
                      elinewidth=0.9, capsize=2, zorder=3)  # fmt: skip
        for mask, face in ((known, look.color), (~known, "white")):
            axes.plot(levels[mask], values[mask], linestyle="none", marker=look.marker, markersize=size,
                      color=look.color, markerfacecolor=face, markeredgewidth=0.9, zorder=4)  # fmt: skip
    every = np.concatenate([picture.levels for picture in pictures])
    style.log_axis(axes, every.min() / 1.6, every.max() * 1.6, "x")
    axes.margins(y=0.12)
    axes.set_xlabel("ε", fontsize=TEXT)
    axes.set_ylabel("ln volume (nats)", fontsize=TEXT)
    if any(not np.isfinite(picture.half_widths).all() for picture in pictures):
        _note_hollow(axes)
    style.dress(axes)


def draw_radii(axes: Axes, pictures: Sequence[VolumePicture]) -> None:
    """Draw a histogram of the radii for each ε of one run, or for the largest ε of several."""
    drawn = list(_histograms(pictures))
    every = np.concatenate([radii for *_, radii in drawn])
    if not len(every):
        axes.text(0.5, 0.5, "no radius above 0", transform=axes.transAxes, ha="center", fontsize=SMALL)
        return
    edges = bins([radii for *_, radii in drawn])
    for index, label, radii in drawn:
        look = style.look(index)
        axes.hist(
            radii,
            bins=edges.tolist(),
            histtype="stepfilled",
            alpha=0.35,
            color=look.color,
            zorder=2,
            label=label,
        )
        axes.hist(radii, bins=edges.tolist(), histtype="step", color=look.color, linewidth=0.9, zorder=3)
    style.log_axis(axes, edges[0], edges[-1], "x")
    axes.set_xlabel("radius (units of the parameters)", fontsize=TEXT)
    axes.set_ylabel("rays", fontsize=TEXT)
    if len(pictures) == 1:
        axes.legend(fontsize=SMALL, frameon=False, loc="best", handlelength=1.2)
    else:
        largest = {f"{picture.levels[-1]:g}" for picture in pictures}
        text = f"ε = {largest.pop()}" if len(largest) == 1 else "each run's largest ε"
        axes.set_title(text, fontsize=SMALL, color=GREY)
    style.dress(axes)


def bins(histograms: Sequence[np.ndarray]) -> np.ndarray:
    """Return edges of bins that are evenly spaced in the logarithm, as many as the narrowest histogram wants.

    Args:
        histograms: positive radii of each.
    """
    every = np.concatenate(list(histograms))
    low, high = float(every.min()), float(every.max())
    if high / low < 1.05:  # one radius, or nearly: a bin needs a width
        low, high = low / 1.05, high * 1.05
    spreads = [np.log(radii.max() / radii.min()) for radii in histograms if len(radii)]
    narrowest = max(min(spreads), np.log(high / low) / _MOST_BINS)
    rays = max(len(radii) for radii in histograms)
    each = min(max(rays // _RAYS_PER_BIN, 4), 12)
    count = min(_MOST_BINS, max(8, round(each * float(np.log(high / low)) / narrowest)))
    edges = np.geomspace(low, high, count + 1)
    edges[[0, -1]] = low * (1 - 1e-9), high * (1 + 1e-9)
    return edges


def interactive(pictures: Sequence[VolumePicture]) -> plotly.graph_objects.Figure:
    """Return the same as a plotly figure.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2)
    names = words.labels([picture.subject for picture in pictures])
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        look, known = style.look(i), np.isfinite(picture.half_widths)
        figure.add_trace(
            go.Scatter(x=picture.levels, y=picture.values, mode="lines+markers", name=name,
                       line={"color": look.color, "dash": look.dash, "width": 1},
                       marker={"size": 9, "symbol": ["circle" if k else "circle-open" for k in known]},
                       error_y={"type": "data", "array": np.where(known, picture.half_widths, 0.0)}),
            row=1, col=1,
        )  # fmt: skip
    for index, label, radii in _histograms(pictures):
        figure.add_trace(
            go.Histogram(x=np.log10(radii), name=label, marker={"color": style.look(index).color}, opacity=0.5),
            row=1, col=2,
        )  # fmt: skip
    figure.update_xaxes(type="log", title_text="ε", row=1, col=1)
    figure.update_yaxes(title_text="ln volume (nats)", row=1, col=1)
    figure.update_xaxes(title_text="log₁₀ radius", row=1, col=2)
    figure.update_yaxes(title_text="rays", row=1, col=2)
    title = words.title("Volume", [picture.subject for picture in pictures])
    title += f"<br>{pictures[0].result}" if len(pictures) == 1 else ""
    figure.update_layout(title=title, barmode="overlay", template="plotly_white", height=450)
    return figure


def _histograms(pictures: Sequence[VolumePicture]) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yield index of the look, label, and positive radii of each histogram."""
    if len(pictures) > 1:
        names = words.labels([picture.subject for picture in pictures])
        for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
            column = picture.radii[:, -1]
            yield i, name, column[column > 0]
        return
    (picture,) = pictures
    count = len(picture.levels)
    shown = np.unique(np.linspace(0, count - 1, min(count, _MOST_LEVELS)).round().astype(int))
    for index, level in enumerate(shown):
        column, share = picture.radii[:, level], picture.unbounded[:, level].mean()
        label = f"ε = {picture.levels[level]:g}" + (f" ({share:.0%} unbounded)" if share else "")
        yield index, label, column[column > 0]


def _note_hollow(axes: Axes) -> None:
    from matplotlib.lines import Line2D

    handle = Line2D([], [], linestyle="none", marker="o", color=GREY, markerfacecolor="white",
                    markersize=_MARKER, label="no error: a few rays carry the sum")  # fmt: skip
    axes.legend(handles=[handle], fontsize=SMALL, frameon=False, loc="best", handletextpad=0.2)


def _result(record: Record) -> str:
    """Return for example `64 rays, of which 12 to 20 count; 3 % unbounded at ε = 1`."""
    rays = int(record["done"].sum())
    few, many = (float(end(record["effective_samples"])) for end in (np.min, np.max))
    counts = [f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" for value in (few, many)]
    effective = counts[0] if counts[0] == counts[1] else f"{counts[0]} to {counts[1]}"
    text = f"{rays} rays, effectively {effective}"
    bend = str(words.configuration(record).get("preconditioner", "none"))
    if bend != "none":
        text += f", bent by {bend.replace('_', ' ').replace('ggn', 'Gauss–Newton')}"
    share = record["unbounded_fraction"].max()
    if share > 0:
        text += (
            f"; up to {share:.0%} unbounded, truncated at {words.number(float(record['truncation_radius']))}"
        )
    return text if record.attrs.get("complete", True) else f"{text} (not finished)"
