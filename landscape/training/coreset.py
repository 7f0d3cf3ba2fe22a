"""Coresets from a measured file: the examples of lowest curvature of each class. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def select_coreset(
    dataset: Any,
    labels: Sequence[int] | np.ndarray | None = None,
    per_class: int = 20,
    *,
    by: str = "curvature",
) -> np.ndarray:
    """Return the indices of the examples of lowest curvature of each class, class by class.

    Args:
        dataset: a measurement of `input_curvature`, as `landscape.open` or `landscape.results.read` gives it.
        labels: one for each example; None takes those that were stored.
        per_class: examples of each class.
        by: the variable that ranks, "curvature" (Curv(X)) or another one of an example.

    Returns:
        Indices, (classes · per_class,), in the order of the data; classes ascend, curvature within each.

    Raises:
        ValueError: if labels are missing or do not fit, or a class has too few examples that were measured.

    Source: Garg & Roy 2023 (arXiv 2205.15943).
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; allowed is a number >= 1")
    if by not in dataset or dataset[by].ndim != 1:
        raise ValueError(f"the measurement has no {by!r} of each example; measure input_curvature first")
    values = np.asarray(dataset[by], dtype=float)
    if labels is None:
        if "label" not in dataset:
            raise ValueError("the measurement holds no labels (its targets are no integers); give labels=")
        labels = np.asarray(dataset["label"])
    named = np.asarray(labels)
    if named.shape != values.shape:
        raise ValueError(f"got {named.shape} labels for {values.shape} examples; each needs one")
    usable = np.isfinite(values) & np.asarray(dataset["done"], dtype=bool)
    chosen = []
    for label in np.unique(named[usable]) if usable.any() else []:
        own = np.flatnonzero(usable & (named == label))
        if len(own) < per_class:
            raise ValueError(
                f"class {label} has {len(own)} measured examples, {per_class} are asked for; allowed is at most "
                f"per_class={len(own)}"
            )
        chosen.append(own[np.argsort(values[own], kind="stable")[:per_class]])
    if not chosen:
        raise ValueError(
            "no example is measured; run `landscape measure --metric input_curvature` to its end"
        )
    return np.concatenate(chosen)
