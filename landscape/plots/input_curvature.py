"""How curved the loss is in each example's input: histogram, cumulative curve, and the extreme examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape.plots import PlotError, style, words
from landscape.plots.style import SMALL, TEXT

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from landscape.results import Record

_NAME = "normalized curvature ‖∇²f‖ / (‖∇f‖ + ε)"
_GALLERY, _NARROW = 10, 6  # examples of each end, in a wide and in a narrow figure
_BINS = 40
_PICTURE = 0.95  # inches: a row of the gallery, with its texts


@dataclass(frozen=True)
class InputCurvaturePicture:
    """What a picture of the curvature of examples shows.

    Attributes:
        run: its name, "" where it has none.
        values: C_f of the examples that have one, ascending, (n,).
        mean: their mean.
        stderr: its standard error.
        images: of the examples of lowest and of highest Curv, (2, k, height, width[, channels]); None where
            the file holds no pictures.
        captions: for each of them its label, and what it was taken for.
    """

    run: str
    values: np.ndarray
    mean: float
    stderr: float
    images: np.ndarray | None
    captions: list[list[str]]

    @property
    def label(self) -> str:
        """The mean in words, with the examples that have no place on a logarithmic axis."""
        text = f"mean {words.plus_minus(self.mean, self.stderr)}"
        zero = int((self.values <= 0).sum())
        return f"{text}, {zero} of {len(self.values)} zero" if zero else text


def prepare(record: Record, name: str = "") -> InputCurvaturePicture:
    """Turn what is stored of examples into plain arrays.

    Args:
        record: the measurement.
        name: of the run.

    Raises:
        PlotError: if no example has a curvature yet.
    """
    values = record["normalized_curvature"][record["done"]] if "done" in record else np.zeros(0)
    values = np.sort(values[np.isfinite(values)])
    if not len(values) or values[-1] <= 0:
        raise PlotError(
            "no example has a curvature above zero yet; run `landscape measure` again to go on, or take another f "
            "(the logits of a piecewise linear network have none)"
        )
    images, captions = _gallery(record)
    return InputCurvaturePicture(
        run=name or str(record.attrs.get("model") or ""),
        values=values,
        mean=float(record["mean_normalized_curvature"]),
        stderr=float(record["mean_normalized_curvature_stderr"]),
        images=images,
        captions=captions,
    )


def figure_size(pictures: Sequence[InputCurvaturePicture], width: float) -> tuple[float, float]:
    """Return width and height in inches."""
    stacked = 2 if width < style.SIDE_BY_SIDE else 1
    gallery = 2 * _PICTURE if _shows_gallery(pictures) else 0.0
    legend = style.legend_height(_labels(pictures), width)
    return width, style.TITLE_HEIGHT + stacked * style.PLOT_HEIGHT + gallery + legend


def draw(figure: Figure, pictures: Sequence[InputCurvaturePicture]) -> None:
    """Draw the histograms and cumulative curves of all runs, and the gallery of a single one.

    Args:
        figure: a `matplotlib.figure.Figure`.
        pictures: what `prepare` returned, one for each run.
    """
    narrow = figure.get_figwidth() < style.SIDE_BY_SIDE
    upper: Any = figure
    if _shows_gallery(pictures):
        height = (2 if narrow else 1) * style.PLOT_HEIGHT
        parts: Any = figure.subfigures(2, 1, height_ratios=[height, 2 * _PICTURE])
        upper = parts[0]
        _draw_gallery(parts[1], pictures[0], _NARROW if narrow else _GALLERY)
    left, right = upper.subplots(2, 1) if narrow else upper.subplots(1, 2)
    positive = [picture.values[picture.values > 0] for picture in pictures]
    low, high = min(v[0] for v in positive), max(v[-1] for v in positive)
    limits = (low / 1.3, high * 1.3)
    edges = np.geomspace(*limits, _BINS + 1)
    for index, (picture, values) in enumerate(zip(pictures, positive, strict=True)):
        look = style.look(index)
        counts = np.histogram(values, edges)[0] / len(picture.values)
        line = {"color": look.color, "linestyle": look.line, "linewidth": 1.1}
        left.stairs(counts, edges, **line)
        left.stairs(counts, edges, fill=True, color=look.color, alpha=style.BAND)
        share = np.arange(1, len(picture.values) + 1) / len(picture.values)
        right.step(picture.values, share, where="post", **line)
    left.set_ylim(bottom=0)
    right.set_ylim(0, 1)
    for axes, text in ((left, "share of the examples"), (right, "share of the examples up to here")):
        style.log_axis(axes, *limits, "x")
        axes.set_xlabel(_NAME, fontsize=SMALL)
        axes.set_ylabel(text, fontsize=SMALL)
        style.dress(axes)
    style.run_legend(figure, _labels(pictures), markers=False)
    figure.suptitle(style.wrapped(_title(pictures), figure.get_figwidth(), TEXT + 0.5), fontsize=TEXT + 0.5)


def interactive(pictures: Sequence[InputCurvaturePicture]) -> plotly.graph_objects.Figure:
    """Return the cumulative curves as a plotly figure.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, (picture, name) in enumerate(zip(pictures, _labels(pictures), strict=True)):
        look = style.look(index)
        share = np.arange(1, len(picture.values) + 1) / len(picture.values)
        figure.add_trace(
            go.Scatter(x=picture.values, y=share, mode="lines", name=name,
                       line={"color": look.color, "dash": look.dash, "shape": "hv"})
        )  # fmt: skip
    figure.update_xaxes(type="log", title_text=_NAME)
    figure.update_yaxes(title_text="share of the examples up to here")
    figure.update_layout(title=_title(pictures), template="plotly_white", showlegend=len(pictures) > 1)
    return figure


def _gallery(record: Record) -> tuple[np.ndarray | None, list[list[str]]]:
    """The pictures of the examples of lowest and of highest Curv."""
    if "image" not in record:
        return None, []
    curved = np.where(record["done"], record["curvature"], np.nan)
    order = np.argsort(curved, kind="stable")[: int(np.isfinite(curved).sum())]
    count = min(_GALLERY, len(order) // 2)
    if not count:
        return None, []
    chosen = np.stack([order[:count], order[::-1][:count]])
    images = record["image"][chosen]
    if images.ndim == 5:
        images = np.moveaxis(images, 2, -1)
    return images, [[_caption(record, i) for i in row] for row in chosen]


def _caption(record: Record, index: int) -> str:
    if "label" not in record:
        return f"{index}"
    label = int(record["label"][index])
    taken = int(record["predicted"][index]) if "predicted" in record else label
    return f"{label}" if taken == label else f"{label} as {taken}"


def _draw_gallery(figure: Any, picture: InputCurvaturePicture, most: int) -> None:
    assert picture.images is not None
    count = min(most, picture.images.shape[1])
    grid = figure.subplots(2, count, squeeze=False)
    lowest, highest = np.nanmin(picture.images), np.nanmax(picture.images)
    span = (highest - lowest) or 1.0
    for row, name in enumerate(("lowest Curv", "highest Curv")):
        for column, caption in enumerate(picture.captions[row][:count]):
            _show(grid[row, column], (picture.images[row, column] - lowest) / span, caption)
        grid[row, 0].set_ylabel(name, fontsize=SMALL)


def _show(axes: Axes, image: np.ndarray, caption: str) -> None:
    single = image.ndim == 2 or image.shape[-1] not in {3, 4}
    shown = image if image.ndim == 2 or not single else image[..., 0]
    axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(caption, fontsize=SMALL, pad=2)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def _shows_gallery(pictures: Sequence[InputCurvaturePicture]) -> bool:
    return len(pictures) == 1 and pictures[0].images is not None


def _labels(pictures: Sequence[InputCurvaturePicture]) -> list[str]:
    names = [words.clipped(p.run) or f"run {i}" for i, p in enumerate(pictures, 1)]
    if len(set(names)) < len(names):
        names = [f"{name} ({i})" for i, name in enumerate(names, 1)]
    return [f"{name}: {p.label}" for name, p in zip(names, pictures, strict=True)]


def _title(pictures: Sequence[InputCurvaturePicture]) -> str:
    if len(pictures) > 1:
        return f"Curvature of the loss in the input, {len(pictures)} runs"
    picture = pictures[0]
    of = f" of {picture.run}" if picture.run else ""
    return f"Curvature of the loss in the input{of} ({words.grouped(len(picture.values))} examples, {picture.label})"
