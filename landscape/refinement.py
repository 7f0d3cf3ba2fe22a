"""Points to be added to a grid where the values on it bend, chosen from the values alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_HALVINGS = 6  # of a cell at most
_UNIT = 1 << _HALVINGS  # lattice steps to a cell
_CELLS = 12  # halved in a round
_SECOND_DIFFERENCE = 1 / 8  # times h² f'': the largest error of linear interpolation over a length h

Place = tuple[int, ...]


@dataclass(frozen=True)
class _Cell:
    """An interval or rectangle of the lattice, and the error expected of interpolation over it."""

    corner: Place
    size: int
    error: float

    def at(self, fractions: Sequence[float]) -> Place:
        return tuple(c + int(f * self.size) for c, f in zip(self.corner, fractions, strict=True))


def following(axes: Sequence[np.ndarray], values: np.ndarray, refined: np.ndarray, limit: int) -> np.ndarray:
    """Return the points of the next round of refinement; none where the limit is reached or nothing bends.

    A cell's error of (bi)linear interpolation is estimated from second differences of the grid, or from what
    was found at its parent's midpoints, a quarter of it; the cells with the largest error are halved along
    each axis. Cells with a value that is not finite are left alone.

    Args:
        axes: coordinates of the grid, one array or two.
        values: on the grid, along the axes in their order.
        refined: values at the points of earlier rounds, in the order in which they were returned.
        limit: points in all.

    Returns:
        Coordinates, (points, axes).
    """
    if limit <= len(refined):
        return np.zeros((0, len(axes)))
    known = {tuple(_UNIT * i for i in index): float(value) for index, value in np.ndenumerate(values)}
    cells = _cells(values)
    used = 0
    while used < limit:
        cells.sort(key=lambda cell: (-cell.error, cell.size, cell.corner))
        chosen = [cell for cell in cells[:_CELLS] if cell.error > 0 and cell.size > 1]
        new = list(dict.fromkeys(place for cell in chosen for place in _middles(cell) if place not in known))
        new = new[: limit - used]
        if not new:
            break
        if used + len(new) > len(refined):
            open_ = new[len(refined) - used :]  # those before were measured when the limit was lower
            return np.array(
                [[_coordinate(a, i) for a, i in zip(axes, place, strict=True)] for place in open_]
            )
        known.update(zip(new, map(float, refined[used : used + len(new)]), strict=True))
        used += len(new)
        if used < limit:  # else the last cell may lack a middle
            cells = [*cells[len(chosen) :], *(child for cell in chosen for child in _children(cell, known))]
    return np.zeros((0, len(axes)))


def _cells(values: np.ndarray) -> list[_Cell]:
    with np.errstate(invalid="ignore", over="ignore"):
        bends = np.sum([_second_difference(values, axis) for axis in range(values.ndim)], axis=0)
    found = []
    for index in np.ndindex(*(n - 1 for n in values.shape)):
        corners = np.ix_(*[[i, i + 1] for i in index])
        error = _SECOND_DIFFERENCE * float(np.max(bends[corners]))
        fine = bool(np.isfinite(values[corners]).all() and np.isfinite(error))
        found.append(_Cell(tuple(_UNIT * i for i in index), _UNIT, error if fine else 0.0))
    return found


def _second_difference(values: np.ndarray, axis: int) -> np.ndarray:
    """|f(i−1) − 2 f(i) + f(i+1)|, at the ends that of the neighbour; 0 where it is not finite."""
    if values.shape[axis] < 3:
        return np.zeros_like(values)
    inner = np.abs(np.diff(values, n=2, axis=axis))
    ends = [(1, 1) if i == axis else (0, 0) for i in range(values.ndim)]
    padded = np.pad(inner, ends, mode="edge")
    return np.where(np.isfinite(padded), padded, 0.0)


def _middles(cell: _Cell) -> list[Place]:
    fractions = itertools.product((0.0, 0.5, 1.0), repeat=len(cell.corner))
    return [cell.at(f) for f in fractions if 0.5 in f]


def _children(cell: _Cell, known: dict[Place, float]) -> list[_Cell]:
    """The halves of a cell, with a quarter of the error that was found at its middles."""
    dimensions = len(cell.corner)
    corners = {f: known[cell.at(f)] for f in itertools.product((0.0, 1.0), repeat=dimensions)}
    worst = 0.0
    for f in itertools.product((0.0, 0.5, 1.0), repeat=dimensions):
        if 0.5 in f:
            weights = {
                c: float(np.prod([1 - abs(a - b) for a, b in zip(c, f, strict=True)])) for c in corners
            }
            error = abs(known[cell.at(f)] - sum(weights[c] * corners[c] for c in corners))
            worst = max(worst, error) if np.isfinite(error) else np.nan
    expected = worst / 4 if np.isfinite(worst) else 0.0
    half = cell.size // 2
    return [_Cell(cell.at(f), half, expected) for f in itertools.product((0.0, 0.5), repeat=dimensions)]


def _coordinate(axis: np.ndarray, place: int) -> float:
    cell, part = divmod(place, _UNIT)
    if part == 0:
        return float(axis[cell])
    return float(axis[cell] + part / _UNIT * (axis[cell + 1] - axis[cell]))
