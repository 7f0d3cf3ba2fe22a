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


def registered() -> dict[str, type[Metric]]:
    """Return every known metric by name: ours, and those of installed packages.

    A package adds one with an entry point in the group `landscape.metrics`.
    """
    found = {m.name: m for module in _ours() for m in _metrics_of(_imported(module))}
    for point in importlib.metadata.entry_points(group="landscape.metrics"):
        found.setdefault(point.name, point.load())
    return dict(sorted(found.items()))


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
    known = registered()
    if spec.replace("-", "_") in known:
        return known[spec.replace("-", "_")]
    near = difflib.get_close_matches(spec, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise UnknownMetric(f"unknown metric {spec!r}{hint} Known: {', '.join(known)}; or a file, ./mine.py")


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
        return candidates[chosen]
    if chosen or len(candidates) != 1:
        names = ", ".join(candidates) or "none"
        raise UnknownMetric(f"{path} defines the metrics {names}; say which one: --metric {path}:Name")
    return next(iter(candidates.values()))


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
