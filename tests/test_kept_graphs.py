"""Graphs that are kept between products: the same numbers, let go in time."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch

import landscape
from landscape import memory
from landscape.metrics import Eigenvalues

KINDS = {"hessian": "hvp", "ggn": "ggn_vp", "empirical_fisher": "empirical_fisher_vp"}
CASES = [
    case
    for case in cases.WITH_OUTPUTS
    if case.name in {"tied", "groupnorm", "lstm", "padding", "frozen", "checkpointed"}
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_are_the_same_bit_for_bit(case: cases.Case, kind: str) -> None:
    problem = landscape.Problem(**case.arguments())
    product = getattr(problem, KINDS[kind])
    V = torch.randn(problem.size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once = product(V)
    with problem.session(), problem.keeping_graphs():
        for _ in range(3):
            assert torch.equal(product(V), once)
            assert torch.equal(product(V[:, 1]), once[:, 1])
        assert len(problem.kept_graphs(kind) or {}) == len(list(problem.evaluator.pieces(problem.batches)))
        assert product(V[:, :0]).shape == (problem.size, 0)
    assert problem.kept_graphs(kind) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_runs_the_model_again_is_known(case: cases.Case, kind: str) -> None:
    problem = landscape.Problem(**case.arguments())
    with problem.session(), problem.keeping_graphs():
        getattr(problem, KINDS[kind])(torch.ones(problem.size, dtype=torch.float64))
        graphs = problem.kept_graphs(kind)
        assert graphs
        # Of a function in Python, such as our convolution's, it is not known.
        assert {graph.reruns for graph in graphs.values()} == {case.name in {"checkpointed", "groupnorm"}}


class _Recomputed(torch.autograd.Function):
    """A layer that keeps only its input, and runs again when slopes are asked for, of whatever order."""

    @staticmethod
    def forward(ctx: Any, layer: torch.nn.Module, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *weights)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        with torch.enable_grad():
            named = dict(zip(("weight", "bias"), weights, strict=True))
            made = torch.func.functional_call(ctx.layer, named, (x,))
            wanted = [t for t in (x, *weights) if t.requires_grad]
            found = iter(torch.autograd.grad(made, wanted, slopes, create_graph=torch.is_grad_enabled()))
        return None, *(next(found) if t.requires_grad else None for t in (x, *weights))


class _Recomputing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second):
            x = torch.tanh(_Recomputed.apply(layer, x, layer.weight, layer.bias))
        return x


def test_a_layer_that_recomputes_itself() -> None:
    torch.manual_seed(0)
    model = _Recomputing().double()
    data = [(torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64))]
    plain = torch.nn.Sequential(model.first, torch.nn.Tanh(), model.second, torch.nn.Tanh())
    problem, other = (landscape.Problem(m, torch.nn.MSELoss(), data) for m in (model, plain))
    V, moved = torch.eye(problem.size, dtype=torch.float64), problem.parameters_vector() * 1.5
    problem, other = problem.at(moved), other.at(moved)
    with problem.session(), problem.keeping_graphs():
        H = torch.stack([problem.hvp(v) for v in V])
    assert (H - other.hvp(V)).abs().max() < 1e-14


def test_another_matrix_point_data_or_part_is_another_graph() -> None:
    case = cases.BY_NAME["tied"]
    problem = landscape.Problem(**case.arguments())
    moved = problem.at(problem.parameters_vector() * 1.1)
    fewer = problem.on([next(iter(problem.batches))])
    part = problem.only(problem.names[-1])
    V = {p: torch.ones(p.size, dtype=torch.float64) for p in (problem, moved, fewer, part)}
    expected = {p: (p.hvp(v), p.ggn_vp(v)) for p, v in V.items()}
    with problem.session(), problem.keeping_graphs():
        for _ in range(2):
            for p, v in V.items():
                assert torch.equal(p.hvp(v), expected[p][0])
                assert torch.equal(p.ggn_vp(v), expected[p][1])


def test_a_solve_keeps_graphs_only_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = cases.BY_NAME["tied"].arguments()
    problem = landscape.Problem(**{**arguments, "data": list(arguments["data"]) * 300})
    needed = memory.graphs(problem, 1 << 30)
    assert needed is not None
    assert needed > 0
    kept: list[bool] = []
    hvp = landscape.Problem.hvp

    def watched(self: landscape.Problem, V: torch.Tensor) -> torch.Tensor:
        if self.batches is problem.batches:  # the check of products has its own small problem
            kept.append(self.kept_graphs("hessian") is not None)
        return hvp(self, V)

    monkeypatch.setattr(landscape.Problem, "hvp", watched)
    plain = landscape.evaluate(Eigenvalues(k=2), problem)
    assert all(kept)
    kept.clear()
    tight = landscape.evaluate(Eigenvalues(k=2), problem, memory=4 * needed)
    assert kept
    assert not any(kept)
    assert abs(float(plain["eigenvalues"][0]) - float(tight["eigenvalues"][0])) < 1e-9
