"""The residual R = H − G and second differences, against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_traces import smooth
from torch import nn

import landscape
from landscape import seeds, testbeds
from landscape.errors import Refused
from landscape.residual import linearized, product
from landscape.second_differences import quadratics


def vectors(problem: landscape.Problem, count: int) -> torch.Tensor:
    draws = seeds.generator(0, "residual tests", count)
    return torch.randn(problem.size, count, generator=draws, dtype=torch.float64).to(problem.dtype)


@pytest.mark.parametrize("name", ["gelu", "tied", "gpt"])
@pytest.mark.parametrize("options", [{}, {"microbatch": 3}], ids=str)
def test_the_tangents_hessian_is_the_residual(name: str, options: dict[str, object]) -> None:
    case = smooth(name)
    problem = case.problem.replace(**options)
    R = linearized(problem).hvp(torch.eye(problem.size, dtype=torch.float64))
    assert float((R - (case.H - case.G)).norm()) < 1e-12 * float(case.H.norm())
    assert float(R.norm()) > 0.05 * float(case.H.norm())
    torch.testing.assert_close(linearized(problem).gradient(), problem.gradient(), rtol=1e-12, atol=1e-15)


def test_a_sum_of_losses_has_the_same_residual() -> None:
    case, summed = smooth("gelu"), smooth("gelu", "sum").problem
    V = vectors(summed, 2)
    torch.testing.assert_close(linearized(summed).hvp(V), (case.H - case.G) @ V, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        quadratics(summed, V), (V * (case.H @ V)).sum(0), rtol=1e-4, atol=1e-6 * float(case.H.norm())
    )


def test_padding_has_no_residual() -> None:
    case = smooth("gpt").problem
    x, y = next(iter(case.batches))
    padded = y.clone()
    padded[:, 2:] = -100
    problem = case.replace(data=[(x, padded)])
    V = vectors(problem, 2)
    expected = problem.hvp(V) - problem.ggn_vp(V)
    torch.testing.assert_close(linearized(problem).hvp(V), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        quadratics(problem, V, residual=True), (V * expected).sum(0), rtol=1e-4, atol=1e-4
    )


def test_a_linear_network_has_none() -> None:
    draws = seeds.generator(0, "residual tests", 0)
    x, y = torch.randn(9, 4, generator=draws, dtype=torch.float64), torch.arange(9) % 3
    problem = landscape.Problem(nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), [(x, y)])
    V = vectors(problem, 2)
    assert float(linearized(problem).hvp(V).norm()) == 0.0
    assert float(quadratics(problem, V, residual=True).abs().max()) < 1e-3 * float(
        quadratics(problem, V).min()
    )


def test_what_cannot_be_had_is_refused() -> None:
    problem = smooth("gelu").problem
    black = landscape.Problem(nn.Linear(2, 1), forward=lambda m, b: m(b).mean(), data=[torch.ones(3, 2)])
    with pytest.raises(Refused, match="the residual H - G cannot be had from forward="):
        linearized(black)
    with pytest.raises(Refused, match="the residual H - G cannot be had from forward="):
        quadratics(black, torch.ones(3, 1), residual=True)
    with pytest.raises(ValueError, match="needs products by autodiff"):
        linearized(problem.replace(products="difference"))


@pytest.mark.parametrize("name", ["gelu", "tied", "gpt"])
def test_second_differences_are_quadratic_forms(name: str) -> None:
    case = smooth(name)
    V = vectors(case.problem, 3)
    for residual, A in ((False, case.H), (True, case.H - case.G)):
        expected = (V * (A @ V)).sum(0)
        allowed = 1e-5 * float(case.H.norm()) * float(V[:, 0].square().sum())
        found = quadratics(case.problem, V, residual=residual)
        assert float((found - expected).abs().max()) < allowed


def test_second_differences_of_a_black_box() -> None:
    case = smooth("gelu")
    model = case.problem.evaluator.model
    black = landscape.Problem(
        model,
        forward=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
        data=case.problem.batches.data,
    )
    V = vectors(black, 2)
    expected = (V * (case.H @ V)).sum(0)
    assert float((quadratics(black, V) - expected).abs().max()) < 1e-2 * float(expected.abs().max())


def test_second_differences_in_float32_are_good_to_a_percent() -> None:
    case = smooth("gpt")
    V = vectors(case.problem, 4).sign()
    single = quadratics(case.problem.replace(dtype=torch.float32), V)
    assert float((single - quadratics(case.problem, V)).abs().max()) < 1e-2 * float(case.H.trace().abs())


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_step_follows_the_vectors_length(factor: float) -> None:
    """A step that ignores ‖v‖ is wrong for signs, whose norm is √n."""
    problem = smooth("gelu").problem
    V = vectors(problem, 2)
    scaled = quadratics(problem, factor * V)
    np.testing.assert_allclose(scaled, factor**2 * quadratics(problem, V), rtol=1e-9)
    assert quadratics(problem, 0 * V).tolist() == [0.0, 0.0]


def test_a_second_difference_is_the_same_bits_in_any_block() -> None:
    problem = testbeds.load_default()
    problem = landscape.Problem(problem[0], problem[1], problem[2])
    V = vectors(problem, 3).sign()
    whole = quadratics(problem, V)
    alone = torch.cat([quadratics(problem, V[:, i : i + 1]) for i in range(3)])
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_autodiff_is_wrong_the_product_is_a_difference(dtype: torch.dtype) -> None:
    """Through weight_norm, whose second derivative PyTorch gets wrong, by trace and by products."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(40, 4).to(dtype), torch.arange(40) % 3
    problem = landscape.Problem(model.to(dtype), nn.CrossEntropyLoss(), [(x, y)])
    V = torch.eye(problem.size, dtype=dtype)
    H, G = problem.hvp(V), problem.ggn_vp(V)
    assert problem.product_checks["hessian"].products == "difference"
    torch.testing.assert_close(product(problem, V), H - G, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        model[2].weight.mul_(3)  # away from where R is small
    moved = landscape.Problem(model, nn.CrossEntropyLoss(), [(x, y)])
    found = landscape.evaluate(landscape.metrics.Trace(method="residual", rtol=0.0, max_probes=64), moved)
    truth = float(moved.hvp(V).trace())
    assert abs(float(found["trace"]) - truth) <= 4 * float(found["trace_stderr"])
    assert abs(truth - float(moved.ggn_vp(V).trace())) > 6 * float(found["trace_stderr"])
