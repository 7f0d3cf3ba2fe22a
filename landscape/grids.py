"""Points of a line or plane: those of a grid, of a coarser one, and those that refinement adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from landscape.record import Record, Variable

AXES = ("x", "y")
GRID, MAP, REFINED = 0, 1, 2
"""Kinds of points."""


def mesh(axes: Sequence[np.ndarray]) -> np.ndarray:
    """Return all points of a grid, (points, axes); x runs fastest."""
    return np.stack([part.ravel() for part in np.meshgrid(*axes)], axis=1)


def lengthened(record: Record, coordinates: np.ndarray, kind: int) -> dict[str, Variable]:
    """Return the points of a record with more of them, by name of the variable.

    Args:
        record: with point_x, point_y and point_kind, or none of them yet.
        coordinates: of the points that are added, (points, axes).
        kind: of these.
    """

    def longer(name: str, more: np.ndarray, words: str) -> Variable:
        held = [record[name]] if name in record else []
        return Variable(("point",), np.concatenate([*held, more]), "1", words)

    found = {}
    for name, column in zip(AXES, coordinates.T, strict=False):
        found[f"point_{name}"] = longer(
            f"point_{name}", column, f"displacement of the point along direction_{name}"
        )
    kinds = np.full(len(coordinates), kind, np.int8)
    found["point_kind"] = longer("point_kind", kinds, "0 on the grid, 1 of the curvature map, 2 refined")
    return found


def on_grid(record: Record, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return values of points as (x,) or (y, x); the shape has x first."""
    values: np.ndarray = record[name][record["point_kind"] == GRID]
    return values.reshape(shape[::-1])


def laid_out(record: Record, names: Mapping[str, str], shape: tuple[int, ...]) -> dict[str, Variable]:
    """Return quantities on the grid, and whether each point of it is measured.

    Args:
        record: with the quantities of points.
        names: what each quantity is, in words; those that were not measured are left out.
        shape: of the grid, x first.
    """
    dims = AXES[: len(shape)][::-1]
    values = {
        name: Variable(dims, on_grid(record, f"point_{name}", shape), "1", words)
        for name, words in names.items()
        if f"point_{name}" in record
    }
    return values | {
        "measured": Variable(dims, on_grid(record, "done", shape), "1", "whether the point is measured")
    }


def listed(record: Record, kind: int, prefix: str, names: Sequence[str]) -> dict[str, Variable]:
    """Return coordinates and quantities of the points of a kind; nothing where there are none."""
    chosen = record["point_kind"] == kind
    found = {}
    for name in (*AXES, *names) if chosen.any() else ():
        if f"point_{name}" in record:
            old = record.variables[f"point_{name}"]
            found[f"{prefix}_{name}"] = Variable(
                (f"{prefix}_point",), old.data[chosen], old.units, old.long_name
            )
    return found


def lowest(record: Record) -> dict[str, Variable]:
    """Return the lowest finite loss that was measured, and where it is."""
    losses = np.where(np.isfinite(record["point_loss"]), record["point_loss"], np.inf)
    best = int(np.argmin(losses))
    known = np.isfinite(losses[best])
    value = losses[best] if known else np.nan
    found = {"loss_lowest": Variable((), np.asarray(value), "1", "lowest finite loss")}
    for name in AXES:
        if f"point_{name}" in record:
            place = record[f"point_{name}"][best] if known else np.nan
            found[f"lowest_{name}"] = Variable(
                (), np.asarray(place), "1", f"where it is along direction_{name}"
            )
    return found
