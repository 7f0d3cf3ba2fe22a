"""What tests of pictures share: drawing into memory, and looking at the texts that come out."""

from __future__ import annotations

import itertools
import types
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from landscape.results import Record


def drawn(
    module: types.ModuleType, records: Sequence[Record], width: float, names: Sequence[str] = ()
) -> Figure:
    """Draw records as `landscape.plots.plot` does."""
    names = names or ["digits_mlp", *(f"digits_mlp_batch_{2**i}" for i in range(1, len(records)))]
    pictures = [module.prepare(record, name) for record, name in zip(records, names, strict=False)]
    figure = Figure(figsize=module.figure_size(pictures, width), layout="constrained")
    FigureCanvasAgg(figure)
    module.draw(figure, pictures)
    figure.canvas.draw()
    return figure


def texts(figure: Figure) -> tuple[list[Text], list[Text], list[Text]]:
    """Titles and axis labels, the tick labels that are drawn, and the rest (legends)."""
    ticks, hidden = [], []
    for axes in figure.axes:
        if axes.name == "3d":  # places its labels while it draws, and keeps none of the places
            hidden += [
                t.label1 for axis in (axes.xaxis, axes.yaxis, axes.zaxis) for t in axis.get_major_ticks()
            ]
            continue
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                # matplotlib keeps labels of ticks outside the limits, without drawing them
                for label in (tick.label1, tick.label2):  # of colour bars the second one
                    shown = low <= tick.get_loc() <= high and label.get_visible()
                    (ticks if shown else hidden).append(label)
    legends = [legend for part in (figure, *figure.axes) for legend in _legends(part)]
    entries = [text for legend in legends for text in legend.get_texts()]
    known = {*ticks, *hidden, *entries}
    every = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    titles = [t for t in every if t not in known and isinstance(t, Text)]
    return titles, [t for t in ticks if t.get_text()], entries


def assert_readable(figure: Figure, least: int = 4) -> None:
    """Every text lies in the figure, is large enough, and titles, labels and ticks lie apart."""
    renderer = figure.canvas.get_renderer()
    titles, tick_labels, entries = texts(figure)
    assert len(titles) + len(tick_labels) > least
    for text in [*titles, *tick_labels, *entries]:
        box = text.get_window_extent(renderer)
        assert text.get_fontsize() >= 7, text.get_text()
        assert box.x0 >= -1, text.get_text()
        assert box.y0 >= -1, text.get_text()
        assert box.x1 <= figure.bbox.x1 + 1, text.get_text()
        assert box.y1 <= figure.bbox.y1 + 1, text.get_text()
    boxes = [
        (t.get_text(), Text.get_window_extent(t, renderer).padded(-0.5)) for t in [*titles, *tick_labels]
    ]
    boxes += [
        (e.get_text(), e.get_window_extent(renderer)) for legend in figure.legends for e in legend.get_texts()
    ]
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        assert not first.overlaps(second), f"{a!r} runs into {b!r}"


def _legends(part: object) -> list[object]:
    if isinstance(part, Figure):
        return list(part.legends)
    legend = part.get_legend()
    return [legend] if legend else []
