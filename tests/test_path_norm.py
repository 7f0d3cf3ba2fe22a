"""The metric `path_norm` against sums over enumerated paths, and what it is invariant to."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import landscape
from landscape import Problem, paths
from landscape.metrics import PathNorm
from landscape.testbeds import nets


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """A float64 model with random parameters and statistics of both signs."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(torch.randn(p.shape, generator=draws, dtype=torch.float64))
        for name, b in model.named_buffers():
            if b.is_floating_point():
                low = 0.5 if name.endswith("var") else -1.0
                b.copy_(low + 1.5 * torch.rand(b.shape, generator=draws, dtype=torch.float64))
    return model


def of(model: nn.Module, *shape: int, p: float = 2.0, seed: int = 0) -> float:
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = torch.zeros_like(model.eval()(x))
    problem = Problem(model, nn.MSELoss(), [(x, y)])
    return float(landscape.evaluate(PathNorm(p=p), problem)["path_norm"])


def linear_rows(layer: nn.Module, *shape: int) -> Tensor:
    """The matrix of a linear operation and its constant, (outputs, inputs + 1)."""
    size = math.prod(shape)
    with torch.no_grad():
        constant = layer(torch.zeros(1, *shape, dtype=torch.float64)).reshape(-1, 1)
        columns = layer(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).reshape(size, -1).T
    return torch.cat([columns - constant, constant], 1)


def chained(matrices: list[Tensor], p: float) -> float:
    """Σ over paths through matrices whose last column is the constant."""
    value = torch.ones(matrices[0].shape[1] - 1, dtype=torch.float64)
    for matrix in matrices:
        value = matrix.abs() ** p @ torch.cat([value, value.new_ones(1)])
    return float(value.sum())


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_every_path_of_a_small_network(p: float) -> None:
    model = filled(nets.mlp([2, 3, 2]))
    (A, a), (B, b) = ((m.weight, m.bias) for m in model if isinstance(m, nn.Linear))
    found = [float(A[j, i] * B[k, j]) for i, j, k in itertools.product(range(2), range(3), range(2))]
    found += [float(a[j] * B[k, j]) for j, k in itertools.product(range(3), range(2))]
    found += [float(b[k]) for k in range(2)]
    expected = sum(abs(w) ** p for w in found) ** (1 / p)
    assert of(model, 2, p=p) == pytest.approx(expected, rel=1e-12)


LINEAR = {
    "conv": lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1),
    "depthwise": lambda: nn.Conv2d(2, 4, (2, 3), groups=2, dilation=(2, 1), bias=False),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
    "batch norm": lambda: nn.BatchNorm2d(2),
    "batch norm without parameters": lambda: nn.BatchNorm2d(2, affine=False),
    "average": lambda: nn.AvgPool2d(2),
    "average with padding": lambda: nn.AvgPool2d(3, stride=2, padding=1),
    "average without padding": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False, ceil_mode=True),
    "average by another divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
    "adaptive average": lambda: nn.AdaptiveAvgPool2d((2, 3)),
    "global average": lambda: nn.AdaptiveAvgPool2d(1),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "reflected": lambda: nn.ReflectionPad2d(1),
    "shuffled": lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.PixelShuffle(2)),
    "fraction": lambda: Formula(lambda x: -(x / 3 - 0.5 * x.flip(1) + 0.25)),
    "mean": lambda: Formula(lambda x: x.mean((2, 3))),
    "matrix": lambda: Formula(lambda x: torch.einsum("bchw,wk->bchk", 2 - x, torch.ones(4, 2).double() * 0.7)),
    "pieces": lambda: Formula(lambda x: torch.cat([x[:, :1], torch.stack(x.chunk(2, 1)).sum(0)], 1).mul(2)),
}  # fmt: skip


class Formula(nn.Module):
    """A model without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_operations_by_their_matrices(name: str, p: float) -> None:
    """In front of a rectifier and a linear layer; the matrix comes from the operation on unit inputs."""
    shape = (2, 5, 4)
    operation = filled(LINEAR[name]())
    rows = linear_rows(operation.eval(), *shape)
    if name == "fraction":  # two paths from x to the same place where the flip maps it onto itself: none here
        assert (rows[:, :-1] != 0).sum(1).eq(2).all()
    last = filled(nn.Linear(rows.shape[0], 3), seed=1)
    model = nn.Sequential(operation, nn.ReLU(), nn.Flatten(), last)
    expected = chained([rows, torch.cat([last.weight.detach(), last.bias.detach()[:, None]], 1)], p)
    if name in {"fraction", "matrix"}:  # constants of one channel each, along with paths through them
        expected = _with_constants(name, last, p)
    if name == "pieces":
        x = torch.ones(1, *shape, dtype=torch.float64)
        doubled = 2**p * torch.cat([x[:, :1], x[:, :1] + x[:, 1:]], 1)
        expected = float((last.weight.abs() ** p @ doubled.flatten() + last.bias.abs() ** p).sum())
    assert of(model, *shape, p=p) ** p == pytest.approx(expected, rel=1e-12)


def _with_constants(name: str, last: nn.Linear, p: float) -> float:
    x = torch.ones(1, 2, 5, 4, dtype=torch.float64)
    if name == "fraction":
        value = x / 3**p + 0.5**p * x + 0.25**p
    else:
        value = (2**p + x) @ torch.full((4, 2), 0.7**p, dtype=torch.float64)
    return float((last.weight.abs() ** p @ value.flatten() + last.bias.abs() ** p).sum())


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool2d(2, stride=1, dilation=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d((1, 3), stride=(1, 2), padding=(0, 1), ceil_mode=True),
        nn.AdaptiveMaxPool2d(1),
        nn.AdaptiveMaxPool2d((2, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_a_maximum_has_a_path_from_each_place(pool: nn.Module, p: float) -> None:
    """Which places a window has is told by its maximum of unit inputs."""
    shape = (2, 5, 4)
    seen = linear_rows(pool, *shape)
    assert set(seen.unique().tolist()) == {0.0, 1.0}
    last = filled(nn.Linear(seen.shape[0], 3))
    model = nn.Sequential(pool, nn.Flatten(), last)
    expected = chained([seen, torch.cat([last.weight.detach(), last.bias.detach()[:, None]], 1)], p)
    assert of(model, *shape, p=p) ** p == pytest.approx(expected, rel=1e-12)


def test_other_maxima() -> None:
    x = torch.ones(1, 3, 4, dtype=torch.float64)
    for function, expected in (
        (lambda t: t.amax(2), 12.0),
        (lambda t: t.max(2).values, 12.0),
        (lambda t: t.max(1, keepdim=True)[0], 12.0),
        (lambda t: torch.maximum(t, 3 * t), 12 * 10.0),
        (lambda t: F.max_pool1d(t, 2), 12.0),
        (lambda t: F.adaptive_max_pool1d(t, 2), 12.0),
        (lambda t: F.avg_pool1d(t, 2), 6 * 2 / 4.0),
        (lambda t: t.clamp(min=0).abs() * 0 + t.sub(2 * t, alpha=2), 12 * 17.0),
    ):
        problem = (
            Problem(Formula(function), nn.MSELoss(), [(x, function(x))], parameters=None) if False else None
        )
        del problem
        model = nn.Sequential(filled(nn.Identity()), Formula(function), Gain())
        y = model(x).detach()
        assert paths.path_sum(Problem(model, nn.MSELoss(), [(x, y)]), 2.0) == pytest.approx(expected)


class Gain(nn.Module):
    """Times a parameter, which is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
