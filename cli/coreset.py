"""`landscape coreset`: the examples of lowest curvature of each class, from a measured file."""

from __future__ import annotations

import io
from pathlib import Path

import click

from .progress import emit, say


@click.command("coreset", short_help="Choose the examples of lowest curvature of each class.")
@click.argument("measurement", type=click.Path(path_type=Path))
@click.option("--per-class", type=click.IntRange(min=1), required=True, help="Examples of each class.")
@click.option("--by", default="curvature", show_default=True, metavar="NAME",
              help="What ranks them: curvature (Curv(X)), normalized_curvature, gradient_norm, ...")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE.npy",
              help="Where the indices go, as a NumPy array. [default: they are printed, one a line]")  # fmt: skip
@click.option("--debug", is_flag=True, expose_value=False, help="Show the trace of an error too.")
def command(measurement: Path, per_class: int, by: str, out: Path | None) -> None:
    """Choose a coreset from MEASUREMENT, the input_curvature.h5 of a run.

    Written are indices in the order of the measured data, class by class, lowest first.
    """
    import numpy as np

    from landscape import atomic, results
    from landscape.training.coreset import select_coreset

    if out is not None and out.suffix != ".npy":
        raise click.UsageError(f"-o {out}: allowed is a name that ends in .npy")
    path = measurement / "input_curvature.h5" if measurement.is_dir() else measurement
    chosen = select_coreset(results.read(path), per_class=per_class, by=by)
    if out is None:
        emit("\n".join(map(str, chosen)))
        return
    buffer = io.BytesIO()
    np.save(buffer, chosen)
    atomic.replace(out, [buffer.getvalue()])
    say(f"wrote {len(chosen)} indices to {out}")
