"""The adaptive spectral norm and normalized sharpness, against dense float64."""

from __future__ import annotations

import pytest
import torch
from cases_base import normal
from test_adaptive import classified, dense, network, of
from torch import Tensor, nn

import landscape
from landscape import Refused
from landscape.metrics import AdaptiveSpectralNorm, NormalizedSharpness, SpectralNorm
from landscape.problem import Problem

# adaptive spectral norm


@pytest.mark.parametrize(
    ("method", "curvature"),
    [("power", "hessian"), *(("lanczos", c) for c in ("hessian", "ggn", "fisher", "empirical_fisher"))],
)
def test_both_ends_within_their_residuals(method: str, curvature: str) -> None:
    problem = classified(network(nn.Tanh), 4)
    theta = problem.parameters_vector()
    values = torch.linalg.eigvalsh(theta[:, None] * dense(problem, curvature) * theta)
    metric = AdaptiveSpectralNorm(method=method, curvature=curvature, rtol=1e-5, max_matvecs=5000)
    record = landscape.evaluate(metric, problem)
    assert bool(record["converged"])
    assert float(record["adaptive_spectral_norm"]) == pytest.approx(float(values.abs().max()), rel=1e-5)
    for end, value in (("max", values[-1]), ("min", values[0])):
        stated = float(record[f"eigenvalue_{end}_residual_norm"])
        assert abs(float(record[f"eigenvalue_{end}"]) - float(value)) <= stated + 1e-14


def test_one_layers_block() -> None:
    problem = classified(network(), 4)
    start, stop = problem.space.ranges["2.weight"]
    theta, H = problem.parameters_vector()[start:stop], dense(problem)[start:stop, start:stop]
    expected = float(torch.linalg.eigvalsh(theta[:, None] * H * theta).abs().max())
    assert of(AdaptiveSpectralNorm(layer="2.weight", rtol=1e-9), problem) == pytest.approx(expected, rel=1e-8)
    assert of(SpectralNorm(layer="2.weight", rtol=1e-9), problem) != pytest.approx(expected, rel=0.1)


def test_scaled_operators() -> None:
    problem = classified(network(), 4)
    d, A = normal(problem.size, seed=8), landscape.hessian(problem)
    dense_scaled = d[:, None] * dense(problem) * d
    block = A.scaled(d) @ torch.eye(problem.size, dtype=torch.float64)
    torch.testing.assert_close(block, dense_scaled, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(A.scaled(d) @ d, dense_scaled @ d, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match=r"shape \(83,\); allowed is \(64,\)"):
        landscape.hessian(classified(network(sizes=(4, 5, 4, 3)), 4)).scaled(d)


# normalized sharpness


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_normalized_sharpness_is_the_minimum_over_scales(activation: type[nn.Module]) -> None:
    problem = classified(network(activation), 4, cut=(3,) * 17)
    diagonal, theta = dense(problem, "ggn").diagonal(), problem.parameters_vector()
    record = landscape.evaluate(NormalizedSharpness(), problem)
    value = float(record["normalized_sharpness"])
    assert value == pytest.approx(float((2 * theta.abs() * diagonal.clamp(min=0).sqrt()).sum()), rel=1e-9)
    assert float(record["layer_normalized_sharpness"].sum()) == pytest.approx(value, rel=1e-12)
    live = (diagonal > 1e-12) & (theta != 0)
    best = (theta.abs() / diagonal.sqrt())[live]  # σ²

    def bound(squares: Tensor) -> float:
        return float((diagonal[live] * squares + theta[live] ** 2 / squares).sum())

    assert bound(best) == pytest.approx(value, rel=1e-6)
    for seed in range(5):
        assert bound(best * (0.1 * normal(len(best), seed=seed)).exp()) > bound(best)


def test_where_the_network_is_piecewise_linear_it_is_the_hessians() -> None:
    problem = classified(network(nn.ReLU), 4)
    diagonal, theta = dense(problem).diagonal(), problem.parameters_vector()
    expected = float((2 * theta.abs() * diagonal.clamp(min=0).sqrt()).sum())
    assert of(NormalizedSharpness(), problem) == pytest.approx(expected, rel=1e-7)


def test_a_loss_that_is_not_convex_has_no_normalized_sharpness() -> None:
    model = network()
    x = normal(6, 4)
    problem = Problem(model, lambda f, y: (f - y).cos().mean(0).sum(), [(x, model(x).detach())])
    with pytest.raises(Refused, match="not convex"):
        of(NormalizedSharpness(), problem)
