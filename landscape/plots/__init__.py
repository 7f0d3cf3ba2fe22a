"""Pictures of results, drawn without torch.

Each file draws one metric: `prepare(record, name)` turns what is stored into plain arrays, a picture of one
run; `draw(figure, pictures)` draws one or several of them with matplotlib, `interactive(pictures)` with plotly.
Figures are made without pyplot, so nothing global changes. `words` and `style` are shared by all.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from landscape import atomic, foreign
from landscape.plots.style import MOST_RUNS
from landscape.plots.words import plus_minus, power_of_ten

if TYPE_CHECKING:
    from landscape.results import Record

__all__ = ["PlotError", "metrics_with_a_picture", "plot", "plus_minus", "power_of_ten"]

WIDTH = 7.0
"""Default width in inches: the text width of a page."""
_SHARED = {"class_panels", "contours", "profile", "style", "words"}
_FORMATS = {".png", ".pdf", ".svg", ".html", ".vtk"}
# Without these, the same record drawn twice would give two files that differ.
_NO_DATES: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    ".svg": {"Date": None, "Creator": None},
}


class PlotError(Exception):
    """A measurement that cannot be drawn; the message says why and what to do."""


def plot(
    record_or_path: Record | Path | str | Sequence[Record | Path | str],
    out: Path | str,
    *,
    width: float | None = None,
    dpi: int = 200,
    log: bool | None = None,
) -> Path:
    """Draw a measurement, or several of the same metric over each other, into a file.

    Args:
        record_or_path: a measurement, or its `.h5` file; or a sequence of them, one for each run.
        out: the picture; its ending chooses the format: .png, .pdf, .svg, .html (interactive), or for one surface
            .vtk (ParaView).
        width: in inches, 7 by default; below 5 the panels stand one above the other.
        dpi: pixels per inch of a .png.
        log: for surfaces, whether losses are drawn on a logarithmic scale; by default where they span much.

    Returns:
        The path of the picture.

    Raises:
        ValueError: if `out` has another ending, or there is no measurement.
        PlotError: if there is no picture of this metric, nothing to draw yet, the measurements do not fit
            into one picture, or plotly is missing.
        landscape.ResultsError: if a file cannot be read or written.
    """
    out = Path(out)
    kind = out.suffix.lower()
    if kind not in _FORMATS:
        raise ValueError(
            f"{out} is no picture we can draw; allowed endings are {', '.join(sorted(_FORMATS))}"
        )
    records, names = _read(record_or_path)
    metric = _one_metric(records, names)
    module = _module(metric)
    if metric != "surface" and (log is not None or kind == ".vtk"):
        what = "a logarithmic scale on request" if log is not None else "a .vtk file"
        raise PlotError(f"{what} is for surfaces, and this is metric {metric!r}; leave it out")
    options: dict[str, Any] = {} if log is None else {"log": log}
    named = zip(records, names, strict=True)
    with foreign.understood(", ".join(filter(None, names)) or None):
        pictures = [module.prepare(record, name=name, **options) for record, name in named]
        image = _drawn(module, pictures, kind, width, dpi)
    atomic.replace(out, [image])
    return out


def _drawn(module: ModuleType, pictures: Sequence[Any], kind: str, width: float | None, dpi: int) -> bytes:
    if kind == ".vtk" and len(pictures) > 1:
        raise PlotError(
            f"a .vtk file holds one surface, and these are {len(pictures)}; export them one by one"
        )
    if kind == ".vtk":
        return bytes(module.vtk(pictures[0]))
    return _html(module, pictures) if kind == ".html" else _image(module, pictures, kind, width, dpi)


def metrics_with_a_picture() -> list[str]:
    """Return the names of the metrics that can be drawn."""
    return sorted({module.name for module in pkgutil.iter_modules(__path__)} - _SHARED)


def _read(given: Record | Path | str | Sequence[Record | Path | str]) -> tuple[list[Record], list[str]]:
    """Return the measurements and the names of their runs."""
    from landscape import results

    sources = [given] if isinstance(given, results.Record | Path | str) else list(given)
    if not sources:
        raise ValueError("no measurement to draw; name one .h5 file or more")
    if len(sources) > MOST_RUNS:
        raise PlotError(
            f"{len(sources)} runs cannot be told apart in one picture; draw at most {MOST_RUNS} together"
        )
    paths = [None if isinstance(s, results.Record) else Path(s) for s in sources]
    records = [s if isinstance(s, results.Record) else results.read(s) for s in sources]
    return records, _names(paths)


def _names(paths: Sequence[Path | None]) -> list[str]:
    """Return what tells the runs apart: their directories' names, with as much of the path as that takes."""
    whole = [path.resolve().with_suffix("").parts if path else () for path in paths]
    directories = [parts[-2] if parts else "" for parts in whole]
    # the directory alone, or with the file's name, or with the directories above
    longer = (["/".join(parts[-depth:]) for parts in whole] for depth in range(2, max(map(len, whole)) + 1))
    unique = (names for names in (directories, *longer) if len(set(names)) == len(names))
    return next(unique, directories)  # records without files, or a file twice, are numbered in the legend


def _one_metric(records: Sequence[Record], names: Sequence[str]) -> str:
    metrics = [str(record.attrs.get("metric", "")) for record in records]
    if len(set(metrics)) > 1:
        found = ", ".join(
            f"{m} of {n or f'run {i}'}" for i, (m, n) in enumerate(zip(metrics, names, strict=True), 1)
        )
        raise PlotError(
            f"one picture shows one metric, but these are {found}; draw the {len(set(metrics))} metrics apart"
        )
    return metrics[0]


def _module(metric: str) -> ModuleType:
    known = metrics_with_a_picture()
    if metric not in known:
        raise PlotError(f"there is no picture of metric {metric!r}; there are pictures of {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{metric}")


def _image(module: ModuleType, pictures: Sequence[Any], kind: str, width: float | None, dpi: int) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # names of an .svg's parts are else random; a matplotlibrc in the current directory could make LaTeX run
    with matplotlib.rc_context({"svg.hashsalt": "landscape", "text.usetex": False}):
        figure = Figure(figsize=module.figure_size(pictures, width or WIDTH), layout="constrained")
        FigureCanvasAgg(figure)
        module.draw(figure, pictures)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind[1:], dpi=dpi, metadata=_NO_DATES[kind])
    return buffer.getvalue()


def _html(module: ModuleType, pictures: Sequence[Any]) -> bytes:
    try:
        figure = module.interactive(pictures)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "plotly":
            raise
        raise PlotError(
            "an .html picture needs plotly, which is not installed: "
            'pip install "landscape-toolkit[interactive]", or draw a .png, .pdf or .svg'
        ) from error
    # plotly's own code goes into the file, so that it opens without a network
    page: str = figure.to_html(include_plotlyjs=True, full_html=True, div_id="landscape")
    return page.encode()
