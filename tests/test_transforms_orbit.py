"""The balanced point of an orbit, permutations, and other coordinates."""

from __future__ import annotations

import math

import pytest
import torch
from cases_base import labels, net, normal
from cases_symmetries import BY_NAME, FIVE, IMAGES, Net, found, grouped, mlp
from cases_symmetries_own import Dense, weight_norm
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

import landscape
from landscape import testbeds, transforms

EYE = torch.eye(200, dtype=torch.float64)

# the balanced point


@pytest.mark.parametrize(
    "name",
    ["mlp", "lenet", "leaky and parametric relu", "functional", "u-net", "mobilenet", "transformer, tied",
     "shared layer without bias", "squeeze and excite"],
)  # fmt: skip
def test_the_balanced_point_is_the_same_from_all_over_the_orbit(name: str) -> None:
    symmetries = found(name)
    here = symmetries.balanced()
    away = symmetries.random(1.0, seed=3)
    there = transforms.find(away.problem).balanced()
    assert float((here.vector - there.vector).abs().max()) <= 1e-11
    assert here.function_change <= 1e-13
    for buffer, value in here.buffers.items():
        assert torch.allclose(there.problem.buffers()[buffer], value, rtol=1e-11)
    # nothing near by on the orbit is shorter
    norm = float(here.vector.norm())
    assert norm < float(symmetries.problem.parameters_vector().norm())
    assert all(
        float(transforms.find(here.problem).random(1e-3, i).vector.norm()) >= norm - 1e-12 for i in range(3)
    )


def test_balanced_units_have_as_much_coming_in_as_going_out() -> None:
    """Closed form of one hidden layer without biases: each unit's two norms are their geometric mean."""
    problem = Net("", lambda: mlp(8, 16, 4, bias=False), normal(4, 8), 16, 1).problem()
    there = transforms.find(problem).balanced()
    W, V = problem.space.split(problem.parameters_vector())
    W_there, V_there = problem.space.split(there.vector)
    target = (W.norm(dim=1) * V.norm(dim=0)).sqrt()
    assert torch.allclose(W_there.norm(dim=1), target, rtol=1e-12)
    assert torch.allclose(V_there.norm(dim=0), target, rtol=1e-12)


def test_rows_before_a_norm_have_norm_one_at_the_balanced_point() -> None:
    problem = Net(
        "", lambda: testbeds.resnet20(4, blocks=1), IMAGES, 0, 0, options={"mode": "train"}
    ).problem()
    symmetries = transforms.find(problem)
    there = symmetries.balanced(exact=False)
    assert not there.exact
    parts = dict(zip(problem.names, problem.space.split(there.vector), strict=True))
    for group in symmetries.groups:
        if not group.exact:
            (name,) = group.parameters
            assert torch.allclose(parts[name].flatten(1).norm(dim=1), torch.ones(1).double(), rtol=1e-10), (
                name
            )
    away = transforms.find(symmetries.random(0.5, exact=False).problem).balanced(exact=False)
    assert float((away.vector - there.vector).abs().max()) <= 1e-9


def test_units_of_zeros_stay() -> None:
    """A unit that nothing comes into, and one that nothing comes into or goes out of."""
    problem = Net("", lambda: mlp(5, 4, 3), FIVE, 4, 1).problem()
    theta = problem.parameters_vector()
    W, b, V, _ = problem.space.split(theta)
    W[:2], b[:2], V[:, 1] = 0, 0, 0
    there = transforms.find(problem.at(theta)).balanced()
    assert there.function_change <= 1e-14
    assert bool(torch.isfinite(there.vector).all())


# permutations


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mlp", [16, 12]), ("lenet", [6, 16, 120, 84]), ("functional", [6, 4, 5]), ("gelu", [10, 9]),
        ("resnet-20 of width 4", [4, 4, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16]), ("u-net", [4, 6, 8, 6, 6, 5]),
        ("mobilenet", [8, 16, 16]), ("shared layer with bias", [6]), ("transformer, tied", [8, 16, 16]),
        ("gelu with two linear layers", [7, 6, 5]), ("squeeze and excite", [6, 3]),
    ],
)  # fmt: skip
def test_permutations_of_hidden_units(name: str, sizes: list[int]) -> None:
    problem = found(name).problem
    exchanges = transforms.permutations(problem)
    assert sorted(len(group) for group in exchanges.groups) == sorted(sizes)
    there = exchanges.random()
    assert there.function_change <= 1e-13
    assert float((there.vector - problem.parameters_vector()).abs().max()) > 0.1
    assert torch.equal(there.vector.sort().values, problem.parameters_vector().sort().values)


def test_a_swap_moves_rows_and_columns_and_nothing_else() -> None:
    problem = BY_NAME["mlp"].problem()
    there = transforms.permutations(problem).swap(1, 2, 5)
    before, after = (problem.space.split(v) for v in (problem.parameters_vector(), there.vector))
    order = [0, 1, 5, 3, 4, 2, *range(6, 12)]
    expected = [before[0], before[1], before[2][order], before[3][order], before[4][:, order], before[5]]
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
    with pytest.raises(ValueError, match=r"allowed are 0 \(0\.weight, 16 units\)"):
        transforms.permutations(problem).swap(1, 2, 12)


def test_permuted_derivatives() -> None:
    problem = Net("", lambda: mlp(3, 4, 3, 2), normal(6, 3), 0, 0).problem()
    there = transforms.permutations(problem).random(seed=2)
    v = normal(problem.size, seed=8)
    assert torch.allclose(
        there.problem.gradient(), there.cotangent(problem.gradient()), rtol=1e-12, atol=1e-15
    )
    expected = there.cotangent(problem.hvp(there.pull(v)))
    assert torch.allclose(there.problem.hvp(v), expected, rtol=1e-11, atol=1e-14)
    assert torch.equal(there.push(there.pull(v)), v)


def test_what_cannot_be_permuted_stays() -> None:
    """Groups of a convolution do; a network of one such layer after the other has nothing to exchange."""
    grouped_net = Net("", grouped, IMAGES, 0, 0).problem()
    with pytest.raises(landscape.Refused, match="no hidden units"):
        transforms.permutations(grouped_net).random()
    assert len(transforms.permutations(Net("", Dense, IMAGES, 0, 0).problem()).groups) == 3


# other coordinates


def small(loss: nn.Module | None = None) -> landscape.Problem:
    model, x, y = net(lambda: mlp(4, 5, 3))(), normal(7, 4), labels(7, 3)
    return landscape.Problem(model, loss or nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:], y[4:])])


def quartic(a: float, b: float, at: float = 0.3) -> tuple[landscape.Problem, landscape.Problem]:
    """L(θ) = 2 (θ−θ̂)² + (θ−θ̂)³ + (θ−θ̂)⁴ + 1 at its minimum θ̂, and in the coordinates η."""

    def f(p: dict[str, Tensor], x: Tensor) -> Tensor:
        t = p["theta"] - at
        return (2 * t**2 + t**3 + t**4 + 1) * x

    one = torch.ones(1, 1, dtype=torch.float64)
    problem = landscape.Problem(
        f,
        lambda out, _: out.mean(),
        [(one, one)],
        parameters={"theta": torch.tensor([at], dtype=torch.float64)},
    )
    return problem, transforms.radial(problem, a, b).problem


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.1), (2.0, 0.3), (-0.25, 0.01), (-0.45, 2.0), (1.0, 5.0)])
def test_curvature_at_a_minimum_can_be_anything(a: float, b: float) -> None:
    """L_η'' = L'' b^(−2a), and nothing else changes there. Dinh et al., section 5.1."""
    problem, other = quartic(a, b)
    one = torch.ones(1, dtype=torch.float64)
    assert float(problem.hvp(one)) == pytest.approx(4.0, rel=1e-12)
    assert float(other.hvp(one)) == pytest.approx(4.0 * b ** (-2 * a), rel=1e-10)
    assert float(other.value()) == pytest.approx(float(problem.value()), rel=1e-14)


@pytest.mark.parametrize("a", [-0.4, 0.7, 1.5])
def test_radial_coordinates_are_those_of_the_formula(a: float) -> None:
    """Away from the centre, against dη/dθ = (t²+b)^(a−1) ((2a+1) t² + b), and the curve against its own η."""
    problem, b = small(), 0.3
    theta = problem.parameters_vector()
    center = theta + 0.1 * normal(len(theta), seed=4)
    other = transforms.radial(problem, a, b, center)
    eta = other.problem.parameters_vector()
    t = theta - center
    assert torch.allclose(eta, (t @ t + b) ** a * t, rtol=1e-13)
    assert float((other.theta(eta) - theta).abs().max()) <= 1e-13
    along = t / t.norm()
    slope = along @ jacobian(other.theta, eta) @ along
    square = float(t @ t)
    assert float(slope) == pytest.approx(
        1 / ((square + b) ** (a - 1) * ((2 * a + 1) * square + b)), rel=1e-11
    )


def test_the_hessian_in_other_coordinates_has_a_second_term() -> None:
    """∇gᵀ H ∇g + Σ_j (∂L/∂θ_j) ∇²g_j with g's derivatives by autograd."""
    problem = small()
    other = transforms.radial(problem, 0.7, 0.3, problem.parameters_vector() + 0.1)
    eta, n = other.problem.parameters_vector(), problem.size
    H, g, J = problem.hvp(EYE[:n, :n]), problem.gradient(), jacobian(other.theta, eta)
    second = hessian(lambda e: other.theta(e) @ g, eta)
    made = other.problem.hvp(EYE[:n, :n])
    expected = J.T @ H @ J + second
    assert float((made - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
    assert float((made - J.T @ H @ J).abs().max()) > 1e-3 * float(expected.abs().max())
    assert torch.allclose(other.problem.gradient(), J.T @ g, rtol=1e-11, atol=1e-15)


def test_weight_normalization() -> None:
    """v → α v leaves f alone and divides v's block of the Hessian by α²; the gradient has no part along v."""
    problem = small()
    other = transforms.weight_normalized(problem)
    assert other.problem.names == ["0.weight_size", "0.weight_direction", "0.bias", "2.weight_size",
                                   "2.weight_direction", "2.bias"]  # fmt: skip
    assert other.function_change <= 1e-14
    symmetries = transforms.find(other.problem)
    assert [(len(g.nodes), g.parameters) for g in symmetries.groups[:2]] == [
        (5, ("0.weight_direction",)),
        (3, ("2.weight_direction",)),
    ]
    start, stop = other.problem.space.ranges["0.weight_direction"]
    v, gradient = other.problem.parameters_vector()[start:stop], other.problem.gradient()[start:stop]
    assert abs(float(v @ gradient)) <= 1e-15
    E = torch.eye(other.problem.size, dtype=torch.float64)[:, start:stop]
    before = other.problem.hvp(E)[start:stop]
    there = symmetries.scale(10.0, group=0)
    assert there.function_change <= 1e-14
    assert torch.allclose(there.problem.hvp(E)[start:stop], before / 100, rtol=1e-9, atol=1e-15)


def test_weight_normalization_of_pytorch_is_found_too() -> None:
    symmetries = transforms.find(Net("", weight_norm, FIVE, 10, 3).problem())
    assert [len(g.nodes) for g in symmetries.groups if len(g.parameters) == 1] == [6, 3]
    # the balanced point has rows of norm one, as the length of a row has no effect
    there = symmetries.balanced()
    parts = dict(zip(symmetries.problem.names, symmetries.problem.space.split(there.vector), strict=True))
    for name, part in parts.items():
        if name.endswith("original1"):
            assert torch.allclose(part.norm(dim=1), torch.ones(1).double())


def test_other_forms_of_problems() -> None:
    """A black box, a dictionary as batch, a problem moved and cut; buffers come along."""
    x, y = normal(7, 4), labels(7, 3)
    model = net(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)))()
    data = [{"x": x, "y": y}]
    black = landscape.Problem(
        model, forward=lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["y"]), data=data
    )
    open_ = landscape.Problem(
        model, nn.CrossEntropyLoss(), data, output=lambda m, b: m(b["x"]), target=lambda b: b["y"]
    )
    for problem in (black, open_):
        away = problem.at(problem.parameters_vector() * 1.1, {"1.running_mean": torch.ones(5).double()})
        for each in (away, away.only(["0"])):
            other = transforms.radial(each, 0.7, 0.3)
            assert float(other.problem.value()) == pytest.approx(float(each.value()), rel=1e-14)
            v = EYE[0, : each.size]
            # at its own centre dθ/dη = b^(−a), and the gradient's second term vanishes there by symmetry
            assert torch.allclose(other.problem.hvp(v), each.hvp(v) * 0.3**-1.4, rtol=1e-9, atol=1e-13)


def test_any_smooth_map_even_onto_fewer_dimensions() -> None:
    """θ = Aη + θ̂ with A (n, m): the gradient is Aᵀg, the Hessian AᵀHA."""
    problem = small()
    theta, A = problem.parameters_vector(), normal(problem.size, 6, seed=2)
    other = transforms.pulled_back(problem, lambda eta: theta + A @ eta, torch.zeros(6).double())
    assert other.problem.names == ["eta"]
    assert torch.allclose(other.problem.gradient(), A.T @ problem.gradient(), rtol=1e-11)
    H = problem.hvp(EYE[: problem.size, : problem.size])
    assert torch.allclose(other.problem.hvp(EYE[:6, :6]), A.T @ H @ A, rtol=1e-10, atol=1e-13)


def test_a_unit_for_each_parameter() -> None:
    problem = small()
    d = normal(problem.size, seed=6).exp() * normal(problem.size, seed=7).sign()
    other = transforms.elementwise(problem, d).problem
    v = normal(problem.size, seed=8)
    assert torch.allclose(other.gradient(), problem.gradient() / d, rtol=1e-11, atol=1e-15)
    assert torch.allclose(other.hvp(v), problem.hvp(v / d) / d, rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="finite factors other than 0"):
        transforms.elementwise(problem, 0 * d)


def test_points_that_are_not_the_same_function_are_refused() -> None:
    problem = small()
    theta = problem.parameters_vector()
    with pytest.raises(landscape.Refused, match=r"give an η with g\(η\) = θ"):
        transforms.pulled_back(problem, lambda eta: eta, theta + 0.1)
    with pytest.raises(ValueError, match="allowed are the measured parameters"):
        transforms.pulled_back(problem, lambda parts: {"0.weight": parts["w"]}, {"w": torch.ones(2)})
    for a, b in ((-0.5, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="a > -1/2 and b > 0"):
            transforms.radial(problem, a, b)
    with pytest.raises(ValueError, match="one dimension only"):
        transforms.weight_normalized(problem, "0.bias")
    assert math.isfinite(float(problem.value()))
