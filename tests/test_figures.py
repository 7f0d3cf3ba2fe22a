"""The arithmetic of recipes in `figures/` that stands on its own."""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import landscape
from landscape import testbeds
from landscape.metrics import registry

FIGURES = Path(__file__).parent.parent / "figures"


@pytest.fixture
def dinh(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return recipe("dinh_volume", monkeypatch)


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


def test_surfaces_of_saddles_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch):
    saddles = recipe("boettcher_saddle", monkeypatch)
    monkeypatch.setattr(saddles, "POINTS", 5)
    problem = landscape.Problem(*testbeds.saddle(2, 1))
    plane = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    x, y = np.meshgrid(saddles.places(), saddles.places())
    np.testing.assert_allclose(saddles.surface(problem, plane), (x**2 - y**2) / 2, rtol=0, atol=1e-15)
    network = recipe("boettcher_network", monkeypatch)
    monkeypatch.setattr(network, "POINTS", 3)
    found = network.surface(problem, plane, (2.0, 1.0))
    np.testing.assert_allclose(
        found, [[1.5, -0.5, 1.5], [2.0, 0.0, 2.0], [1.5, -0.5, 1.5]], rtol=0, atol=1e-15
    )


def test_along_the_orbit_the_function_stays_and_balls_are_disjoint(dinh: ModuleType):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 3, bias=False)).double()
    inputs, targets = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3
    largest = float(model[0].weight.detach().abs().max())
    orbit = dinh.Orbit(model, inputs, targets, largest / 2)
    problem, moved = orbit.at(1.0), orbit.at(1e3)
    assert float(moved.value()) == pytest.approx(float(problem.value()), rel=1e-12)
    assert moved.parameters_vector()[:6] == pytest.approx(1e3 * problem.parameters_vector()[:6])
    # by how much the largest weight of the first layer can differ within the ball, and within its image
    step = dinh.disjoint_step(orbit)
    assert (largest - orbit.radius) * step > largest + orbit.radius


def test_the_volume_carried_along_shifts_by_the_jacobian(dinh: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dinh, "RAYS", 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False)).double()
        inputs, targets = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 2
    orbit = dinh.Orbit(model, inputs, targets, 0.05)
    points = [dinh.measured(orbit, alpha, ball=True) for alpha in (1.0, 7.0)]
    expected = (12 - 6) * math.log(7.0)
    error = 4 * math.hypot(points[0].stderr, points[1].stderr)
    assert points[1].carried - points[0].carried == pytest.approx(expected, abs=error)
    assert points[0].ball == pytest.approx(points[0].carried, abs=error)
    assert points[1].change < 1e-13


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


def test_the_invariance_table_moves_between_equal_functions(monkeypatch: pytest.MonkeyPatch):
    table = recipe("invariance_table", monkeypatch)
    for name, made in table.columns().items():
        first, *others = made()
        assert len(others) == 2, name
        assert max(landscape.transforms.function_change(first, other) for other in others) <= 1e-11, name
        # something has moved: the weights, or the coordinates that they are measured in
        vectors = [p.parameters_vector() for p in (first, *others)]
        assert all(v.shape != vectors[0].shape or not torch.equal(v, vectors[0]) for v in vectors[1:])


@pytest.mark.parametrize(
    ("measure", "column", "mark"),
    [
        ("trace", "layer scale", "✗"),
        ("trace", "permutation", "✓"),
        ("adaptive_trace", "element scale", "✓"),
        ("adaptive_trace", "smooth map", "✗"),
        ("relative_flatness", "node scale", "✗"),
        ("relative_flatness", "element scale", "–"),
    ],
)
def test_cells_of_the_invariance_table(measure: str, column: str, mark: str, monkeypatch: pytest.MonkeyPatch):
    table = recipe("invariance_table", monkeypatch)
    assert table.cell(measure, list(table.columns()[column]()))[0] == mark


def test_the_invariance_table_that_is_shown_has_every_measure(monkeypatch: pytest.MonkeyPatch):
    table = recipe("invariance_table", monkeypatch)
    with (FIGURES / "invariance_table.csv").open(newline="") as file:
        shown = [row[0] for row in csv.reader(file)][1:]
    assert shown == sorted(set(registry.registered()) - table.NOT_MEASURES)


def test_eigenvalues_grow_up_to_the_bound_of_interlacing(monkeypatch: pytest.MonkeyPatch):
    eigenvalues = recipe("dinh_eigenvalues", monkeypatch)
    monkeypatch.setattr(eigenvalues, "BETAS", (1.0, 10.0))
    monkeypatch.setattr(eigenvalues, "SIZES", (3, 4, 2, 3))
    layers = [nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(2, 3, bias=False)).double()
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws, dtype=torch.float64))
    x = torch.randn(40, 3, generator=draws, dtype=torch.float64)
    problem = landscape.Problem(model, nn.CrossEntropyLoss(), [(x, torch.arange(40) % 3)])
    before, after = eigenvalues.points(problem)
    H = problem.hvp(torch.eye(problem.size, dtype=torch.float64))
    inner = torch.linalg.eigvalsh(H[:-6, :-6]).flip(0)  # all but the last layer, of 6 weights
    count = int((inner > 1e-9).sum())
    assert count >= int((torch.from_numpy(before.eigenvalues.copy()) > 1e-9).sum()) - 6
    assert (after.eigenvalues[:count] >= 100 * inner[:count].numpy() * (1 - 1e-9)).all()
    assert after.change <= 1e-13


def test_other_coordinates_bend_the_minimum_by_the_formula(monkeypatch: pytest.MonkeyPatch):
    maps = recipe("dinh_reparametrization", monkeypatch)
    for a in (0.0, 0.6, -0.4):
        found = maps.curve(a)
        assert found.curvature[0] == pytest.approx(2.0 * 0.1 ** (-2 * a), rel=1e-9)
        assert found.expected == pytest.approx(found.curvature[0], rel=1e-9)
        assert found.minima[0] == 0.0


def test_the_widest_gap_is_where_it_was_put(monkeypatch: pytest.MonkeyPatch):
    papyan = recipe("papyan", monkeypatch)
    one = papyan.Outcome(np.array([9.0, 4.0, 3.5, 3.0, 1.5, 1.4, 1.3]), 0.9, 2.0, 0.5)
    assert one.widest() == 1
    assert one.widest(2) == one.widest(4) == 4
    with torch.no_grad():
        for make in papyan.NETWORKS.values():
            assert make().eval()(torch.zeros(2, 64)).shape == (2, papyan.CLASSES)
    model = papyan.NETWORKS["MLP"]()
    assert list(papyan.trained(model, 1)) == [0, 1]
    assert not model.training
