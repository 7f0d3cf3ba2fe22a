"""Measure how flat, sharp or curved the loss of a trained PyTorch model is, and how sure that is.

The public names are loaded on first use: `import landscape.results` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from landscape._version import __version__ as __version__

if TYPE_CHECKING:
    from landscape import directions as directions
    from landscape import estimators as estimators
    from landscape import metrics as metrics
    from landscape import training as training
    from landscape import transforms as transforms
    from landscape.errors import RankLost as RankLost
    from landscape.errors import Refused as Refused
    from landscape.errors import UnknownMetric as UnknownMetric
    from landscape.merging import merge as merge
    from landscape.metrics.base import evaluate as evaluate
    from landscape.operators import empirical_fisher as empirical_fisher
    from landscape.operators import fisher as fisher
    from landscape.operators import ggn as ggn
    from landscape.operators import hessian as hessian
    from landscape.operators import input_hessian as input_hessian
    from landscape.problem import Problem as Problem
    from landscape.results import ResultsError as ResultsError
    from landscape.results import open as open  # noqa: A004
    from landscape.run import measure as measure

_HOME = {
    "Problem": "problem",
    "RankLost": "errors",
    "Refused": "errors",
    "ResultsError": "results",
    "UnknownMetric": "errors",
    "empirical_fisher": "operators",
    "evaluate": "metrics.base",
    "fisher": "operators",
    "ggn": "operators",
    "hessian": "operators",
    "input_hessian": "operators",
    "measure": "run",
    "merge": "merging",
    "open": "results",
}
_MODULES = ("directions", "estimators", "metrics", "plots", "results", "testbeds", "training", "transforms")

__all__ = [*_HOME, *_MODULES, "__version__"]  # noqa: PLE0604  (names, all strings)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"landscape.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"landscape.{name}")
    raise AttributeError(f"module 'landscape' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
