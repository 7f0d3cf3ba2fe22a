"""The adapter over the table of cases, exact against dense float64 references."""

from __future__ import annotations

import pytest
import torch
from cases import BY_NAME, CASES, WITH_OUTPUTS, reference
from cases_base import normal
from torch import Tensor, nn

from landscape.checks import Need
from landscape.errors import Refused
from landscape.operators import ggn, hessian
from landscape.problem import Problem

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
with_outputs = pytest.mark.parametrize("case", WITH_OUTPUTS, ids=lambda c: c.name)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the norm of the expected; the absolute one where that vanishes."""
    assert found.shape == expected.shape
    difference = (found.detach().double() - expected).norm().item()
    scale = expected.norm().item()
    return difference / scale if scale else difference


def vectors(case, k: int = 3) -> Tensor:
    return normal(len(reference(case).theta), k, seed=50)


# exactness


@every_case
def test_flat_vector(case):
    expected = reference(case)
    problem = Problem(**case.arguments())
    assert problem.size == len(expected.theta)
    assert tuple(problem.names) == expected.names
    assert torch.equal(problem.parameters_vector(), expected.theta)


@every_case
def test_value_and_gradient(case):
    expected = reference(case)
    problem = Problem(**case.arguments())
    value = problem.value()
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert error(value, expected.value) <= case.tolerance
    assert error(problem.gradient(), expected.gradient) <= case.tolerance


@every_case
def test_hessian_products(case):
    H, V = reference(case).hessian, vectors(case)
    problem = Problem(**case.arguments())
    block = problem.hvp(V)
    single = problem.hvp(V[:, 1])
    assert error(block, H @ V) <= case.tolerance
    assert error(single, H @ V[:, 1]) <= case.tolerance
    assert torch.equal(block[:, 1], single)
    assert torch.equal(hessian(problem) @ V, block)


@with_outputs
def test_gauss_newton_products(case):
    G, V = reference(case).ggn, vectors(case)
    problem = Problem(**case.arguments())
    block = problem.ggn_vp(V)
    single = problem.ggn_vp(V[:, 1])
    assert error(block, G @ V) <= case.tolerance
    assert error(single, G @ V[:, 1]) <= case.tolerance
    assert torch.equal(block[:, 1], single)
    assert torch.equal(ggn(problem) @ V, block)


@every_case
def test_no_result_depends_on_the_cut(case):
    expected, V = reference(case), vectors(case)
    for sizes in case.other_cuts():
        problem = Problem(**case.arguments(sizes))
        assert error(problem.value(), expected.value) <= case.tolerance
        assert error(problem.gradient(), expected.gradient) <= case.tolerance
        assert error(problem.hvp(V), expected.hessian @ V) <= case.tolerance
        if not case.blackbox:
            assert error(problem.ggn_vp(V), expected.ggn @ V) <= case.tolerance


@with_outputs
def test_losses_per_example(case):
    expected = reference(case).losses
    found = Problem(**case.arguments()).losses()
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    assert error(found.nan_to_num(), expected.nan_to_num()) <= case.tolerance


@every_case
def test_another_point(case):
    expected = reference(case)
    theta = expected.theta + 0.1 * normal(len(expected.theta), seed=51)
    variable = theta.clone().requires_grad_()
    value = expected.loss_of(variable)
    gradient = torch.zeros_like(theta)
    if value.requires_grad:  # not where only unused parameters are measured
        gradient = torch.autograd.grad(value, variable)[0]
    problem = Problem(**case.arguments())
    moved = problem.at(theta)
    assert torch.equal(moved.parameters_vector(), theta)
    assert error(moved.value(), value.detach()) <= case.tolerance
    assert error(moved.gradient(), gradient) <= case.tolerance
    assert torch.equal(problem.parameters_vector(), expected.theta)
    assert error(problem.value(), expected.value) <= case.tolerance


@pytest.mark.parametrize("case", [c for c in CASES if c.blackbox], ids=lambda c: c.name)
def test_a_black_box_has_no_outputs(case):
    problem = Problem(**case.arguments())
    with pytest.raises(Refused, match="output="):
        problem.ggn_vp(vectors(case))
    with pytest.raises(Refused, match="output="):
        problem.losses()


@every_case
def test_float32_is_within_its_rounding(case):
    expected, V = reference(case), vectors(case)
    problem = Problem(**{**case.arguments(), "dtype": torch.float32})
    assert problem.gradient().dtype == torch.float32
    # Rounding the point, the data and each operation: a few units in the last place, 17 at worst here.
    allowed = 50 * torch.finfo(torch.float32).eps
    assert error(problem.value(), expected.value) <= allowed
    assert error(problem.gradient(), expected.gradient) <= allowed
    assert error(problem.hvp(V), expected.hessian @ V) <= allowed
    if not case.blackbox:
        assert error(problem.ggn_vp(V), expected.ggn @ V) <= allowed


@pytest.mark.parametrize("name", ["cross_entropy", "class_weights", "attention", "lstm"])
def test_a_float32_model_measured_in_float64(name):
    case = BY_NAME[name]
    arguments = case.arguments()
    arguments["model"] = arguments["model"].float()
    problem = Problem(**{**arguments, "dtype": torch.float64})
    theta = reference(case).theta.float().double().requires_grad_()
    value = reference(case).loss_of(theta)
    gradient = torch.autograd.grad(value, theta, create_graph=True)[0]
    v = vectors(case)[:, 0]
    product = torch.autograd.grad(gradient, theta, v)[0]
    assert error(problem.value(), value.detach()) <= case.tolerance
    assert error(problem.gradient(), gradient.detach()) <= case.tolerance
    assert error(problem.hvp(v), product) <= case.tolerance
    assert {p.dtype for p in arguments["model"].parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "name", ["mse", "padding", "attention", "lstm", "tied_embedding", "forward", "function"]
)
def test_difference_products(name):
    case = BY_NAME[name]
    expected, V = reference(case), vectors(case)
    problem = Problem(**{**case.arguments(), "products": "difference"})
    assert error(problem.hvp(V), expected.hessian @ V) <= 1e-7
    if not case.blackbox:
        assert error(problem.ggn_vp(V), expected.ggn @ V) <= 1e-7


@every_case
def test_check_accepts(case):
    needs = {Need.VALUE, Need.GRADIENT, Need.HESSIAN} | (set() if case.blackbox else {Need.GGN, Need.OUTPUTS})
    report = Problem(**case.arguments()).check(frozenset(needs))
    assert report.products == "autodiff"
    assert report.repeat_difference == 0
    assert not report.additivity_error > case.tolerance
    assert not report.product_error > 1e-6
    assert not report.symmetry_error > 1e-10


@pytest.mark.parametrize("products", ["difference", "auto"])
def test_weight_norm_whose_second_derivative_is_wrong_in_pytorch(products):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double()
    x, y = normal(6, 3, seed=52), normal(6, 2, seed=53)
    names = [n for n, _ in layer.named_parameters()]
    sizes = [p.numel() for p in layer.parameters()]

    def loss_of(theta: Tensor) -> Tensor:
        p = dict(zip(names, torch.split(theta, sizes), strict=True))
        g, v = p["parametrizations.weight.original0"], p["parametrizations.weight.original1"].view(2, 3)
        w = g.view(2, 1) * v / (v**2).sum(1, keepdim=True).sqrt()
        return ((torch.tanh(x @ w.T + p["bias"]) - y) ** 2).mean()

    theta = nn.utils.parameters_to_vector(layer.parameters()).detach()
    H = torch.autograd.functional.hessian(loss_of, theta)
    model = nn.Sequential(layer, nn.Tanh())
    problem = Problem(model, nn.MSELoss(), [(x[:4], y[:4]), (x[4:], y[4:])], products=products)
    report = problem.check(frozenset({Need.HESSIAN}))
    assert report.products == "difference"
    problem = problem.replace(products=report.products)
    V = normal(len(theta), 2, seed=54)
    assert error(problem.gradient(), torch.autograd.functional.jacobian(loss_of, theta)) <= 1e-12
    assert error(problem.hvp(V), H @ V) <= 1e-7


@every_case
def test_the_reference_itself(case):
    """The dense Hessian against a difference of the dense gradient: the rows of autodiff are right."""
    expected = reference(case)
    v = normal(len(expected.theta), seed=55)
    v = v / v.norm()
    up, down = (
        torch.autograd.functional.jacobian(expected.loss_of, expected.theta + s * 1e-5 * v) for s in (1, -1)
    )
    assert error((up - down) / 2e-5, expected.hessian @ v) <= 1e-8
