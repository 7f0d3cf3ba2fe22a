"""The spectral density with its 95 % band and the outliers beyond the bulk, of one run or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape.plots import PlotError, style, words
from landscape.plots.style import GREY, PLOT_HEIGHT, SMALL, TEXT
from landscape.plots.words import Subject

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from landscape.results import Record

_Map = Callable[[np.ndarray], np.ndarray]
_DECADES = 6.0  # that a logarithmic axis of densities shows where the matrix's order is not known
_LABEL_HEIGHT = 0.5  # inches: the upright values of the outliers
_LABEL_DISTANCE = 0.125  # inches between two of them


@dataclass(frozen=True)
class DensityPicture:
    """What a picture of a spectral density shows.

    Attributes:
        subject: matrix, run and size.
        caption: probes, smoothing and outliers, in words.
        axis: "linear"; "log", where x is |λ| + ε; or "symlog", even in asinh(λ / 2ε) and signed.
        x_floor: ε of the logarithmic axes.
        reach: the largest |λ| that was found.
        x: eigenvalues, (x,).
        density: per unit of eigenvalue, or per decade, (x,).
        low: lower end of the 95 % band, (x,).
        high: upper end, (x,).
        floor: the smallest density worth drawing: a tenth of a single eigenvalue's peak.
        outliers: eigenvalues beyond the bulk, descending, (outliers,).
        bulk: its two ends; None where there is none apart from the outliers.
        width: σ of the smoothing, in the unit of x or in decades.
    """

    subject: Subject
    caption: str
    axis: str
    x_floor: float
    reach: float
    x: np.ndarray
    density: np.ndarray
    low: np.ndarray
    high: np.ndarray
    floor: float
    outliers: np.ndarray
    bulk: tuple[float, float] | None
    width: float

    @property
    def logarithmic(self) -> bool:
        """Whether the density is one per decade."""
        return self.axis != "linear"

    @property
    def places(self) -> np.ndarray:
        """Where the outliers stand on the axis."""
        return np.abs(self.outliers) + self.x_floor if self.axis == "log" else self.outliers

    @property
    def extent(self) -> tuple[float, float]:
        """What of the axis is worth showing: no tail of the kernel beyond a decade past what was found."""
        shown = self.x[self.high >= self.floor]
        if self.logarithmic:
            shown = shown[np.abs(shown) <= 10 * self.reach]
        ends = np.concatenate([shown, self.places])
        return float(ends.min()), float(ends.max())


def prepare(record: Record, name: str = "") -> DensityPicture:
    """Turn a stored density into plain arrays.

    Args:
        record: the measurement.
        name: of the run, for the title.

    Raises:
        PlotError: if nothing is measured yet.
    """
    axis = str(record.attrs.get("x_scale", "linear"))
    known = np.isfinite(record["density"]) if "density" in record else np.zeros(0, bool)
    if not np.any(known):
        raise PlotError("no density is measured yet; run `landscape measure` again to go on")
    if axis == "log":
        known &= record["x"] > 0
    x, density, low, high = (record[v][known] for v in ("x", "density", "density_low", "density_high"))
    subject, width = words.subject(record, name), float(record["width"])
    outliers = np.sort(record["outliers"])[::-1] if "outliers" in record else np.zeros(0)
    outliers = outliers[np.isfinite(outliers)]
    ends = [float(record[end]) if end in record else np.nan for end in ("bulk_low", "bulk_high")]
    parts = [record[v].ravel() for v in ("ritz_values", "atoms") if v in record]
    found = np.abs(np.concatenate([outliers, *parts]))
    unit = "decades" if axis != "linear" else subject.curvature
    return DensityPicture(
        subject=subject,
        caption=_caption(record, f"{words.number(width, 2)} {unit}", outliers),
        axis=axis,
        x_floor=float(record.attrs.get("x_floor", 0.0)) if axis != "linear" else 0.0,
        reach=float(np.nanmax(found, initial=0.0)) or np.inf,
        x=x,
        density=density,
        # where an error is not known no band is drawn
        low=np.where(np.isfinite(low), np.maximum(low, 0.0), density),
        high=np.where(np.isfinite(high), high, density),
        floor=_floor(density, subject.size, width),
        outliers=outliers,
        bulk=(ends[0], ends[1]) if np.all(np.isfinite(ends)) and ends[0] < ends[1] else None,
        width=width,
    )


def figure_size(pictures: Sequence[DensityPicture], width: float) -> tuple[float, float]:
    """Return width and height in inches; the bulk has a panel of its own beside or below."""
    narrow = width < style.SIDE_BY_SIDE
    rows = 2 if narrow and _bulk(pictures) else 1
    text = 0.55 + (0.35 if narrow else 0.0)
    labels = _LABEL_HEIGHT if len(pictures) == 1 and len(pictures[0].outliers) else 0.0
    return width, text + labels + style.legend_height(_legend(pictures), width) + rows * (PLOT_HEIGHT + 0.1)


def draw(figure: Figure, pictures: Sequence[DensityPicture]) -> None:
    """Draw the pictures into an empty figure: the whole spectrum, and its bulk on linear axes.

    Args:
        figure: a `matplotlib.figure.Figure`.
        pictures: what `prepare` returned, one for each run.

    Raises:
        PlotError: if their axes are of different kinds.
    """
    _require_one_scale(pictures)
    width, bulk = figure.get_figwidth(), _bulk(pictures)
    if bulk is None:
        whole = figure.subplots()
    elif width < style.SIDE_BY_SIDE:
        whole, inner = figure.subplots(2, 1)
    else:
        whole, inner = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.7, 1.0]})
    share = 0.78 if bulk is None or width < style.SIDE_BY_SIDE else 0.48
    draw_whole(whole, pictures, share * width)
    if bulk is not None:
        draw_bulk(inner, pictures, bulk)
    lines = [style.wrapped(line, width, TEXT) for line in _heading(pictures)]
    figure.suptitle("\n".join(lines), fontsize=TEXT)
    if len(pictures) > 1:
        style.run_legend(figure, _legend(pictures), markers=False)
    else:
        style.legend_below(figure, whole.get_legend_handles_labels()[0], _legend(pictures))


def draw_whole(axes: Axes, pictures: Sequence[DensityPicture], inches: float) -> None:
    """Draw the densities on a logarithmic axis, with a mark for each outlier.

    Args:
        axes: matplotlib's.
        pictures: one for each run.
        inches: about the width of the axes; the values of outliers that would overlap are left out.
    """
    ends = np.array([p.extent for p in pictures])
    logarithmic, curvature = pictures[0].logarithmic, pictures[0].subject.curvature
    factor, unit = (1.0, curvature) if logarithmic else words.scale(ends, curvature)
    for index, picture in enumerate(pictures):
        _draw_density(axes, picture, index, len(pictures), factor, 1.0)
    style.log_axis(axes, min(p.floor for p in pictures), 3 * max(float(p.high.max()) for p in pictures))
    low, high = float(ends.min()) * factor, float(ends.max()) * factor
    if pictures[0].axis == "log":
        style.log_axis(axes, low / 1.2, high * 1.2, "x")
    elif pictures[0].axis == "symlog":
        floor = _common_floor(pictures)
        style.asinh_axis(axes, floor, _with_room(low, high, floor), inches)
    else:
        axes.set_xlim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    _mark_outliers(axes, pictures, factor, inches)
    axes.set_xlabel(f"{_eigenvalue(pictures)} ({unit})", fontsize=TEXT)
    axes.set_ylabel(_density_label(pictures), fontsize=TEXT)
    style.dress(axes)


def draw_bulk(axes: Axes, pictures: Sequence[DensityPicture], bulk: tuple[float, float]) -> None:
    """Draw the densities between two eigenvalues on linear axes."""
    low, high = bulk
    subject = pictures[0].subject
    peak = max(float(p.high[(p.x >= low) & (p.x <= high)].max(initial=0.0)) for p in pictures)
    across, eigenvalue_unit = words.scale(np.array(bulk), subject.curvature)
    up, density_unit = words.scale(np.array([peak]), subject.density)
    for index, picture in enumerate(pictures):
        _draw_density(axes, picture, index, len(pictures), across, up)
    axes.set_xlim(low * across, high * across)
    axes.set_ylim(0, 1.08 * peak * up or 1.0)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(f"eigenvalue ({eigenvalue_unit})", fontsize=TEXT)
    axes.set_ylabel(f"density ({density_unit})", fontsize=TEXT)
    axes.set_title("bulk, linear axes", fontsize=TEXT)
    style.dress(axes)


def interactive(pictures: Sequence[DensityPicture]) -> plotly.graph_objects.Figure:
    """Return the same as a plotly figure, with a panel for the whole spectrum.

    Plotly has no signed logarithmic axis: there, asinh(λ / 2ε) is drawn, and the ticks say the eigenvalues.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
        PlotError: if their axes are of different kinds.
    """
    import plotly.graph_objects as go

    _require_one_scale(pictures)
    figure = go.Figure()
    signed, floor = pictures[0].axis == "symlog", _common_floor(pictures)

    def across(values: np.ndarray) -> np.ndarray:
        return np.arcsinh(values / (2 * floor)) if signed else values

    for index, (picture, label) in enumerate(zip(pictures, _labels(pictures), strict=True)):
        look = style.look(index)
        shared: dict[str, Any] = {"x": across(picture.x), "legendgroup": label}
        edge: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        # a band is a line that is filled down to the one before; zero has no place on a logarithmic axis
        figure.add_trace(
            go.Scatter(y=np.maximum(picture.low, picture.floor), showlegend=False, **edge, **shared)
        )
        figure.add_trace(go.Scatter(y=picture.high, fill="tonexty", name="95 % band",
                                    fillcolor=style.transparent(look.color), showlegend=len(pictures) == 1,
                                    **edge, **shared))  # fmt: skip
        figure.add_trace(go.Scatter(y=picture.density, name=label if len(pictures) > 1 else "density", mode="lines",
                                    customdata=picture.x, hovertemplate="%{customdata:.4g}: %{y:.4g}",
                                    line={"color": look.color, "dash": look.dash}, **shared))  # fmt: skip
        places = across(picture.places)
        figure.add_trace(
            go.Scatter(x=places, y=np.full(len(places), 2 * picture.high.max()), mode="markers", legendgroup=label,
                       name=f"outliers ({len(places)})", showlegend=len(pictures) == 1, text=picture.outliers,
                       hovertemplate="outlier %{text:.6g}", marker={"symbol": "triangle-down", "color": look.color})
        )  # fmt: skip
    heights = np.log10([min(p.floor for p in pictures), 3 * max(float(p.high.max()) for p in pictures)])
    figure.update_yaxes(
        type="log", range=list(heights), title_text=_density_label(pictures), exponentformat="power"
    )
    ends = np.array([p.extent for p in pictures])
    low, high = float(ends.min()), float(ends.max())
    figure.update_xaxes(type="log" if pictures[0].axis == "log" else "linear",
                        title_text=f"{_eigenvalue(pictures)} ({pictures[0].subject.curvature})")  # fmt: skip
    if signed:
        limits = across(np.array(_with_room(low, high, floor)))
        ticks = np.array(style.asinh_ticks(floor, (low, high), 7.0))
        names = [words.number(tick, 1) for tick in ticks]
        figure.update_xaxes(range=list(limits), tickvals=across(ticks), ticktext=names)
    figure.update_layout(title="<br>".join(_heading(pictures)), template="plotly_white", height=500)
    return figure


def _draw_density(
    axes: Axes, picture: DensityPicture, index: int, runs: int, across: float, up: float
) -> None:
    x, look = picture.x * across, style.look(index)
    axes.plot(
        x,
        picture.density * up,
        color=look.color,
        linestyle=look.line,
        linewidth=style.behind(1.1, index, runs),
        zorder=3,
        label="density",
    )
    axes.fill_between(x, picture.low * up, picture.high * up, color=look.color, alpha=style.BAND, linewidth=0,
                      zorder=2, label="95 % band")  # fmt: skip


def _mark_outliers(axes: Axes, pictures: Sequence[DensityPicture], factor: float, inches: float) -> None:
    """Put a triangle above the axes for each outlier, and the value of those of a single run above it."""
    across = axes.get_xaxis_transform()
    for index, picture in enumerate(pictures):
        if not len(picture.outliers):
            continue
        look = style.look(index)
        height = 1.02 + 0.045 * (len(pictures) - 1 - index)
        axes.plot(picture.places * factor, np.full(len(picture.outliers), height), transform=across, marker="v",
                  markersize=3.2, linestyle="none", color=look.color, clip_on=False,
                  label=f"outliers ({len(picture.outliers)})")  # fmt: skip
    if len(pictures) > 1:
        return
    for value, place, shifted in label_places(pictures[0], axes.get_xlim(), factor, inches):
        axes.plot([place, shifted], [1.04, 1.075], transform=across, color=GREY, linewidth=0.5, clip_on=False)
        axes.annotate(words.number(value * factor), (shifted, 1.075), (0, 1.5), xycoords=across, rotation=90,
                      ha="center", va="bottom", textcoords="offset points", fontsize=SMALL,
                      annotation_clip=False)  # fmt: skip


def label_places(
    picture: DensityPicture, limits: tuple[float, float], factor: float, inches: float
) -> list[tuple[float, float, float]]:
    """Return value, place and place of the label for the outermost outliers, as many as have room.

    Args:
        picture: of one run.
        limits: of the axis.
        factor: from eigenvalues to what the axis shows.
        inches: its length.
    """
    most = int(inches / _LABEL_DISTANCE)
    shown = np.argsort(-np.abs(picture.outliers), kind="stable")[:most]
    shown = shown[np.argsort(picture.places[shown], kind="stable")]
    values, places = picture.outliers[shown], picture.places[shown] * factor
    to_axis, back = _coordinates(picture)
    low, high = to_axis(np.array(limits))
    per_inch = (high - low) / inches
    shifted = low + per_inch * style.spread((to_axis(places) - low) / per_inch, _LABEL_DISTANCE, inches)
    return list(zip(values.tolist(), places.tolist(), back(shifted).tolist(), strict=True))


def _coordinates(picture: DensityPicture) -> tuple[_Map, _Map]:
    """Return the map from eigenvalues to lengths along the axis, and back."""
    scale = 2 * picture.x_floor
    if picture.axis == "symlog":
        return lambda x: np.arcsinh(x / scale), lambda u: scale * np.sinh(u)
    if picture.axis == "log":
        return np.log10, lambda u: np.asarray(10.0**u)
    return np.asarray, np.asarray


def _common_floor(pictures: Sequence[DensityPicture]) -> float:
    """Return ε of the axis; beyond the larger one all densities per decade agree with it."""
    return max(picture.x_floor for picture in pictures)


def _with_room(low: float, high: float, floor: float) -> tuple[float, float]:
    """Return the limits of a signed axis, zero between them and a little room at the ends."""
    ends = np.arcsinh(np.array([min(low, -floor), max(high, floor)]) / (2 * floor))
    room = 0.02 * (ends[1] - ends[0])
    first, last = 2 * floor * np.sinh(ends + np.array([-room, room]))
    return float(first), float(last)


def _eigenvalue(pictures: Sequence[DensityPicture]) -> str:
    return "|eigenvalue|" if pictures[0].axis == "log" else "eigenvalue"


def _require_one_scale(pictures: Sequence[DensityPicture]) -> None:
    kinds = {"linear": "linear", "log": "logarithmic", "symlog": "signed logarithmic"}
    if len(found := sorted({kinds[picture.axis] for picture in pictures})) > 1:
        raise PlotError(
            f"these densities are over {' and '.join(found)} axes; draw those of one kind together"
        )


def _bulk(pictures: Sequence[DensityPicture]) -> tuple[float, float] | None:
    """Return what the panel of the bulk shows: the bulks of all runs, with their smoothed edges."""
    found = [(*p.bulk, p.width) for p in pictures if p.bulk and len(p.outliers) and not p.logarithmic]
    if not found:
        return None
    return min(low - 3 * width for low, _, width in found), max(high + 3 * width for _, high, width in found)


def _floor(density: np.ndarray, size: int | None, width: float) -> float:
    top = float(density.max())
    single = 1.0 / (size * width * np.sqrt(2 * np.pi)) if size and width > 0 else 0.0
    # one eigenvalue's peak and a decade below, in no less than three decades and no more than ten
    return float(np.clip(0.1 * single, 1e-10 * top, 1e-3 * top)) if single else top * 10.0**-_DECADES


def _density_label(pictures: Sequence[DensityPicture]) -> str:
    return "density per decade" if pictures[0].logarithmic else f"density ({pictures[0].subject.density})"


def _heading(pictures: Sequence[DensityPicture]) -> list[str]:
    """Return the lines above the panels: what is shown, and how it was smoothed."""
    title = words.title("Spectral density", [picture.subject for picture in pictures])
    captions = sorted({picture.caption for picture in pictures})
    return [title, captions[0] if len(captions) == 1 else "95 % bands; " + _widths(pictures)]


def _widths(pictures: Sequence[DensityPicture]) -> str:
    widths = sorted(picture.width for picture in pictures)
    unit = "decades" if pictures[0].logarithmic else pictures[0].subject.curvature
    span = words.number(widths[0], 2) + (
        f" to {words.number(widths[-1], 2)}" if widths[0] < widths[-1] else ""
    )
    return "smoothed with " + words.unbroken(f"σ = {span} {unit}")


def _caption(record: Record, width: str, outliers: np.ndarray) -> str:
    """Return for example `8 probes of 100 nodes; Gaussian, σ = 0.011 loss / parameter²; 9 outliers`."""
    parts = []
    if "ritz_values" in record:
        probes, nodes = record["ritz_values"].shape
        parts.append(f"{probes} probe{'s' * (probes > 1)} of {nodes} nodes")
    smoothing = record.attrs.get("smoothing", "smoothed")
    parts += [f"{smoothing}, {words.unbroken(f'σ = {width}')}", words.unbroken(_count(len(outliers)))]
    text = "; ".join(parts)
    return text if record.attrs.get("complete", True) else f"{text} (not finished)"


def _legend(pictures: Sequence[DensityPicture]) -> list[str]:
    """Return the entries of the legend: the parts of one curve, or the runs."""
    outliers = len(pictures[0].outliers)
    parts = ["density", "95 % band", *([f"outliers ({outliers})"] if outliers else [])]
    return _labels(pictures) if len(pictures) > 1 else parts


def _count(outliers: int) -> str:
    return f"{outliers or 'no'} outlier{'s' * (outliers != 1)}"


def _labels(pictures: Sequence[DensityPicture]) -> list[str]:
    names = words.labels([picture.subject for picture in pictures])
    return [f"{name}, {_count(len(p.outliers))}" for name, p in zip(names, pictures, strict=True)]
