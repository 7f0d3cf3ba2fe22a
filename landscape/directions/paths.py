"""Directions between points of parameter space: differences, and the principal ones of a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from landscape import checkpoints as files
from landscape.directions.base import Directions, gram, made
from landscape.directions.drawn import draw

if TYPE_CHECKING:
    from landscape.problem import Problem

Point = Tensor | nn.Module | Mapping[str, Tensor] | Path | str
_PIECE = 1 << 22  # entries of long vectors that are added at once in float64


def difference(problem: Problem, other: Point) -> Directions:
    """Return θ' − θ for another point θ': a coordinate of 1 is there.

    Args:
        problem: at θ.
        other: θ' as a vector (n,), a model, a state dict, or the file of a checkpoint.

    Raises:
        Refused: if it is of another model.
    """
    row = point(problem, other) - problem.parameters_vector()
    return made(problem, [row], ["difference of two points"], kind="difference")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A path of checkpoints in the plane of directions.

    Attributes:
        coordinates: of each checkpoint's displacement from θ, (t, k).
        residuals: its distance from the plane, (t,).
        explained_variance: share of Σ ‖displacement‖² along each principal direction, (k,); None where the
            directions are no principal ones.
    """

    coordinates: Tensor
    residuals: Tensor
    explained_variance: Tensor | None


def pca(
    problem: Problem, checkpoints: Sequence[Point], count: int = 2, *, centred: bool = False, seed: int = 0
) -> tuple[Directions, Trajectory]:
    """Return the principal directions of a training trajectory, of norm 1, and the path in their plane.

    The rows are θ_t − θ, θ the problem's parameters; not centred, so that the plane through θ is the one
    closest to the path. Where a path spans fewer dimensions than asked for, random directions fill the rest.

    Args:
        problem: at θ, as a rule the end of training.
        checkpoints: θ_t, each as for `difference`.
        count: directions.
        centred: subtract the mean row first, as the PCA of Li et al.'s code does.
        seed: of directions that fill up.

    Raises:
        Refused: if a checkpoint is of another model.
        ValueError: if no checkpoint lies apart from θ.

    Source: Li et al. 2018 (arXiv 1712.09913), section 7.
    """
    rows = _displacements(problem, checkpoints)
    products = gram(rows)
    if centred:
        average = torch.eye(len(rows), dtype=torch.float64) - 1.0 / len(rows)
        products = average @ products @ average
    values, combinations = torch.linalg.eigh(products)
    values, combinations = values.flip(0).clamp(min=0), combinations.flip(1)
    if not float(values[0]) > 0:
        raise ValueError(
            "no checkpoint lies apart from the problem's parameters; give those of a training run"
        )
    # Squares of singular values are rounded at eps of the largest.
    rank = int((values[:count] > len(rows) * 1e-15 * values[0]).sum())
    found = [_combined(rows, combinations[:, i]) for i in range(rank)]
    found += [draw(problem, seed, i) for i in range(rank, count)]
    labels = [f"principal direction {i + 1}" if i < rank else "random direction" for i in range(count)]
    shares = torch.zeros(count, dtype=torch.float64)
    shares[:rank] = values[:rank] / values.sum()
    directions = made(problem, found, labels, kind="pca", centred=centred, explained_variance=shares.tolist())
    directions = dataclasses.replace(directions.orthogonalized().normalized(), origin=directions.origin)
    return directions, Trajectory(*directions.coordinates(rows), shares)


def trajectory(problem: Problem, directions: Directions, checkpoints: Sequence[Point]) -> Trajectory:
    """Return a path of checkpoints in the plane of any directions."""
    return Trajectory(*directions.coordinates(_displacements(problem, checkpoints)), None)


def point(problem: Problem, given: Point) -> Tensor:
    """Return a point of parameter space as a vector (n,).

    Raises:
        Refused: if it is of another model.
    """
    if isinstance(given, Tensor):
        problem.space.split(given)
        return given.detach().to(problem.device, problem.dtype)
    wanted = dict(zip(problem.names, problem.space.shapes, strict=True))
    if isinstance(given, Path | str):
        found = files.read(given, wanted)
    else:
        state = given.state_dict(keep_vars=True) if isinstance(given, nn.Module) else given
        found = files.matching(state, wanted, "the given point")
    return problem.space.flatten(t.detach().to(problem.device, problem.dtype) for t in found)


def _displacements(problem: Problem, checkpoints: Sequence[Point]) -> Tensor:
    if not checkpoints:
        raise ValueError("no checkpoint is given; give those of a training run, in its order")
    theta = problem.parameters_vector()
    return torch.stack([point(problem, given) - theta for given in checkpoints])


def _combined(rows: Tensor, weights: Tensor) -> Tensor:
    pieces = [weights.to(part.device) @ part.double() for part in torch.split(rows, _PIECE, dim=1)]
    return torch.cat(pieces)
