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


@pytest.fixture
def smith_le(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("smith_le_evidence", FIGURES / "smith_le_evidence.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
