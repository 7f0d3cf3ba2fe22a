"""The adaptive trace, and what it is made of, against dense float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CASES, WITH_OUTPUTS, reference
from cases_base import labels, normal
from torch import Tensor, nn

import landscape
from landscape import Problem, Refused, ggn_trace, operators
from landscape.linear_maps import Maps, Scale
from landscape.metrics import AdaptiveSpectralNorm, AdaptiveTrace, NormalizedSharpness
from landscape.metrics.base import Metric
from landscape.testbeds import nets


def of(metric: Metric, problem: Problem, seed: int = 0) -> float:
    return float(landscape.evaluate(metric, problem, seed)[metric.headline])


def network(activation: type[nn.Module] = nn.ReLU, sizes: tuple[int, ...] = (4, 6, 5, 3)) -> nn.Module:
    model = nets.mlp(sizes, activation).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=i) * 0.7)
    return model


def classified(model: nn.Module, *shape: int, cut: tuple[int, ...] = (4, 5), classes: int = 3) -> Problem:
    x, y = normal(sum(cut), *shape, seed=50), labels(sum(cut), classes, seed=51)
    return Problem(
        model, nn.CrossEntropyLoss(), list(zip(torch.split(x, cut), torch.split(y, cut), strict=True))
    )


def dense(problem: Problem, curvature: str = "hessian") -> Tensor:
    return operators.named(problem, curvature) @ torch.eye(problem.size, dtype=problem.dtype)


# every case of the table


@pytest.mark.parametrize("case", WITH_OUTPUTS, ids=lambda c: c.name)
def test_the_diagonal_and_the_scaled_trace_of_every_case(case) -> None:
    """By rules and per example, for one cut of the data and for single batches."""
    expected = reference(case)
    diagonal = expected.ggn.diagonal()
    for sizes in (case.sizes, case.other_cuts()[0]):
        problem = Problem(**case.arguments(sizes))
        sums, weight = ggn_trace.diagonal_by_batch(problem, problem.batches)
        scale = float(diagonal.abs().sum())
        torch.testing.assert_close(sums / weight, diagonal, rtol=1e-9, atol=1e-13 * scale)
        maps = [Scale(leaf.detach().reshape(-1)) for leaf in problem.leaves()]
        parts, weights = ggn_trace.mapped_by_batch(problem, problem.batches, maps)
        terms = expected.theta**2 * diagonal
        blocks = [float(terms[a:b].sum()) for a, b in problem.space.ranges.values()]
        np.testing.assert_allclose(
            parts.sum(0) / weights.sum(), blocks, rtol=1e-9, atol=1e-13 * float(terms.abs().sum())
        )


def test_little_memory_changes_nothing_but_the_steps() -> None:
    """One column of one example at a time, by rules and per example."""
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    problem = classified(model, 2, 5)
    whole, _ = ggn_trace.diagonal_by_batch(problem, problem.batches)
    little, _ = ggn_trace.diagonal_by_batch(problem, problem.batches, memory=1)
    torch.testing.assert_close(little, whole, rtol=1e-12, atol=1e-15)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 3)).double()
    problem = classified(normed, 4)
    whole, _ = ggn_trace.diagonal_by_batch(problem, problem.batches)
    little, weight = ggn_trace.diagonal_by_batch(problem, problem.batches, memory=1)
    torch.testing.assert_close(little, whole, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(little / weight, dense(problem, "ggn").diagonal(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", [c for c in CASES if c.blackbox], ids=lambda c: c.name)
def test_a_black_box_has_the_adaptive_trace_and_norm_but_no_diagonal(case) -> None:
    problem, expected = Problem(**case.arguments()), reference(case)
    scaled = expected.theta[:, None] * expected.hessian * expected.theta
    assert of(AdaptiveTrace(), problem) == pytest.approx(float(scaled.trace()), rel=1e-9)
    modulus = float(torch.linalg.eigvalsh(scaled).abs().max())
    assert of(AdaptiveSpectralNorm(rtol=1e-8), problem) == pytest.approx(modulus, rel=1e-7)
    with pytest.raises(Refused, match="output="):
        of(NormalizedSharpness(), problem)


# adaptive trace


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_the_exact_adaptive_trace(activation: type[nn.Module], curvature: str) -> None:
    problem = classified(network(activation), 4)
    theta = problem.parameters_vector()
    terms = theta**2 * dense(problem, curvature).diagonal()
    record = landscape.evaluate(AdaptiveTrace(curvature=curvature), problem)
    assert float(record["adaptive_trace"]) == pytest.approx(float(terms.sum()), rel=1e-10)
    blocks = [float(terms[a:b].sum()) for a, b in problem.space.ranges.values()]
    np.testing.assert_allclose(record["layer_adaptive_trace"], blocks, rtol=1e-9)
    assert float(record["adaptive_trace_stderr"]) == 0.0
    assert bool(record["converged"])
    smooth = activation is nn.Tanh and curvature == "hessian"
    assert record.attrs["way"] == ("unit_vectors" if smooth else "layers")


@pytest.mark.parametrize("moved", [False, True])
def test_convolutions_norms_and_frozen_parameters(moved: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2, bias=False),
        nn.GroupNorm(1, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(3, 3),
    ).double()  # fmt: skip
    x, y = normal(7, 2, 7, 7, seed=3), labels(7, 3)
    problem = Problem(model, nn.CrossEntropyLoss(), [(x, y)], parameters=["0", "1.weight", "4", "8.bias"])
    if moved:
        problem = problem.at(normal(problem.size, seed=9))
    theta = problem.parameters_vector()
    H = dense(problem)
    assert of(AdaptiveTrace(method="exact"), problem) == pytest.approx(
        float((theta**2 * H.diagonal()).sum()), rel=1e-9
    )
    values = torch.linalg.eigvalsh(theta[:, None] * H * theta)
    assert of(AdaptiveSpectralNorm(rtol=1e-9), problem) == pytest.approx(float(values.abs().max()), rel=1e-7)


@pytest.mark.parametrize(
    ("way", "options", "columns"),
    [
        ("probes", {"method": "hutchinson"}, 64),
        ("output_probes", {"method": "hutchinson", "curvature": "ggn"}, 64),
        ("residual", {}, 64),
        ("residual", {}, 0),
    ],
)
def test_the_interval_of_probes_covers_the_truth(
    way: str, options: dict[str, str], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 runs: fewer than 32 inside has probability 3e-4 where 95 % are inside (binomial)."""
    monkeypatch.setattr("landscape.metrics.base_trace._MOST_COLUMNS", columns)
    problem = classified(network(nn.Tanh), 4)
    metric = AdaptiveTrace(rtol=0.0, max_probes=16, **options)
    terms = problem.parameters_vector() ** 2 * dense(problem, metric.curvature).diagonal()
    truth, inside, spread = float(terms.sum()), 0, []
    for seed in range(40):
        record = landscape.evaluate(metric, problem, seed)
        assert record.attrs["way"] == way
        assert ("exact_layer_part" in record, "output_samples" in record) == (
            way == "residual" and columns > 0,
            columns == 0,
        )
        off = float(record["adaptive_trace"]) - truth
        inside += abs(off) <= 1.96 * float(record["adaptive_trace_stderr"])
        spread.append(float(record["adaptive_trace_stderr"]))
        assert not bool(record["converged"])
        assert record["layer_adaptive_trace"].sum() == pytest.approx(float(record["adaptive_trace"]))
    assert inside >= 32
    assert np.median(spread) < 2 * float(terms.abs().sum())


def test_a_weight_norm_whose_second_derivative_is_wrong() -> None:
    """Its products are made by differences; the residual beside G must be H - G all the same."""
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)
    ).double()
    problem = classified(model, 4)
    truth = float((problem.parameters_vector() ** 2 * dense(problem).diagonal()).sum())
    record = landscape.evaluate(AdaptiveTrace(rtol=0.0, max_probes=32), problem)
    assert record.attrs["way"] == "residual"
    off = float(record["adaptive_trace"]) - truth
    assert abs(off) <= 4 * float(record["adaptive_trace_stderr"])  # one draw: 2.6 in 100 000
    assert problem.product_checks["hessian"].products == "difference"


def test_more_probes_until_the_tolerance() -> None:
    problem = classified(network(nn.Tanh), 4)
    record = landscape.evaluate(AdaptiveTrace(curvature="ggn", method="hutchinson", rtol=0.02), problem)
    assert bool(record["converged"])
    assert float(record["adaptive_trace_stderr"]) <= 0.02 * float(record["adaptive_trace"])
    assert len(record["done"]) in {16 << i for i in range(7)}


def test_average_and_worst_sharpness_to_second_order() -> None:
    """E L(θ + ρ θ⊙N) - L(θ) = ρ²/2 of the trace, exactly for a quadratic; the worst is ρ²/2 of the largest."""
    A = normal(5, 5, seed=1)
    A = A @ A.T
    theta = normal(5, seed=2)
    problem = Problem(
        lambda p, x: (p["a"] - theta) @ A @ (p["a"] - theta) / 2 + 0 * x.sum(),
        lambda f, y: f + 0 * y.sum(),
        [(torch.zeros(1, 1).double(), torch.zeros(1).double())],
        parameters={"a": theta.clone()},
        weight=lambda batch: 1.0,
    )
    rho = 0.3
    draws = rho * theta * normal(40000, 5, seed=3)
    rises = torch.einsum("ki,ij,kj->k", draws, A, draws) / 2
    average = rho**2 / 2 * of(AdaptiveTrace(), problem)
    assert float(rises.mean()) == pytest.approx(average, abs=5 * float(rises.std()) / 200)
    directions = nn.functional.normalize(normal(40000, 5, seed=4)) * rho * theta
    worst = rho**2 / 2 * of(AdaptiveSpectralNorm(rtol=1e-9), problem)
    found = float((torch.einsum("ki,ij,kj->k", directions, A, directions) / 2).max())
    assert 0.9 * worst <= found <= worst * (1 + 1e-9)


# bad input


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: AdaptiveTrace(method="xtrace"), "allowed is 'auto', 'exact' or 'hutchinson'"),
        (lambda: AdaptiveTrace(rtol=-1), "allowed is a number >= 0"),
        (lambda: AdaptiveTrace(max_probes=1), "allowed is a number >= 2"),
        (lambda: AdaptiveSpectralNorm(rtol=1.0), "allowed is 0 <= rtol < 1"),
        (lambda: AdaptiveSpectralNorm(curvature="input_hessian"), "allowed is"),
    ],
)
def test_what_is_refused(made, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made()


def test_maps_of_several_tensors() -> None:
    maps = Maps([Scale(normal(3)), Scale(normal(2, seed=1))])
    L = maps.push(torch.eye(5, dtype=torch.float64))
    assert maps.size == 5
    assert maps.ranges == [(0, 3), (3, 5)]
    torch.testing.assert_close(maps.pull(torch.eye(5, dtype=torch.float64), [3, 2]), L.T)
