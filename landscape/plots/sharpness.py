"""Sharpness against the size of the neighbourhood, with its bounds and its first and second order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from landscape.plots import PlotError, style, words
from landscape.plots.style import GREY, SMALL, TEXT
from landscape.plots.words import Subject

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from landscape.results import Record

_SETS = {
    "keskar": "Sharpness in Keskar's box",
    "ball": "Sharpness in a ball",
    "adaptive": "Adaptive sharpness",
    "average": "Average sharpness",
}
_UNITS = {"keskar": "100 · rise of the loss / (1 + L)", "ball": "rise of the loss / (1 + L)"}
# What may stand beside the measured values: name, words, and the line's dashes in matplotlib and plotly.
_BESIDE = (
    ("first_order", "first order: the slope alone", (0, (1, 1.5)), "dot"),
    ("second_order", "second order: the largest eigenvalue alone", (0, (5, 2)), "dash"),
    ("upper_bound", "certain upper bound", (0, (7, 1.5, 1, 1.5)), "dashdot"),
)
_HEIGHT = 2.9  # inches


@dataclass(frozen=True)
class SharpnessPicture:
    """What a picture of sharpness shows.

    Attributes:
        quantity: which sharpness.
        subject: run and size.
        unit: of the sharpness, in words.
        epsilon: sizes of the neighbourhood, ascending, (e,).
        sharpness: measured, (e,).
        low: lowest restart, or value − 1.96 stderr, (e,).
        high: the value itself for a maximum, or value + 1.96 stderr, (e,).
        beside: by name, what is drawn beside it, each (e,).
        note: what low and high are.
    """

    quantity: str
    subject: Subject
    unit: str
    epsilon: np.ndarray
    sharpness: np.ndarray
    low: np.ndarray
    high: np.ndarray
    beside: dict[str, np.ndarray]
    note: str


def prepare(record: Record, name: str = "") -> SharpnessPicture:
    """Turn stored sharpness into plain arrays.

    Args:
        record: the measurement.
        name: of the run, for the title.

    Raises:
        PlotError: if nothing is measured yet, or nothing is positive.
    """
    if "sharpness" not in record or not np.isfinite(record["sharpness"]).any():
        raise PlotError("no sharpness is measured yet; run `landscape measure` again to go on")
    if not (record["sharpness"] > 0).any():
        raise PlotError("the loss rises nowhere, so there is nothing to draw on a logarithmic axis")
    definition = str(words.configuration(record).get("definition", "keskar"))
    given = words.subject(record, name)
    value = np.asarray(record["sharpness"], dtype=float)
    if "sharpness_stderr" in record:
        half = 1.96 * np.asarray(record["sharpness_stderr"], dtype=float)
        low, high, note = value - half, value + half, "95 % intervals"
    else:
        low, high, note = value - np.asarray(record["spread"]), value, "bars down to the worst restart"
    beside = {key: np.asarray(record[key]) for key, *_ in _BESIDE if key in record}
    return SharpnessPicture(
        quantity=_SETS.get(definition, "Sharpness"),
        subject=Subject("the loss", given.run, given.size),
        unit=_UNITS.get(definition, "rise of the loss"),
        epsilon=np.asarray(record["epsilon"], dtype=float),
        sharpness=value,
        low=low,
        high=high,
        beside=beside,
        note=note,
    )


def figure_size(pictures: Sequence[SharpnessPicture], width: float) -> tuple[float, float]:
    """Return width and height in inches."""
    names = words.labels([picture.subject for picture in pictures])
    return min(width, 4.6), _HEIGHT + style.legend_height(names, min(width, 4.6))


def draw(figure: Figure, pictures: Sequence[SharpnessPicture]) -> None:
    """Draw one line for each run over logarithmic axes.

    Args:
        figure: a `matplotlib.figure.Figure`.
        pictures: what `prepare` returned, one for each run.
    """
    axes = figure.subplots()
    alone = len(pictures) == 1
    for index, picture in enumerate(pictures):
        look = style.look(index)
        down = np.clip(picture.sharpness - picture.low, 0, 0.999 * np.abs(picture.sharpness))
        axes.errorbar(
            picture.epsilon, picture.sharpness, yerr=np.stack([down, picture.high - picture.sharpness]),
            color=look.color, marker=look.marker, linestyle=look.line, markersize=4, linewidth=1.2,
            elinewidth=0.8, capsize=2, zorder=3, label=f"measured ({picture.note})" if alone else None,
        )  # fmt: skip
        for key, text, dashes, _ in _BESIDE:
            if key in picture.beside:
                color = GREY if alone else look.color
                axes.plot(
                    picture.epsilon, picture.beside[key], linestyle=dashes, color=color, linewidth=1.0, zorder=2,
                    marker="" if len(picture.epsilon) > 1 else "_", label=text if alone else None,
                )  # fmt: skip
    _limits(axes, pictures)
    axes.set_xlabel("size ε of the neighbourhood", fontsize=TEXT)
    units = {picture.unit for picture in pictures}
    axes.set_ylabel(units.pop() if len(units) == 1 else "sharpness", fontsize=TEXT)
    style.dress(axes)
    if alone:
        handles, texts = axes.get_legend_handles_labels()
        order = sorted(range(len(texts)), key=lambda i: not texts[i].startswith("measured"))
        axes.legend(
            [handles[i] for i in order],
            [texts[i] for i in order],
            fontsize=SMALL,
            frameon=False,
            loc="best",
            handlelength=2.6,
        )
    title = _title(pictures)
    figure.suptitle(style.wrapped(title, figure.get_figwidth(), TEXT + 0.5), fontsize=TEXT + 0.5)
    style.run_legend(figure, words.labels([picture.subject for picture in pictures]))


def interactive(pictures: Sequence[SharpnessPicture]) -> plotly.graph_objects.Figure:
    """Return the same as a plotly figure.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    names = words.labels([picture.subject for picture in pictures])
    for index, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        look = style.look(index)
        figure.add_trace(
            go.Scatter(x=picture.epsilon, y=picture.sharpness, mode="lines+markers", name=name,
                       line={"color": look.color, "dash": look.dash},
                       error_y={"type": "data", "symmetric": False, "array": picture.high - picture.sharpness,
                                "arrayminus": picture.sharpness - picture.low})
        )  # fmt: skip
        for key, text, _, dash in _BESIDE:
            if key in picture.beside:
                label = text if len(pictures) == 1 else f"{name}: {text}"
                figure.add_trace(
                    go.Scatter(x=picture.epsilon, y=picture.beside[key], mode="lines", name=label,
                               line={"color": look.color, "dash": dash, "width": 1})
                )  # fmt: skip
    figure.update_xaxes(type="log", title_text="size ε of the neighbourhood")
    figure.update_yaxes(type="log", title_text=pictures[0].unit)
    figure.update_layout(title=_title(pictures), template="plotly_white")
    return figure


def _limits(axes: Axes, pictures: Sequence[SharpnessPicture]) -> None:
    """Make both axes logarithmic around all that is drawn."""
    sizes = np.concatenate([picture.epsilon for picture in pictures])
    values = np.concatenate([np.concatenate([p.sharpness, *p.beside.values()]) for p in pictures])
    values = values[np.isfinite(values) & (values > 0)]
    for name, low, high in (("x", sizes.min(), sizes.max()), ("y", values.min(), values.max())):
        style.log_axis(axes, low / 1.4, high * 1.4, name)


def _title(pictures: Sequence[SharpnessPicture]) -> str:
    quantities = {picture.quantity for picture in pictures}
    quantity = quantities.pop() if len(quantities) == 1 else "Sharpness"
    return words.title(quantity, [picture.subject for picture in pictures])
