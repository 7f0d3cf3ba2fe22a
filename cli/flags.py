"""The flags of a metric are the fields of its dataclass.

`--rtol` goes to every named metric that has the field, `--trace.rtol` to that one; a flag that no named
metric has is a usage error that lists what they have, if they are few. Hyphens and underscores are the same.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import click

from . import values

_LISTED = 3  # metrics up to which a message lists the flags of each


class Flag(click.Option):
    """An option that knows under which heading of the help it stands."""

    def __init__(self, *declarations: str, group: str = "", **attributes: Any):
        super().__init__(list(declarations), **attributes)
        self.group = group


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a metric: its name, type, default and help."""

    name: str
    hint: Any
    default: Any
    help: str
    grows: bool

    @property
    def flag(self) -> str:
        """The name of its flag, without dashes in front."""
        return self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether it is written `--x` or `--no-x`."""
        return self.hint is bool


def fields_of(metric: type[Any]) -> dict[str, Field]:
    """Return the fields of a metric's dataclass that a user can set, by name."""
    hints = typing.get_type_hints(metric)
    return {
        field.name: Field(
            field.name,
            hints[field.name],
            None if field.default is dataclasses.MISSING else field.default,
            str(field.metadata.get("help", "")),
            bool(field.metadata.get("grows", False)),
        )
        for field in dataclasses.fields(metric)
        if field.init and not field.name.startswith("_")
    }


def sentence(metric: type[Any]) -> str:
    """Return the first sentence of a metric's docstring."""
    text = inspect.cleandoc(metric.__doc__ or "").split("\n\n")[0]
    return " ".join(text.split())


class MetricFlags:
    """The flags of the named metrics.

    Args:
        named: metric name -> class, those that the command names.
        known: metric name -> class, all that are registered (for messages only).
        taken: names of the command's own options, which no field may have.

    Raises:
        click.UsageError: if a field has the name of an option of the command.
    """

    def __init__(
        self,
        named: Mapping[str, type[Any]],
        known: Mapping[str, type[Any]] | None = None,
        taken: Sequence[str] = (),
    ):
        self.named, self.known = dict(named), dict(known or named)
        for name, metric in self.named.items():
            clash = sorted(set(fields_of(metric)) & set(taken))
            if clash:
                raise click.UsageError(
                    f"metric {name} has a field {clash[0]!r}, which is an option of landscape measure; "
                    "rename the field"
                )

    def options(self) -> list[click.Option]:
        """Return `--field` for each field of any named metric, and `--metric.field` for each metric's own.

        The second form is left out of the help, which says once that it exists, except where the first
        does not (a switch in one metric that takes a value in another).
        """
        made: dict[str, click.Option] = {}
        for name, metric in self.named.items():
            for field in fields_of(metric).values():
                owners = [other for other in self.named if field.name in fields_of(self.named[other])]
                shared = len({fields_of(self.named[other])[field.name].is_switch for other in owners}) == 1
                heading = f"Flags of {', '.join(owners)}"
                if shared and field.name not in made:
                    fields = {other: fields_of(self.named[other])[field.name] for other in owners}
                    forms = {values.describe(f.hint) for f in fields.values()}
                    form = forms.pop() if len(forms) == 1 else "VALUE"
                    text = _texts(fields, with_form=form == "VALUE")
                    made[field.name] = _option(field, field.flag, f"any__{field.name}", heading, text, form)
                own = f"{name}.{field.flag}"
                made[own] = _option(
                    field,
                    own,
                    f"{_key(name)}__{field.name}",
                    heading,
                    _text(field),
                    values.describe(field.hint),
                    shared,
                )
        return list(made.values())

    def settings(self, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return, for each named metric, the fields that the user set.

        Raises:
            click.UsageError: if a text does not fit the field's type.
        """
        chosen: dict[str, dict[str, Any]] = {}
        for name, metric in self.named.items():
            chosen[name] = {}
            for field in fields_of(metric).values():
                for key, flag in ((f"{_key(name)}__{field.name}", f"--{name}.{field.flag}"),
                                  (f"any__{field.name}", f"--{field.flag}")):  # fmt: skip
                    if given.get(key) is not None:
                        chosen[name][field.name] = _value(given[key], field, flag)
                        break
        return chosen

    def no_such(self, flag: str, own: Sequence[str]) -> click.UsageError:
        """Return the error for a flag that neither the command nor a named metric has.

        Args:
            flag: what the user wrote, with its dashes.
            own: the command's own options, with their dashes.
        """
        word = flag.lstrip("-")
        metric_name, _, field_name = word.rpartition(".")
        field_name = field_name.replace("-", "_")
        if metric_name:
            if metric_name not in self.named:
                also = f" (add --metric {metric_name})" if metric_name in self.known else ""
                text = f"{flag}: {metric_name} is not among the named metrics, {', '.join(self.named)}{also}"
                return click.UsageError(text + values.nearest(metric_name, self.named))
            has = list(fields_of(self.named[metric_name]))
            text = f"metric {metric_name} has no {field_name}{values.nearest(field_name, has)}"
            return click.UsageError(f"{text}; it has {', '.join(has)}")
        mine = [f"--{field.flag}" for metric in self.named.values() for field in fields_of(metric).values()]
        text = f"no flag {flag}{values.nearest(flag, [*mine, *own])}"
        owners = [name for name, metric in self.known.items() if field_name in fields_of(metric)]
        if owners:
            text += f"; {', '.join(owners)} has it, which is not among the named metrics"
        if len(self.named) <= _LISTED:  # without --metric all are named
            text += "".join(
                f"; {name} has {', '.join('--' + f.flag for f in fields_of(metric).values()) or 'no flags'}"
                for name, metric in self.named.items()
            )
        return click.UsageError(f"{text}. landscape measure --help lists all")


def _texts(fields: Mapping[str, Field], with_form: bool) -> str:
    """Return the help of a flag of several metrics, each different one with the metrics that it is of."""
    owners: dict[str, list[str]] = {}
    for name, field in fields.items():
        form = f"{values.describe(field.hint)} " if with_form else ""
        owners.setdefault(form + _text(field), []).append(name)
    if len(owners) == 1:
        return next(iter(owners))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in owners.items())


def _text(field: Field) -> str:
    default = f"[default: {values.show(field.default)}]"
    return f"{field.help.rstrip('.')} {default}".strip() if field.help else default


def _option(
    field: Field, flag: str, key: str, heading: str, text: str, form: str, hidden: bool = False
) -> click.Option:
    if field.is_switch:
        stem, _, last = flag.rpartition(".")
        off = f"{stem}.no-{last}" if stem else f"no-{last}"
        return Flag(f"--{flag}/--{off}", key, group=heading, default=None, help=text, hidden=hidden)
    return Flag(f"--{flag}", key, group=heading, type=str, metavar=form, help=text, hidden=hidden)


def _value(given: Any, field: Field, flag: str) -> Any:
    if field.is_switch:
        return bool(given)
    try:
        return values.parse(given, field.hint)
    except ValueError as error:
        form = values.describe(field.hint)
        # "is no number" says it all; of a list or a union it is one reading of several
        allowed = f"; allowed is {form}" if "," in form or form.endswith("|none") else ""
        raise click.UsageError(f"{flag}: {error}{allowed}") from error


def _key(metric: str) -> str:
    """Return a metric's name as part of a Python identifier (click wants one)."""
    return "".join(c if c.isalnum() else "_" for c in metric)
