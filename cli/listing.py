"""`landscape metrics`: what can be measured."""

from __future__ import annotations

from typing import Any

import click

from . import flags, report, values
from .progress import emit


@click.command("metrics", short_help="List the metrics and their flags.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the trace of an error too.")
def command(as_json: bool) -> None:
    """List the metrics: name, headline variable, what it is, its fields and their defaults."""
    from landscape.metrics import registry

    known = registry.registered()
    if as_json:
        emit(report.dump([_plain(name, metric) for name, metric in known.items()]))
        return
    for index, (name, metric) in enumerate(known.items()):
        if index:
            emit("")
        headline = headline_of(metric)
        emit(name if headline in (name, "") else f"{name} (headline: {headline})")
        emit(f"  {flags.sentence(metric)}")
        rows = [
            (f"--{field.flag}", values.describe(field.hint), values.show(field.default), field.help)
            for field in flags.fields_of(metric).values()
        ]
        if rows:
            lines = report.aligned([("flag", "values", "default", ""), *rows]).splitlines()
            emit("\n".join("    " + line for line in lines))


def headline_of(metric: type[Any]) -> str:
    """Return the name of a metric's headline variable."""
    return str(getattr(metric, "headline", ""))


def _plain(name: str, metric: type[Any]) -> dict[str, Any]:
    return {
        "name": name,
        "headline": headline_of(metric),
        "description": flags.sentence(metric),
        "fields": [
            {
                "name": f.name,
                "values": values.describe(f.hint),
                "default": f.default,
                "help": f.help,
                "grows": f.grows,
            }
            for f in flags.fields_of(metric).values()
        ],
    }
