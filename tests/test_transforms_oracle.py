"""The dimension of the symmetries against numbers that know no graph, and what the elimination rests on."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from cases_base import normal
from cases_symmetries import BY_NAME, TRUTH, Net, found
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from landscape import transforms
from landscape.transforms.fields import Field, Fields
from landscape.transforms.system import System

# Directions that scale whole tensors, with no buffer moved: exact ones, and those that hold up to a norm's epsilon.
WHOLE_TENSORS = [
    ("mlp", 2, 0), ("mlp without bias", 2, 0), ("leaky and parametric relu", 3, 0), ("functional", 2, 0),
    ("depthwise and grouped convolution", 4, 0), ("gelu", 0, 0), ("gelu with two linear layers", 1, 0),
    ("u-net", 4, 0), ("shared layer with bias", 1, 0), ("shared layer without bias", 2, 0),
    ("squeeze and excite", 2, 0), ("transformer, tied", 8, 1), ("transformer, untied", 9, 1),
    ("layer and group norm", 2, 2), ("unused layer", 1, 0), ("resnet-20, frozen buffers", 12, 0),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of forward derivatives, within PyTorch
@pytest.mark.parametrize(
    ("name", "exact", "approximate"), WHOLE_TENSORS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_as_many_directions_as_the_outputs_jacobian_has_zeros(
    name: str, exact: int, approximate: int
) -> None:
    """Singular values of the outputs' derivatives in the tensors' log-scales, against the graph's answer.

    Exact directions have singular value 0; those up to an epsilon are small; all others are not. On inputs of
    many examples, since a unit that never fires for the sample has a direction of its own.
    """
    net = BY_NAME[name]
    names = [n for n in found(name).problem.names if found(name).excluded.get(n) != NEVER]
    values = torch.linalg.svdvals(_jacobian(net, names))
    values = values / values[0]
    zero, small = int((values < 1e-12).sum()), int(((values >= 1e-12) & (values < 1e-5)).sum())
    assert (zero, small) == (exact, approximate), values
    whole = _whole_tensor_directions(found(name), names)
    assert whole == exact + approximate


NEVER = "the outputs do not depend on it"


def _jacobian(net: Net, names: list[str]) -> Tensor:
    many = net.x if net.x.dtype == torch.int64 else normal(24, *net.x.shape[1:], seed=9)
    model = net.problem().evaluator.model.eval()
    theta = {n: p.detach() for n, p in model.named_parameters()}

    def outputs(s: Tensor) -> Tensor:
        moved = {n: theta[n] * s[i].exp() for i, n in enumerate(names)}
        return torch.func.functional_call(model, {**theta, **moved}, (many,)).flatten()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        still, directions = (
            torch.zeros(len(names), dtype=torch.float64),
            torch.eye(len(names), dtype=torch.float64),
        )
        return torch.stack([torch.func.jvp(outputs, (still,), (e,))[1] for e in directions], 1)


def _whole_tensor_directions(symmetries: transforms.Symmetries, names: list[str]) -> int:
    """How many combinations of nodes scale each tensor as a whole: the rest of every tensor's log-scale is 0."""
    count = len(symmetries.nodes)
    if not count:
        return 0
    columns = [symmetries.at(torch.full((count,), 1.0).double() + torch.eye(count)[k].double()).diagonal.log()
               for k in range(count)]  # fmt: skip
    E = torch.stack(columns, 1)
    parts = [E[slice(*symmetries.problem.space.ranges[n])] for n in names]
    inner = torch.cat([part - part.mean(0, keepdim=True) for part in parts])
    return count - int(torch.linalg.matrix_rank(inner))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_elimination_leaves_the_rank_of_the_equations(data: st.DataObject) -> None:
    """Against the rank over the rationals of a dense matrix, and every equation holds."""
    size = data.draw(st.integers(1, 7))
    numbers = st.integers(-2, 2)
    rows = data.draw(st.lists(st.lists(numbers, min_size=size, max_size=size), max_size=8))
    bound = data.draw(st.integers(0, size))
    system = System()
    unknowns = [*system.unknowns(bound, bound=True), *system.unknowns(size - bound, bound=False)]
    news = [system.require(dict(zip(unknowns, row, strict=True)), "because") for row in rows]
    free = {u for v in unknowns for u in system.resolve(v)}
    assert sum(news) == _rank(rows)
    assert len(free) == size - _rank(rows)
    for row in rows:
        assert not system.reduce(dict(zip(unknowns, row, strict=True)))
    assert all(system.resolve(u) == {u: 1} for u in free)


def _rank(rows: list[list[int]]) -> int:
    left = [[Fraction(v) for v in row] for row in rows]
    rank = 0
    for column in range(len(left[0]) if left else 0):
        pivot = next((r for r in left[rank:] if r[column]), None)
        if pivot is None:
            continue
        left.remove(pivot)
        left = [*left[:rank], pivot, *[
            [a - r[column] / pivot[column] * b for a, b in zip(r, pivot, strict=True)] for r in left[rank:]
        ]]  # fmt: skip
        rank += 1
    return rank


def test_reasons_follow_what_is_zero() -> None:
    system = System()
    a, b, c = system.unknowns(3, bound=False)
    system.require({a: 1, b: -1}, "")
    system.require({b: 2, c: 1}, "")
    assert system.reason(a) == ""
    system.require({c: 3}, "a kink that is not at zero")
    assert {system.reason(u) for u in (a, b, c)} == {"a kink that is not at zero"}


def test_a_field_is_constant_where_it_is_required_to_be() -> None:
    """A sum of two terms, each along a dimension of its own, costs their sizes' sum in equations."""
    system = System()
    fields = Fields(system)
    rows, columns = (torch.tensor(list(system.unknowns(n, bound=False))) for n in (4, 3))
    field = Field((4, 3), ((1, rows[:, None].expand(4, 3)), (-2, columns[None].expand(4, 3))))
    kept = fields.uniform(field, [1], "")
    assert kept.shape == (4, 1)
    assert system.solved == 1 + 2  # the constant, and all columns but one
    assert fields.pin(kept, "")
    assert not fields.pin(kept, "")
    assert system.solved == 1 + 2 + 4
    joined = fields.joined(field)
    assert joined.shape == (4, 3)
    assert not bool(joined.any())


@pytest.mark.parametrize(
    "net", [n for n in TRUTH if n.groups and not n.find and not n.options][:6], ids=lambda net: net.name
)
def test_a_wrong_exponent_would_be_noticed(net: Net) -> None:
    """The check that every symmetry passes fails when one entry of one vector is off."""
    from landscape.transforms.nullspace import exponents, solve
    from landscape.transforms.verification import Verifier

    problem = net.problem()
    solved = solve(problem)
    B = exponents(solved)
    B.values[B.columns == 0] *= torch.tensor([2.0] + [1.0] * (int((B.columns == 0).sum()) - 1)).double()
    assert Verifier(problem, solved.layout, B, 0).change([0], 0) > 1e-6
