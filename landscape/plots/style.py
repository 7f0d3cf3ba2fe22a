"""How pictures look: colours, sizes of text, axes, and the legend of several runs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, told apart with every kind of colour vision; their yellow is too pale on white.
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#555555"
_CYCLE = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "D", "^", "P", "X", "h")
_LINES: Final = ("-", "--")
MOST_RUNS = len(_CYCLE) * len(_LINES)
SIDE_BY_SIDE = 5.0  # inches: a narrower figure has its panels one above the other
TEXT, SMALL = 8.0, 7.0  # points: the sizes of captions in print
TITLE_HEIGHT, PLOT_HEIGHT = 0.4, 2.4  # inches
BAND = 0.18  # opacity of a 95 % band
_LEGEND_ROW = 0.16  # inches
_TICK_DISTANCE = 0.36  # inches: between two powers of ten on a horizontal axis
_LETTER = 0.56  # mean width of a letter over its size


@dataclass(frozen=True)
class Look:
    """How one run is drawn.

    Attributes:
        color: of its line, markers and band.
        marker: shape of its markers, matplotlib's name.
        line: of matplotlib's line styles.
    """

    color: str
    marker: str
    line: Literal["-", "--"]

    @property
    def dash(self) -> str:
        """Plotly's name of the line style."""
        return "solid" if self.line == "-" else "dash"


def look(index: int) -> Look:
    """Return how the run of this index is drawn; no two of `MOST_RUNS` runs look the same."""
    place = index % len(_CYCLE)
    return Look(_CYCLE[place], _MARKERS[place], _LINES[index // len(_CYCLE) % len(_LINES)])


def behind(size: float, index: int, runs: int) -> float:
    """Return a width or size for one of several runs: those drawn first are larger, so that they stay visible.

    >>> behind(1.0, 0, 3), behind(1.0, 2, 3)
    (2.4, 1.0)
    """
    return size * (1 + 0.7 * min(runs - 1 - index, 3))


def transparent(color: str) -> str:
    """Return a colour as plotly names it, as transparent as a band.

    >>> transparent("#0072B2")
    'rgba(0, 114, 178, 0.18)'
    """
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {BAND})"


def dress(axes: Axes) -> None:
    """Give axes thin lines, small text and no box."""
    axes.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    axes.tick_params(which="minor", width=0.4, length=1.5)
    axes.yaxis.get_offset_text().set_fontsize(SMALL)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_linewidth(0.6)


def wrapped(text: str, width: float, size: float) -> str:
    """Break a text into lines, before a parenthesis where that is enough.

    Args:
        text: words.
        width: of the lines, in inches.
        size: of the letters, in points.
    """
    letters = max(20, int(width * 72 / (_LETTER * size)))
    head, mark, tail = text.partition(" (")
    if len(text) <= letters or not mark:
        return "\n".join(textwrap.wrap(text, letters))
    return "\n".join([*textwrap.wrap(head, letters), *textwrap.wrap(f"({tail}", letters)])


def log_axis(axes: Axes, low: float, high: float, name: str = "y") -> None:
    """Make an axis logarithmic, with plain numbers where few decades give few ticks.

    Args:
        axes: matplotlib's.
        low: lower limit, positive.
        high: upper limit.
        name: "x" or "y".
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.yaxis if name == "y" else axes.xaxis
    # what reaches below zero ends at the edge
    (axes.set_yscale if name == "y" else axes.set_xscale)("log", nonpositive="clip")
    (axes.set_ylim if name == "y" else axes.set_xlim)(low, high)
    if high / low < 1e3 and low > 1e-4 and high < 1e5:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def index_ticks(count: int, most: int = 6) -> list[int]:
    """Return ticks for the numbers 1 to `count`: 1 and multiples of a round step.

    >>> index_ticks(5), index_ticks(20)
    ([1, 2, 3, 4, 5], [1, 5, 10, 15, 20])
    """
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if count <= step * most:
                return sorted({1, *range(step, count + 1, step)})
        power *= 10


def run_legend(figure: Figure, names: Sequence[str], *, markers: bool = True) -> None:
    """Name several runs below the panels, each with its look; nothing for a single one."""
    from matplotlib.lines import Line2D

    if len(names) < 2:
        return
    looks, count = [look(index) for index in range(len(names))], len(names)
    legend_below(
        figure,
        [
            Line2D([], [], color=one.color, linestyle=one.line, markersize=4,
                   linewidth=1.1 if markers else behind(1.1, i, count), marker=one.marker if markers else "")
            for i, one in enumerate(looks)
        ],
        names,
    )  # fmt: skip


def legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Put a legend below the panels, in as many columns as have room."""
    columns = _legend_columns(names, figure.get_figwidth())
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False,
        handlelength=2.0, columnspacing=1.2, borderpad=0.1,
    )  # fmt: skip


def legend_height(names: Sequence[str], width: float) -> float:
    """Return inches that the legend with these entries takes; none for a single one."""
    return _LEGEND_ROW * -(-len(names) // _legend_columns(names, width)) if len(names) > 1 else 0.0


def spread(places: np.ndarray, distance: float, length: float) -> np.ndarray:
    """Move places as little as possible (least squares) until they lie a distance apart.

    Args:
        places: ascending, (n,).
        distance: between two neighbours.
        length: the places stay between 0 and this; (n - 1) distance fits into it.

    Returns:
        The new places, (n,).

    >>> spread(np.array([1.0, 1.0, 5.0]), 0.5, 10.0).tolist()
    [0.75, 1.25, 5.0]
    """
    steps = distance * np.arange(len(places))
    groups: list[list[float]] = []  # mean and number: pooled as long as one lies above the next
    for place in places - steps:
        groups.append([place, 1])
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (a, m), (b, n) = groups.pop(-2), groups.pop()
            groups.append([(m * a + n * b) / (m + n), m + n])
    free = np.array([mean for mean, count in groups for _ in range(int(count))])
    return np.asarray(np.clip(free, 0.0, length - (steps[-1] if len(steps) else 0.0)) + steps)


def power_ticks(low: int, high: int, most: int) -> list[int]:
    """Return at most `most` whole powers from `low` to `high`, evenly spaced, `high` among them."""
    step = max(1, -(-(high - low + 1) // most))
    return list(range(high, low - 1, -step))[::-1]


def signed_log(axes: Axes, values: np.ndarray, bars: np.ndarray, most: int = 4) -> None:
    """Make the vertical axis logarithmic on both sides of zero.

    It is linear up to the smallest value, but shows no more than five decades.

    Args:
        axes: whose limits are set, with room at both ends.
        values: that will be shown, not all zero.
        bars: half the lengths of their error bars.
        most: ticks at each side.
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    top = int(np.ceil(np.log10(sizes.max())))
    bottom = max(int(np.floor(np.log10(sizes.min()))), top - 5)
    powers = 10.0 ** np.array(power_ticks(bottom, top, most))
    axes.set_yscale("symlog", linthresh=10.0**bottom, linscale=0.6)
    negative, positive = np.any(values < 0), np.any(values > 0)
    ticks = [*(-powers[::-1] if negative else []), 0.0, *(powers if positive else [])]
    axes.set_yticks(ticks, [_power_label(tick) for tick in ticks])
    axes.minorticks_off()
    least = 10.0**bottom
    low, high = (values - bars).min(), (values + bars).max()
    axes.set_ylim(1.6 * min(low, -0.2 * least), 1.6 * max(high, 0.2 * least))


def asinh_axis(axes: Axes, floor: float, limits: tuple[float, float], inches: float) -> None:
    """Make the horizontal axis logarithmic on both sides of zero, as the signed axis of densities is.

    Args:
        axes: matplotlib's.
        floor: ε; the axis is even in asinh(x / 2ε).
        limits: of the axis.
        inches: its length, in which the ticks have room.
    """
    from matplotlib.ticker import NullLocator

    axes.set_xscale("asinh", linear_width=2 * floor)
    ticks = asinh_ticks(floor, limits, inches)
    axes.set_xticks(ticks, [_power_label(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(limits)


def asinh_ticks(floor: float, limits: tuple[float, float], inches: float) -> list[float]:
    """Return 0 and powers of ten on both sides of it, those between the limits, as many as have room.

    >>> asinh_ticks(1e-3, (-2.0, 20.0), 6.0)
    [-1.0, -0.1, -0.01, 0.0, 0.01, 0.1, 1.0, 10.0]
    """
    low, high = limits
    per_unit = inches / float(np.arcsinh(high / (2 * floor)) - np.arcsinh(low / (2 * floor)))
    step = max(1, int(np.ceil(_TICK_DISTANCE / (per_unit * np.log(10)))))
    power, sizes = int(np.floor(np.log10(max(abs(low), abs(high))))), []
    while per_unit * np.arcsinh(10.0**power / (2 * floor)) >= _TICK_DISTANCE:
        sizes.append(10.0**power)
        power -= step
    ticks = [*(-size for size in sizes), 0.0, *reversed(sizes)]
    return [tick for tick in ticks if low <= tick <= high]


def _power_label(tick: float) -> str:
    if tick == 0:
        return "0"
    sign = "-" if tick < 0 else ""
    return f"${sign}10^{{{round(np.log10(abs(tick)))}}}$"


def _legend_columns(names: Sequence[str], width: float) -> int:
    longest = max(len(name) for name in names) * _LETTER * SMALL + 28  # points, with its line and a gap
    return max(1, min(len(names), int(width * 72 / longest)))
