"""Both ends of the spectrum with residual bars, on one axis for all runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from landscape.plots import PlotError, style, words
from landscape.plots.style import BLUE, GREY, TEXT
from landscape.plots.words import Subject

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.figure import Figure

    from landscape.results import Record

_ROW_HEIGHT = 0.42  # inches: the line of a run, and its numbers above it


@dataclass(frozen=True)
class SpectralNormPicture:
    """What a picture of the two ends of a spectrum shows.

    Attributes:
        subject: matrix, run and size.
        ends: the smallest and the largest eigenvalue, (2,).
        residuals: of each, within which an eigenvalue lies, (2,).
        converged: whether both residuals that were asked for were reached.
    """

    subject: Subject
    ends: np.ndarray
    residuals: np.ndarray
    converged: bool


def prepare(record: Record, name: str = "") -> SpectralNormPicture:
    """Turn stored ends into plain arrays.

    Args:
        record: the measurement.
        name: of the run, for the title.

    Raises:
        PlotError: if nothing is measured yet.
    """
    ends = ("eigenvalue_min", "eigenvalue_max")
    if not all(end in record and np.isfinite(record[end]) for end in ends):
        raise PlotError("no end of the spectrum is found yet; run `landscape measure` again to go on")
    return SpectralNormPicture(
        subject=words.subject(record, name),
        ends=np.array([float(record[end]) for end in ends]),
        residuals=np.array([float(record[f"{end}_residual_norm"]) for end in ends]),
        converged=bool(record["converged"]),
    )


def figure_size(pictures: Sequence[SpectralNormPicture], width: float) -> tuple[float, float]:
    """Return width and height in inches, with a line for each run."""
    narrow = width < style.SIDE_BY_SIDE
    return width, 0.95 + 0.15 * narrow + _ROW_HEIGHT * len(pictures)


def draw(figure: Figure, pictures: Sequence[SpectralNormPicture]) -> None:
    """Draw a line from the smallest to the largest eigenvalue for each run; hollow ends have not converged.

    Args:
        figure: a `matplotlib.figure.Figure`.
        pictures: what `prepare` returned, one for each run.
    """
    axes = figure.subplots()
    every = np.concatenate([picture.ends for picture in pictures])
    factor, unit = words.scale(every, pictures[0].subject.curvature)
    names = words.labels([picture.subject for picture in pictures])
    texts = [_numbers(picture) for picture in pictures]
    if len(pictures) > 1:
        texts = [f"{name}: {text}" for name, text in zip(names, texts, strict=True)]
    for row, picture in enumerate(pictures):
        ends = picture.ends * factor
        axes.plot(ends, [row, row], color=BLUE, linewidth=1.2, alpha=0.6, zorder=2)
        axes.errorbar(
            ends, [row, row], xerr=picture.residuals * factor, fmt="o", color=BLUE, markersize=4.2, elinewidth=0.9,
            capsize=2, markerfacecolor=BLUE if picture.converged else "white", zorder=3,
        )  # fmt: skip
        axes.annotate(
            texts[row], (0.01, row), (0, 4), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            va="bottom", fontsize=style.SMALL, bbox={"color": "white", "pad": 0.5},
        )  # fmt: skip
    axes.axvline(0, color=GREY, linewidth=0.6, zorder=1)
    low, high = min(0.0, every.min() * factor), max(0.0, every.max() * factor)
    room = 0.06 * ((high - low) or 1.0)
    axes.set_xlim(low - room, high + room)
    axes.set_yticks([])
    axes.set_ylim(len(pictures) - 0.6, -0.75)
    axes.set_xlabel(f"eigenvalue ({unit})", fontsize=TEXT)
    style.dress(axes)
    axes.spines["left"].set_visible(False)
    figure.suptitle(style.wrapped(_title(pictures), figure.get_figwidth(), TEXT + 0.5), fontsize=TEXT + 0.5)


def interactive(pictures: Sequence[SpectralNormPicture]) -> plotly.graph_objects.Figure:
    """Return the same as a plotly figure.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    names = words.labels([picture.subject for picture in pictures])
    for picture, name in zip(pictures, names, strict=True):
        symbol = "circle" if picture.converged else "circle-open"
        figure.add_trace(
            go.Scatter(x=picture.ends, y=[name, name], mode="lines+markers", name=name,
                       marker={"color": BLUE, "size": 9, "symbol": symbol}, line={"color": BLUE},
                       error_x={"type": "data", "array": picture.residuals})
        )  # fmt: skip
    figure.update_xaxes(title_text=f"eigenvalue ({pictures[0].subject.curvature})")
    figure.update_yaxes(autorange="reversed", automargin=True)
    height = 260 + 40 * len(pictures)
    figure.update_layout(title=_title(pictures), showlegend=False, template="plotly_white", height=height)
    return figure


def _numbers(picture: SpectralNormPicture) -> str:
    smallest, largest = picture.ends
    text = f"λ min {words.number(smallest)}, λ max {words.number(largest)}"
    return text if picture.converged else f"{text} (not converged)"


def _title(pictures: Sequence[SpectralNormPicture]) -> str:
    return words.title("Ends of the spectrum", [picture.subject for picture in pictures])
