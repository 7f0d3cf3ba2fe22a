"""Accuracy under attack, and how far gradients change, against the size of the displacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from landscape.plots import PlotError, style, words
from landscape.plots.style import SMALL, TEXT

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from landscape.results import Record

_Z = 1.96  # of a 95 % band


@dataclass(frozen=True)
class Curve:
    """Values with their standard errors at the displacements of a picture, (n,) each."""

    values: np.ndarray
    stderr: np.ndarray


@dataclass(frozen=True)
class RobustnessPicture:
    """What a picture of robustness shows.

    Attributes:
        run: its name, "" where it has none.
        norm: of the displacements, "2" or "∞".
        epsilon: their lengths, (n,).
        change: relative change of the gradient.
        accuracy: share of examples without a known attack, at 0 and at each ε; None without attacks.
        attack: how attacks were made, in words.
    """

    run: str
    norm: str
    epsilon: np.ndarray
    change: Curve
    accuracy: Curve | None
    attack: str


def prepare(record: Record, name: str = "") -> RobustnessPicture:
    """Turn stored means into plain arrays.

    Args:
        record: the measurement.
        name: of the run.

    Raises:
        PlotError: if nothing is measured yet.
    """
    if "gradient_robustness" not in record or not np.isfinite(record["gradient_robustness"]).any():
        raise PlotError("no example is measured yet; run `landscape measure` again to go on")
    fields = words.configuration(record)
    accuracy = None
    if "adversarial_accuracy" in record:
        start = float(record["accuracy"])
        count = max(1, int(record["done"].sum()))
        held, error = record["adversarial_accuracy"], record["adversarial_accuracy_stderr"]
        accuracy = Curve(np.append(start, held), np.append(np.sqrt(start * (1 - start) / count), error))
    steps, restarts = fields.get("steps", "?"), fields.get("restarts", "?")
    return RobustnessPicture(
        run=name or str(record.attrs.get("model") or ""),
        norm="∞" if fields.get("norm") == "inf" else "2",
        epsilon=record["epsilon"],
        change=Curve(record["gradient_robustness"], record["gradient_robustness_stderr"]),
        accuracy=accuracy,
        attack=f"PGD, {steps} steps, 1 + {restarts} starts",
    )


def figure_size(pictures: Sequence[RobustnessPicture], width: float) -> tuple[float, float]:
    """Return width and height in inches."""
    panels = 2 if _has_attacks(pictures) and width < style.SIDE_BY_SIDE else 1
    legend = style.legend_height(_labels(pictures), width)
    return width, style.TITLE_HEIGHT + panels * style.PLOT_HEIGHT + legend


def draw(figure: Figure, pictures: Sequence[RobustnessPicture]) -> None:
    """Draw both curves of every run with 95 % bands.

    Args:
        figure: a `matplotlib.figure.Figure`.
        pictures: what `prepare` returned, one for each run.

    Raises:
        PlotError: if the runs moved inputs in different norms.
    """
    if len({picture.norm for picture in pictures}) > 1:
        raise PlotError("one picture shows displacements in one norm, these are in two; draw them apart")
    narrow = figure.get_figwidth() < style.SIDE_BY_SIDE
    change = figure.subplots() if not _has_attacks(pictures) else None
    if change is None:
        accuracy, change = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        for index, picture in enumerate(pictures):
            if picture.accuracy is not None:
                _curve(accuracy, np.append(0.0, picture.epsilon), picture.accuracy, index)
        accuracy.set_ylim(0, 1.02)
        _label(accuracy, pictures, "accuracy under attack (upper bound)")
    for index, picture in enumerate(pictures):
        _curve(change, picture.epsilon, picture.change, index)
    change.set_ylim(bottom=0)
    _label(change, pictures, "relative change of the gradient")
    style.run_legend(figure, _labels(pictures))
    figure.suptitle(style.wrapped(_title(pictures), figure.get_figwidth(), TEXT + 0.5), fontsize=TEXT + 0.5)


def interactive(pictures: Sequence[RobustnessPicture]) -> plotly.graph_objects.Figure:
    """Return the same as a plotly figure.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, (picture, name) in enumerate(zip(pictures, _labels(pictures), strict=True)):
        look = style.look(index)
        shown = [("change of the gradient", picture.epsilon, picture.change)]
        if picture.accuracy is not None:
            shown.append(("accuracy", np.append(0.0, picture.epsilon), picture.accuracy))
        for quantity, x, curve in shown:
            figure.add_trace(
                go.Scatter(x=x, y=curve.values, name=f"{name}, {quantity}", mode="lines+markers",
                           yaxis="y" if quantity == "accuracy" else "y2",
                           line={"color": look.color, "dash": "solid" if quantity == "accuracy" else "dot"},
                           error_y={"type": "data", "array": _Z * curve.stderr})
            )  # fmt: skip
    figure.update_layout(
        title=_title(pictures), template="plotly_white", xaxis_title=_distance(pictures),
        yaxis={"title": "accuracy under attack (upper bound)", "range": [0, 1.02]},
        yaxis2={"title": "relative change of the gradient", "overlaying": "y", "side": "right", "rangemode": "tozero"},
    )  # fmt: skip
    return figure


def _curve(axes: Axes, x: np.ndarray, curve: Curve, index: int) -> None:
    look = style.look(index)
    axes.plot(
        x,
        curve.values,
        color=look.color,
        linestyle=look.line,
        marker=look.marker,
        markersize=3.5,
        linewidth=1.1,
    )
    half = _Z * np.where(np.isfinite(curve.stderr), curve.stderr, 0.0)
    axes.fill_between(
        x, curve.values - half, curve.values + half, color=look.color, alpha=style.BAND, linewidth=0
    )


def _label(axes: Axes, pictures: Sequence[RobustnessPicture], text: str) -> None:
    axes.set_xlim(left=0)
    axes.set_xlabel(_distance(pictures), fontsize=SMALL)
    axes.set_ylabel(text, fontsize=SMALL)
    style.dress(axes)


def _distance(pictures: Sequence[RobustnessPicture]) -> str:
    return f"ε, length of the displacement (norm {pictures[0].norm}, unit of the input)"


def _has_attacks(pictures: Sequence[RobustnessPicture]) -> bool:
    return any(picture.accuracy is not None for picture in pictures)


def _labels(pictures: Sequence[RobustnessPicture]) -> list[str]:
    names = [words.clipped(p.run) or f"run {i}" for i, p in enumerate(pictures, 1)]
    return names if len(set(names)) == len(names) else [f"{n} ({i})" for i, n in enumerate(names, 1)]


def _title(pictures: Sequence[RobustnessPicture]) -> str:
    text = "Robustness"
    if len(pictures) > 1:
        text += f", {len(pictures)} runs"
    elif pictures[0].run:
        text += f" of {pictures[0].run}"
    attacks = {picture.attack for picture in pictures if picture.accuracy is not None}
    return f"{text} ({attacks.pop()})" if len(attacks) == 1 else text
