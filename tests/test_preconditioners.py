"""The sampled Gauss-Newton diagonal, and the maps that bend directions, against dense float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import CASES, WITH_OUTPUTS, reference
from test_eigenvalues import rotated

from landscape import ggn_diagonal, preconditioners
from landscape.errors import Refused
from landscape.preconditioners import Preconditioner, from_diagonal, from_eigenpairs
from landscape.problem import Problem
from landscape.seeds import generator


@pytest.mark.parametrize("case", WITH_OUTPUTS[::7], ids=lambda c: c.name)
def test_the_sampled_diagonal_is_unbiased(case):
    assert_unbiased(case, 60)


@pytest.mark.slow
@pytest.mark.parametrize("case", WITH_OUTPUTS, ids=lambda c: c.name)
def test_the_sampled_diagonal_of_every_case_is_unbiased(case):
    assert_unbiased(case, 300)


def assert_unbiased(case, samples: int) -> None:
    """Each entry's mean is within 6 standard errors; entries that never vary are exact."""
    expected = reference(case).ggn.diagonal()
    problem = Problem(**case.arguments())
    draws = torch.stack(
        [ggn_diagonal.sampled(problem, [generator(0, "d", i)], examples=3) for i in range(samples)]
    )
    scale = float(expected.abs().max())
    error = draws.std(0) / math.sqrt(samples) + 1e-12 * scale
    assert ((draws.mean(0) - expected).abs() <= 6 * error).all()


def test_a_black_box_has_no_sampled_diagonal():
    problem = Problem(**next(c for c in CASES if c.blackbox).arguments())
    with pytest.raises(Refused, match="output="):
        ggn_diagonal.sampled(problem, [generator(0, "d", 0)])


def dense(bend: Preconditioner, size: int) -> torch.Tensor:
    """P, column by column, from directions and their lengths."""
    columns = []
    for unit in torch.eye(size, dtype=torch.float64):
        direction, weight = bend.direction(unit)
        columns.append(direction * math.exp(-weight / size))
    return torch.stack(columns, 1)


def test_maps_have_determinant_1_and_are_the_roots_that_they_claim():
    A = rotated([9.0, 4.0, 1.0, 0.25, 0.04])
    values, vectors = torch.linalg.eigh(A)
    whole = from_eigenpairs(values.numpy(), vectors, math.nan, 1e-14)
    P = dense(whole, 5)
    assert float(torch.linalg.det(P)) == pytest.approx(1.0)
    bent = P.T @ A @ P
    assert torch.allclose(bent, bent[0, 0] * torch.eye(5, dtype=torch.float64), atol=1e-9)
    # two eigenvectors, and the mean curvature 0.43 across the other three
    part = dense(from_eigenpairs(values.numpy()[-2:], vectors[:, -2:], 0.43, 1e-14), 5)
    assert float(torch.linalg.det(part)) == pytest.approx(1.0)
    ratios = (vectors.T @ part @ vectors).diagonal()
    assert ratios[4] / ratios[3] == pytest.approx(math.sqrt(4 / 9))
    assert ratios[3] / ratios[0] == pytest.approx(math.sqrt(0.43 / 4))
    diagonal = dense(from_diagonal(torch.tensor([4.0, 1.0, 0.25]), 1e-14), 3)
    assert torch.allclose(diagonal, torch.diag(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)))


def test_damping_bounds_what_is_flat_or_negative():
    found = dense(from_diagonal(torch.tensor([2.0, 0.0, -1.0, 2.0]), 0.1), 4).diagonal()
    assert found[1] == found[2]
    assert found[1] / found[0] == pytest.approx(math.sqrt((2 + 0.1) / 0.1))
    _, vectors = torch.linalg.eigh(rotated([3.0, 1e-12, -1e-3]))
    pairs = dense(from_eigenpairs(np.array([-1e-3, 1e-12, 3.0]), vectors, math.nan, 0.1), 3)
    assert float(torch.linalg.cond(pairs)) == pytest.approx(math.sqrt(3.1 / 0.1), rel=1e-6)


def test_no_map_leaves_directions_as_they_are():
    u = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction, weight = Preconditioner().direction(u)
    assert weight == 0.0
    assert torch.allclose(direction, u / u.norm())


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, -2.0], [math.nan, math.nan]])
def test_without_positive_curvature_there_is_no_map(values: list[float]):
    with pytest.raises(Refused, match="preconditioner='none'"):
        from_diagonal(torch.tensor(values), 0.1)
    with pytest.raises(Refused, match="preconditioner='none'"):
        from_eigenpairs(np.array(values), torch.eye(2, dtype=torch.float64), math.nan, 0.1)


def test_a_problems_eigenvectors_and_the_mean_across_them():
    case = next(c for c in WITH_OUTPUTS if c.name)
    problem, G = Problem(**case.arguments()), reference(case).ggn
    bend = preconditioners.eigenvectors(problem, "ggn", 2, 1e-12, 0)
    values, vectors = torch.linalg.eigh(G)
    P = dense(bend, problem.size)
    top = vectors[:, -2:]
    ratios = (top.T @ P @ top).diagonal()
    assert float(ratios[0] / ratios[1]) == pytest.approx(float((values[-1] / values[-2]).sqrt()), rel=1e-4)
    assert float(torch.linalg.slogdet(P).logabsdet) == pytest.approx(0.0, abs=1e-9)
