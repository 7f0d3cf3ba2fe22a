"""Which networks have tr H = tr G: recognised from the graph, tested by numbers, and true of dense matrices."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, WITH_OUTPUTS, reference
from cases_base import labels, normal
from torch import Tensor, nn

from landscape import ggn_trace, structure
from landscape.errors import Refused
from landscape.problem import Problem
from landscape.testbeds import nets


def classified(model: nn.Module, x: Tensor, classes: int = 3) -> Problem:
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(torch.rand(p.shape, generator=stream, dtype=torch.float64) - 0.4)
    y = labels(len(x), classes, seed=80)
    return Problem(model, nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:], y[4:])])


def hessian_blocks(problem: Problem) -> np.ndarray:
    diagonal = problem.hvp(torch.eye(problem.size, dtype=problem.dtype)).diagonal()
    return np.array([float(diagonal[a:b].sum()) for a, b in problem.space.ranges.values()])


IMAGE = normal(7, 2, 8, 8, seed=81)
FLAT = normal(7, 4, seed=82)
SEQUENCE = normal(7, 4, 3, seed=83)


class Pooled(nn.Module):
    """Convolution, eval BatchNorm, max-pooling, a residual connection, a shortcut, ReLU6, PReLU, a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU6())
        self.shortcut = nn.Conv2d(3, 3, 1)
        self.prelu = nn.PReLU(3)
        self.gain = nn.Parameter(torch.ones(3, 1, 1))
        self.out = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = F.leaky_relu(self.body(h) * self.gain + self.shortcut(h), 0.1)
        return self.out(self.prelu(h).amax((2, 3)) / 2)


class Siamese(nn.Module):
    """One weight used twice side by side: still linear in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 5)
        self.b = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x[:, :2])) - F.relu(self.a(x[:, 2:])))


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nets.mlp([4, 6, 5, 3]), FLAT),
        (
            lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(5, 3)),
            FLAT,
        ),
        (Pooled, IMAGE),
        (lambda: nets.resnet20(1, 3, channels=2, blocks=1), IMAGE),
        (Siamese, FLAT),
    ],
    ids=["mlp", "inplace and dropout", "pooled", "resnet", "siamese"],
)
def test_piecewise_linear_networks(make, x):
    problem = classified(make(), x)
    verdict, found = structure.multilinear(problem), structure.verify(problem)
    assert verdict.recognized, verdict.reason
    assert found.passed
    assert found.worst < 1e-12
    expected = hessian_blocks(problem)
    np.testing.assert_allclose(
        ggn_trace.exact(problem).blocks, expected, rtol=1e-10, atol=1e-14 * abs(expected).sum()
    )


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.cell(F.relu(self.cell(x)))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))[:, :3]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


class Squeeze(nn.Module):
    """A piecewise linear gate: only that both factors depend on the same weight stands against it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.gate = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(h * F.hardtanh(self.gate(h)))


class Disguised(torch.autograd.Function):
    """A function of the user's own, smooth, that calls itself linear."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


Disguised.__name__ = Disguised.__qualname__ = "Relu"
Relu = type("Relu", (torch.autograd.Function,), dict(vars(Disguised)))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return Relu.apply(self.a(x))


def activated(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("make", "x", "reason"),
    [
        (lambda: activated(nn.Softplus()), FLAT, "Softplus"),
        (lambda: activated(nn.Softplus(beta=20)), FLAT, "Softplus"),
        (lambda: activated(nn.GELU()), FLAT, "Gelu"),
        (lambda: activated(nn.Tanh()), FLAT, "Tanh"),
        (lambda: activated(nn.Hardswish()), FLAT, "Hardswish"),
        (lambda: activated(nn.LayerNorm(5)), FLAT, "NativeLayerNorm"),
        (Repeated, FLAT, "Addmm has cell.weight in both factors"),
        (Tied, FLAT, "Mm has a.weight in both factors"),
        (Recurrent, SEQUENCE, "not known"),
        (Squeeze, FLAT, "Mul has a.weight, a.bias in both factors"),
        (Own, FLAT, "Relu"),
    ],
    ids=[
        "softplus",
        "sharp softplus",
        "gelu",
        "tanh",
        "hardswish",
        "layernorm",
        "depth",
        "tied",
        "lstm",
        "gate",
        "own",
    ],
)
def test_other_networks_are_not_recognized_and_fail_the_test(make, x, reason):
    problem = classified(make(), x)
    verdict = structure.multilinear(problem)
    assert not verdict.recognized
    assert reason in verdict.reason
    found = structure.verify(problem)
    assert not found.passed
    assert found.worst > 1e-3
    gap = abs(hessian_blocks(problem) - ggn_trace.exact(problem).blocks)
    assert gap.max() > 1e-6


@pytest.mark.parametrize(
    ("make", "linear"),
    [
        (lambda: activated(nn.ReLU()), True),
        (lambda: nets.mlp([4, 9, 9, 3]), True),
        (Siamese, True),
        (lambda: activated(nn.Softplus(beta=20)), False),
        (lambda: activated(nn.GELU()), False),
        (Tied, False),
        (Repeated, False),
        (Squeeze, False),
    ],
    ids=["relu", "mlp", "siamese", "softplus", "gelu", "tied", "depth", "gate"],
)
def test_few_examples_decide_for_any_weights_and_vectors(make, linear):
    """vᵀRv is continuous and of order vᵀGv where a unit is near its bend: missed by chance in about 1e-8."""
    for seed in range(30):
        stream = torch.Generator().manual_seed(seed)
        model = make().double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=stream, dtype=torch.float64))
        x = torch.randn(40, 4, generator=stream, dtype=torch.float64)
        y = torch.randint(0, 3, (40,), generator=stream)
        found = structure.verify(Problem(model, nn.CrossEntropyLoss(), [(x, y)]), seed=seed)
        assert found.examples == 32
        assert found.passed is linear, (seed, found)
    # Of a wide network one example is enough.
    wide = nets.mlp([4, 512, 512, 3], activation=nn.ReLU if linear else nn.GELU)
    found = structure.verify(Problem(wide, nn.CrossEntropyLoss(), [(x.float(), y)]))
    assert (found.examples, found.passed) == (1, linear)


def test_verification_skips_examples_without_a_target():
    x, y = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)), torch.full((40,), -100)
    y[36] = 1
    for activation, linear in ((nn.ReLU(), True), (nn.Softplus(), False)):
        model = nets.mlp([4, 6, 3], lambda made=activation: made)
        found = structure.verify(Problem(model, nn.CrossEntropyLoss(), [(x, y)]))
        assert found.passed is linear
        assert found.worst == 0 or found.worst > 1e-3


def test_verification_names_the_tensors_that_fail():
    """Behind the last activation everything is linear: only what stands before it fails."""
    problem = classified(activated(nn.Softplus()), FLAT)
    found = structure.verify(problem)
    assert found.failed == ["0.weight", "0.bias"]
    assert found.ratios[2:].max() <= found.tolerance
    assert found.examples == 4


@pytest.mark.parametrize("case", WITH_OUTPUTS, ids=lambda c: c.name)
def test_no_case_is_mistaken(case):
    expected = reference(case)
    problem = Problem(**case.arguments())
    if structure.multilinear(problem).recognized:
        assert structure.verify(problem).passed
        for a, b in problem.space.ranges.values():
            hessian, ggn = (float(M.diagonal()[a:b].sum()) for M in (expected.hessian, expected.ggn))
            assert hessian == pytest.approx(ggn, rel=1e-10, abs=1e-12)


def test_a_layer_without_a_second_derivative_is_not_verified():
    found = structure.verify(classified(activated(nn.Hardsigmoid()), FLAT))
    assert not found.passed
    assert np.isnan(found.worst)


def test_a_subset_may_be_linear_where_the_whole_is_not():
    model = activated(nn.Tanh())
    assert not structure.multilinear(classified(model, FLAT)).recognized
    last = classified(model, FLAT).replace(parameters="2")
    assert structure.multilinear(last).recognized
    assert structure.verify(last).passed


@pytest.mark.parametrize("case", [c for c in CASES if c.blackbox], ids=lambda c: c.name)
def test_a_black_box_is_refused(case):
    problem = Problem(**case.arguments())
    for call in (structure.multilinear, structure.verify):
        with pytest.raises(Refused, match="output="):
            call(problem)


def test_an_exact_trace_loads_neither_scipy_nor_kernels():
    script = """
import sys, torch, landscape
model, x, y = torch.nn.Linear(3, 2), torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
problem = landscape.Problem(model, torch.nn.CrossEntropyLoss(), [(x, y)])
record = landscape.evaluate(landscape.metrics.Trace(), problem)
print(record.attrs["way"], sorted({"scipy", "landscape.kernels"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "layers []"
