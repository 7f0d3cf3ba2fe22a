"""Losses at displaced parameters against problems that stand there, and that the model is left as it was."""

from __future__ import annotations

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from cases import CASES
from cases_base import labels, normal
from test_problem_untouched import MODULES, random_states, same, snapshot, with_gradients
from torch import Tensor, nn

from landscape import Problem, Refused, batches, folding, matmul, testbeds, ways
from landscape.displaced import Displaced

POINTS = [(0.0, 0.0), (0.3, -0.7), (-1.0, 0.25)]


def plane(problem: Problem, scale: float = 0.1) -> tuple[Tensor, Tensor]:
    x, y = scale * normal(problem.size, 2, seed=5).to(problem.dtype).T
    return x.contiguous(), y.contiguous()


def by_hand(problem: Problem, x: float, y: float, d: tuple[Tensor, Tensor]) -> float:
    return float(problem.at(problem.parameters_vector() + x * d[0] + y * d[1]).value())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_are_those_of_a_problem_that_stands_there(case) -> None:
    problem = Problem(**case.arguments())
    d = plane(problem)
    with problem.displaced(*d) as at, problem.displaced(*d, exact=True) as exact:
        assert exact.ways.exact
        for x, y in POINTS:
            expected = by_hand(problem, x, y, d)
            assert exact(x, y) == expected
            assert at(x, y) == pytest.approx(expected, rel=1e-13)
            assert at.moved(x * d[0] + y * d[1]) == pytest.approx(expected, rel=1e-13)


def test_what_a_line_of_a_grid_has_in_common_is_made_anew_where_it_changes() -> None:
    problem = Problem(**CASES[0].arguments())
    d = (*plane(problem), plane(problem)[0] ** 2)
    points = [
        (0.1, 0.5, 0.2),
        (0.2, 0.5, 0.2),
        (0.2, 0.5),
        (0.3,),
        (),
        (0.2, 0.5, 0.2),
        (0.2, math.nan),
        (0.1, 0.5),
    ]
    with problem.displaced(*d) as at:
        found = [value for (value,) in at.values(points)]
        assert at(0.1, 0.7) == at.values(np.array([[0.1, 0.7]]))[0][0] != at(0.1, 0.5)
        kept = at(0.1, 0.7, 0.2)
        with pytest.raises(ValueError, match="could not convert"):
            at(0.1, 0.5, "x")  # type: ignore[arg-type]
        assert at(0.1, 0.7, 0.2) == kept
    theta = problem.parameters_vector()
    for point, value in zip(points, found, strict=True):
        moved = theta + sum((c * row for c, row in zip(point, d, strict=False)), torch.zeros_like(theta))
        assert value == pytest.approx(float(problem.at(moved).value()), rel=1e-13, nan_ok=True)


@pytest.mark.parametrize("exact", [False, True])
def test_the_faster_matrix_product_is_taken_where_it_is_exact(
    monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    seen = []
    model, loss, data, _ = testbeds.load_default()
    model.register_forward_pre_hook(lambda *_: seen.append(setting.fp32_precision))
    setting = torch.backends.mkldnn.matmul
    problem = Problem(model, loss, data)
    for sound in (True, False):
        monkeypatch.setattr(matmul, "faster_is_exact", lambda sound=sound: sound)
        with problem.displaced(problem.gradient(), exact=exact) as at:
            assert at.ways.faster_matmul == (not exact and sound)
            seen.clear()
            at(0.1)
            assert set(seen) == {"bf16" if at.ways.faster_matmul else "none"}
            assert setting.fp32_precision == "none"
    # Ways that were stored where it is exact, taken up where it is not.
    with problem.displaced(problem.gradient(), ways=ways.Ways(faster_matmul=True)) as at:
        seen.clear()
        at(0.1)
    assert set(seen) == {"none"}


@pytest.mark.parametrize("kind", ["attention", "encoder", "float64", "set by the user"])
def test_the_matrix_product_is_left_alone(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(matmul, "faster_is_exact", lambda: True)
    layers = {
        "attention": _Attending(),
        "encoder": nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    }
    model = layers.get(kind, nn.Linear(8, 8))
    data = [(normal(4, 3, 8), normal(4, 3, 8))]
    dtype = torch.float64 if kind == "float64" else torch.float32
    users = matmul.precision_set("ieee") if kind == "set by the user" else contextlib.nullcontext()
    with users, Problem(model, nn.MSELoss(), data, dtype=dtype).displaced() as at:
        assert not at.ways.faster_matmul


class _Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*self.into(x)[:, None].chunk(3, dim=-1))[:, 0]


@pytest.mark.parametrize("case", MODULES, ids=lambda c: c.name)
def test_the_model_is_left_as_it_was(case) -> None:
    arguments = case.arguments()
    model = with_gradients(arguments["model"])
    before, states = snapshot(model), random_states()
    own = [id(p) for p in model.parameters()]
    problem = Problem(**arguments)
    for exact in (False, True):
        with problem.displaced(*plane(problem), exact=exact) as at:
            at.values(POINTS)
            # not even meanwhile, outside of a call
            assert [id(p) for p in model.parameters()] == own
        with pytest.raises(ValueError, match="3 coefficients"), problem.displaced(*plane(problem)) as at:
            at(1.0, 2.0, 3.0)
    assert same(before, snapshot(model))
    assert same(states, random_states())


def trained_images(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """A small ResNet whose norms have seen data, and images."""
    model = testbeds.resnet20(width=4, blocks=1, seed=seed)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t, low, high in (
                    (m.running_mean, -0.5, 0.5),
                    (m.running_var, 0.3, 2.0),
                    (m.weight, 0.5, 1.5),
                ):
                    t.uniform_(low, high, generator=draws)
                m.bias.uniform_(-0.3, 0.3, generator=draws)
    x = torch.randn(50, 3, 12, 12, generator=draws, dtype=dtype)
    return model.to(dtype).eval(), x, labels(50, 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batchnorm_is_folded_and_batches_recut_exactly(dtype: torch.dtype) -> None:
    model, x, y = trained_images(dtype=dtype)
    data = [(x[:7], y[:7]), (x[7:40], y[7:40]), (x[40:], y[40:])]
    before = snapshot(model)
    problem = Problem(model, nn.CrossEntropyLoss(), data)
    d = plane(problem)
    with problem.displaced(*d) as at:
        assert at.ways.folded
        assert at.ways.channels_last == (dtype == torch.float32)
        assert at.ways.microbatch is not None
        assert len(at._prepared.pieces) < 3
        assert len([layer for layer in at._prepared.layers if layer.norm]) == 9
        for point in POINTS:
            assert at(*point) == pytest.approx(by_hand(problem, *point, d), rel=300 * torch.finfo(dtype).eps)
    assert same(before, snapshot(model))


class Reused(nn.Module):
    """Four ways in which a norm must not be folded, and one in which it may."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y)
        z = {
            "sum": lambda: z + y,
            "detached": lambda: z + y.detach().tanh(),
            "twice": lambda: self.norm(self.conv(z)),
            "weight": lambda: z + self.conv.weight.sum(),
            "alone": lambda: z,
        }[self.kind]()
        return self.head(z.relu().mean((2, 3)))


@pytest.mark.parametrize("kind", ["sum", "detached", "twice", "weight", "hook", "alone", "far mean"])
def test_only_a_norm_that_alone_reads_its_layer_is_folded(kind: str) -> None:
    torch.manual_seed(2)
    model = Reused(kind if kind not in {"hook", "far mean"} else "alone").double().eval()
    model.norm.running_mean.fill_(1e6 if kind == "far mean" else 0.4)
    seen: list[Tensor] = []
    if kind == "hook":
        model.norm.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    x = normal(12, 2, 5, 5)
    problem = Problem(model, nn.CrossEntropyLoss(), [(x, labels(12, 3))])
    d = plane(problem)
    with problem.displaced(*d) as at:
        assert at.ways.folded == (kind == "alone")
        for point in POINTS:
            assert at(*point) == pytest.approx(by_hand(problem, *point, d), rel=1e-13)


def test_a_norm_after_a_linear_layer_is_folded_where_its_channels_are_the_outputs() -> None:
    torch.manual_seed(0)
    for rows, folded in ((None, True), (4, False)):
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
        x = normal(20, 6) if rows is None else normal(20, rows, 6)
        model = model.double()
        model(x)  # sets the statistics, and the last layer's size
        problem = Problem(model, nn.CrossEntropyLoss(), [(x, labels(20, 3))])
        d = plane(problem)
        with problem.displaced(*d) as at:
            assert at.ways.folded == folded
            assert at(0.3, 0.1) == pytest.approx(by_hand(problem, 0.3, 0.1, d), rel=1e-13)


class Counting(nn.Module):
    """Writes into one buffer, and assigns another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.assigned = self.assigned + 1
        return self.linear(x) * self.written + self.assigned


@pytest.mark.parametrize("exact", [False, True])
def test_every_pass_begins_with_the_buffers_as_they_are(exact: bool) -> None:
    torch.manual_seed(0)
    model = Counting().double()
    x, y = normal(9, 3), normal(9, 2, seed=1)
    problem = Problem(model, nn.MSELoss(), [(x[:4], y[:4]), (x[4:], y[4:])])
    d = plane(problem)
    with problem.displaced(*d, exact=exact) as at:
        for _ in range(2):
            assert at(0.5, 0.5) == pytest.approx(by_hand(problem, 0.5, 0.5, d), rel=1e-13)
    assert float(model.written) == float(model.assigned) == 0


class OwnGradient(nn.Module):
    """A model that differentiates on its way, as energies and physics-informed networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            inside = x.detach().clone().requires_grad_()
            return torch.autograd.grad(self.linear(inside).tanh().sum(), inside)[0]


def test_a_model_that_uses_autograd_itself() -> None:
    torch.manual_seed(0)
    x, y = normal(9, 3), normal(9, 3, seed=1)
    problem = Problem(OwnGradient().double(), nn.MSELoss(), [(x, y)])
    d = plane(problem)
    with problem.displaced(*d) as at:
        assert not at.ways.inference
        assert at(0.5, 0.5) == pytest.approx(by_hand(problem, 0.5, 0.5, d), rel=1e-13)


def test_problems_that_were_moved_or_cut_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = Problem(model, nn.MSELoss(), [(normal(9, 3), normal(9, 2, seed=1))])
    elsewhere = problem.at(problem.parameters_vector() + 0.1, {"1.running_mean": normal(4, seed=3)})
    for one in (elsewhere, problem.only("0.weight"), elsewhere.only(["1.bias", "3"])):
        d = plane(one)
        with one.displaced(*d) as at, one.displaced(*d, exact=True) as exact:
            expected = float(one.at(one.parameters_vector() + 0.5 * d[0] - d[1], one._buffers).value())
            assert exact(0.5, -1.0) == expected
            assert at(0.5, -1.0) == pytest.approx(expected, rel=1e-13)


def test_data_too_large_to_keep_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = trained_images()
    data = [(x[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)]
    kept = Problem(model, nn.CrossEntropyLoss(), data)
    d = plane(kept)
    with kept.displaced(*d, accuracy=True) as at:
        expected = at.values(POINTS)
    monkeypatch.setattr(batches, "CACHE_BYTES", 1000)
    problem = Problem(model, nn.CrossEntropyLoss(), data)
    with problem.displaced(*d, accuracy=True) as at:
        assert at._prepared.pieces is None
        found = at.values(POINTS)
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-13)


def test_accuracy_and_other_quantities_are_means_over_answers_and_examples() -> None:
    torch.manual_seed(1)
    model = nn.Linear(3, 4).double()
    x, y = normal(11, 3), labels(11, 4)
    y[[2, 9]] = -100
    problem = Problem(model, nn.CrossEntropyLoss(), [(x[:8], y[:8]), (x[8:], y[8:])])
    largest = {"largest": lambda output, target: output.amax(1).mean()}
    with problem.displaced(torch.zeros(16).double(), accuracy=True, also=largest, exact=True) as at:
        assert at.names == ["loss", "accuracy", "largest"]
        _, accuracy, mean = at.values([(1.0,)])[0]
    output = model(x).detach()
    assert accuracy == float((output.argmax(1) == y)[y >= 0].double().mean())
    assert mean == pytest.approx(float(output.amax(1).mean()), rel=1e-14)


def test_accuracy_of_other_shapes() -> None:
    for loss, shape, target in (
        (nn.BCEWithLogitsLoss(), (9,), normal(9, seed=1) > 0),
        (nn.CrossEntropyLoss(), (9, 3, 5), labels((9, 5), 3)),
    ):
        output = normal(*shape, seed=4)
        problem = Problem(
            lambda p, x: x + p["a"], loss, [(output, target.double() if shape == (9,) else target)],
            parameters={"a": torch.zeros(1, dtype=torch.float64)},
        )  # fmt: skip
        with problem.displaced(torch.ones(1).double(), accuracy=True) as at:
            right = (output > 0) == target if shape == (9,) else output.argmax(1) == target
            assert at.values([(0.0,)])[0][1] == pytest.approx(float(right.double().mean()))


def test_quantities_of_outputs_need_outputs() -> None:
    problem = Problem(nn.Linear(2, 1), forward=lambda m, b: m(b).sum(), data=[torch.ones(3, 2)])
    with pytest.raises(Refused, match="output="), problem.displaced(accuracy=True):
        pass
    with problem.displaced(torch.ones(3)) as at:
        assert at(1.0) == pytest.approx(float(problem.at(problem.parameters_vector() + 1).value()))


def test_not_a_number_and_infinity_stay_what_they_are() -> None:
    problem = Problem(
        lambda p, x: (p["a"] * x).log(), lambda o, t: (o * t).mean(), [(torch.ones(4), torch.ones(4))],
        parameters={"a": torch.ones(1)},
    )  # fmt: skip
    with problem.displaced(torch.ones(1)) as at:
        found = [value for (value,) in at.values([(-2.0,), (-1.0,), (0.0,)])]
    assert math.isnan(found[0])
    assert found[1:] == [-math.inf, 0.0]


def test_bfloat16_is_near_and_said() -> None:
    model, x, y = trained_images(dtype=torch.float32)
    problem = Problem(model, nn.CrossEntropyLoss(), [(x, y)])
    d = plane(problem)
    with problem.session():
        chosen = ways.choose(problem, bfloat16=True)
        assert chosen.bfloat16
        near = Displaced(problem, d, ways=chosen)(0.2, 0.1)
    expected = by_hand(problem, 0.2, 0.1, d)
    assert near == pytest.approx(expected, rel=0.02)
    assert near != pytest.approx(expected, rel=1e-6)


def test_the_microbatch_follows_from_shapes_and_the_users_limit() -> None:
    _, x, y = trained_images(dtype=torch.float32)
    # One writes over its operand, one does not.
    for rectifier, most in ((nn.ReLU, 4 << 20), (nn.GELU, 2 << 20)):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), rectifier(), nn.Flatten(), nn.Linear(576, 10))
        for limit in (None, 5):
            problem = Problem(net, nn.CrossEntropyLoss(), [(x, y)], microbatch=limit)
            with problem.session():
                # the largest results are images of 4 channels, 12 by 12, in float32
                expected = 2 ** int(math.log2(most / (4 * 12 * 12 * 4)))
                assert ways.choose(problem).microbatch == (limit or expected)


def test_batches_that_cannot_be_joined_stay_apart() -> None:
    lengths = (5, 5, 3)
    data = [normal(4, n, seed=n) for n in lengths]
    problem = Problem(
        nn.Linear(1, 1).double(), forward=lambda m, b: m(b[..., None]).square().mean(), data=data
    )
    d = plane(problem)
    with problem.displaced(*d) as at:
        assert [len(piece.batch) for piece in at._prepared.pieces] == [8, 4]
        assert at(0.1, 0.2) == pytest.approx(by_hand(problem, 0.1, 0.2, d), rel=1e-13)


def test_what_calls_a_layer_reads_is_seen() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Conv1d(3, 3, 1)).eval()
    copied = copy.deepcopy(model)
    found = folding.layers(model, lambda: model(torch.ones(2, 2, 6)))
    assert [(layer.module, layer.norm) for layer in found] == [(model[0], model[1])]
    assert same(list(model.state_dict().values()), list(copied.state_dict().values()))


def test_batches_with_more_than_tensors_are_joined_only_where_that_is_equal() -> None:
    arrays = [{"x": normal(3, 2), "note": np.arange(3) + i} for i in (0, 1)]
    words = [{"x": normal(3, 2), "note": "same"} for _ in (0, 1)]
    for data, pieces in ((arrays, 2), (words, 1)):
        problem = Problem(nn.Linear(2, 1).double(), forward=lambda m, b: m(b["x"]).square().mean(), data=data)
        with problem.displaced() as at:
            assert len(at._prepared.pieces) == pieces
            assert at() == pytest.approx(float(problem.value()), rel=1e-14)
