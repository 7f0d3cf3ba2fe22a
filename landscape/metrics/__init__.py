"""One file per metric; `base` is the interface they share.

>>> from landscape import metrics
>>> metrics.Trace(rtol=0.01).name
'trace'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from landscape.metrics.trace import Trace as Trace


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name == "base":
        raise AttributeError(name)
    from landscape.metrics import base

    # Ours first: what packages add is told by reading the list of every installed one.
    for found in (base.shipped, base.registered):
        for metric in found().values():
            if metric.__name__ == name:
                return metric
    raise AttributeError(f"landscape.metrics has no metric {name!r}")
