"""Pictures of results, drawn without torch.

Each file draws one metric: `prepare(record)` turns what is stored into plain arrays, `draw(figure, prepared)`
draws them with matplotlib, `interactive(prepared)` with plotly. Figures are made without pyplot, so nothing
global changes.
"""

from __future__ import annotations

import importlib
import io
import math
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from landscape import atomic

if TYPE_CHECKING:
    from landscape.results import Record

__all__ = ["PlotError", "metrics_with_a_picture", "plot", "plus_minus", "power_of_ten"]

WIDTH = 7.0
"""Default width in inches: the text width of a page."""
_FORMATS = {".png", ".pdf", ".svg", ".html"}
# Without these, the same record drawn twice would give two files that differ.
_NO_DATES: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    ".svg": {"Date": None, "Creator": None},
}


class PlotError(Exception):
    """A measurement that cannot be drawn; the message says why and what to do."""


def plot(
    record_or_path: Record | Path | str, out: Path | str, *, width: float | None = None, dpi: int = 200
) -> Path:
    """Draw a measurement into a file.

    Args:
        record_or_path: a measurement, or its `.h5` file.
        out: the picture; its ending chooses the format: .png, .pdf, .svg, or .html (interactive).
        width: in inches, 7 by default; below 5 the panels stand one above the other.
        dpi: pixels per inch of a .png.

    Returns:
        The path of the picture.

    Raises:
        ValueError: if `out` has another ending.
        PlotError: if there is no picture of this metric, nothing to draw yet, or plotly is missing.
        landscape.ResultsError: if a file cannot be read or written.
    """
    out = Path(out)
    kind = out.suffix.lower()
    if kind not in _FORMATS:
        raise ValueError(
            f"{out} is no picture we can draw; allowed endings are {', '.join(sorted(_FORMATS))}"
        )
    record, name = _record(record_or_path)
    module = _module(str(record.attrs.get("metric", "")))
    prepared = module.prepare(record, name=name)
    atomic.replace(
        out, [_html(module, prepared) if kind == ".html" else _image(module, prepared, kind, width, dpi)]
    )
    return out


def metrics_with_a_picture() -> list[str]:
    """Return the names of the metrics that can be drawn."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def plus_minus(value: float, stderr: float | None) -> str:
    """Return `value ± stderr`, the error with two digits and the value with as many places.

    Args:
        value: an estimate.
        stderr: its standard error; 0 for an exact value, None or NaN where it is not known.

    >>> plus_minus(1234.5678, 6.789), plus_minus(-1.5e-7, 2e-9)
    ('1234.6 ± 6.8', '(−1.500 ± 0.020) × 10⁻⁷')
    >>> plus_minus(2.0, 0.0), plus_minus(2.5, None)
    ('2', '2.5')
    """
    if not math.isfinite(value):
        return str(value)
    if stderr is None or not math.isfinite(stderr) or stderr == 0:
        # an exact value is as exact as its arithmetic: ten digits hold in double precision
        return f"{value:.{10 if stderr == 0 else 6}g}".replace("-", "−")
    power = math.floor(math.log10(max(abs(value), stderr)))
    if stderr >= 100 or power < -3:
        return f"({_fixed(value / 10.0**power, stderr / 10.0**power)}) × {power_of_ten(power)}"
    return _fixed(value, stderr)


def power_of_ten(power: int) -> str:
    """Return 10 to a power in words.

    >>> power_of_ten(-12)
    '10⁻¹²'
    """
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _fixed(value: float, stderr: float) -> str:
    places = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{value:.{places}f} ± {stderr:.{places}f}".replace("-", "−")


def _record(source: Record | Path | str) -> tuple[Record, str]:
    """Return the measurement and the name of its run."""
    from landscape import results

    if isinstance(source, results.Record):
        return source, ""
    path = Path(source)
    return results.read(path), path.resolve().parent.name


def _module(metric: str) -> ModuleType:
    known = metrics_with_a_picture()
    if metric not in known:
        raise PlotError(f"there is no picture of metric {metric!r}; there are pictures of {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{metric}")


def _image(module: ModuleType, prepared: Any, kind: str, width: float | None, dpi: int) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=module.figure_size(prepared, width or WIDTH), layout="constrained")
    FigureCanvasAgg(figure)
    module.draw(figure, prepared)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind[1:], dpi=dpi, metadata=_NO_DATES[kind])
    return buffer.getvalue()


def _html(module: ModuleType, prepared: Any) -> bytes:
    try:
        figure = module.interactive(prepared)
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
