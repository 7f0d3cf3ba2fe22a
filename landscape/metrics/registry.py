"""Finding a metric by name: ours, those of installed packages, and one in a file."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

from landscape.errors import UnknownMetric
from landscape.metrics.base import Metric
from landscape.record import NAME


def registered() -> dict[str, type[Metric]]:
    """Return every known metric by name: ours, and those of installed packages, which are imported for it.

    A package adds one with an entry point in the group `landscape.metrics`.
    """
    found = shipped() | {name: point.load() for name, point in _entry_points().items()}
    return dict(sorted(found.items()))


def shipped() -> dict[str, type[Metric]]:
    """Return the metrics of this package by name; nobody else's code is run."""
    return dict(sorted((m.name, m) for module in _ours() for m in _metrics_of(_imported(module))))


def shipped_class(name: str) -> type[Metric] | None:
    """Return the metric class of this package that is called so, from the file that is called like it."""
    module = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    found = getattr(_imported(module), name, None) if module in _ours() else None
    return found if isinstance(found, type) and issubclass(found, Metric) else None


def load(spec: str) -> type[Metric]:
    """Return a metric by name, or from a file `path.py` or `path.py:Class`.

    Raises:
        UnknownMetric: naming the known ones.
    """
    path, _, chosen = spec.partition(":")
    if path.endswith(".py"):
        return _from_file(Path(path), chosen)
    name, ours, theirs = spec.replace("-", "_"), shipped(), _entry_points()
    if name in ours:
        return ours[name]
    if name in theirs:
        return _checked(theirs[name].load(), spec)
    known = sorted({*ours, *theirs})
    near = difflib.get_close_matches(spec, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise UnknownMetric(f"unknown metric {spec!r}{hint} Known: {', '.join(known)}; or a file, ./mine.py")


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    """What installed packages add, by name, not imported; none takes the place of one of ours."""
    known = importlib.metadata.entry_points(group="landscape.metrics")
    ours = shipped()
    return {point.name: point for point in known if point.name not in ours}


def _checked(found: Any, spec: str) -> type[Metric]:
    """Refuse what is no metric, and a name that leads out of the run's directory."""
    if not (isinstance(found, type) and issubclass(found, Metric)):
        raise UnknownMetric(f"{spec} is no landscape.metrics.Metric")
    if not NAME.fullmatch(found.name):
        raise UnknownMetric(
            f"{spec} calls itself {found.name!r}; a metric's name is made of letters, digits and _"
        )
    return found


def _from_file(path: Path, chosen: str) -> type[Metric]:
    if not path.is_file():
        raise UnknownMetric(
            f"{path} does not exist; --metric takes a name or a Python file that defines a Metric"
        )
    spec = importlib.util.spec_from_file_location(f"landscape_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UnknownMetric(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    candidates = {m.__name__: m for m in _metrics_of(module)}
    if chosen and chosen in candidates:
        return _checked(candidates[chosen], f"{path}:{chosen}")
    if chosen or len(candidates) != 1:
        names = ", ".join(candidates) or "none"
        raise UnknownMetric(f"{path} defines the metrics {names}; say which one: --metric {path}:Name")
    return _checked(next(iter(candidates.values())), str(path))


def _ours() -> list[str]:
    here = pkgutil.iter_modules([str(Path(__file__).parent)])
    return [m.name for m in here if m.name != "registry" and not m.name.startswith("base")]


def _imported(module: str) -> Any:
    return importlib.import_module(f"{__package__}.{module}")


def _metrics_of(module: Any) -> list[type[Metric]]:
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Metric) and value.__module__ == module.__name__
    ]
