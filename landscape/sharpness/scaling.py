"""How far each parameter may move: the scale c of adaptive sharpness, and random subspaces."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from landscape import seeds
from landscape.problem import Problem

Scaling = Literal["element", "filter", "none"]
Law = Literal["gaussian", "rademacher", "orthonormal"]


def parameter_scale(problem: Problem, scaling: Scaling) -> Tensor:
    """Return c, (n,): how far each parameter moves for ε = 1.

    Args:
        problem: at θ.
        scaling: "element" is |θ|; "filter" the length of each filter (a slice of the first axis of a tensor
            with more than one), and |θ| for vectors; "none" is 1.

    Source: Kwon et al. 2021 (arXiv 2102.11600).
    """
    theta = problem.parameters_vector()
    if scaling == "none":
        return torch.ones_like(theta)
    if scaling == "element":
        return theta.abs()
    pieces = []
    for piece in problem.space.split(theta):
        if piece.ndim < 2:
            pieces.append(piece.abs().reshape(-1))
        else:
            rows = piece.reshape(len(piece), -1)
            lengths = torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True).to(piece.dtype)
            pieces.append(lengths.expand_as(rows).reshape(-1))
    return torch.cat(pieces)


def subspace_matrix(size: int, dimensions: int, law: Law, scale: float, seed: int) -> Tensor:
    """Return A, (size, dimensions) float64 on the CPU, whose columns span a random subspace.

    Args:
        size: the number n of parameters.
        dimensions: p.
        law: of the entries, times `scale`: independent N(0, 1) or signs, so that columns have about the
            length √n; or orthonormal columns. Sharpness grows with the square of the columns' length.
        scale: a factor.
        seed: column j comes from a random stream of its own.
    """
    columns = []
    for j in range(dimensions):
        stream = seeds.generator(seed, "sharpness/subspace", j)
        column = torch.randn(size, generator=stream, dtype=torch.float64)
        columns.append(torch.where(column < 0, -1.0, 1.0).double() if law == "rademacher" else column)
    A = torch.stack(columns, dim=1)
    if law == "orthonormal":
        A = torch.linalg.qr(A).Q
    return scale * A


def coordinates(A: Tensor, theta: Tensor) -> Tensor:
    """Return A⁺θ, (p,) float64: the coordinates of the point of the subspace that is nearest to θ."""
    solution: Tensor = torch.linalg.lstsq(A, theta.detach().to("cpu", torch.float64)[:, None]).solution
    return solution[:, 0]
