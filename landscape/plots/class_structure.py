"""Class structure: t-SNE of the class means, spectra with knockouts, outliers against G1, and class cosines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape.plots import PlotError, class_panels, style
from landscape.plots.class_panels import ClassStructurePicture, Spectrum
from landscape.plots.style import TEXT

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.figure import Figure

    from landscape.results import Record

_PANEL = 2.75  # inches: height of a panel with its texts
_SIGNS = {
    "hessian": "Hessian",
    "-": " − ",
    "/": " without ",
    "G012": "G₀₁₂",
    "G0": "G₀",
    "G1": "G₁",
    "G2": "G₂",
}


def prepare(record: Record, name: str = "") -> ClassStructurePicture:
    """Turn a stored class structure into plain arrays.

    Args:
        record: the measurement.
        name: of the run, for the title.

    Raises:
        PlotError: if there is nothing to draw yet.
    """
    if "class_cosine" not in record and "tsne" not in record and "spectrum_x" not in record:
        raise PlotError(
            "no part of the class structure is measured yet; run `landscape measure` again to go on"
        )
    labels = [int(c) for c in record["label"]]
    place = {c: i for i, c in enumerate(labels)}
    there = "tsne" in record
    points = record["point_label"] if there else np.zeros(0)
    parts = {
        part: record[f"eigenvalues_{part}"] for part in ("G0", "G1", "G2") if f"eigenvalues_{part}" in record
    }
    counts = record["class_count"].astype(int)
    each = f"{counts[0]}" if len(set(counts)) == 1 else f"{counts.min()} to {counts.max()}"
    return ClassStructurePicture(
        run=name or str(record.attrs.get("model") or ""),
        caption=f"{len(labels)} classes, {each} examples of each, weighting of {record.attrs['weighting']}",
        names=[str(one) for one in record["class_name"]],
        points=record["tsne"] if there else np.zeros((0, 2)),
        point_label=np.array([place[int(c)] for c in points], dtype=int),
        point_output=record["point_output"].astype(int) if there else np.zeros(0, int),
        own=np.array(labels),
        spectra=_spectra(record),
        parts=parts,
        top=record["eigenvalues_G"] if "eigenvalues_G" in record else np.zeros(0),
        cosines=record["class_cosine"] if "class_cosine" in record else np.zeros((0, 0)),
        size=int(record.attrs["order"]),
    )


def _spectra(record: Record) -> list[Spectrum]:
    if "spectrum_x" not in record:
        return []
    found = []
    for i, name in enumerate(record["spectrum"]):
        known = np.isfinite(record["spectrum_density"][i])
        if known.any():
            x, density = (record[f"spectrum_{key}"][i][known] for key in ("x", "density"))
            found.append(Spectrum(_in_words(str(name)), x, density, int(record["spectrum_outliers"][i])))
    return found


def _in_words(name: str) -> str:
    """Return a matrix's name as a reader says it.

    >>> _in_words("hessian/G1")
    'Hessian without G₁'
    """
    for short, long in _SIGNS.items():
        name = name.replace(short, long)
    return name


def figure_size(pictures: Sequence[ClassStructurePicture], width: float) -> tuple[float, float]:
    """Return width and height in inches: two panels side by side, or one above the other in a narrow figure."""
    columns = 1 if width < style.SIDE_BY_SIDE else 2
    rows = sum(-(-len(_panels(picture)) // columns) for picture in pictures)
    return width, style.TITLE_HEIGHT + rows * _PANEL + 0.2 * (len(pictures) - 1)


def draw(figure: Figure, pictures: Sequence[ClassStructurePicture]) -> None:
    """Draw up to four panels for each run, those of the next run below.

    Args:
        figure: a `matplotlib.figure.Figure`.
        pictures: what `prepare` returned, one for each run.
    """
    width = figure.get_figwidth()
    columns = 1 if width < style.SIDE_BY_SIDE else 2
    panels = [_panels(picture) for picture in pictures]
    rows = [-(-len(one) // columns) for one in panels]
    parts = figure.subfigures(len(pictures), 1, height_ratios=rows, squeeze=False)
    for part, picture, made, count in zip(parts.flat, pictures, panels, rows, strict=True):
        grid = part.subplots(count, columns, squeeze=False)
        for axes in grid.flat[len(made) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, made, strict=False):
            panel(axes, picture, 0.72 * width / columns)
        title = f"Class structure of {picture.run}: {picture.caption}" if picture.run else picture.caption
        part.suptitle(style.wrapped(title, width, TEXT + 0.5), fontsize=TEXT + 0.5)


def _panels(picture: ClassStructurePicture) -> list[Callable[..., None]]:
    """The panels for which there is something to draw."""
    made: list[Callable[..., None]] = []
    if len(picture.points):
        made.append(lambda axes, one, _: class_panels.draw_points(axes, one))
    if picture.spectra:
        made.append(class_panels.draw_spectra)
    if len(picture.top) and "G1" in picture.parts and picture.parts["G1"].max() > 0:
        made.append(lambda axes, one, _: class_panels.draw_outliers(axes, one))
    if len(picture.cosines):
        made.append(lambda axes, one, _: class_panels.draw_cosines(axes, one))
    return made


def interactive(pictures: Sequence[ClassStructurePicture]) -> plotly.graph_objects.Figure:
    """Return the t-SNE and the class cosines as a plotly figure, a row for each run; points say what they are.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(pictures), cols=2, subplot_titles=["t-SNE", "cosines of the class means"])
    for row, picture in enumerate(pictures, 1):
        if len(picture.points):
            figure.add_trace(_points(go, picture), row=row, col=1)
        if len(picture.cosines):
            figure.add_trace(
                go.Heatmap(z=picture.cosines, x=picture.names, y=picture.names, zmin=-1, zmax=1, colorscale="RdBu_r"),
                row=row, col=2,
            )  # fmt: skip
    figure.update_yaxes(autorange="reversed", col=2)
    title = "; ".join(f"{p.run}: {p.caption}" if p.run else p.caption for p in pictures)
    figure.update_layout(title=title, template="plotly_white", height=480 * len(pictures), showlegend=False)
    return figure


def _points(go: Any, picture: ClassStructurePicture) -> Any:
    tint = [
        f"rgb{tuple(round(255 * part) for part in color)}"
        for color in class_panels.colors(len(picture.names))
    ]
    outputs = dict(zip(picture.own.tolist(), picture.names, strict=True))
    said = [
        f"{picture.names[c]}" + ("" if j < 0 else f", towards {outputs.get(int(j), j)}")
        for c, j in zip(picture.point_label, picture.point_output, strict=True)
    ]
    size = np.where(picture.point_output < 0, 16, 7)
    return go.Scatter(x=picture.points[:, 0], y=picture.points[:, 1], mode="markers", text=said, hoverinfo="text",
                      marker={"color": [tint[c] for c in picture.point_label], "size": size})  # fmt: skip
