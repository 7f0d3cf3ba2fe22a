"""The Fisher-Rao norm against dense matrices and in closed form."""

from __future__ import annotations

import pytest
import torch
from cases import WITH_OUTPUTS, reference
from test_adaptive import classified, dense, network, of
from torch import nn

import landscape
from landscape import Problem, Refused, losses
from landscape.metrics import FisherRao

LIKELIHOODS = [c for c in WITH_OUTPUTS if not losses.no_likelihood(c.arguments().get("loss"))]


@pytest.mark.parametrize("case", LIKELIHOODS, ids=lambda c: c.name)
def test_every_case_that_has_a_fisher_information(case) -> None:
    expected = reference(case)
    problem = Problem(**case.arguments())
    value = float(expected.theta @ expected.ggn @ expected.theta)
    scale = float(expected.theta.abs() @ expected.ggn.abs() @ expected.theta.abs())
    assert of(FisherRao(), problem) == pytest.approx(value, rel=1e-9, abs=1e-13 * scale)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bias_free_networks_in_closed_form(depth: int) -> None:
    """K² E⟨∂ℓ/∂f, f⟩², over the model's labels and over those of the data; each weight has an equal part."""
    model = nn.Sequential(
        *[m for i in range(depth) for m in (nn.Linear(4, 4, bias=False), nn.ReLU())][:-1]
    ).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(4, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
    problem = classified(model, 4, classes=4)
    x, y = (torch.cat(parts) for parts in zip(*problem.batches, strict=True))
    f = model(x).detach()
    p = torch.softmax(f, 1)
    gap = (p * f).sum(1, keepdim=True) - f  # ⟨p, f⟩ - f_y for every y
    expected = {
        "fisher": depth**2 * float((p * gap**2).sum(1).mean()),
        "empirical_fisher": depth**2 * float((gap[torch.arange(len(y)), y] ** 2).mean()),
    }
    for curvature, value in expected.items():
        record = landscape.evaluate(FisherRao(curvature=curvature), problem)
        assert float(record["fisher_rao"]) == pytest.approx(value, rel=1e-12)
        assert record["layer_fisher_rao"].tolist() == pytest.approx([value / depth] * depth, rel=1e-11)
        assert int(record["matvecs"]) == 1


def test_with_biases_it_is_the_quadratic_form() -> None:
    """Where the closed form of homogeneous networks does not hold."""
    problem = classified(network(), 4)
    theta = problem.parameters_vector()
    for curvature in ("fisher", "empirical_fisher"):
        expected = float(theta @ dense(problem, curvature) @ theta)
        assert of(FisherRao(curvature=curvature), problem) == pytest.approx(expected, rel=1e-10)


def test_what_is_refused() -> None:
    problem = classified(network(), 4)
    with pytest.raises(Refused, match="negative log-likelihood"):
        of(FisherRao(), Problem(network(), nn.CrossEntropyLoss(label_smoothing=0.1), list(problem.batches)))
    with pytest.raises(ValueError, match="allowed is 'fisher' or 'empirical_fisher'"):
        FisherRao(curvature="ggn")
