"""The metric `path_norm` against sums over enumerated paths, and what it is invariant to."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import landscape
from landscape import Problem, Refused, paths
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
    (A, a), (B, b) = ((m.weight.detach(), m.bias.detach()) for m in model if isinstance(m, nn.Linear))
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
    last = filled(nn.Linear(rows.shape[0], 3), seed=1)
    model = nn.Sequential(operation, nn.ReLU(), nn.Flatten(), last)
    expected = chained([rows, torch.cat([last.weight.detach(), last.bias.detach()[:, None]], 1)], p)
    if name in {"fraction", "matrix"}:  # constants of one channel each, along with paths through them
        expected = _with_constants(name, last, p)
    if name == "pieces":
        x = torch.ones(1, *shape, dtype=torch.float64)
        doubled = 2**p * torch.cat([x[:, :1], x[:, :1] + x[:, 1:]], 1)
        expected = float(
            (last.weight.detach().abs() ** p @ doubled.flatten() + last.bias.detach().abs() ** p).sum()
        )
    assert of(model, *shape, p=p) ** p == pytest.approx(expected, rel=1e-12)


def _with_constants(name: str, last: nn.Linear, p: float) -> float:
    x = torch.ones(1, 2, 5, 4, dtype=torch.float64)
    if name == "fraction":
        value = x / 3**p + 0.5**p * x + 0.25**p
    else:
        value = (2**p + x) @ torch.full((4, 2), 0.7**p, dtype=torch.float64)
    return float((last.weight.detach().abs() ** p @ value.flatten() + last.bias.detach().abs() ** p).sum())


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


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda t: t.amax(2), 12.0),
        (lambda t: t.max(2).values, 12.0),
        (lambda t: t.max(1, keepdim=True)[0], 12.0),
        (lambda t: t.max().reshape(1, 1), 12.0),
        (lambda t: torch.maximum(t, 3 * t), 12 * 10.0),
        (lambda t: F.max_pool1d(t, 2), 12.0),
        (lambda t: F.adaptive_max_pool1d(t, 3), 3 * 6.0),
        (lambda t: F.avg_pool1d(t, 2), 6 * 2 / 4.0),
        (lambda t: t.clamp(min=0).abs().sub(2 * t, alpha=2), 12 * 17.0),
        (lambda t: 5 - F.threshold(t, 0.0, 0.0), 12 * 26.0),
        (lambda t: t.clone().add_(2).mul_(3).neg_().relu_(), 12 * 45.0),
        (lambda t: t + torch.full_like(t, 2.0), 12 * 5.0),
        (lambda t: F.max_pool3d(t[None], (1, 2, 2), stride=1), 6 * 4.0),
    ],
)
def test_formulas(function, expected: float) -> None:
    """Of 3 x 4 inputs, at p = 2."""
    x = torch.ones(1, 3, 4, dtype=torch.float64)
    model = nn.Sequential(Formula(function), Gain())
    problem = Problem(model, nn.MSELoss(), [(x, model(x).detach())])
    assert paths.path_sum(problem, 2.0) == pytest.approx(expected)


class Gain(nn.Module):
    """Times a parameter, which is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_networks_by_their_layers() -> None:
    """Residual blocks: the paths around and those through add up; a shared layer counts wherever it stands."""
    body, head = filled(nn.Linear(3, 3)), filled(nn.Linear(3, 2, bias=False), seed=1)
    W, b, V = (t.detach().abs() ** 2 for t in (body.weight, body.bias, head.weight))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.relu(self.body(x))
            return self.head(x - torch.relu(self.body(x)))

    x = torch.ones(3, dtype=torch.float64)
    for _ in range(2):
        x = x + W @ x + b
    assert of(Residual(), 3) ** 2 == pytest.approx(float((V @ x).sum()), rel=1e-12)


def test_a_residual_network_runs() -> None:
    """Against float64 with the layers' own arithmetic: BatchNorm folded by hand, no maximum in it."""
    model = filled(nets.resnet20(2, blocks=1))
    folded = filled(nets.resnet20(2, blocks=1))
    with torch.no_grad():
        for part in folded.modules():
            for norm in part.children():
                if isinstance(norm, nn.BatchNorm2d):
                    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
                    shift = norm.bias - norm.running_mean * factor
                    norm.running_mean.zero_()
                    norm.running_var.fill_(1 - norm.eps)
                    norm.weight.copy_(factor)
                    norm.bias.copy_(shift)
        for p in folded.parameters():
            p.copy_(p.abs())
    x = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    assert of(model, 3, 8, 8, p=1.0) == pytest.approx(float(folded.eval()(x).sum().detach()), rel=1e-9)


def test_weight_norm_counts_as_the_weight_that_it_makes() -> None:
    plain = filled(nn.Linear(4, 3))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3).double())
    normed.weight = plain.weight.detach().clone()
    with torch.no_grad():
        normed.bias.copy_(plain.bias)
        normed.parametrizations.weight.original1.mul_(7.0)  # v -> 7 v, and the weight stays
    assert of(normed, 4) == pytest.approx(of(plain, 4), rel=1e-12)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.GELU(), "gelu"),
        (nn.ReLU6(), "hardtanh"),
        (nn.LayerNorm(4).double(), "layer_norm"),
        (nn.Softmax(1), "softmax"),
        (Formula(lambda x: x * x), "mul"),
        (Formula(lambda x: x @ x.mT), "mm"),
        (Formula(lambda x: 1 / x), "reciprocal"),
        (Formula(lambda x: x * (x > 0)), "gt"),
        (Formula(lambda x: x.clamp(min=-1)), "clamp"),
        (Formula(lambda x: F.pad(x, (1, 0), value=1.0)[:, :4]), "constant_pad_nd"),
        (Formula(lambda x: x if x.sum() > 0 else -x), "gt"),
    ],
    ids=str,
)
def test_other_operations_are_refused_and_named(layer: nn.Module, named: str) -> None:
    model = nn.Sequential(filled(nn.Linear(4, 4)), layer)
    with pytest.raises(Refused, match=f"rectifiers; aten.{named}|rectifiers; aten.native_{named}|_{named}"):
        of(model, 4)


def test_what_else_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed is a finite number >= 1"):
        PathNorm(p=0.5)
    tokens = torch.tensor([[0, 1], [1, 2]])
    embedded = nn.Sequential(nn.Embedding(3, 2), nn.Flatten(), nn.Linear(4, 2)).double()
    with pytest.raises(Refused, match="whole numbers"):
        paths.path_sum(Problem(embedded, nn.CrossEntropyLoss(), [(tokens, torch.tensor([0, 1]))]), 2.0)
    x, y = torch.randn(4, 2).double(), torch.tensor([0, 1, 1, 0])
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    with pytest.raises(Refused, match="mode='eval'"):
        paths.path_sum(Problem(norm, nn.CrossEntropyLoss(), [(x, y)], mode="train"), 2.0)
    box = Problem(norm, forward=lambda m, b: F.cross_entropy(m(b[0]), b[1]), data=[(x, y)])
    with pytest.raises(Refused, match="output="):
        landscape.measure(PathNorm(), box)
    huge = nn.Linear(2, 2).double()
    with torch.no_grad():
        huge.weight.fill_(1e200)
    with pytest.raises(Refused, match="overflows"):
        paths.path_sum(Problem(huge, nn.CrossEntropyLoss(), [(x, y)]), 2.0)


def test_the_data_do_not_matter_and_the_model_stays() -> None:
    model = filled(nets.mlp([3, 4, 2]))
    before = [p.clone() for p in model.parameters()]
    assert of(model, 3, seed=0) == of(model, 3, seed=1)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    x, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])
    problem = Problem(model, nn.CrossEntropyLoss(), [(x, y)], parameters="0.weight")
    moved = problem.at(2 * problem.parameters_vector())
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert paths.path_sum(moved, 2.0) == pytest.approx(of(model, 3) ** 2, rel=1e-12)


def test_batches_of_any_structure() -> None:
    """Several inputs, by position, by name, and taken out of the batch by the user; all are ones."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = filled(nn.Linear(2, 3)), filled(nn.Linear(4, 3), seed=1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([self.a(a), torch.relu(self.b(b))], 1)

    model, y = Sum(), torch.tensor([0, 1, 2])
    a, b = torch.randn(3, 2).double(), torch.randn(3, 4).double()
    expected = sum(float((p.detach() ** 2).sum()) for p in model.parameters())
    problems = [
        Problem(model, nn.CrossEntropyLoss(), [((a, b), y)]),
        Problem(model, nn.CrossEntropyLoss(), [({"a": a, "b": b}, y)]),
        Problem(
            model, nn.CrossEntropyLoss(), [{"one": a, "two": b, "y": y}],
            output=lambda m, batch: m(batch["one"], batch["two"]), target=lambda batch: batch["y"],
        ),
    ]  # fmt: skip
    for problem in problems:
        assert paths.path_sum(problem, 2.0) == pytest.approx(expected, rel=1e-12)
