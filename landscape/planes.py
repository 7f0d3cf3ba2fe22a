"""The line or plane of a surface: its directions by name, and the training path in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from landscape import directions as made
from landscape.directions import Directions, Trajectory
from landscape.errors import Refused
from landscape.record import Variable

if TYPE_CHECKING:
    from landscape.problem import Problem

_MARGIN = 0.25  # of the path's extent, around it
_DRAWN: dict[str, Callable[..., Directions]] = {
    "filter": made.filter_normalized,
    "random": made.gaussian,
    "layer": made.layer_normalized,
}


def make(
    problem: Problem, kind: str, count: int, *, seed: int, file: str | None, files: Sequence[Path]
) -> tuple[Directions, Trajectory | None]:
    """Make directions of a kind.

    Args:
        problem: at θ.
        kind: "filter", "random", "layer", "hessian", "gradient", "difference", "pca" or "file".
        count: of directions, 1 or 2.
        seed: of what is drawn, and of the solver.
        file: of directions, or of eigenvectors.
        files: checkpoints of a training run, or the last of them of the other point.

    Returns:
        The directions; with "pca" also the path in their plane.

    Raises:
        Refused: if a file does not fit.
    """
    if kind in _DRAWN:
        return _DRAWN[kind](problem, count, seed=seed), None
    if kind == "pca":
        return made.pca(problem, files, count, seed=seed)
    if kind == "hessian":
        ends = ("largest", "smallest")[:count]
        return made.eigenvectors(problem, ends, source=file, seed=seed), None  # type: ignore[arg-type]
    if kind == "difference":
        return made.difference(problem, files[-1]), None
    if kind == "gradient":
        return made.gradient(problem), None
    plane = made.load(str(file), problem)
    if len(plane) < count:
        raise Refused(
            f"{file} holds {len(plane)} directions, not {count}; ask for a line, for example points=(51,)"
        )
    return plane, None


def extent(path: Trajectory) -> list[tuple[float, float]]:
    """Return ranges that show a whole path and its end at zero, with room around it."""
    columns = [sorted([0.0, *column.tolist()]) for column in path.coordinates.T]
    longest = max(column[-1] - column[0] for column in columns)
    found = []
    for low, *_, high in columns:
        room = _MARGIN * (high - low if high - low > 1e-6 * longest else longest)
        found.append((low - room, high + room))
    return found


def path_variables(path: Trajectory | None, axes: Sequence[str]) -> dict[str, Variable]:
    """Return a path in the plane, to be stored; nothing without one."""
    if path is None:
        return {}
    found = {}
    for i, name in enumerate(axes):
        words = f"displacement of the checkpoint along direction_{name}"
        found[f"trajectory_{name}"] = Variable(
            ("checkpoint",), path.coordinates[:, i].cpu().numpy(), "1", words
        )
    words = "distance of the checkpoint from the plane"
    found["trajectory_residual"] = Variable(("checkpoint",), path.residuals.cpu().numpy(), "1", words)
    if path.explained_variance is not None:
        words = "share of the trajectory's squared displacement"
        found["explained_variance"] = Variable(("component",), path.explained_variance.numpy(), "1", words)
    return found
