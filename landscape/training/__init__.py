"""What the measures are used for: curvature penalties, low-curvature layers, coreset selection.

>>> import torch
>>> from landscape import training
>>> training.CenteredSoftplus(beta=5.0)(torch.zeros(1)).item()
0.0
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from landscape.training.coreset import select_coreset as select_coreset
    from landscape.training.layers import CenteredSoftplus as CenteredSoftplus
    from landscape.training.layers import LipschitzBatchNorm as LipschitzBatchNorm
    from landscape.training.low_curvature import low_curvature_penalty as low_curvature_penalty
    from landscape.training.low_curvature import to_low_curvature as to_low_curvature
    from landscape.training.penalties import cure_penalty as cure_penalty
    from landscape.training.penalties import curvature_penalty as curvature_penalty
    from landscape.training.penalties import gradient_penalty as gradient_penalty
    from landscape.training.spectral import spectrally_normalized as spectrally_normalized

_HOME = {
    "CenteredSoftplus": "layers",
    "LipschitzBatchNorm": "layers",
    "cure_penalty": "penalties",
    "curvature_penalty": "penalties",
    "gradient_penalty": "penalties",
    "low_curvature_penalty": "low_curvature",
    "select_coreset": "coreset",
    "spectrally_normalized": "spectral",
    "to_low_curvature": "low_curvature",
}

__all__ = [*_HOME]  # noqa: PLE0604  (names, all strings)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"landscape.training.{_HOME[name]}"), name)
    raise AttributeError(f"module 'landscape.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
