"""`landscape plot`: a picture of one measurement or of several runs, drawn without torch."""

from __future__ import annotations

from pathlib import Path

import click

from .progress import say
from .show import files

FORMATS = (".png", ".pdf", ".svg", ".html", ".vtk")


@click.command("plot", short_help="Draw a picture of a measurement, or of several runs together.")
@click.argument(
    "measurements", metavar="MEASUREMENT...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE",
              help="The picture: .png, .pdf, .svg, .html to look at with the mouse; of one surface .vtk for ParaView. "
              "[default: a .png beside the measurement; needed with several]")  # fmt: skip
@click.option("--width", type=click.FloatRange(2, 40), metavar="INCHES",
              help="Width on paper; below 5 the panels stand one above the other. [default: 7]")  # fmt: skip
@click.option(
    "--dpi", type=click.IntRange(30, 1200), default=200, show_default=True, help="Pixels per inch of a .png."
)
@click.option("--log/--linear", default=None,
              help="Scale of a surface's losses. [default: logarithmic where they span 1.5 decades]")  # fmt: skip
@click.option("--debug", is_flag=True, expose_value=False, help="Show the trace of an error too.")
def command(
    measurements: tuple[Path, ...], out: Path | None, width: float | None, dpi: int, log: bool | None
) -> None:
    """Draw MEASUREMENT, an .h5 file or a run directory that holds one.

    Several measurements of the same metric are drawn over each other, and a legend names their runs.
    """
    from landscape import reading

    reading.start()  # it loads while we do
    from landscape import plots

    found = [_single(measurement) for measurement in measurements]
    if out is None and len(found) > 1:
        raise click.UsageError(f"{len(found)} measurements in one picture: say where it goes, -o picture.png")
    target = out or found[0].with_suffix(".png")
    if target.suffix.lower() not in FORMATS:
        raise click.UsageError(f"-o {target}: allowed are {', '.join(FORMATS)}")
    plots.plot(found if len(found) > 1 else found[0], target, width=width, dpi=dpi, log=log)
    say(f"wrote {target}")


def _single(measurement: Path) -> Path:
    found = files(measurement)
    if len(found) > 1:
        names = ", ".join(str(path) for path in found[:4])
        raise click.UsageError(f"{measurement} holds {len(found)} measurements; name one: {names}")
    return found[0]
