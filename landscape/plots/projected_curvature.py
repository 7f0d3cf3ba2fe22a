"""Principal curvatures of random planes as histograms, the share of saddles, and the plane of the Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape.plots import PlotError, style, words
from landscape.plots.style import BLUE, GREY, SMALL, TEXT, VERMILLION
from landscape.plots.words import Subject

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from landscape.results import Record

_ROW_HEIGHT, _MOST_BINS = 1.35, 60
_COLORS, _NAMES = (BLUE, VERMILLION), ("κ₋", "κ₊")
_LEGEND = (*_NAMES, "expected: t ± √(π/2) F")
_NEGLIGIBLE = 1e-4  # a share of saddles that is told as none


@dataclass(frozen=True)
class ProjectedCurvaturePicture:
    """What a picture of curvatures in random planes shows.

    Attributes:
        subject: matrix, run and size.
        kappa: κ₋ and κ₊ of the planes that are measured, (planes, 2).
        expected: t ∓ √(π/2) F from the estimates, the means of κ∓ for many comparable eigenvalues, (2,).
        share: of planes that are saddles.
        interval: its 95 % interval, (2,).
        limit: the share for many comparable eigenvalues.
        dominated: whether few eigenvalues dominate, so that expected and limit are off.
        hessian: curvatures in the plane of the extremal eigenvectors, of length √n like the others, (2,); None
            where it was not asked for.
        result: the trace in words.
    """

    subject: Subject
    kappa: np.ndarray
    expected: np.ndarray
    share: float
    interval: np.ndarray
    limit: float
    dominated: bool
    hessian: np.ndarray | None
    result: str

    @property
    def told(self) -> str:
        """The share of saddles against its limit, in words."""
        low, high = 100 * self.interval
        limit = f"limit {100 * self.limit:.3g} %" if self.limit >= _NEGLIGIBLE else "limit < 0.01 %"
        limit = "few eigenvalues dominate" if self.dominated else limit
        return f"saddles {100 * self.share:.3g} % ({low:.3g} to {high:.3g} %); {limit}"


def prepare(record: Record, name: str = "") -> ProjectedCurvaturePicture:
    """Turn stored curvatures into plain arrays.

    Args:
        record: the measurement.
        name: of the run, for the title.

    Raises:
        PlotError: if nothing is measured yet.
    """
    kappa = record["kappa"] if "kappa" in record else np.full((0, 2), np.nan)
    kappa = kappa[np.isfinite(kappa).all(axis=1)]
    if len(kappa) < 2:
        raise PlotError("fewer than two planes are measured yet; run `landscape measure` again to go on")
    subject = words.subject(record, name)
    trace, norm = float(record["trace"]), float(record["frobenius_norm"])
    result = f"trace = {words.plus_minus(trace, float(record['trace_stderr']))}, {len(kappa)} planes"
    return ProjectedCurvaturePicture(
        subject=subject,
        kappa=kappa,
        expected=trace + np.sqrt(np.pi / 2) * norm * np.array([-1.0, 1.0]),
        share=float(record["saddle_fraction"]),
        interval=np.array([float(record["saddle_fraction_low"]), float(record["saddle_fraction_high"])]),
        limit=float(record["saddle_limit"]),
        dominated=bool(record["dominated"]),
        hessian=record["hessian_kappa"] * record.attrs["order"] if "hessian_kappa" in record else None,
        result=result if record.attrs.get("complete", True) else f"{result} (not finished)",
    )


def figure_size(pictures: Sequence[ProjectedCurvaturePicture], width: float) -> tuple[float, float]:
    """Return width and height in inches, with a panel for each run."""
    legend = style.legend_height(_legend(pictures), width)
    return width, 0.9 + legend + (_ROW_HEIGHT + 0.25 * (width < style.SIDE_BY_SIDE)) * len(pictures)


def draw(figure: Figure, pictures: Sequence[ProjectedCurvaturePicture]) -> None:
    """Draw a panel of histograms for each run, one above the other on one axis.

    Where the Hessian's own plane has curvatures beyond the histograms, arrows point to them.

    Args:
        figure: a `matplotlib.figure.Figure`.
        pictures: what `prepare` returned, one for each run.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels = figure.subplots(len(pictures), 1, squeeze=False)[:, 0]
    factor, unit = words.scale(_every(pictures), pictures[0].subject.curvature)
    low, high = limits(pictures)
    names = words.labels([picture.subject for picture in pictures])
    column = figure.get_figwidth() < style.SIDE_BY_SIDE
    for axes, picture, name in zip(panels, pictures, names, strict=True):
        draw_planes(axes, picture, (low, high), factor)
        named = f"{name}: {picture.result}" if len(pictures) > 1 else picture.result
        lines = [named, picture.told] if column else [f"{named}; {picture.told}"]
        width = figure.get_figwidth() * 0.95
        text = "\n".join(style.wrapped(line, width, SMALL) for line in lines)
        axes.set_title(text, fontsize=SMALL)
        axes.locator_params(axis="x", nbins=5 if column else 9)
        axes.set_xlim(low * factor, high * factor)
        if axes is not panels[-1]:
            shown = axes.get_xticks()
            axes.set_xticks(shown[(shown >= low * factor) & (shown <= high * factor)], [])
    label = f"curvature, directions of length √n ({unit})"
    panels[-1].set_xlabel(style.wrapped(label, figure.get_figwidth() * 0.8, TEXT), fontsize=TEXT)
    handles: list[Any] = [Patch(color=color, alpha=0.6) for color in _COLORS]
    handles.append(Line2D([], [], color="black", linestyle="--", linewidth=0.9))
    handles.append(Line2D([], [], color=GREY, marker="D", markersize=4, linestyle="none"))
    style.legend_below(figure, handles[: len(_legend(pictures))], _legend(pictures))
    title = words.title("Curvature in random planes", [picture.subject for picture in pictures])
    figure.suptitle(style.wrapped(title, figure.get_figwidth(), TEXT + 0.5), fontsize=TEXT + 0.5)


def draw_planes(
    axes: Axes, picture: ProjectedCurvaturePicture, ends: tuple[float, float], factor: float = 1.0
) -> None:
    """Draw histograms of κ₋ and κ₊, their expectation, and where the plane of the Hessian lies."""
    bins = bin_edges(picture, ends)
    for side, color in enumerate(_COLORS):
        axes.hist(
            picture.kappa[:, side] * factor, bins=list(bins * factor), color=color, alpha=0.6, linewidth=0
        )
        axes.axvline(picture.expected[side] * factor, color="black", linestyle="--", linewidth=0.9)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_ylabel("planes", fontsize=TEXT)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.35)
    _mark(axes, picture, ends, factor)
    style.dress(axes)


def bin_edges(picture: ProjectedCurvaturePicture, ends: tuple[float, float]) -> np.ndarray:
    """Return edges of equal bins over the axis, as wide as Freedman & Diaconis (1981) would have them."""
    quartiles = np.percentile(picture.kappa, [25, 75], axis=0)
    width = 2 * float((quartiles[1] - quartiles[0]).max()) / len(picture.kappa) ** (1 / 3)
    low, high = ends
    count = int(np.clip((high - low) / width if width > 0 else 1, 20, _MOST_BINS))
    return np.linspace(low, high, count + 1)


def limits(pictures: Sequence[ProjectedCurvaturePicture]) -> tuple[float, float]:
    """Return the ends of the axis: all curvatures and expectations, and zero, with some room."""
    every = _every(pictures)
    low, high = min(0.0, float(every.min())), max(0.0, float(every.max()))
    room = 0.06 * ((high - low) or 1.0)
    return low - room, high + room


def interactive(pictures: Sequence[ProjectedCurvaturePicture]) -> plotly.graph_objects.Figure:
    """Return the same as a plotly figure.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    names = words.labels([picture.subject for picture in pictures])
    headings = [
        ", ".join([name] * (len(pictures) > 1) + [picture.result, picture.told])
        for name, picture in zip(names, pictures, strict=True)
    ]
    figure = make_subplots(rows=len(pictures), cols=1, shared_xaxes=True, subplot_titles=headings)
    for row, picture in enumerate(pictures, start=1):
        bins = bin_edges(picture, limits(pictures))
        size = {"start": bins[0], "end": bins[-1], "size": bins[1] - bins[0]}
        for side, (name, color) in enumerate(zip(_NAMES, _COLORS, strict=True)):
            figure.add_trace(
                go.Histogram(x=picture.kappa[:, side], xbins=size, name=name, legendgroup=name, opacity=0.6,
                             showlegend=row == 1, marker={"color": color}),
                row=row, col=1,
            )  # fmt: skip
            figure.add_vline(x=picture.expected[side], line={"dash": "dash", "width": 1}, row=row, col=1)
        if picture.hessian is not None:
            figure.add_trace(
                go.Scatter(x=picture.hessian, y=[0, 0], mode="markers", name="Hessian plane",
                           showlegend=row == 1, legendgroup="Hessian plane",
                           marker={"color": GREY, "symbol": "diamond", "size": 9}),
                row=row, col=1,
            )  # fmt: skip
    unit = pictures[0].subject.curvature
    figure.update_xaxes(title_text=f"curvature, directions of length √n ({unit})", row=len(pictures), col=1)
    figure.update_yaxes(title_text="planes")
    title = words.title("Curvature in random planes", [picture.subject for picture in pictures])
    height = 180 + 230 * len(pictures)
    figure.update_layout(title=title, barmode="overlay", template="plotly_white", height=height)
    return figure


def _mark(axes: Axes, picture: ProjectedCurvaturePicture, ends: tuple[float, float], factor: float) -> None:
    """Mark the Hessian's plane where it lies, or point to it with an arrow at the edge."""
    for value in _inside(picture, ends):
        axes.plot([value * factor], [0], marker="D", color=GREY, markersize=4.5, clip_on=False, zorder=5)
    for value in [] if picture.hessian is None else picture.hessian:
        if ends[0] <= value <= ends[1]:
            continue
        left, text = value < ends[0], f"Hessian plane {words.number(float(value))}"
        axes.annotate(
            f"← {text}" if left else f"{text} →", (0.005 if left else 0.995, 0.97), xycoords="axes fraction",
            ha="left" if left else "right", va="top", fontsize=SMALL, bbox={"color": "white", "pad": 0.8},
        )  # fmt: skip


def _inside(picture: ProjectedCurvaturePicture, ends: tuple[float, float]) -> list[float]:
    """The curvatures of the Hessian's plane that lie on the axis."""
    return [] if picture.hessian is None else [float(v) for v in picture.hessian if ends[0] <= v <= ends[1]]


def _legend(pictures: Sequence[ProjectedCurvaturePicture]) -> list[str]:
    ends = limits(pictures)
    return [*_LEGEND, *(["Hessian plane"] if any(_inside(picture, ends) for picture in pictures) else [])]


def _every(pictures: Sequence[ProjectedCurvaturePicture]) -> np.ndarray:
    return np.concatenate([np.append(picture.kappa.ravel(), picture.expected) for picture in pictures])
