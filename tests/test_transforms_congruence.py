"""Gradient and Hessian at T(θ): D⁻¹g and D⁻¹HD⁻¹, against dense derivatives that plain PyTorch makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases_base import labels, net, normal
from cases_symmetries import mlp
from torch import Tensor, nn
from torch.autograd.functional import hessian

import landscape
from landscape import transforms
from landscape.transforms import Symmetries, Transformed


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """Two blocks around one stream, with biases and BatchNorm; a projection and an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.a1, self.b1 = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.n1, self.m1 = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        self.a2, self.b2, self.skip = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n0(self.stem(x)))
        x = torch.relu(x + self.m1(self.b1(torch.relu(self.n1(self.a1(x))))))
        x = torch.relu(self.skip(x) + self.b2(torch.relu(self.a2(x))))
        return self.head(x.mean((2, 3)))


def gated() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GLU(), nn.Linear(4, 4), nn.LeakyReLU(), nn.Linear(4, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: mlp(6, 5, 4, 3), normal(8, 6)),
    "mlp without bias": (lambda: mlp(6, 5, 4, 3, bias=False), normal(8, 6)),
    "gated": (gated, normal(8, 6)),
    "cnn with batch norm": (convolutional, normal(6, 2, 6, 6)),
    "resnet": (Residual, normal(6, 2, 4, 4)),
}


def made(name: str) -> tuple[Symmetries, Callable[[Transformed | None], tuple[Tensor, Tensor]]]:
    """The symmetries of a model, and its dense gradient and Hessian there (None: at θ)."""
    make, x = MODELS[name]
    model, y = net(make)().eval(), labels(len(x), 3)
    problem = landscape.Problem(model, nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:], y[4:])])

    def dense(there: Transformed | None) -> tuple[Tensor, Tensor]:
        names, held = problem.names, {**dict(model.named_buffers()), **(there.buffers if there else {})}

        def loss(theta: Tensor) -> Tensor:
            parts = dict(zip(names, problem.space.split(theta), strict=True))
            return nn.functional.cross_entropy(torch.func.functional_call(model, {**held, **parts}, (x,)), y)

        theta = there.vector if there else problem.parameters_vector()
        gradient = torch.autograd.functional.jacobian(loss, theta)
        return gradient, hessian(loss, theta)

    return transforms.find(problem), dense


def assert_congruent(there: Transformed, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> None:
    assert there.function_change <= 1e-12
    d = there.diagonal
    for measured, predicted in ((after[0] * d, before[0]), (d[:, None] * after[1] * d, before[1])):
        assert float((measured - predicted).abs().max()) <= 1e-12 * float(predicted.abs().max())
    assert torch.allclose(there.cotangent(before[0]), after[0], rtol=1e-9, atol=1e-14)
    v = normal(len(d), seed=5)
    product = there.problem.hvp(v)
    predicted = there.cotangent(before[1] @ there.pull(v))
    assert float((product - predicted).abs().max()) <= 1e-11 * float(product.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_layer_scaling(name: str) -> None:
    """Every group, at a factor far from one."""
    found, dense = made(name)
    before = dense(None)
    assert len(found.groups) >= 2
    for k in range(len(found.groups)):
        there = found.scale(4.7 if k % 2 else 0.13, group=k)
        assert_congruent(there, before, dense(there))


@pytest.mark.parametrize("name", MODELS)
def test_node_scaling(name: str) -> None:
    """One channel or unit at a time, and all of them at random."""
    found, dense = made(name)
    before = dense(None)
    for there in (found.scale_node(6.0, 0), found.scale_node(0.2, len(found.nodes) - 1), found.random(0.7)):
        assert_congruent(there, before, dense(there))


def test_buffers_of_the_cnn_move() -> None:
    found, _ = made("cnn with batch norm")
    there = found.scale(3.0)
    assert set(there.buffers) == {"1.running_mean"}
    before = found.problem.buffers()["1.running_mean"]
    assert torch.allclose(there.buffers["1.running_mean"], 3 * before)
    # A new problem takes them as `at` does, and without them the function would be another.
    again = found.problem.at(there.vector, buffers=there.buffers)
    assert transforms.function_change(found.problem, again) <= 1e-14
    assert transforms.function_change(found.problem, found.problem.at(there.vector)) > 1e-3


def test_eigenvalues_of_theorem_5() -> None:
    """H = B Bᵀ of rank 9 over layers of 6, 5 and 3 weights: at least 6 eigenvalues above any M."""
    H = normal(14, 9, seed=11)
    H = H @ H.T
    smallest = float(torch.linalg.eigvalsh(H)[-9])
    for M in (10.0, 1e3, 1e6):
        beta = 1.01 * max(1.0, (M / smallest) ** 0.5)
        d = torch.cat([torch.full((n,), a).double() for n, a in ((6, 1 / beta), (5, 1 / beta), (3, beta**2))])
        values = torch.linalg.eigvalsh(H / d[:, None] / d)
        assert int((values > M).sum()) >= 9 - 3


def test_eigenvalues_of_a_deep_network() -> None:
    """Dinh et al., theorem 5, on a network: all but min_k n_k of the eigenvalues that are not 0 can be made large."""
    make, x = lambda: mlp(5, 5, 4, 2, bias=False), normal(40, 5)
    problem = landscape.Problem(net(make)(), nn.MSELoss(), [(x, normal(40, 2, seed=1))])
    found = transforms.find(problem)
    values = torch.linalg.eigvalsh(problem.hvp(torch.eye(problem.size, dtype=torch.float64)))
    rank = int((values.abs() > 1e-9 * values.abs().max()).sum())
    positive = int((values > 1e-9 * values.abs().max()).sum())
    for M in (1e2, 1e4):
        # W1, W2 times 1/β and W3, the smallest, times β²
        beta = (M / float(values[values > 1e-9 * values.abs().max()].min())) ** 0.5
        factors = torch.cat([torch.full((5,), 1 / beta), torch.full((4,), 1 / beta**2)]).double()
        there = found.at(factors)
        assert there.function_change <= 1e-12
        H = there.problem.hvp(torch.eye(problem.size, dtype=torch.float64))
        assert int((torch.linalg.eigvalsh(H) > M).sum()) >= positive - 8
    assert rank >= positive > 8
