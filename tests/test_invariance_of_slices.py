"""The rest of the table of invariances: filter-normalized slices, the evidence, the mass under a prior."""

from __future__ import annotations

import math

import pytest
import torch
from cases_base import normal
from test_invariance import TRANSFORMATIONS, network, problem
from torch import Tensor, nn

import landscape
from landscape import Problem
from landscape.estimators import logdet
from landscape.metrics import Evidence, Volume


def curvatures_of_slices(of: Problem, draws: int) -> Tensor:
    """dᵀHd along filter-normalized directions."""
    d = torch.stack(list(landscape.directions.filter_normalized(of, draws)), dim=1)
    return (d * of.hvp(d)).sum(0)


def mean_curvature_of_slices(of: Problem) -> float:
    """Its mean over directions, Σ_f ‖w_f‖² tr H_ff / n_f over filters f, from the dense Hessian."""
    diagonal = of.hvp(torch.eye(of.size, dtype=torch.float64)).diagonal()
    total = 0.0
    for w, h in zip(of.space.split(of.parameters_vector()), of.space.split(diagonal), strict=True):
        if w.ndim > 1:
            total += float((w.flatten(1).square().sum(1) * h.flatten(1).mean(1)).sum())
    return total


def test_the_mean_curvature_of_slices_is_the_formula():
    of = problem(network(bias=True))
    found = curvatures_of_slices(of, 4000)
    assert float(found.mean()) == pytest.approx(
        mean_curvature_of_slices(of), abs=4 * float(found.std()) / math.sqrt(4000)
    )


@pytest.mark.parametrize(
    ("transformation", "invariant"),
    [("layer", True), ("rows", False), ("columns", False), ("permutation", True)],
)
def test_filter_normalized_slices(transformation: str, invariant: bool):
    before = network(bias=False)
    old, new = problem(before), problem(TRANSFORMATIONS[transformation](before))
    if invariant:
        assert mean_curvature_of_slices(new) == pytest.approx(mean_curvature_of_slices(old), rel=1e-9)
    else:
        # The filter itself may be scaled, not the outgoing weights, which are entries of other filters.
        assert abs(mean_curvature_of_slices(new) / mean_curvature_of_slices(old) - 1) > 0.1
    if transformation == "layer":  # not on average only, but along each drawn direction
        torch.testing.assert_close(
            curvatures_of_slices(new, 5), curvatures_of_slices(old, 5), rtol=1e-9, atol=0
        )


def test_the_evidence_depends_on_the_prior_unless_it_is_pushed_forward():
    before = network(bias=False)
    old, new = problem(before), problem(TRANSFORMATIONS["layer"](before))
    values = [float(landscape.evaluate(Evidence(), of)["log_evidence"]) for of in (old, new)]
    assert abs(values[0] - values[1]) > 1.0
    # A prior of precision D⁻¹ λ D⁻¹ at D θ: det(I + D G' D / λ), and the same ‖θ‖².
    D = new.parameters_vector() / old.parameters_vector()
    shift = 0.1
    pushed = logdet(landscape.ggn(new).scaled(D), shift=shift).value
    assert pushed == pytest.approx(logdet(landscape.ggn(old), shift=shift).value, rel=1e-9)
    assert abs(logdet(landscape.ggn(new), shift=shift).value - pushed) > 1.0


def test_the_mass_under_a_fixed_prior_depends_on_the_scale():
    # Two weights of a rectifier, L = ½ E (w₂ w₁ x - x)²: the set around (1, 1) and around (2, 1/2), which lies farther
    # from the origin.
    x = normal(40, 1, seed=3).abs()

    def masses(alpha: float) -> Tensor:
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
        with torch.no_grad():
            model[0].weight.fill_(alpha)
            model[2].weight.fill_(1 / alpha)
        of = Problem(model, lambda f, y: 0.5 * (f - y).square().mean(), [(x, x)])
        metric = Volume(epsilon=(0.01,), rays=512, prior=0.5, truncation=0.3)
        return torch.tensor([float(landscape.evaluate(metric, of, seed)["log_mass"][0]) for seed in range(8)])

    here, there = masses(1.0), masses(2.0)
    scatter = math.hypot(float(here.std()), float(there.std())) / math.sqrt(8)
    assert float(here.mean() - there.mean()) > 6 * scatter
