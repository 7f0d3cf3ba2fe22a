"""Everything that the user names: `module:name` or `file.py:name`, losses, data, the first N examples.

torch is imported inside the functions that need it, so that asking for help does not wait for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import click

from . import causes
from .values import nearest

T = TypeVar("T")
_FILES: dict[Path, ModuleType] = {}

_SHORT_LOSSES = {
    "mse": "mse_loss",
    "l1": "l1_loss",
    "nll": "nll_loss",
    "huber": "huber_loss",
    "ce": "cross_entropy",
    "bce": "binary_cross_entropy",
    "bce_with_logits": "binary_cross_entropy_with_logits",
}


def named(spec: str, flag: str) -> Any:
    """Return the object that `module:name` or `file.py:name` names; `name` may be dotted.

    Args:
        spec: what the user wrote.
        flag: the flag it was written behind, for messages.

    Raises:
        click.UsageError: if there is no such module, file or name, or if importing it fails.
    """
    where, separator, name = spec.rpartition(":")
    if not separator or not where or not name:
        raise click.UsageError(
            f"{flag} {spec}: allowed is module:name or file.py:name, for example nets.py:make_model"
        )
    module = _from_file(where, flag) if where.endswith(".py") else _from_path(where, flag)
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            public = [n for n in dir(found) if not n.startswith("_")]
            listed = f"; it has {', '.join(public[:8])}" if 0 < len(public) <= 8 else ""
            text = f"{flag} {spec}: {where} has no {part!r}{nearest(part, public) or listed}"
            raise click.UsageError(text) from None
    return found


def made(
    spec: str,
    flag: str,
    arguments: Mapping[str, Any],
    *,
    used_as_is: Callable[[Any], bool],
    argument_flag: str,
) -> Any:
    """Return the named object: called with the arguments, or as it is.

    Args:
        spec: what the user wrote.
        flag: the flag it was written behind.
        arguments: keyword arguments for a callable.
        used_as_is: says of an object that it is not called, though it could be.
        argument_flag: the flag that gave the arguments, for messages.

    Raises:
        click.UsageError: if the arguments do not fit, or the user's function fails.
    """
    target = named(spec, flag)
    if used_as_is(target) or not callable(target):
        if arguments:
            kind = type(target).__name__
            raise click.UsageError(
                f"{argument_flag} is for something that is called; {spec} is a {kind} and is used as it is"
            )
        return target
    _check_arguments(target, spec, arguments, argument_flag)
    start_random_state()
    try:
        return target(**arguments)
    except Exception as error:
        raise click.UsageError(f"{flag} {spec}: calling it failed: {causes.cause(error)}") from error


def loss(spec: str, arguments: Mapping[str, Any]) -> Any:
    """Return a loss by its name in `torch.nn.functional`, or the one that `module:name` names.

    Args:
        spec: `cross_entropy`, `mse_loss` (or `mse`), ..., or `module:name`; a class is instantiated, a
            function is used as it is.
        arguments: keyword arguments of the loss, for example `ignore_index`.

    Raises:
        click.UsageError: if there is no such loss or it does not take the arguments.
    """
    target = named(spec, "--loss") if ":" in spec else _torch_loss(spec)
    if isinstance(target, type):
        return made(spec, "--loss", arguments, used_as_is=lambda _: False, argument_flag="--loss-arg")
    if not callable(target):
        kind = type(target).__name__
        raise click.UsageError(f"--loss {spec} is a {kind}; allowed is a loss(output, target)")
    return _with_arguments(target, spec, arguments) if arguments else target


def arguments(pairs: tuple[str, ...], flag: str) -> dict[str, Any]:
    """Return `k=v` texts as keyword arguments; a value is a Python literal, else a text.

    Raises:
        click.UsageError: for a text without `=`, or a key that is no name.
    """
    from .values import literal

    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or not key.isidentifier():
            raise click.UsageError(f"{flag} {pair}: allowed is name=value, for example {flag} width=16")
        found[key] = literal(value.strip())
    return found


class FirstExamples:
    """The first N examples of the data: whole batches, then one that is cut.

    Args:
        data: a re-iterable of batches, or one pair of tensors.
        count: N, at least 1.
    """

    def __init__(self, data: Any, count: int):
        from torch import Tensor

        is_pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)
        self.data, self.count = [data] if is_pair else data, count

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches.

        Raises:
            ValueError: if the tensors of a batch disagree about the number of examples.
        """
        from landscape import batches

        left = self.count
        for batch in self.data:
            size = batches.examples(batch)
            yield batch if size <= left else batches.cut(batch, 0, left)
            left -= size
            if left <= 0:
                return


def start_random_state() -> None:
    """Put the global generators into a fixed state before the user's code runs.

    A model that is made with random weights is then the same model when the same command is run again,
    and an interrupted measurement of it can go on.
    """
    import numpy as np
    import torch

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (the user's code may draw from it; ours does not)


def _with_arguments(loss: Any, spec: str, arguments: Mapping[str, Any]) -> Any:
    from torch import nn

    if isinstance(loss, nn.Module):
        raise click.UsageError(
            f"--loss-arg is for something that is called; {spec} is a module and is used as it is"
        )
    parameters = inspect.signature(loss).parameters
    unknown = [key for key in arguments if key not in parameters]
    if unknown:
        near = nearest(unknown[0], parameters)
        raise click.UsageError(f"--loss-arg: {spec} does not take {unknown[0]!r}{near}")
    return functools.partial(loss, **arguments)


def _torch_loss(spec: str) -> Any:
    from torch.nn import functional

    known = _functional_losses()
    name = spec.replace("-", "_")
    name = _SHORT_LOSSES.get(name, name)
    if name in known:
        return getattr(functional, name)
    near = nearest(spec, [*known, *_SHORT_LOSSES])
    raise click.UsageError(f"--loss {spec}: no such loss{near}; known are {', '.join(known)}, or module:name")


def _functional_losses() -> list[str]:
    from torch.nn import functional

    found = []
    for name, value in vars(functional).items():
        if name.startswith("_") or not inspect.isfunction(value):
            continue
        parameters = inspect.signature(value).parameters
        required = [p.name for p in parameters.values() if p.default is p.empty]
        if "reduction" in parameters and required == ["input", "target"]:
            found.append(name)
    return sorted(found)


def _check_arguments(target: Any, spec: str, given: Mapping[str, Any], flag: str) -> None:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return  # a builtin says nothing about its parameters; calling it will
    parameters = signature.parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [key for key in given if key not in parameters and not takes_any]
    takes = f"it takes {', '.join(parameters)}" if parameters else "it takes none"
    if unknown:
        raise click.UsageError(
            f"{flag}: {spec} does not take {unknown[0]!r}{nearest(unknown[0], parameters)}; {takes}"
        )
    try:
        signature.bind(**given)
    except TypeError as error:
        raise click.UsageError(
            f"{spec} cannot be called: {error}; give it as {flag} name=value ({takes})"
        ) from error


def _from_file(where: str, flag: str) -> ModuleType:
    path = Path(where).expanduser().resolve()
    if path in _FILES:
        return _FILES[path]  # --model and --data of one file share what it defines
    if not path.is_file():
        folder = path.parent
        files = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
        raise click.UsageError(f"{flag} {where}: no such file{nearest(path.name, files)}")
    _make_importable(path.parent)
    # under its own name where that is free, so that what it defines can be pickled by loader processes
    name = (
        path.stem
        if path.stem not in sys.modules and path.stem.isidentifier()
        else f"user_file_{abs(hash(path))}"
    )
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise click.UsageError(f"{flag} {where}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        _imported(lambda: spec.loader.exec_module(module), where, flag)  # type: ignore[union-attr]
    except click.UsageError:
        del sys.modules[name]
        raise
    _FILES[path] = module
    return module


def _from_path(where: str, flag: str) -> ModuleType:
    _make_importable(Path.cwd())
    importlib.invalidate_caches()
    try:
        found = importlib.util.find_spec(where) is not None
    except ModuleNotFoundError as error:
        if error.name and not (where == error.name or where.startswith(error.name + ".")):
            raise click.UsageError(f"{flag}: importing {where} failed: {causes.cause(error)}") from error
        found = False
    except (ImportError, ValueError, AttributeError) as error:
        raise click.UsageError(f"{flag}: importing {where} failed: {causes.cause(error)}") from error
    if not found:
        parent, _, last = where.rpartition(".")
        search = getattr(sys.modules.get(parent), "__path__", []) if parent else None
        names = [module.name for module in pkgutil.iter_modules(search)]
        near = nearest(last, names)
        raise click.UsageError(
            f"{flag} {where}: no such module{near}; the current directory is searched first"
        )
    return _imported(lambda: importlib.import_module(where), where, flag)


def _imported(action: Callable[[], T], where: str, flag: str) -> T:
    try:
        return action()
    except SystemExit as error:
        raise click.UsageError(
            f"{flag}: importing {where} ended the program; put what runs under if __name__ == '__main__':"
        ) from error
    except Exception as error:
        raise click.UsageError(f"{flag}: importing {where} failed: {causes.cause(error)}") from error


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
