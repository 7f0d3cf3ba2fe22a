"""The four panels of a class structure: t-SNE, spectra with knockouts, outliers against G1, cosines of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from landscape.plots import style, words
from landscape.plots.style import GREY, SMALL, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMED = 20  # classes whose names have room
_OFFSET = 6  # points from a mark to its number


@dataclass(frozen=True)
class Spectrum:
    """The density of one matrix, over a signed logarithmic axis.

    Attributes:
        name: of the matrix, in words.
        x: eigenvalues, (x,).
        density: per decade, (x,).
        outliers: eigenvalues above the bulk.
    """

    name: str
    x: np.ndarray
    density: np.ndarray
    outliers: int


@dataclass(frozen=True)
class ClassStructurePicture:
    """What a picture of a class structure shows.

    Attributes:
        run: its name, "" where it has none.
        caption: how many examples of how many classes, and the weighting.
        names: of the classes, (S,).
        points: t-SNE coordinates, (points, 2); empty where there are none yet.
        point_label: index of each point's class, (points,).
        point_output: its output, -1 for the mean of a class, (points,).
        own: output of each class, (S,).
        spectra: one for each matrix that is done.
        parts: eigenvalues of G0, G1, G2 as far as they are there.
        top: the largest eigenvalues of G, (k,).
        cosines: of the class means, (S, S).
        size: number of parameters.
    """

    run: str
    caption: str
    names: list[str]
    points: np.ndarray
    point_label: np.ndarray
    point_output: np.ndarray
    own: np.ndarray
    spectra: list[Spectrum]
    parts: dict[str, np.ndarray]
    top: np.ndarray
    cosines: np.ndarray
    size: int


def colors(count: int) -> list[tuple[float, float, float]]:
    """Return a colour for each class: evenly spaced hues, every second one darker."""
    import colorsys

    return [
        colorsys.hls_to_rgb((0.6 + i / count) % 1.0, 0.52 if i % 2 else 0.38, 0.75)
        for i in range(max(count, 1))
    ]


def draw_points(axes: Axes, picture: ClassStructurePicture) -> None:
    """Draw class means large and the means of a class towards each output small, in the colour of the class.

    The ring of a small circle has the colour of the output, where that is one of the classes.
    """
    tint = colors(len(picture.names))
    rings = {int(output): tint[i] for i, output in enumerate(picture.own)}
    for mean in (False, True):
        chosen = (picture.point_output < 0) == mean
        faces = [tint[i] for i in picture.point_label[chosen]]
        edges = faces if mean else [rings.get(int(j), (0.6, 0.6, 0.6)) for j in picture.point_output[chosen]]
        x, y = picture.points[chosen].T
        axes.scatter(
            x, y, s=70 if mean else 11, c=faces, edgecolors="black" if mean else edges,
            linewidths=0.7 if mean else 1.0, zorder=3 if mean else 2,
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.08)
    axes.set_title("t-SNE: class means (large), class and output", fontsize=TEXT)
    for side in axes.spines.values():
        side.set_linewidth(0.6)


def draw_spectra(axes: Axes, picture: ClassStructurePicture, inches: float) -> None:
    """Draw the densities, and below them the eigenvalues of the parts of G as ticks."""
    least = 0.1 / picture.size
    ends = np.concatenate([one.x[one.density > least] for one in picture.spectra])
    largest = max([float(ends.max()), *(float(part.max(initial=0.0)) for part in picture.parts.values())])
    floor = 1e-5 * largest
    for i, one in enumerate(picture.spectra):
        look = style.look(i)
        label = f"{one.name} ({one.outliers})"
        shown = np.where(one.density > least, one.density, np.nan)
        axes.plot(
            one.x,
            shown,
            color=look.color,
            linestyle=look.line,
            linewidth=1.0,
            zorder=4 - 0.1 * i,
            label=label,
        )
    peak = max(float(one.density.max()) for one in picture.spectra)
    rows = -(-len(picture.spectra) // 2)
    # Room for the legend above the curves, and for the ticks of the parts below them.
    decades = np.log10(peak / least)
    style.log_axis(axes, least * 10 ** (-0.2 * decades), peak * 10 ** (0.12 * (rows + 1) * decades))
    style.asinh_axis(axes, floor, (min(1.5 * float(ends.min()), -2 * floor), 4 * largest), inches)
    _draw_ticks(axes, {"G": picture.top, **picture.parts}, 2 * floor)
    axes.set_xlabel("eigenvalue (loss / parameter²)", fontsize=TEXT)
    axes.set_ylabel("density (1 / decade)", fontsize=TEXT)
    axes.set_title("spectra, and how many outliers above", fontsize=TEXT)
    axes.legend(fontsize=SMALL, frameon=False, handlelength=1.2, loc="upper left", labelspacing=0.25, borderpad=0.1,
                ncols=2, columnspacing=0.8, handletextpad=0.5)  # fmt: skip
    style.dress(axes)


def _draw_ticks(axes: Axes, spectra: dict[str, np.ndarray], least: float) -> None:
    """Draw the eigenvalues of G and of its parts as ticks at the bottom, those above a least one."""
    across = axes.get_xaxis_transform()
    for row, (name, values) in enumerate(spectra.items()):
        shown, height = values[values > least], 0.03 + 0.055 * row
        axes.plot(shown, np.full(len(shown), height), "|", color=GREY, markersize=4.5, markeredgewidth=0.8,
                  transform=across, zorder=5)  # fmt: skip
        axes.annotate(name[0] + "₀₁₂"[int(name[1])] if name[1:] else name, (0.99, height), xycoords="axes fraction",
                      va="center", ha="right", fontsize=SMALL, color=GREY)  # fmt: skip


def draw_outliers(axes: Axes, picture: ClassStructurePicture) -> None:
    """Draw the largest eigenvalues of G against those of G1 in order, with the diagonal."""
    from matplotlib.ticker import LogFormatterMathtext, LogLocator

    first = picture.parts["G1"]
    count = min(len(first), len(picture.top))
    x, y = first[:count], picture.top[:count]
    shown = (x > 0) & (y > 0)
    x, y = x[shown], y[shown]
    low, high = 0.6 * min(x.min(), y.min()), 1.7 * max(x.max(), y.max())
    axes.plot([low, high], [low, high], color=GREY, linewidth=0.7, linestyle="--", zorder=1)
    axes.plot(x, y, "o", color=style.BLUE, markersize=4.2, zorder=3)
    style.log_axis(axes, low, high, "x")
    style.log_axis(axes, low, high)
    if np.floor(np.log10(high)) - np.ceil(np.log10(low)) >= 1:  # two powers of ten are labels enough
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator())
            axis.set_major_formatter(LogFormatterMathtext())
    axes.set_xlabel("eigenvalue of G₁, the class means", fontsize=TEXT)
    axes.set_ylabel("eigenvalue of G", fontsize=TEXT)
    axes.set_title(f"largest {count} of G and of G₁, in order", fontsize=TEXT)
    axes.annotate("equal", (high / 1.1, high / 1.35), (-_OFFSET, -3 * _OFFSET), textcoords="offset points",
                  ha="right", va="top", fontsize=SMALL, color=GREY)  # fmt: skip
    style.dress(axes)


def draw_cosines(axes: Axes, picture: ClassStructurePicture) -> None:
    """Draw the cosines of the class means as a heat map, the classes' names in their colours."""
    count = len(picture.names)
    image = axes.imshow(picture.cosines, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest", zorder=1)
    if count <= MOST_NAMED:
        names = [words.clipped(name, 10) for name in picture.names]
        turned = max(map(len, names)) > 2
        axes.set_xticks(range(count), names, rotation=90 if turned else 0)
        axes.set_yticks(range(count), names)
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            for tick, color in zip(ticks, colors(count), strict=True):
                tick.set_color(color)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, aspect=18, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    bar.outline.set_linewidth(0.6)
    axes.set_title("cosines of the class means", fontsize=TEXT)
    style.dress(axes)
    axes.tick_params(labelsize=SMALL, length=1.5)
