"""`landscape merge`: the parts of a job array become one result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import report, show
from .progress import emit, say

REFUSED, TOLERANCE = 3, 4


@click.command("merge", short_help="Merge the parts that `measure --part i/n` measured.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--metric", multiple=True, metavar="FILE",
              help="A metric of your own, as it was measured: ./mine.py. Repeat for several.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Results as JSON; NaN is null.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the trace of an error too.")
def command(run: Path, metric: tuple[str, ...], as_json: bool) -> int:
    """Merge the parts in RUN, a run directory or one measurement (.h5), and print the results.

    They must be parts of one measurement (model, data, configuration, seed), and none may be missing; what one
    process would have measured comes out, bit for bit. A metric that stops at a tolerance may then need a further
    round: run the same --part commands again, and merge again.
    """
    from landscape import merging, results
    from landscape.errors import Refused
    from landscape.metrics import registry

    named = {m.name: m for m in map(registry.load, metric)}
    code = 0
    rows: list[report.Summary] = []
    merged: list[dict[str, Any]] = []
    for path in show.files(run):
        try:
            found = merging.merge(path, named.get(str(results.read(path).attrs.get("metric"))))
        except (Refused, results.ResultsError) as error:
            say(f"{path}: {' '.join(str(error).split())}")
            code = REFUSED  # the other measurements of the run are still worth merging
            continue
        if found.further:
            say(
                f"{path}: this round is complete, and its tolerance asks for units up to {found.further}: run the "
                "same --part commands again, then merge again"
            )
        if found.further or found.record.attrs["exit_code"]:
            code = code or TOLERANCE
        rows.append(report.summarize(found.record, path))
        merged.append(report.as_json(found.record, path) if as_json else {})
    if rows:
        emit(report.dump(merged) if as_json else report.table(rows))
    return code
