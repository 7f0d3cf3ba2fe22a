"""Which settings of sharpness go together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from landscape.estimators.regions import Norm

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "keskar": {"maximizer": "lbfgsb", "steps": 10, "restarts": 1},
        "adaptive": {"maximizer": "apgd", "steps": 20, "restarts": 1, "m": 128},
    }
)
"""What preset="paper" stands for: Keskar et al. 2017, and Andriushchenko et al. 2023."""

_SEARCHED = {"keskar", "ball", "adaptive"}
_DEFINITIONS = {
    "subspace": {"keskar"}, "law": {"keskar"}, "column_scale": {"keskar"},
    "norm": {"adaptive"}, "m": {"adaptive"}, "scaling": {"adaptive", "average"},
    "noise": {"average"}, "samples": {"average"}, "rtol": {"average"},
    "maximizer": _SEARCHED, "steps": _SEARCHED, "restarts": _SEARCHED, "preset": {"keskar", "adaptive"},
    "second_order": {"ball", "adaptive"},
}  # fmt: skip
_LEAST = {"steps": 1, "restarts": 1, "samples": 2, "m": 1, "subspace": 1}


def chosen(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, with those of the preset in their place."""
    return {**given, **(PRESETS[given["definition"]] if given["preset"] == "paper" else {})}


def norm_of(given: Mapping[str, Any]) -> Norm:
    """Return the p of the sets."""
    norm: Norm = given["norm"]
    return {"keskar": "inf", "adaptive": norm}.get(given["definition"], 2)


def ladder_of(given: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the sizes, ascending."""
    return tuple(sorted(float(size) for size in given["epsilon"]))


def require(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse settings that do not fit one another.

    Args:
        given: all settings by name.
        defaults: what they are unless set.

    Raises:
        ValueError: saying what is allowed.
    """
    _require_sizes(given["epsilon"])
    definition, changed = given["definition"], [k for k in given if given[k] != defaults[k]]
    for name in changed:
        if definition not in _DEFINITIONS.get(name, {definition}):
            words = " or ".join(sorted(_DEFINITIONS[name]))
            raise ValueError(f"{name} goes with definition {words}; got definition={definition!r}")
    if given["preset"] == "paper":
        for name in set(changed) & set(PRESETS[definition]):
            raise ValueError(f"preset 'paper' sets {', '.join(PRESETS[definition])}; leave out {name}")
    used = chosen(given)
    for name, least in _LEAST.items():
        if used[name] is not None and used[name] < least:
            raise ValueError(f"{name} is {used[name]}; allowed is a number >= {least}")
    if used["maximizer"] == "lbfgsb" and (
        definition == "ball" or (definition == "adaptive" and used["norm"] == 2)
    ):
        raise ValueError("maximizer 'lbfgsb' searches boxes: definition keskar, or adaptive with norm 'inf'")
    if not (math.isfinite(used["column_scale"]) and used["column_scale"] > 0):
        raise ValueError(f"column_scale is {used['column_scale']}; allowed is a number > 0")
    if not used["rtol"] >= 0:
        raise ValueError(f"rtol is {used['rtol']}; allowed is a number >= 0")


def _require_sizes(sizes: Any) -> None:
    if not isinstance(sizes, tuple | list) or not sizes:
        raise ValueError(
            f"epsilon is {sizes!r}; allowed is a tuple of one size or more, such as (5e-4, 1e-3)"
        )
    words = ", ".join(f"{size:g}" for size in sizes)
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        raise ValueError(f"epsilon is {words}; allowed are numbers > 0")
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"epsilon holds a size twice: {words}; name each once")
