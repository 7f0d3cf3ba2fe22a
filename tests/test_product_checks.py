"""The first product of a problem finds out how products are made; nothing else pays for that."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from landscape_cli.app import app
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import landscape
from landscape import product_checks
from landscape.checks import Need
from landscape.metrics import Trace


def problem(*layers: nn.Module, **options: Any) -> landscape.Problem:
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(layers or (nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) * 0.5)
    x, y = torch.randn(12, 5, generator=draws), torch.randint(0, 3, (12,), generator=draws)
    data = options.pop("data", [(x, y)])
    return landscape.Problem(model, nn.CrossEntropyLoss(), data, **options)


def normalized(**options: Any) -> landscape.Problem:
    """Right gradients, wrong double backward (PyTorch 2.13), a right Gauss-Newton product."""
    return problem(weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3), **options)


def by_differences(p: landscape.Problem, V: Tensor) -> Tensor:
    """H V column by column, from float64 gradients; nothing of the products' code."""
    p = p.replace(dtype=torch.float64)
    theta, h = p.parameters_vector(), 1e-5
    ends = [[p.at(theta + s * h * v.double()).gradient() for s in (1, -1)] for v in V.T]
    return torch.stack([(up - down) / (2 * h) for up, down in ends], dim=1)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The matrices of the checks that are made."""
    made: list[str] = []
    run = product_checks.run

    def counting(p: landscape.Problem, matrix: Any) -> product_checks.ProductCheck:
        made.append(matrix)
        return run(p, matrix)

    monkeypatch.setattr(product_checks, "run", counting)
    return made


def test_an_operator_in_a_notebook_is_right_where_autograd_is_wrong(counted: list[str]) -> None:
    p = normalized()
    V = torch.randn(p.size, 3, generator=torch.Generator().manual_seed(1))
    reference = by_differences(p, V)
    assert distance(p.replace(products="autodiff").hvp(V), reference) > 0.01
    H = landscape.hessian(p)
    assert distance(H @ V, reference) < 1e-6
    assert distance(H @ V[:, 0], reference[:, 0]) < 1e-6
    assert counted == ["hessian"]
    assert p.product_checks["hessian"].error > 0.01


def test_each_matrix_is_decided_for_itself(counted: list[str]) -> None:
    """J v is the derivative of Jᵀu in u, in which the wrong formula is linear: G stays with autodiff."""
    p = normalized()
    v = torch.randn(p.size, generator=torch.Generator().manual_seed(2))
    reference = p.replace(products="difference").ggn_vp(v)
    assert distance(p.ggn_vp(v), reference) < 1e-6
    p.hvp(v)
    assert counted == ["ggn", "hessian"]
    assert {m: c.products for m, c in p.product_checks.items()} == {
        "ggn": "autodiff",
        "hessian": "difference",
    }
    report = p.check(frozenset({Need.HESSIAN, Need.GGN}))
    assert report.products == "ggn by autodiff, hessian by difference"
    assert report.product_error > 0.01
    assert "wrong" in report.reason
    assert counted == ["ggn", "hessian", "hessian", "ggn"]  # asked for, it is made anew


def test_relatives_share_what_was_found(counted: list[str]) -> None:
    p = problem()
    theta = p.parameters_vector()
    v = torch.ones(p.size)
    p.at(theta * 1.1).hvp(v)
    p.hvp(v)
    p.replace(microbatch=5).hvp(v)
    p.replace(data=list(p.batches)[:1]).hvp(v)
    for part, _ in p.split(4):
        part.hvp(v)
    assert counted == ["hessian"]
    for changed in ({"dtype": torch.float64}, {"mode": "train"}, {"parameters": "0.*"}):
        other = p.replace(**changed)
        other.hvp(torch.ones(other.size))
    assert counted == ["hessian"] * 4


def test_what_is_asked_for_is_not_checked_by_a_product(counted: list[str]) -> None:
    v = torch.ones(problem().size)
    for products in ("autodiff", "difference"):
        problem(products=products).hvp(v)
    assert not counted


def test_a_vector_of_another_length_is_refused_before_any_check(counted: list[str]) -> None:
    with pytest.raises(ValueError, match=r"got a block of shape \(3,\)"):
        problem().hvp(torch.ones(3))
    assert not counted


def test_the_check_leaves_no_trace_in_the_cost_or_in_the_model() -> None:
    p = normalized()
    modes = [m.training for m in p.evaluator.model.modules()]
    state = torch.get_rng_state()
    p.hvp(torch.ones(p.size))
    assert vars(p.cost) == {"values": 0, "gradients": 0, "matvecs": 1}
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in p.evaluator.model.modules()]


# --- in a measurement ---------------------------------------------------------------------------------


def relu_net(**options: Any) -> landscape.Problem:
    return problem(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3), **options)


def test_an_exact_trace_without_products_is_not_held_up(counted: list[str]) -> None:
    ds = landscape.measure(Trace(), relu_net())
    assert ds.attrs["way"] == "layers"
    assert not counted
    assert ds.attrs["products"] == ds.attrs["check"]["products"] == "not needed"
    assert math.isnan(ds.attrs["check"]["product_error"])
    assert ds.attrs["check"]["additivity_error"] < 1e-5


@pytest.mark.parametrize("method", ["hutchinson", "exact", "xtrace"])
def test_what_the_first_product_found_is_stored_with_the_first_unit(
    method: str, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = Trace(method=method, max_probes=64)  # type: ignore[arg-type]
    whole = landscape.measure(metric, normalized())
    path, calls = tmp_path / "x.h5", []

    def stop(progress: Any) -> None:
        calls.append(progress)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        landscape.measure(metric, normalized(), out=path, progress=stop)
    stored = landscape.open(path)
    for ds in (whole, stored):
        assert ds.attrs["products"] == "difference"
        assert ds.attrs["check"]["product_error"] > 0.01
        assert "wrong" in ds.attrs["check"]["reason"]
    assert counted == ["hessian"] * 2
    resumed = landscape.measure(metric, normalized(), out=path)
    assert counted == ["hessian"] * 2  # the stored decision is used
    assert float(resumed["trace"]) == float(whole["trace"])
    assert resumed.attrs["check"]["product_checks"] == whole.attrs["check"]["product_checks"]


def interrupted(path: Path, p: landscape.Problem, **options: Any) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        landscape.measure(Trace(method="hutchinson"), p, out=path, progress=stop, **options)


@pytest.mark.parametrize(
    ("before", "now", "check"),
    [
        ({"products": "difference"}, {"products": "autodiff"}, True),
        ({}, {"products": "autodiff"}, False),
        ({}, {}, False),
    ],
)
def test_products_made_otherwise_are_refused(
    before: dict[str, Any], now: dict[str, Any], check: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    interrupted(path, normalized(**before))
    with pytest.raises(landscape.Refused, match=r"(measured with difference products|wrong here)"):
        landscape.measure(Trace(method="hutchinson"), normalized(**now), out=path, check=check)


def test_what_was_measured_unchecked_is_checked_when_it_goes_on_with_a_check(tmp_path: Path) -> None:
    interrupted(tmp_path / "wrong.h5", normalized(), check=False)
    with pytest.raises(landscape.Refused, match="measured with autodiff products, now they are made by diff"):
        landscape.measure(Trace(method="hutchinson"), normalized(), out=tmp_path / "wrong.h5")
    interrupted(tmp_path / "right.h5", problem(), check=False)
    ds = landscape.measure(Trace(method="hutchinson"), problem(), out=tmp_path / "right.h5")
    assert ds.attrs["check"]["product_error"] < 1e-6


def test_without_check_autodiff_is_taken_and_stored(counted: list[str]) -> None:
    ds = landscape.measure(Trace(method="hutchinson", max_probes=2), normalized(), check=False)
    assert ds.attrs["products"] == "autodiff"
    assert ds.attrs["check"] is None
    assert not counted


def test_wrong_products_that_are_asked_for_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    landscape.measure(Trace(method="hutchinson", max_probes=2), normalized(), out=path)
    before = path.read_bytes()
    with pytest.raises(landscape.Refused, match="second derivative is wrong here"):
        landscape.measure(
            Trace(method="hutchinson"), normalized(products="autodiff"), out=path, overwrite=True
        )
    assert path.read_bytes() == before


# --- layers that autograd differentiates once only -----------------------------------------------------


class Once(torch.autograd.Function):
    """tanh, whose backward pass is marked as having no derivative; products silently miss terms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class OnceTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


class Bag(nn.Module):
    """Bags of the tokens that the signs of the inputs stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(10, 8, mode="mean")

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.bag((x > 0).long() + 2 * torch.arange(5)))


@pytest.mark.parametrize(
    "layers", [(nn.Linear(5, 8), OnceTanh()), (Bag(),)], ids=["once_differentiable", "embedding_bag"]
)
def test_both_matrices_of_a_layer_without_second_derivative_are_made_by_differences(layers: Any) -> None:
    p = problem(*layers, nn.Linear(8, 3))
    plain = problem(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    v = torch.randn(p.size, generator=torch.Generator().manual_seed(4))
    assert distance(landscape.hessian(p) @ v, by_differences(p, v[:, None])[:, 0]) < 1e-6
    found = landscape.ggn(p) @ v
    if len(layers) == 2:
        assert distance(found, plain.replace(products="autodiff").ggn_vp(v)) < 1e-6
    else:
        assert float(v @ found) > 0
    for check in p.product_checks.values():
        assert check.products == "difference"
        assert "second derivative" in check.reason


def test_a_refusal_of_products_is_one_line_and_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_product_checks import normalized\n"
        "def make(): return normalized(products='autodiff')\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["measure", "--metric", "trace", "--problem", "mine.py:make", "--out", "runs/x"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 3
    assert len([line for line in done.stderr.splitlines() if "second derivative is wrong" in line]) == 1
    assert "Traceback" not in done.stderr


def test_the_padding_vector_of_an_embedding_is_a_constant_and_no_wrong_derivative() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 3, padding_idx=1)
            self.out = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.table(x)).sum(1))

    torch.manual_seed(0)
    model = Net().double()
    with torch.no_grad():
        model.table.weight[1] = 0.3  # not at the kink of tanh's curvature
    tokens = torch.tensor([[0, 1, 2], [3, 1, 1], [5, 4, 1], [2, 2, 0]])
    embedded = landscape.Problem(model, nn.CrossEntropyLoss(), [(tokens, torch.tensor([0, 1, 1, 0]))])
    H = embedded.hvp(torch.eye(embedded.size, dtype=torch.float64))
    assert embedded.products_in_use == "autodiff"
    assert torch.allclose(H, H.T, atol=1e-15)
    assert not H[3:6].any()
