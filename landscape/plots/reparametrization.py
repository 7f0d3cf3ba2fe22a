"""Measures along the α-orbit, each divided by its value at θ, with its verdict; one panel for each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from landscape.plots import PlotError, style, words
from landscape.plots.style import GREY, SMALL, TEXT

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from landscape.results import Record

_PANEL, _ROW = 2.3, 0.16  # inches: a panel, and a line of its legend


@dataclass(frozen=True)
class ReparametrizationPicture:
    """What a picture of measures along α shows.

    Attributes:
        run: its name.
        layers: that were scaled.
        alpha: factors, (k,).
        measures: names.
        ratios: value over that at θ, (measure, k); nan where a measure is not defined.
        predicted: the same from the Hessian at θ, nan where that is not known.
        errors: standard errors of the ratios.
        verdicts: in words, with the exponent.
        change: the largest relative change of the function.
    """

    run: str
    layers: str
    alpha: np.ndarray
    measures: list[str]
    ratios: np.ndarray
    predicted: np.ndarray
    errors: np.ndarray
    verdicts: list[str]
    change: float


def prepare(record: Record, name: str = "") -> ReparametrizationPicture:
    """Turn stored values into plain arrays.

    Args:
        record: the measurement.
        name: of the run, for the title.

    Raises:
        PlotError: if nothing is measured yet.
    """
    if "value_at" not in record or not record["done"].any():
        raise PlotError("no α is measured yet; run `landscape measure` again to go on")
    done = record["done"]
    order = np.argsort(record["alpha"][done])
    reference, logarithmic = record["reference"], record["logarithmic"]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios, predicted, errors = (
            (record[key][done][order] / scale).T
            for key, scale in (
                ("value_at", reference),
                ("predicted_at", reference),
                ("stderr_at", abs(reference)),
            )
        )
        grown = np.exp((record["value_at"][done][order] - reference).T)
    ratios[logarithmic], predicted[logarithmic] = grown[logarithmic], np.nan
    errors[logarithmic] = (ratios * record["stderr_at"][done][order].T)[logarithmic]
    count = len(reference)
    found = record["verdict"].tolist() if "verdict" in record else ["not finished"] * count
    powers = record["exponent"].tolist() if "exponent" in record else [np.nan] * count
    return ReparametrizationPicture(
        run=name or str(record.attrs.get("model") or ""),
        layers=str(record.attrs.get("layers_moved", "")),
        alpha=record["alpha"][done][order],
        measures=[str(m) for m in record["measure"]],
        ratios=ratios,
        predicted=predicted,
        errors=errors,
        verdicts=[f"∝ α^{p:g}" if v == "covariant" else str(v) for v, p in zip(found, powers, strict=True)],
        change=float(record["function_change"][done].max()),
    )


def figure_size(pictures: Sequence[ReparametrizationPicture], width: float) -> tuple[float, float]:
    """Return width and height in inches, with a panel for each run."""
    rows = max(len(picture.measures) for picture in pictures)
    beside = width >= style.SIDE_BY_SIDE
    return width, 0.4 + len(pictures) * (_PANEL + (0 if beside else _ROW * rows) + 0.3)


def draw(figure: Figure, pictures: Sequence[ReparametrizationPicture]) -> None:
    """Draw each measure's line over α; a flat one survives, any other says nothing about the function alone.

    Args:
        figure: a `matplotlib.figure.Figure`.
        pictures: what `prepare` returned, one for each run.
    """
    rows = figure.subplots(len(pictures), squeeze=False)[:, 0]
    for axes, picture in zip(rows, pictures, strict=True):
        _panel(axes, picture, beside=figure.get_figwidth() >= style.SIDE_BY_SIDE)


def _panel(axes: Axes, picture: ReparametrizationPicture, *, beside: bool) -> None:
    drawn = [r[np.isfinite(r) & (r > 0)] for r in (*picture.ratios, *picture.predicted)]
    every = np.concatenate([*drawn, [0.5, 2.0]])
    axes.axhline(1.0, color=GREY, linewidth=0.6, zorder=1)
    for i, measure in enumerate(picture.measures):
        look = style.look(i)
        ratio, expected = picture.ratios[i], picture.predicted[i]
        axes.plot(
            picture.alpha, np.where(ratio > 0, ratio, np.nan), look.line, marker=look.marker, markersize=3.5,
            linewidth=1.2, color=look.color, label=f"{measure}: {picture.verdicts[i]}", zorder=3,
        )  # fmt: skip
        axes.errorbar(
            picture.alpha, ratio, yerr=1.96 * picture.errors[i], fmt="none", ecolor=look.color, elinewidth=0.8
        )
        axes.plot(
            picture.alpha, expected, "o", markersize=7.5, markerfacecolor="none", markeredgewidth=0.8,
            color=look.color, zorder=2,
        )  # fmt: skip
    axes.set_xscale("log")
    style.log_axis(axes, every.min() / 1.6, every.max() * 1.6)
    axes.set_xlabel("α: incoming weights × α, outgoing ÷ α", fontsize=TEXT)
    axes.set_ylabel("value / value at θ", fontsize=TEXT)
    if np.isfinite(picture.predicted).any():
        axes.plot([], [], "o", markersize=7.5, markerfacecolor="none", markeredgewidth=0.8, color=GREY,
                  label="predicted from the Hessian at θ")  # fmt: skip
    if beside:
        axes.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    else:
        axes.legend(fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.25))
    style.dress(axes)
    axes.set_title(_title(picture), fontsize=TEXT, loc="left")


def interactive(pictures: Sequence[ReparametrizationPicture]) -> plotly.graph_objects.Figure:
    """Return the same as a plotly figure.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for picture in pictures:
        for i, measure in enumerate(picture.measures):
            look = style.look(i)
            label = f"{measure}: {picture.verdicts[i]}"
            figure.add_trace(
                go.Scatter(
                    x=picture.alpha, y=picture.ratios[i], mode="lines+markers",
                    name=f"{picture.run} {label}" if len(pictures) > 1 else label,
                    line={"color": look.color, "dash": look.dash},
                )
            )  # fmt: skip
    figure.update_xaxes(title_text="α: incoming weights × α, outgoing ÷ α", type="log")
    figure.update_yaxes(title_text="value / value at θ", type="log")
    title = _title(pictures[0]) if len(pictures) == 1 else "Measures along the α-orbit"
    figure.update_layout(title=title, template="plotly_white")
    return figure


def _title(picture: ReparametrizationPicture) -> str:
    run = f"{picture.run}: " if picture.run else ""
    layers = words.clipped(picture.layers)
    return f"{run}α-scale of layer {layers}; the function changes by at most {picture.change:.0e}"
