"""The arithmetic of recipes in `figures/` that stands on its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

FIGURES = Path(__file__).parent.parent / "figures"


def recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FIGURES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def smith_le(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return recipe("smith_le_evidence", monkeypatch)


def test_softmax_regression_ends_at_the_minimum_of_the_cost_that_autograd_differentiates(
    smith_le: ModuleType,
):
    random = torch.Generator().manual_seed(1)
    inputs = torch.rand(90, smith_le.FEATURES, generator=random, dtype=torch.float64)
    targets = torch.randint(smith_le.CLASSES, (90,), generator=random)

    def cost(weights: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(inputs @ weights.T, targets, reduction="sum")
        return loss + 0.3 / 2 * weights.square().sum()

    shape = (smith_le.CLASSES, smith_le.FEATURES)
    weights = torch.randn(shape, generator=random, dtype=torch.float64)
    value, gradient, matrix = smith_le.cost(weights, inputs, targets, 0.3)
    assert value == pytest.approx(float(cost(weights)), rel=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(cost, weights))
    torch.testing.assert_close(matrix, torch.autograd.functional.hessian(cost, weights).reshape(640, 640))
    least = smith_le.minimum(torch.zeros(shape, dtype=torch.float64), inputs, targets, 0.3)
    assert float(torch.autograd.functional.jacobian(cost, least).norm()) < 1e-6


def test_both_ways_between_two_minima_begin_and_end_at_them(monkeypatch: pytest.MonkeyPatch):
    keskar = recipe("keskar_sharpness", monkeypatch)
    parts = {"train": tuple(t[:50] for t in keskar.digits())}
    models = [keskar.mlp(keskar.SIZES, seed=seed) for seed in (1, 2)]
    ends = [torch.cat([p.detach().reshape(-1) for p in model.parameters()]) for model in models]
    losses = [nn.functional.cross_entropy(m(parts["train"][0]), parts["train"][1]).item() for m in models]
    middle = len(keskar.ALPHA) // 2
    for curved in (False, True):
        way = keskar.along(*ends, parts, curved=curved)
        for alpha, loss in zip((0, 1), losses, strict=True):
            at = int(abs(keskar.ALPHA - alpha).argmin())
            assert way.loss["train"][at] == pytest.approx(loss, rel=1e-5)
        share = 0.5 if not curved else 0.5**0.5
        torch.nn.utils.vector_to_parameters(share * (ends[0] + ends[1]), models[0].parameters())
        half = nn.functional.cross_entropy(models[0](parts["train"][0]), parts["train"][1])
        assert way.loss["train"][middle] == pytest.approx(half.item(), rel=1e-5)
