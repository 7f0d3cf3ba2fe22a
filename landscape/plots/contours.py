"""Planes: filled contours, a surface in space, and a map of curvature, on one scale of losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape.plots import style, words
from landscape.plots.style import SMALL, TEXT, VERMILLION

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from landscape.plots.surface import SurfacePicture

_COLOURS = "viridis"  # perceptually uniform (Smith & van der Walt)
_LEVELS = 16
_MASK = "#b0b0b0"
_PANEL = 0.86  # height of a panel over its width


def height(pictures: Sequence[SurfacePicture], width: float) -> float:
    """Return inches for the panels."""
    rows, columns = _shape(pictures, width)
    return rows * (_PANEL * min(width / columns, 3.6) + 0.25)


def draw(figure: Figure, pictures: Sequence[SurfacePicture]) -> None:
    """Draw contours of each picture; of a single one the surface in space too."""
    rows, columns = _shape(pictures, figure.get_figwidth())
    levels, norm = _scale(pictures)
    panels: list[Axes] = []
    for i, picture in enumerate(pictures):
        axes = figure.add_subplot(rows, columns, i + 1)
        _contours(axes, picture, levels, norm)
        if len(pictures) > 1:
            axes.set_title(_names(pictures)[i], fontsize=TEXT)
        panels.append(axes)
    _bar(figure, panels, pictures, levels, norm)
    if len(pictures) == 1:
        _space(figure.add_subplot(rows, columns, 2, projection="3d"), pictures[0], norm)
        if len(pictures[0].curvature):
            _, _, high, low = pictures[0].curvature.T
            titles = {
                "largest Hessian eigenvalue": high,
                "smallest / |largest| Hessian eigenvalue": low / np.abs(high),
            }
            for place, (title, values) in enumerate(titles.items(), start=3):
                _curvature(figure, figure.add_subplot(rows, columns, place), pictures[0], values, title)


def interactive(pictures: Sequence[SurfacePicture]) -> plotly.graph_objects.Figure:
    """Return plotly surfaces side by side, on one scale of colours."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    names = _names(pictures) if len(pictures) > 1 else None
    specs = [[{"type": "surface"}] * len(pictures)]
    figure = make_subplots(rows=1, cols=len(pictures), specs=specs, subplot_titles=names)
    every = np.concatenate([shown(p, p.finite) for p in pictures])
    for column, picture in enumerate(pictures, start=1):
        x, y = picture.axes
        z = shown(picture, picture.loss)
        bar = {"title": _quantity(picture)}
        figure.add_trace(
            go.Surface(x=x, y=y, z=np.where(np.isfinite(z), z, np.nan), customdata=picture.loss, colorscale=_COLOURS,
                       cmin=float(every.min()), cmax=float(every.max()), showscale=column == 1, colorbar=bar,
                       hovertemplate="x %{x:.4g}<br>y %{y:.4g}<br>loss %{customdata:.6g}<extra></extra>"),
            row=1, col=column,
        )  # fmt: skip
        if len(picture.path):
            px, py = picture.path.T
            pz = _along(picture, picture.path)
            figure.add_trace(
                go.Scatter3d(x=px, y=py, z=pz, mode="lines+markers", name="training path", showlegend=False,
                             line={"color": VERMILLION, "width": 4}, marker={"size": 3, "color": VERMILLION}),
                row=1, col=column,
            )  # fmt: skip
        scene = "scene" if column == 1 else f"scene{column}"
        titles = {
            "xaxis_title": picture.labels[0],
            "yaxis_title": picture.labels[1],
            "zaxis_title": _quantity(picture),
        }
        figure.update_layout({scene: titles})
    figure.update_layout(height=700)
    return figure


def shown(picture: SurfacePicture, losses: np.ndarray) -> np.ndarray:
    """Losses as heights: on a logarithmic scale their logarithms to base 10."""
    if not picture.logarithmic:
        return losses
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log10(losses))


# --- panels -------------------------------------------------------------------------------------------


def _shape(pictures: Sequence[SurfacePicture], width: float) -> tuple[int, int]:
    """Rows and columns of panels."""
    count = len(pictures) if len(pictures) > 1 else 2 + 2 * bool(len(pictures[0].curvature))
    most = 1 if width < style.SIDE_BY_SIDE else 2 if count == 4 else 3
    columns = min(count, most)
    return -(-count // columns), columns


def _contours(axes: Axes, picture: SurfacePicture, levels: np.ndarray, norm: Any) -> None:
    x, y = picture.axes
    masked = ~np.isfinite(picture.loss)
    if masked.any():
        axes.pcolormesh(x, y, _broken(masked & picture.measured), cmap=_one_colour(), zorder=0)
    if len(picture.refined):
        fine = np.isfinite(picture.loss)
        xs, ys = (part[fine] for part in np.meshgrid(x, y))
        px, py, pz = (
            np.concatenate([a, b])
            for a, b in zip((xs, ys, picture.loss[fine]), picture.refined.T, strict=True)
        )
        axes.tricontourf(px, py, pz, levels=levels, cmap=_COLOURS, norm=norm, extend="both")
        axes.tricontour(px, py, pz, levels=levels, colors="white", linewidths=0.3)
    else:
        loss = np.ma.masked_where(masked, picture.loss)
        axes.contourf(x, y, loss, levels=levels, cmap=_COLOURS, norm=norm, extend="both")
        axes.contour(x, y, loss, levels=levels, colors="white", linewidths=0.3)
    if len(picture.path):
        axes.plot(*picture.path.T, color=VERMILLION, linewidth=1.0, marker="o", markersize=2.4, zorder=3)
    if x[0] <= 0 <= x[-1] and y[0] <= 0 <= y[-1]:
        axes.plot(0, 0, marker="+", color="white", markersize=7, markeredgewidth=1.2, zorder=4)
    axes.plot(
        *picture.lowest,
        marker="o",
        markerfacecolor="none",
        color="white",
        markersize=6,
        markeredgewidth=1.0,
        zorder=4,
        clip_on=False,
    )
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])
    _label(axes, picture)
    style.dress(axes)


def _broken(points: np.ndarray) -> Any:
    """The cells with such a corner, which contours leave out."""
    cells = points[1:, 1:] | points[1:, :-1] | points[:-1, 1:] | points[:-1, :-1]
    return np.ma.masked_where(~cells, np.ones(cells.shape))


def _label(axes: Axes, picture: SurfacePicture) -> None:
    across, up = (label.replace(" (unit", "\n(unit") for label in picture.labels)
    axes.set_xlabel(across, fontsize=SMALL)
    axes.set_ylabel(up, fontsize=SMALL)
    axes.locator_params(nbins=5)


def _space(axes: Any, picture: SurfacePicture, norm: Any) -> None:
    x, y = np.meshgrid(*picture.axes)
    z = np.where(np.isfinite(picture.loss), shown(picture, picture.loss), np.nan)
    colours = _map()(norm(np.where(np.isfinite(picture.loss), picture.loss, picture.finite.min())))
    colours[~np.isfinite(z)] = 0.0
    axes.plot_surface(
        x, y, z, facecolors=colours, rcount=80, ccount=80, linewidth=0, antialiased=False, shade=False
    )
    axes.view_init(elev=32, azim=-55)
    axes.tick_params(labelsize=SMALL, pad=-3)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(_few_ticks())
    axes.set_xlabel("x", fontsize=SMALL, labelpad=-8)
    axes.set_ylabel("y", fontsize=SMALL, labelpad=-8)
    axes.set_title(_quantity(picture), fontsize=SMALL, y=0.97)
    axes.set_box_aspect((1, 1, 0.7), zoom=0.95)


def _curvature(figure: Figure, axes: Axes, picture: SurfacePicture, values: np.ndarray, title: str) -> None:
    x, y, *_ = picture.curvature.T
    across, up = np.unique(x), np.unique(y)
    drawn = axes.pcolormesh(
        across, up, values.reshape(len(up), len(across)), cmap=_COLOURS, shading="nearest"
    )
    axes.set_xlim(x.min(), x.max())
    axes.set_ylim(y.min(), y.max())
    bar = figure.colorbar(drawn, ax=axes, shrink=0.85, pad=0.015, aspect=28)
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    bar.outline.set_linewidth(0.4)
    axes.set_title(title, fontsize=SMALL)
    _label(axes, picture)
    style.dress(axes)


# --- scale --------------------------------------------------------------------------------------------


def _scale(pictures: Sequence[SurfacePicture]) -> tuple[np.ndarray, Any]:
    """The levels and the colours of all panels."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    every = np.concatenate([picture.finite for picture in pictures])
    low, high = float(every.min()), float(every.max())
    if not low < high:
        low, high = low - 0.5 * (abs(low) or 1.0), low + 0.5 * (abs(low) or 1.0)
    if all(picture.logarithmic for picture in pictures):
        return np.geomspace(low, high, _LEVELS + 1), LogNorm(low, high)
    levels = np.asarray(MaxNLocator(_LEVELS, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    return levels, Normalize(levels[0], levels[-1])


def _bar(
    figure: Figure, panels: Sequence[Axes], pictures: Sequence[SurfacePicture], levels: np.ndarray, norm: Any
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    drawn = ScalarMappable(norm, _COLOURS)
    bar = figure.colorbar(drawn, ax=list(panels), shrink=0.85, pad=0.015, aspect=28)
    if all(picture.logarithmic for picture in pictures):
        few = levels[-1] / levels[0] < 1e4
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        if few:
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    bar.outline.set_linewidth(0.4)
    bar.set_label("loss", fontsize=SMALL)


def _quantity(picture: SurfacePicture) -> str:
    return "log₁₀ loss" if picture.logarithmic else "loss"


def _names(pictures: Sequence[SurfacePicture]) -> list[str]:
    return words.labels([picture.subject for picture in pictures])


def _along(picture: SurfacePicture, path: np.ndarray) -> np.ndarray:
    """Heights of the surface under a path, those of the nearest points of the grid."""
    x, y = picture.axes
    columns = np.abs(x[None, :] - path[:, :1]).argmin(axis=1)
    rows = np.abs(y[None, :] - path[:, 1:]).argmin(axis=1)
    return shown(picture, picture.loss[rows, columns])


def _map() -> Any:
    from matplotlib import colormaps

    return colormaps[_COLOURS]


def _one_colour() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([_MASK])


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)
