"""One file per metric; `base` is the interface they share (`base_...` what a few share), `registry` finds them by name.

>>> from landscape import metrics
>>> metrics.Trace(rtol=0.01).name
'trace'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from landscape.metrics.trace import Trace as Trace


def __getattr__(name: str) -> Any:
    if name.startswith(("_", "base")) or name == "registry":
        raise AttributeError(name)
    from landscape.metrics import registry

    # Ours first: what packages add is told by reading the list of every installed one.
    if (metric := registry.shipped_class(name)) is not None:
        return metric
    for metric in registry.registered().values():
        if metric.__name__ == name:
            return metric
    raise AttributeError(f"landscape.metrics has no metric {name!r}")
