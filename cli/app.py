"""The command `landscape` and what its exit status means.

0 done, 2 usage, 3 refused (mismatch, failed check, unreadable file), 4 tolerance not reached,
130 interrupted. A user's mistake is one line on stderr; `--debug` shows the trace as well.
"""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from . import causes, compare, coreset, listing, measure, merge, plot, show
from .progress import say

USAGE, REFUSED, TOLERANCE, INTERRUPTED = 2, 3, 4, 130


class App(click.Group):
    """A group whose errors are one line and whose exit status is the table above."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,  # noqa: ARG002  (click's signature)
        **extra: Any,
    ) -> Any:
        """Run the command line and leave with its exit status."""
        words = list(sys.argv[1:] if args is None else args)
        parent = super().main

        def run() -> Any:
            return parent(words, prog_name or "landscape", complete_var, standalone_mode=False, **extra)

        code = guarded(run, debug="--debug" in words)
        if not standalone_mode:
            return code
        if code and causes.team() is not None:
            # What is left of a broken process group may end the process in its own way, with a code of its own.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; a typo is answered with the nearest ones."""
        from .values import nearest

        if args and args[0] not in self.commands and not args[0].startswith("-"):
            names = sorted(self.commands)
            near = nearest(args[0], names)
            raise click.UsageError(f"no command {args[0]!r}{near}; there are {', '.join(names)}")
        return super().resolve_command(ctx, args)


def guarded(run: Callable[[], Any], debug: bool = False) -> int:
    """Run a command; turn what it raises into one line on stderr and an exit status.

    Args:
        run: returns an exit status or None.
        debug: whether to show the trace of a user's mistake too.
    """
    try:
        result = run()
    except click.Abort as error:
        if isinstance(error.__cause__, EOFError):
            raise error.__cause__ from None
        say("interrupted; run the same command again to go on")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001  (sorted out, and shown with its trace where it is a bug)
        code, line = explain(error)
        team = causes.team()
        if team is not None and not team.first_to_tell():
            return code
        if debug or not line:
            traceback.print_exc()
        if not line:
            line = f"unexpected {type(error).__name__}; this looks like a bug of landscape, please report the trace"
        own = team is not None and code != INTERRUPTED
        say(f"rank {team.rank}: {line}" if team is not None and own else line)
        return code
    return result if isinstance(result, int) else 0


def explain(error: Exception) -> tuple[int, str]:
    """Return the exit status of an error and its line; an empty line for what looks like a bug of ours."""
    if isinstance(error, click.ClickException):
        return (error.exit_code if error.exit_code != 1 else USAGE), error.format_message().rstrip(".")
    # not at the top: they cost 0.2 s that `--help` need not wait for
    from landscape.errors import RankLost, Refused, UnknownMetric
    from landscape.plots import PlotError
    from landscape.results import ResultsError

    text = " ".join(str(error).split())
    if isinstance(error, Refused | ResultsError | PlotError):
        return REFUSED, text
    if isinstance(error, UnknownMetric):
        return USAGE, text
    if isinstance(error, RankLost):
        return INTERRUPTED, text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return REFUSED, f"out of memory ({text[:120]}); give --microbatch, or a smaller --memory"
    if isinstance(error, ValueError | TypeError) and _is_deliberate(error):
        return USAGE, text
    origin = _users_part(error)
    if origin:
        return USAGE, f"{origin} raised {causes.cause(error)}; --debug shows the trace"
    return 1, ""


def _is_deliberate(error: Exception) -> bool:
    """Return whether the error was raised, as a message to the user, by a `raise` of landscape itself."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    last = frames[-1]
    is_ours = (
        "landscape" in Path(last.filename).parent.parts or Path(last.filename).parent == Path(__file__).parent
    )
    return is_ours and linecache.getline(last.filename, last.lineno or 0).strip().startswith("raise")


def _users_part(error: Exception) -> str:
    """Return whose code an error came out of: "the data", "the model", "the loss", "your code", or ""."""
    files = [Path(frame.filename).as_posix() for frame in traceback.extract_tb(error.__traceback__)]
    if any("/torch/utils/data/" in name for name in files):
        return "the data"
    if any(name.endswith("/torch/nn/modules/module.py") for name in files):
        return "the model or its loss"
    if any(name.endswith("/torch/nn/functional.py") for name in files):
        return "the loss"
    return "your code" if any(causes.is_users(name) for name in files) else ""


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        try:
            version = metadata.version("landscape-toolkit")
        except metadata.PackageNotFoundError:
            from landscape._version import __version__ as version
        click.echo(f"landscape {version}")
        ctx.exit()


app = App(
    "landscape",
    commands={c.name or "": c for c in (
        measure.command, show.command, compare.command, merge.command, plot.command, coreset.command, listing.command
    )},
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[
        click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version,
                     help="Show the version and leave."),
        click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the trace of an error too."),
    ],
    help="Measure how flat, sharp or curved the loss of a trained PyTorch model is, and how sure that is.",
    epilog="Start with: landscape measure --metric trace",
)  # fmt: skip
