"""What the user asked to measure -> `landscape.Problem`s: one, or one for each checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import load
from .values import nearest

if TYPE_CHECKING:
    from landscape import Problem

DEFAULT_NAME = "digits_mlp"
# flags that say something about a model which --problem or the embedded default brings along
_OF_A_MODEL = ("model_arg", "checkpoint", "trust_checkpoint", "data", "data_arg", "loss", "loss_arg",
               "forward", "output", "target", "weight", "reduction")  # fmt: skip
_OF_A_PROBLEM = ("parameters", "mode", "device", "dtype", "microbatch", "products", "kernels")
DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Target:
    """One problem to measure.

    Attributes:
        problem: what is measured.
        name: the model's name.
        checkpoint: the file its weights came from, if any.
    """

    problem: Problem
    name: str
    checkpoint: Path | None


class Request:
    """The flags about model and data, checked before anything is loaded.

    Args:
        options: the values of the flags, by name.

    Raises:
        click.UsageError: if they do not go together, or a checkpoint is missing.
    """

    def __init__(self, options: Mapping[str, Any]):
        self.options = options
        if options["problem"]:
            self._exclude(["model", *_OF_A_MODEL, *_OF_A_PROBLEM, "examples"], "--problem brings its own")
        elif not options["model"]:
            self._exclude([*_OF_A_MODEL, "problem_arg"], "it needs --model")
        else:
            self._check_model_flags()
        self.checkpoints = _checkpoints(options["checkpoint"])
        patterns = options["checkpoint"]
        # a pattern means "one run each" also while it matches only one file
        self.several = len(patterns) > 1 or any(Path(p).is_file() is False for p in patterns)

    @property
    def name(self) -> str:
        """The model's name, after which the default run directory is called."""
        spec = self.options["problem"] or self.options["model"]
        if not spec:
            return DEFAULT_NAME
        where, _, name = spec.rpartition(":")
        if self.options["problem"]:
            return Path(where).stem if where.endswith(".py") else str(where.rpartition(".")[2])
        return str(name.rpartition(".")[2])

    def labels(self) -> list[str]:
        """The name of each checkpoint's run: its stem, or with its folder in front where stems repeat."""
        # "...pt" has the stem "..", which as a directory leads out of the run's
        stems = [path.stem.lstrip(".") or "checkpoint" for path in self.checkpoints]
        if len(set(stems)) == len(stems):
            return stems
        folders = [
            f"{path.resolve().parent.name}-{stem}" for path, stem in zip(self.checkpoints, stems, strict=True)
        ]
        if len(set(folders)) == len(folders):
            return folders
        raise click.UsageError(
            f"several checkpoints are called {stems[0]!r}, in folders of one name; measure them one by one with --out"
        )

    def targets(self, say: Callable[[str], None]) -> Iterator[Target]:
        """Yield one problem after the other; each is made only when its turn comes.

        Args:
            say: takes lines about what is measured.

        Raises:
            click.UsageError, landscape.Refused: naming what does not fit.
        """
        load.start_random_state()
        if self.options["problem"]:
            yield Target(self._own_problem(), self.name, None)
        elif not self.options["model"]:
            yield Target(self._default(say), self.name, None)
        else:
            yield from self._models(say)

    def _models(self, say: Callable[[str], None]) -> Iterator[Target]:
        from landscape import checkpoints

        spec = self.options["model"]
        keywords = self._keywords()
        model = self._model(spec)
        data = self._examples(self._data())
        if not self.checkpoints:
            say(f"no --checkpoint: measuring the weights that {spec} comes with")
            yield Target(self._problem(model, data, keywords), self.name, None)
        for path in self.checkpoints:
            checkpoints.load_into(model, path, say, trust=self.options["trust_checkpoint"])
            yield Target(self._problem(model, data, keywords), self.name, path)

    def _own_problem(self) -> Problem:
        from landscape import Problem

        spec = self.options["problem"]
        given = load.arguments(self.options["problem_arg"], "--problem-arg")
        problem = load.made(spec, "--problem", given, argument_flag="--problem-arg",
                            used_as_is=lambda found: isinstance(found, Problem))  # fmt: skip
        if not isinstance(problem, Problem):
            kind = type(problem).__name__
            raise click.UsageError(
                f"--problem {spec} gave a {kind}; allowed is a landscape.Problem or a function of one"
            )
        return problem

    def _default(self, say: Callable[[str], None]) -> Problem:
        from landscape import testbeds

        model, loss, data, info = testbeds.load_default()
        say(f"no --model: measuring the embedded default, {info.sentence}")
        keywords = self._keywords() | {"loss": loss}
        return self._problem(model, self._examples(data), keywords)

    def _model(self, spec: str) -> Any:
        from torch import nn

        given = load.arguments(self.options["model_arg"], "--model-arg")
        model = load.made(spec, "--model", given, argument_flag="--model-arg",
                          used_as_is=lambda found: isinstance(found, nn.Module))  # fmt: skip
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise click.UsageError(
                f"--model {spec} gave a {kind}; allowed is a torch.nn.Module or a function of one"
            )
        return model

    def _data(self) -> Any:
        spec = self.options["data"]
        given = load.arguments(self.options["data_arg"], "--data-arg")
        return load.made(spec, "--data", given, argument_flag="--data-arg",
                         used_as_is=lambda found: hasattr(type(found), "__iter__"))  # fmt: skip

    def _examples(self, data: Any) -> Any:
        count = self.options["examples"]
        if count is None:
            return data
        # refused here: cutting would hide from the adapter that there are no batches to cut
        _check_batches(data)
        return load.FirstExamples(data, count)

    def _keywords(self) -> dict[str, Any]:
        import torch

        _check_device(self.options["device"])
        keywords = {
            name: self.options[name]
            for name in ("reduction", "mode", "device", "microbatch", "products", "kernels")
        }
        patterns = [part.strip() for text in self.options["parameters"] for part in text.split(",")]
        keywords["parameters"] = [pattern for pattern in patterns if pattern] or None
        keywords["dtype"] = getattr(torch, self.options["dtype"]) if self.options["dtype"] else None
        for name in ("forward", "output", "target", "weight"):
            spec = self.options[name]
            keywords[name] = load.named(spec, f"--{name}") if spec else None
        if self.options["loss"]:
            given = load.arguments(self.options["loss_arg"], "--loss-arg")
            keywords["loss"] = load.loss(self.options["loss"], given)
        return {name: value for name, value in keywords.items() if value is not None}

    def _problem(self, model: Any, data: Any, keywords: Mapping[str, Any]) -> Problem:
        from landscape import Problem

        try:
            return Problem(model, data=data, **keywords)
        except (ValueError, TypeError) as error:
            raise click.UsageError(" ".join(str(error).split())) from error

    def _check_model_flags(self) -> None:
        if self.options["problem_arg"]:
            raise click.UsageError("--problem-arg needs --problem")
        if not self.options["data"]:
            raise click.UsageError(
                "--model needs --data module:name, a re-iterable of batches (input, target), for example a DataLoader"
            )
        if self.options["forward"]:
            self._exclude(["loss", "loss_arg", "output", "target"], "--forward computes the loss itself")
        elif not self.options["loss"]:
            raise click.UsageError(
                "--model needs --loss: the name of a loss of torch.nn.functional such as cross_entropy, or module:name"
            )

    def _exclude(self, names: list[str], why: str) -> None:
        for name in names:
            if self.options[name]:
                raise click.UsageError(f"--{name.replace('_', '-')} does not go here: {why}")


def _checkpoints(patterns: Iterable[str]) -> list[Path]:
    from landscape.checkpoint_files import expand
    from landscape.errors import Refused

    try:
        return expand(patterns)
    except Refused as error:
        raise click.UsageError(f"--checkpoint {error}") from error


def check_dtype(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    """Take `float64` and `torch.float64`."""
    name = None if text is None else text.removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise click.UsageError(f"--dtype {text}: allowed are {', '.join(DTYPES)}{nearest(name, DTYPES)}")
    return name


def _check_batches(data: Any) -> None:
    import torch

    from landscape.batches import Batches

    try:
        Batches(data, torch.device("cpu"), torch.float32)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error


def _check_device(device: str | None) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].partition(" at start of device")[0]
        raise click.UsageError(f"--device {device} cannot be used here: {why}") from error
