"""The flags of `landscape measure`, in the groups in which its help shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import values
from .flags import Flag
from .problems import check_dtype

WHAT = "What to measure"
MODEL = "The model and its data"
HOW = "How the loss is computed (the keywords of landscape.Problem)"
WHERE = "The run, and where results go"


def measure_options() -> list[click.Option]:
    """Return the options that do not depend on the named metrics."""
    return [*_what(), *_model(), *_how(), *_where()]


def grouped_help(params: list[click.Parameter], ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the options under the headings of their groups."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for param in params:
        record = param.get_help_record(ctx)
        if record is not None:
            groups.setdefault(getattr(param, "group", "") or WHERE, []).append(record)
    for heading, records in groups.items():
        with formatter.section(heading):
            formatter.write_dl(records)


def _what() -> list[click.Option]:
    return [
        Flag("--metric", group=WHAT, multiple=True, metavar="NAME",
             help="A metric: a name that `landscape metrics` lists, or a file, ./mine.py. Repeat for several."),
        Flag("--problem", group=WHAT, metavar="FILE.py:NAME",
             help="A landscape.Problem or a function that makes one, in place of the flags about model and data."),
        Flag("--problem-arg", group=WHAT, multiple=True, metavar="NAME=VALUE", help="An argument of that function."),
    ]  # fmt: skip


def _model() -> list[click.Option]:
    return [
        Flag("--model", group=MODEL, metavar="MODULE:NAME",
             help="A torch.nn.Module or a function that makes one; module:name or file.py:name. "
             "[default: a small network trained on digits, which comes with its data and loss]"),
        Flag("--model-arg", group=MODEL, multiple=True, metavar="NAME=VALUE",
             help="An argument of that function, for example width=16."),
        Flag("--checkpoint", group=MODEL, multiple=True, metavar="FILE",
             help="Weights: torch.save of a state dict, or safetensors. A pattern in quotes, 'epoch*.pt', or several "
             "flags make one run each, in OUT/<name of the file>."),
        Flag("--trust-checkpoint", group=MODEL, is_flag=True,
             help="Read a pickle that runs code. Only for files whose maker you know."),
        Flag("--data", group=MODEL, metavar="MODULE:NAME",
             help="Batches (input, target) that can be read again and again: a DataLoader without shuffling, a list, "
             "or a function that makes one."),
        Flag("--data-arg", group=MODEL, multiple=True, metavar="NAME=VALUE", help="An argument of that function."),
        Flag("--examples", group=MODEL, type=click.IntRange(min=1), metavar="N",
             help="Only the first N examples of the data."),
        Flag("--loss", group=MODEL, metavar="NAME",
             help="A loss of torch.nn.functional, for example cross_entropy or mse, or module:name of "
             "loss(output, target)."),
        Flag("--loss-arg", group=MODEL, multiple=True, metavar="NAME=VALUE",
             help="An argument of the loss, for example ignore_index=0."),
    ]  # fmt: skip


def _how() -> list[click.Option]:
    return [
        Flag("--forward", group=HOW, metavar="MODULE:NAME",
             help="step(model, batch) -> mean loss, in place of --loss."),
        Flag("--output", group=HOW, metavar="MODULE:NAME", help="output(model, batch), for batches of another form."),
        Flag("--target", group=HOW, metavar="MODULE:NAME", help="target(batch), for batches of another form."),
        Flag("--weight", group=HOW, metavar="MODULE:NAME",
             help="weight(batch): what the loss of a batch was divided by. [default: known for PyTorch's losses]"),
        Flag("--reduction", group=HOW, type=click.Choice(["mean", "sum"]),
             help="Whether the loss is a batch's mean or its sum. [default: mean]"),
        Flag("--parameters", group=HOW, multiple=True, metavar="PATTERN",
             help="Which parameters: names or patterns, 'layer1.*', comma-separated or repeated. "
             "[default: all that require grad]"),
        Flag("--mode", group=HOW, type=click.Choice(["eval", "train"]), help="Mode of the model. [default: eval]"),
        Flag("--device", group=HOW, metavar="DEVICE", help="cpu, cuda, cuda:1. [default: where the model is]"),
        Flag("--dtype", group=HOW, metavar="TYPE", callback=check_dtype,
             help="float32, float64, ... [default: the model's]"),
        Flag("--microbatch", group=HOW, type=click.IntRange(min=1), metavar="N",
             help="The most examples in one pass; fewer need less memory. [default: the batches as they come]"),
        Flag("--products", group=HOW, type=click.Choice(["auto", "autodiff", "difference"]),
             help="How curvature products are made. [default: auto]"),
        Flag("--kernels", group=HOW, type=click.Choice(["auto", "none"]),
             help="Cheaper kernels for products where they are exact. [default: auto]"),
    ]  # fmt: skip


def _where() -> list[click.Option]:
    return [
        Flag("--out", group=WHERE, type=click.Path(path_type=Path), metavar="PATH",
             help="The run directory, or for one metric its file, x.h5. [default: runs/<name of the model>]"),
        Flag("--seed", group=WHERE, type=int, default=0, help="Seed of the measurement. [default: 0]"),
        Flag("--overwrite", group=WHERE, is_flag=True,
             help="Start anew where another configuration, model or data was measured before."),
        Flag("--part", group=WHERE, metavar="I/N", callback=_part,
             help="Measure part I of N of the units, in a job of its own; `landscape merge` puts the parts together."),
        Flag("--shard", group=WHERE, type=click.Choice(["units", "data", "none"]), default="units",
             help="What the ranks of torchrun divide: units, or the data of every product. [default: units]"),
        Flag("--timeout", group=WHERE, type=click.FloatRange(min=1.0), metavar="SECONDS", default=120.0,
             help="After how long without a sign of life another rank counts as lost. [default: 120]"),
        Flag("--wait", group=WHERE, is_flag=True,
             help="Wait while another process measures into the same file; else this is refused, naming it."),
        Flag("--memory", group=WHERE, metavar="SIZE", callback=_memory,
             help="What the measurement may use beside the model and its data; larger batches are cut to fit. "
             "[default: 8GiB]"),
        Flag("--no-check", group=WHERE, is_flag=True,
             help="Skip the check of determinism and of second derivatives; the result says so."),
        Flag("--dry-run", group=WHERE, is_flag=True,
             help="Say what would be measured and what it would cost; measure nothing."),
        Flag("--json", "as_json", group=WHERE, is_flag=True, help="Results as JSON; NaN is null."),
        Flag("--debug", group=WHERE, is_flag=True, expose_value=False, help="Show the trace of an error too."),
    ]  # fmt: skip


def _part(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, _slash, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise click.UsageError(f"--part: {text!r} is no part; allowed is I/N with 1 <= I <= N, such as 3/16")


def _memory(_: click.Context, __: click.Parameter, text: str | None) -> Any:
    try:
        return None if text is None else values.size(text)
    except ValueError as error:
        raise click.UsageError(f"--memory: {error}") from error
