"""`landscape measure`: parse, make the problem, measure, print."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from . import causes, report
from .flags import MetricFlags, fields_of
from .options import grouped_help, measure_options
from .problems import Request, Target
from .progress import Reporter, emit, say

if TYPE_CHECKING:
    from landscape import Problem
    from landscape.metrics.base import Metric

_FLAGS = "landscape_cli.metric_flags"
TOLERANCE, INTERRUPTED = 4, 130


class Interrupted(click.ClickException):
    """Ctrl-C or SIGTERM during a measurement."""

    exit_code = INTERRUPTED


class MeasureCommand(click.Command):
    """A command that has, besides its own options, those of the metrics that the command line names."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the named metrics first: they say which other flags there are."""
        ctx.meta[_FLAGS] = _metric_flags(_named(args), [p.name or "" for p in self.params])
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            own = [name for param in self.params for name in param.opts]
            raise ctx.meta[_FLAGS].no_such(error.option_name, own) from error

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the options, those of the named metrics included."""
        found: MetricFlags | None = ctx.meta.get(_FLAGS)
        return [*super().get_params(ctx), *(found.options() if found else [])]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in groups."""
        grouped_help(self.get_params(ctx), ctx, formatter)


def measure(ctx: click.Context, **options: Any) -> int:
    """Measure a trained model: one file for each metric, and a line on stdout.

    Without --model and --problem, a small network trained on digits is measured. Running the same command
    again goes on where it was interrupted, and prints what is complete. A flag of a metric goes to every
    named metric that has it; --trace.rtol goes to trace alone. Hyphens and underscores are the same.
    """
    flags: MetricFlags = ctx.meta[_FLAGS]
    if not options["metric"]:
        raise click.UsageError(f"name what to measure: --metric {' or --metric '.join(flags.known)}")
    metrics = _configured(flags, options)
    request = Request(options)
    run = _Run(metrics, request, options)
    with _terminated_is_interrupted():
        return run.dry() if options["dry_run"] else run.measure()


class _Run:
    """All measurements of one command."""

    def __init__(self, metrics: Mapping[str, Metric], request: Request, options: Mapping[str, Any]):
        self.metrics, self.request, self.options = metrics, request, options
        self.out: Path = options["out"] or Path("runs") / request.name
        names_a_file = self.out.suffix == ".h5"
        if names_a_file and (len(metrics) > 1 or request.several):
            what = "several metrics" if len(metrics) > 1 else "several checkpoints"
            raise click.UsageError(f"--out {self.out} names one file; {what} need a directory")
        self.files: dict[Path, str] = {}
        self.labels = request.labels() if request.several else []
        # One of several ranks prints; the others end well, or the launcher would end this one at it.
        self.speaks = os.environ.get("RANK", "0") == "0" or options["shard"] == "none"

    def measure(self) -> int:
        """Measure everything; return the exit status."""
        from landscape import ranks, run
        from landscape.errors import RankLost

        ranks.use_own_device()
        rows: list[report.Summary] = []
        results: list[dict[str, Any]] = []
        path = self.out
        try:
            with Reporter() as progress:
                for target, folder in self._targets():
                    for name, metric in self.metrics.items():
                        path = _file(folder, name)
                        found = run.measure(
                            metric, target.problem, out=folder, seed=self.options["seed"],
                            overwrite=self.options["overwrite"], check=not self.options["no_check"],
                            progress=progress, memory=self.options["memory"], wait=self.options["wait"],
                            shard=self.options["shard"], part=self.options["part"], timeout=self.options["timeout"],
                        )  # fmt: skip
                        progress.close()
                        if self.options["part"] and not found.attrs["complete"]:
                            say(_part_done(found, path, self.options["part"]))
                            continue
                        rows.append(report.summarize(found, path))
                        if self.options["as_json"]:
                            results.append(report.as_json(found, path))
        except KeyboardInterrupt as error:
            raise Interrupted(_how_to_go_on(path)) from error
        except RankLost as error:
            raise Interrupted(f"{error}; {_how_to_go_on(path, ' on any number of ranks,')}") from error
        finally:
            # also after an interruption or a refusal: what was measured before it is worth seeing
            if self.speaks and (rows or self.options["as_json"]):
                emit(report.dump(results) if self.options["as_json"] else report.table(rows))
        return self._warn_of_tolerance(rows)

    def dry(self) -> int:
        """Say what would be measured, where it would go, and what it would cost."""
        for target, folder in self._targets():
            problem = target.problem
            problem.gradient()  # the first one pays for starting up
            began = time.perf_counter()
            problem.gradient()
            seconds = time.perf_counter() - began
            emit(f"{target.name}: {problem.size} parameters, one gradient over the data {seconds:.2g} s")
            for name, metric in self.metrics.items():
                least, most = metric.outlook(problem)
                path = _file(folder, name)
                state = "exists: it is resumed or printed" if path.exists() else "new"
                counts = f"{least}" if least == most else f"{least} to {most}"
                what, gradients = metric.outlook_in
                times = [_duration(gradients * seconds * n) for n in (least, most)]
                about = times[0] if least == most else f"{times[0]} to {times[1]}"
                emit(f"  {name}: {counts} {what}, about {about} -> {path} ({state})")
                emit(f"    {self._within_memory(metric, problem)}")
                emit("    " + ", ".join(f"{key}={value}" for key, value in metric.configuration().items()))
        return 0

    def _within_memory(self, metric: Metric, problem: Problem) -> str:
        from landscape import memory, run
        from landscape.metrics.base import MEMORY

        allowed = MEMORY if self.options["memory"] is None else self.options["memory"]
        plan = run.memory_plan(metric, problem, allowed, check=not self.options["no_check"])
        cut = f"at most {plan.microbatch} examples" if plan.microbatch else "batches as they come"
        about = "memory unknown" if plan.needed is None else f"about {memory.in_words(plan.needed)}"
        return f"{cut}, {plan.block} vectors at once; {about} of {memory.in_words(allowed)} beside the model"

    def _targets(self) -> Iterator[tuple[Target, Path]]:
        tell = say if self.speaks else lambda _: None
        for index, target in enumerate(self.request.targets(tell)):
            yield target, self.out / self.labels[index] if self.labels else self.out

    def _warn_of_tolerance(self, rows: list[report.Summary]) -> int:
        missed = [row for row in rows if row.converged is False and self.speaks]
        for row in missed:
            larger = [f"--{f.flag}" for f in fields_of(type(self.metrics[row.metric])).values() if f.grows]
            how = f"; to go on from here, change {' or '.join(larger)}" if larger else ""
            say(f"{row.metric} did not reach its tolerance{how}")
        return TOLERANCE if missed else 0


def _named(args: list[str]) -> list[str]:
    """Return what stands behind each `--metric`, before anything is parsed."""
    found: list[str] = []
    for word, following in itertools.zip_longest(args, args[1:]):
        if word == "--metric" and following:
            found.append(following)
        elif word.startswith("--metric="):
            found.append(word.removeprefix("--metric="))
    return found


def _metric_flags(specs: list[str], taken: list[str]) -> MetricFlags:
    from landscape.metrics import registry

    known: dict[str, type[Metric]] = registry.shipped()
    if not specs:
        return MetricFlags(known, known, taken)
    named: dict[str, type[Metric]] = {}
    for spec in specs:
        metric = registry.load(spec)
        if metric.name in named:
            raise click.UsageError(
                f"--metric {spec}: {metric.name} is named twice; measure it twice with two --out"
            )
        named[metric.name] = metric
    return MetricFlags(named, known, taken)


def _configured(flags: MetricFlags, options: Mapping[str, Any]) -> dict[str, Metric]:
    chosen = flags.settings(options)
    metrics: dict[str, Metric] = {}
    for name, settings in chosen.items():
        try:
            metrics[name] = flags.named[name](**settings)
        except (ValueError, TypeError) as error:
            raise click.UsageError(f"{name}: {error}") from error
    return metrics


def _file(folder: Path, metric: str) -> Path:
    return folder if folder.suffix == ".h5" else folder / f"{metric}.h5"


def _part_done(found: Any, path: Path, part: tuple[int, int]) -> str:
    units = int(found["done"].sum()) if "done" in found else 0
    return (
        f"part {part[0]}/{part[1]} of {found.attrs['metric']} is done ({units} of {found.attrs['stop']} units known "
        f"to it); when all are: landscape merge {path.parent}"
    )


def _how_to_go_on(path: Path, on: str = "") -> str:
    from landscape import journal

    kept = (
        f"what is done is kept in {journal.kept_in(path)}"
        if journal.kept_in(path)
        else "nothing was finished yet"
    )
    return f"interrupted; {kept}; run the same command again{on} to go on"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Treat SIGTERM, which batch systems send before the time is up, like Ctrl-C."""
    came = False

    def interrupt(_: int, __: FrameType | None) -> None:
        nonlocal came
        team = causes.team()
        if came or (team is not None and team.leaving):
            return  # on the way out already: what is done is being written
        came = True
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


command = MeasureCommand(
    "measure",
    callback=click.pass_context(measure),
    params=[*measure_options()],
    help=measure.__doc__,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
    short_help="Measure a trained model.",
)
