"""The embedded default: digits, small trained networks, losses with a known answer.

The names below are loaded on first use, so that importing the package costs no torch. The functions
`digits.digits` and `train.train` carry the name of their file and are imported from there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from landscape.testbeds.digits import DefaultInfo as DefaultInfo
    from landscape.testbeds.digits import batches as batches
    from landscape.testbeds.digits import digits_mlp as digits_mlp
    from landscape.testbeds.digits import load_default as load_default
    from landscape.testbeds.digits import split as split
    from landscape.testbeds.golden import softmax_regression as softmax_regression
    from landscape.testbeds.nets import gpt as gpt
    from landscape.testbeds.nets import mlp as mlp
    from landscape.testbeds.nets import resnet20 as resnet20
    from landscape.testbeds.saddles import saddle as saddle

_HOMES = {
    "DefaultInfo": "digits",
    "batches": "digits",
    "digits_mlp": "digits",
    "gpt": "nets",
    "load_default": "digits",
    "mlp": "nets",
    "resnet20": "nets",
    "saddle": "saddles",
    "softmax_regression": "golden",
    "split": "digits",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
