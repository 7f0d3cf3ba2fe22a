"""Lines: the loss along them, and the accuracy in a panel of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from landscape.plots import style, words
from landscape.plots.style import GREY, PLOT_HEIGHT, SMALL, TEXT

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from landscape.plots.surface import SurfacePicture


def height(pictures: Sequence[SurfacePicture], width: float) -> float:
    """Return inches for the panels and the legend."""
    rows = _panels(pictures) if width < style.SIDE_BY_SIDE else 1
    return rows * (PLOT_HEIGHT + 0.3) + style.legend_height(_names(pictures), width)


def draw(figure: Figure, pictures: Sequence[SurfacePicture]) -> None:
    """Draw the loss along each line, and the accuracy where it was measured."""
    count = _panels(pictures)
    shape = (count, 1) if figure.get_figwidth() < style.SIDE_BY_SIDE else (1, count)
    panels = figure.subplots(*shape, squeeze=False).ravel()
    _losses(panels[0], pictures)
    if count > 1:
        _accuracies(panels[1], pictures)
    for axes in panels:
        axes.axvline(0, color=GREY, linewidth=0.6, linestyle=":", zorder=1)
        labels = {picture.labels[0] for picture in pictures}
        label = labels.pop() if len(labels) == 1 else "x, in units of each run's direction"
        axes.set_xlabel(style.wrapped(label, 0.8 * figure.get_figwidth() / shape[1], SMALL), fontsize=SMALL)
        style.dress(axes)
    style.run_legend(figure, _names(pictures), markers=False)


def interactive(pictures: Sequence[SurfacePicture]) -> plotly.graph_objects.Figure:
    """Return a plotly figure with a panel for losses and one for accuracies."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=_panels(pictures))
    for i, (picture, name) in enumerate(zip(pictures, _names(pictures), strict=True)):
        look = style.look(i)
        line = {"color": look.color, "dash": look.dash}
        x, loss = _points(picture)
        figure.add_trace(go.Scatter(x=x, y=loss, mode="lines", name=name, line=line), row=1, col=1)
        if picture.accuracy is not None:
            trace = go.Scatter(
                x=picture.axes[0],
                y=100 * picture.accuracy,
                mode="lines",
                name=name,
                line=line,
                showlegend=False,
            )
            figure.add_trace(trace, row=1, col=2)
    figure.update_yaxes(title_text="loss", type="log" if _logarithmic(pictures) else "linear", row=1, col=1)
    if _panels(pictures) > 1:
        figure.update_yaxes(title_text="accuracy (%)", row=1, col=2)
    figure.update_xaxes(title_text=pictures[0].labels[0])
    figure.update_layout(showlegend=len(pictures) > 1, height=450)
    return figure


def _losses(axes: Axes, pictures: Sequence[SurfacePicture]) -> None:
    for i, picture in enumerate(pictures):
        look, (x, loss) = style.look(i), _points(picture)
        drawn = np.where(np.isfinite(loss), loss, np.nan)
        axes.plot(
            x, drawn, color=look.color, linestyle=look.line, linewidth=style.behind(1.1, i, len(pictures))
        )
        broken = picture.axes[0][~np.isfinite(picture.loss) & picture.measured]
        if len(broken):
            axes.plot(broken, np.ones(len(broken)), transform=axes.get_xaxis_transform(), marker="|", color=GREY,
                      linestyle="none", clip_on=False)  # fmt: skip
        if len(pictures) == 1:
            axes.plot(
                picture.lowest,
                [picture.finite.min()],
                marker="o",
                markerfacecolor="none",
                color=GREY,
                markersize=5,
            )
    if _logarithmic(pictures):
        every = np.concatenate([picture.finite for picture in pictures])
        style.log_axis(axes, every.min() / 1.3, every.max() * 1.3)
    axes.set_ylabel("loss", fontsize=TEXT)


def _accuracies(axes: Axes, pictures: Sequence[SurfacePicture]) -> None:
    for i, picture in enumerate(pictures):
        if picture.accuracy is not None:
            look = style.look(i)
            axes.plot(picture.axes[0], 100 * picture.accuracy, color=look.color, linestyle=look.line,
                      linewidth=style.behind(1.1, i, len(pictures)))  # fmt: skip
    axes.set_ylim(-2, 102)
    axes.set_ylabel("accuracy (%)", fontsize=TEXT)


def _points(picture: SurfacePicture) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates and losses, refined points among them."""
    x = np.concatenate([picture.axes[0], picture.refined[:, 0]])
    order = np.argsort(x, kind="stable")
    return x[order], np.concatenate([picture.loss, picture.refined[:, -1]])[order]


def _panels(pictures: Sequence[SurfacePicture]) -> int:
    return 1 + any(picture.accuracy is not None for picture in pictures)


def _logarithmic(pictures: Sequence[SurfacePicture]) -> bool:
    return all(picture.logarithmic for picture in pictures)


def _names(pictures: Sequence[SurfacePicture]) -> list[str]:
    return words.labels([picture.subject for picture in pictures])
