"""What the measures of flatness are invariant to, and what not, by transformations made by hand.

The table of ticks and crosses: each measure before and after a change of parameters that leaves the function (or,
for changes of units, the model as a function of its new parameters) alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases_base import labels, normal
from torch import Tensor, nn

import landscape
from landscape import Problem
from landscape.metrics import (
    AdaptiveSpectralNorm,
    AdaptiveTrace,
    FisherRao,
    NormalizedSharpness,
    PathNorm,
    RelativeFlatness,
    SpectralNorm,
    Trace,
)
from landscape.metrics.base import Metric

MEASURES: dict[str, Metric] = {
    "trace": Trace(method="exact"),
    "frobenius": Trace(method="exact", frobenius=True),
    "spectral_norm": SpectralNorm(rtol=1e-10),
    "adaptive_trace": AdaptiveTrace(method="exact"),
    "adaptive_spectral_norm": AdaptiveSpectralNorm(rtol=1e-10),
    "relative_flatness": RelativeFlatness(layer="second.weight", method="exact"),
    "fisher_rao": FisherRao(),
    "empirical_fisher_rao": FisherRao(curvature="empirical_fisher"),
    "path_norm": PathNorm(),
    "path_norm_1": PathNorm(p=1.0),
    "normalized_sharpness": NormalizedSharpness(),
}


class Network(nn.Module):
    """Three linear layers with an activation between them."""

    def __init__(self, bias: bool, activation: Callable[[Tensor], Tensor] = torch.relu):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5, bias=bias), nn.Linear(5, 6, bias=bias)
        self.third, self.activation = nn.Linear(6, 3, bias=bias), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.activation(self.second(self.activation(self.first(x)))))


def filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(model.double().parameters()):
            p.copy_(normal(*p.shape, seed=i))
    return model


def network(bias: bool, activation: Callable[[Tensor], Tensor] = torch.relu) -> Network:
    model = filled(Network(bias, activation))
    assert isinstance(model, Network)
    return model


def problem(model: nn.Module, *shape: int) -> Problem:
    x, y = normal(9, *(shape or (4,)), seed=70), labels(9, 3, seed=71)
    return Problem(model, nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:], y[4:])])


def value(name: str, of: Problem) -> float:
    metric = MEASURES[name]
    headline = "frobenius_norm" if name == "frobenius" else metric.headline
    return float(landscape.evaluate(metric, of)[headline])


def scaled(model: nn.Module, factors: dict[str, Tensor | float]) -> nn.Module:
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.mul_(factors.get(name, 1.0))
    return moved


def layer(model: nn.Module) -> nn.Module:
    """The first layer times 3, the second times 1/6, the third times 2; biases with what leads to them."""
    return scaled(
        model,
        {
            "first.weight": 3.0,
            "first.bias": 3.0,
            "second.weight": 1 / 6,
            "second.bias": 0.5,
            "third.weight": 2.0,
        },
    )


def rows(model: nn.Module) -> nn.Module:
    """Each node of the second layer by a factor of its own."""
    c = normal(6, seed=80).exp()
    return scaled(model, {"second.weight": c[:, None], "second.bias": c, "third.weight": 1 / c})


def columns(model: nn.Module) -> nn.Module:
    """Each node of the first layer by a factor of its own: columns of the second."""
    c = normal(5, seed=81).exp()
    return scaled(model, {"first.weight": c[:, None], "first.bias": c, "second.weight": 1 / c})


def permuted(model: nn.Module) -> nn.Module:
    moved = copy.deepcopy(model)
    assert isinstance(moved, Network)
    order, other = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([5, 2, 0, 1, 4, 3])
    with torch.no_grad():
        for one in (moved.first.weight, moved.first.bias):
            if one is not None:
                one.copy_(one[order].clone())
        moved.second.weight.copy_(moved.second.weight[:, order][other].clone())
        if moved.second.bias is not None:
            moved.second.bias.copy_(moved.second.bias[other].clone())
        moved.third.weight.copy_(moved.third.weight[:, other].clone())
    return moved


TRANSFORMATIONS = {"layer": layer, "rows": rows, "columns": columns, "permutation": permuted}
NEVER = {"layer": False, "rows": False, "columns": False, "permutation": True}
ALWAYS = {"layer": True, "rows": True, "columns": True, "permutation": True}
TABLE = {
    "trace": NEVER,
    "frobenius": NEVER,
    "spectral_norm": NEVER,
    "adaptive_trace": ALWAYS,
    "adaptive_spectral_norm": ALWAYS,
    "relative_flatness": {**ALWAYS, "columns": False},
    "fisher_rao": ALWAYS,
    "empirical_fisher_rao": ALWAYS,
    "path_norm": ALWAYS,
    "path_norm_1": ALWAYS,
    "normalized_sharpness": ALWAYS,
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("measure", TABLE)
def test_rescaled_nodes_and_layers(measure: str, transformation: str, bias: bool) -> None:
    before = network(bias)
    after = TRANSFORMATIONS[transformation](before)
    x = normal(20, 4, seed=90)
    torch.testing.assert_close(after(x), before(x), rtol=1e-11, atol=1e-12)
    old, new = (value(measure, problem(m)) for m in (before, after))
    if TABLE[measure][transformation]:
        assert new == pytest.approx(old, rel=1e-8)
    else:
        assert abs(new / old - 1) > 0.1


# biases


def test_with_asams_unit_scale_on_biases_the_adaptive_trace_is_not_invariant() -> None:
    """Σ_w w²H_ww + Σ_b H_bb, from dense Hessians, against the measure over all parameters."""
    found = []
    for model in (network(True), layer(network(True))):
        p = problem(model)
        diagonal = (landscape.hessian(p) @ torch.eye(p.size, dtype=torch.float64)).diagonal()
        theta = p.parameters_vector()
        biases = torch.cat(
            [torch.full((b - a,), name.endswith("bias")) for name, (a, b) in p.space.ranges.items()]
        )
        asam = float(torch.where(biases, 1.0, theta.square()) @ diagonal)
        found.append((asam, value("adaptive_trace", p)))
    (asam, ours), (asam_moved, ours_moved) = found
    assert ours_moved == pytest.approx(ours, rel=1e-9)
    assert abs(asam_moved / asam - 1) > 0.1


def test_without_its_biases_the_adaptive_trace_is_still_invariant_and_smaller() -> None:
    """Measured are the parameters that the problem selects: each has its own unit."""
    before, after = (problem(m).only("*.weight") for m in (network(True), layer(network(True))))
    old, new = (value("adaptive_trace", p) for p in (before, after))
    assert new == pytest.approx(old, rel=1e-9)
    assert old < value("adaptive_trace", problem(network(True)))


# BatchNorm


def normed() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    filled(model)
    for i in (1, 4):
        width = model[i].running_mean.numel()
        model[i].running_mean.copy_(normal(width, seed=30 + i))
        model[i].running_var.copy_(normal(width, seed=40 + i).exp())
    return model


def rescaled_norm(model: nn.Module) -> nn.Module:
    """A convolution's channels and their running means by c, BatchNorm's weight by 1/c."""
    moved, c = copy.deepcopy(model), normal(4, seed=5).exp()
    with torch.no_grad():
        moved[0].weight.mul_(c[:, None, None, None])
        moved[0].bias.mul_(c)
        moved[1].running_mean.mul_(c)
        moved[1].weight.div_(c)
    return moved


@pytest.mark.parametrize("measure", [m for m in TABLE if m != "relative_flatness"])
def test_scale_before_batch_norm_in_evaluation_mode(measure: str) -> None:
    before = normed().eval()
    after = rescaled_norm(before).eval()
    x = normal(5, 2, 5, 5, seed=90)
    torch.testing.assert_close(after(x), before(x), rtol=1e-11, atol=1e-12)
    old, new = (value(measure, problem(m, 2, 5, 5)) for m in (before, after))
    assert (new == pytest.approx(old, rel=1e-7)) == TABLE[measure]["rows"]


@pytest.mark.parametrize(
    ("metric", "invariant"),
    [
        (Trace(method="exact", curvature="ggn"), False),
        (AdaptiveTrace(method="exact", curvature="ggn"), True),
        (AdaptiveTrace(method="exact"), True),
        (AdaptiveSpectralNorm(rtol=1e-9), True),
        (FisherRao(), True),
        (NormalizedSharpness(), True),
    ],
    ids=lambda v: str(v)[:40],
)
def test_scale_before_batch_norm_in_training_mode(metric: Metric, invariant: bool) -> None:
    """Exact only up to the ε under its root, which is 1e-14 here."""
    found = []
    for factor in (1.0, 5.0):
        model = filled(
            nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, eps=1e-14), nn.ReLU(), nn.Linear(5, 3))
        )
        with torch.no_grad():
            model[0].weight.mul_(factor)
        batch = [(normal(9, 4, seed=70), labels(9, 3, seed=71))]
        moving = Problem(model, nn.CrossEntropyLoss(), batch, mode="train")
        found.append(float(landscape.evaluate(metric, moving)[metric.headline]))
    assert (found[1] == pytest.approx(found[0], rel=1e-6)) == invariant


# weight norm, units, and other reparametrizations


class Remade(nn.Module):
    """A rectifier network whose weight matrices are made from other parameters."""

    def __init__(
        self, parameters: dict[str, Tensor], weights: Callable[[Callable[[str], Tensor]], list[Tensor]]
    ):
        super().__init__()
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weights(self.get_parameter)
        return torch.relu(x @ first.T) @ second.T


def weight_normed(scale: float) -> nn.Module:
    """w = g v/‖v‖ with v -> scale v."""

    def weights(p: Callable[[str], Tensor]) -> list[Tensor]:
        v = p("v")
        return [p("g")[:, None] * v / (v * v).sum(1, keepdim=True).sqrt(), p("second")]

    given = {"v": scale * normal(5, 4), "g": normal(5, seed=1), "second": normal(3, 5, seed=2)}
    return Remade(given, weights)


def in_units(seed: int | None) -> nn.Module:
    """θ = d ⊙ η: the same network in other units of each weight."""
    shapes = {"first": (5, 4), "second": (3, 5)}
    units = {
        name: torch.ones(shape).double() if seed is None else normal(*shape, seed=seed + i).exp()
        for i, (name, shape) in enumerate(shapes.items())
    }

    def weights(p: Callable[[str], Tensor]) -> list[Tensor]:
        return [units[name] * p(name) for name in shapes]

    return Remade({name: normal(*shape) / units[name] for name, shape in shapes.items()}, weights)


def rotated(angle: bool) -> nn.Module:
    """Both factors of a matrix product by an orthogonal matrix and back: no rectifier between them."""
    Q = torch.linalg.qr(normal(5, 5, seed=9)).Q if angle else torch.eye(5).double()
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(Q @ normal(5, 4))
        model[1].weight.copy_(normal(3, 5, seed=1) @ Q.T)
    return model


def cubed(power: int) -> nn.Module:
    """θ = η³ entry by entry."""

    def weights(p: Callable[[str], Tensor]) -> list[Tensor]:
        return [p("first") ** power, p("second") ** power]

    shapes = {"first": (5, 4), "second": (3, 5)}
    return Remade({name: normal(*shape).abs() ** (1 / power) for name, shape in shapes.items()}, weights)


@dataclass(frozen=True)
class Change:
    """Two parametrizations of one function, and which measures agree on them."""

    before: nn.Module
    after: nn.Module
    same: frozenset[str]


EVERYWHERE = frozenset({"adaptive_trace", "adaptive_spectral_norm", "normalized_sharpness"})
# θᵀFθ is invariant to every linear change of parameters; a path's weight is that of the weights that are used.
LINEAR = frozenset({"fisher_rao", "empirical_fisher_rao"})
PATHS = frozenset({"path_norm", "path_norm_1"})
ORTHOGONAL = frozenset({"trace", "frobenius", "spectral_norm"})
CHANGES = {
    "weight norm": lambda: Change(weight_normed(1.0), weight_normed(4.0), EVERYWHERE | LINEAR | PATHS),
    "units": lambda: Change(in_units(None), in_units(50), EVERYWHERE | LINEAR | PATHS),
    "rotation": lambda: Change(rotated(False), rotated(True), LINEAR | ORTHOGONAL),
    "cube": lambda: Change(cubed(1), cubed(3), PATHS),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("measure", [m for m in TABLE if m != "relative_flatness"])
def test_other_changes_of_parameters(measure: str, change: str) -> None:
    made = CHANGES[change]()
    x = normal(20, 4, seed=90)
    torch.testing.assert_close(made.after(x), made.before(x), rtol=1e-11, atol=1e-12)
    old, new = (value(measure, problem(m)) for m in (made.before, made.after))
    if measure in made.same:
        assert new == pytest.approx(old, rel=1e-8)
    else:
        assert abs(new / old - 1) > 0.02


def test_what_the_fisher_rao_norm_becomes_under_a_cube() -> None:
    """θ = η³: ηᵀF_η η = 9 θᵀFθ."""
    assert value("fisher_rao", problem(cubed(3))) == pytest.approx(9 * value("fisher_rao", problem(cubed(1))))


def test_relative_flatness_is_invariant_to_rotations() -> None:
    """Of a layer's neurons and of its inputs."""
    metric = RelativeFlatness(layer="*", method="exact")
    before, after = (landscape.evaluate(metric, problem(rotated(angle))) for angle in (False, True))
    name = "layer_relative_flatness"
    assert after[name].tolist() == pytest.approx(before[name].tolist(), rel=1e-10)


def test_weights_in_other_numbers_have_another_path_norm() -> None:
    """The cross for changes of units: with w -> d w in place, without telling the function."""
    before = network(False)
    d = normal(6, 5, seed=3).exp()
    after = scaled(before, {"second.weight": d})
    assert abs(value("path_norm", problem(after)) / value("path_norm", problem(before)) - 1) > 0.1


# the scalar network, in closed form


@pytest.mark.parametrize("alpha", [1e-3, 0.5, 1.0, 30.0])
def test_the_scalar_network(alpha: float) -> None:
    """L = ½(w₂w₁x - y)² at its minimum: adaptive trace 2(x w₁w₂)², largest eigenvalue x²(α²w₁² + w₂²/α²)."""
    w1, w2, x = 0.7, -1.3, 1.7
    target = torch.tensor([[w1 * w2 * x]], dtype=torch.float64)
    scalar = Problem(
        lambda p, t: p["b"] * p["a"] * t,
        lambda f, y: ((f - y) ** 2 / 2).mean(),
        [(torch.tensor([[x]], dtype=torch.float64), target)],
        parameters={"a": torch.tensor(alpha * w1).double(), "b": torch.tensor(w2 / alpha).double()},
    )
    product = 2 * (x * w1 * w2) ** 2
    assert float(landscape.evaluate(AdaptiveTrace(), scalar)["adaptive_trace"]) == pytest.approx(
        product, rel=1e-6
    )
    found = landscape.evaluate(AdaptiveSpectralNorm(rtol=1e-9), scalar)
    assert float(found["adaptive_spectral_norm"]) == pytest.approx(product, rel=1e-6)
    plain = landscape.evaluate(SpectralNorm(rtol=1e-9), scalar)
    expected = x**2 * (alpha**2 * w1**2 + w2**2 / alpha**2)
    assert float(plain["spectral_norm"]) == pytest.approx(expected, rel=1e-6)
