"""The exact Gauss-Newton trace per parameter tensor against dense float64, and the sampled one against it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, WITH_OUTPUTS, reference
from cases_base import labels, normal
from torch import Tensor, nn

from landscape import ggn_passes, ggn_trace
from landscape.curvature_columns import CrossEntropy
from landscape.errors import Refused
from landscape.output_curvature import Ending, Outputs, columns
from landscape.problem import Problem
from landscape.seeds import generator
from landscape.testbeds import nets


def dense_blocks(problem: Problem) -> np.ndarray:
    """Traces of diagonal blocks from products with unit vectors: a path that shares nothing with the rules."""
    diagonal = problem.ggn_vp(torch.eye(problem.size, dtype=problem.dtype)).diagonal()
    return np.array([float(diagonal[a:b].sum()) for a, b in problem.space.ranges.values()])


def blocks_of(matrix: Tensor, problem: Problem) -> np.ndarray:
    return np.array([float(matrix.diagonal()[a:b].sum()) for a, b in problem.space.ranges.values()])


def assert_equal(found: np.ndarray, expected: np.ndarray, rtol: float = 1e-10) -> None:
    """Relative to each block; to rounding of the whole trace where a block vanishes."""
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * 1e-4 * abs(expected).sum())


def double(model: nn.Module, seed: int = 0) -> nn.Module:
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(torch.rand(p.shape, generator=stream, dtype=torch.float64) - 0.5)
    return model


def classified(model: nn.Module, x: Tensor, classes: int = 3, cut: int = 4) -> Problem:
    y = labels(len(x), classes, seed=77)
    data = [(x[:cut], y[:cut]), (x[cut:], y[cut:])]
    return Problem(double(model), nn.CrossEntropyLoss(), data)


# the table of cases


@pytest.mark.parametrize("case", WITH_OUTPUTS, ids=lambda c: c.name)
def test_blocks_of_every_case(case):
    expected = reference(case).ggn
    for sizes in (case.sizes, *case.other_cuts()):
        problem = Problem(**case.arguments(sizes))
        found = ggn_trace.exact(problem)
        assert found.names == problem.names
        assert_equal(found.blocks, blocks_of(expected, problem))
        scale = float(expected.diagonal().abs().sum())
        assert found.trace == pytest.approx(float(expected.trace()), rel=1e-10, abs=1e-13 * scale)


@pytest.mark.parametrize("case", [c for c in CASES if c.blackbox], ids=lambda c: c.name)
def test_a_black_box_is_refused(case):
    problem = Problem(**case.arguments())
    for call in (ggn_trace.exact, ggn_trace.columns, lambda p: ggn_trace.sampled(p, [generator(0, "x", 0)])):
        with pytest.raises(Refused, match="output="):
            call(problem)


# layers


IMAGE = normal(7, 4, 6, 5, seed=60)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0)},
        {"kernel_size": 3, "dilation": 2, "padding": 2, "groups": 2},
        {"kernel_size": 2, "padding": "same", "groups": 4},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": "valid", "bias": False},
    ],
    ids=str,
)
def test_convolutions(options):
    conv = nn.Conv2d(4, 8, **options)
    width = conv(torch.zeros(1, 4, 6, 5)).numel()
    problem = classified(nn.Sequential(conv, nn.Softplus(), nn.Flatten(), nn.Linear(width, 3)), IMAGE)
    found = ggn_trace.exact(problem)
    assert_equal(found.blocks, dense_blocks(problem))
    assert found.rules[0] == "convolution"


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.Conv1d(2, 6, 3, stride=2, groups=2), normal(7, 2, 9, seed=61)),
        (lambda: nn.Conv3d(2, 4, 2, dilation=(1, 2, 1), padding=1), normal(7, 2, 3, 4, 3, seed=62)),
        (lambda: nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1), normal(7, 2, 5, seed=63)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), IMAGE[..., :3, :3]),
    ],
    ids=["conv1d", "conv3d", "transposed1d", "transposed2d"],
)
def test_other_convolutions(layer, x):
    made = layer()
    width = made(x[:1].float()).numel()
    problem = classified(nn.Sequential(made, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)), x.contiguous())
    found = ggn_trace.exact(problem)
    assert_equal(found.blocks, dense_blocks(problem))
    assert "per example" not in " ".join(found.rules)


@pytest.mark.parametrize(("places", "width"), [(3, 40), (40, 3)], ids=["gram", "explicit"])
def test_positions_by_gram_matrix_and_by_explicit_gradients(places, width):
    """Both ways of a weight that is shared over positions, chosen by the count of multiplications."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, width)
            self.b = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x))).mean(1)

    problem = classified(Net(), normal(6, places, 4, seed=64))
    assert_equal(ggn_trace.exact(problem).blocks, dense_blocks(problem))


def test_embedding_with_repeated_tokens_and_padding():
    for vocabulary in (5, 60):  # explicit, and by a Gram matrix

        class Net(nn.Module):
            def __init__(self, tokens: int) -> None:
                super().__init__()
                self.table = nn.Embedding(tokens, 3, padding_idx=1)
                self.out = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(torch.tanh(self.table(x)).sum(1))

        problem = classified(Net(vocabulary), labels((6, 5), 4, seed=65))
        assert_equal(ggn_trace.exact(problem).blocks, dense_blocks(problem))


class Shared(nn.Module):
    """One convolution at every depth, one layer norm used twice, one weight used by its module and functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.mix = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.zeros(4, 1, 1))
        self.out = nn.Linear(120, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.scale * torch.tanh(self.norm(self.conv(x)))
        x = self.norm(self.mix(x)) + x @ self.mix.weight
        return self.out(x.flatten(1))


def test_weights_shared_over_depth_and_used_functionally():
    problem = classified(Shared(), IMAGE)
    found = ggn_trace.exact(problem)
    assert_equal(found.blocks, dense_blocks(problem))
    assert not any("per example" in rule for rule in found.rules)


class Unseen(nn.Module):
    """Uses that no rule sees, beside ones that it sees: a transposed weight, an einsum, a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4, bias=False), orthogonal_map="cayley")
        self.c = nn.Parameter(torch.zeros(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)) @ self.a.weight.t()
        return torch.einsum("ni,ij->nj", h + self.b(x), self.c)


def test_what_no_rule_sees_goes_the_general_way():
    problem = classified(Unseen(), normal(7, 4, seed=66))
    found = ggn_trace.exact(problem)
    assert_equal(found.blocks, dense_blocks(problem))
    rules = dict(zip(found.names, found.rules, strict=True))
    assert rules["a.weight"].startswith("per example")
    assert rules["c"].startswith("per example")
    assert rules["a.bias"] == "sum"


class Crossed(nn.Module):
    """Layouts in which rows are not examples: time first, examples reversed, positions without examples."""

    def __init__(self) -> None:
        super().__init__()
        self.time_first = nn.Linear(3, 4)
        self.reversed = nn.Linear(4, 4)
        self.place = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.time_first(x.transpose(0, 1))).transpose(0, 1)
        h = h + self.place(torch.arange(x.shape[1]))
        h = h + self.reversed(h.flip(0)).tanh().flip(0)
        return self.out(h.sin()).mean(1)


def test_rows_that_are_not_examples_are_found_out():
    x = normal(6, 6, 3, seed=67)  # as many positions as examples in a batch
    y = labels(6, 3, seed=68)
    for data in ([(x, y)], [(x[:3], y[:3]), (x[3:], y[3:])]):
        problem = Problem(double(Crossed()), nn.CrossEntropyLoss(), data)
        found = ggn_trace.exact(problem)
        assert_equal(found.blocks, dense_blocks(problem))
        rules = dict(zip(found.names, found.rules, strict=True))
        for name in ("time_first.weight", "place.weight"):
            assert rules[name].startswith("per example")
        assert rules["out.weight"] == "matrix product"


class Routed(nn.Module):
    """Each example goes to one of two layers, so that rows and uses differ from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0) == bool(i)
            if chosen.any():
                out[chosen] = torch.tanh(expert(x[chosen]))
        return out


def test_uses_that_differ_from_batch_to_batch():
    x = normal(12, 3, seed=69)
    x[:4, 0] = x[:4, 0].abs()  # the first batch never uses one of the layers
    x[4:8, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    y = labels(12, 3, seed=70)
    data = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    problem = Problem(double(Routed()), nn.CrossEntropyLoss(), data)
    assert_equal(ggn_trace.exact(problem).blocks, dense_blocks(problem))


def test_examples_that_go_through_the_model_together():
    """BatchNorm in training mode: a micro-batch is then one whole, and the trace is still that of its matrix."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))
    problem = classified(model, normal(7, 3, seed=71))
    found = ggn_trace.exact(problem)
    assert_equal(found.blocks, dense_blocks(problem))


def tiny_gpt() -> Problem:
    tokens = labels((5, 4), 8, seed=72)
    model = double(nets.gpt(width=4, layers=1, heads=2, context=4, vocabulary=8))
    return Problem(
        model, nn.CrossEntropyLoss(), [(tokens[:3, :-1], tokens[:3, 1:]), (tokens[3:, :-1], tokens[3:, 1:])],
        output=lambda m, batch: m(batch[0]).transpose(1, 2), target=lambda batch: batch[1],
    )  # fmt: skip


def test_gpt_with_tied_embedding():
    problem = tiny_gpt()
    found = ggn_trace.exact(problem)
    assert_equal(found.blocks, dense_blocks(problem))
    assert found.columns == ggn_trace.columns(problem) == 3 * 7
    assert found.rules[0] == "embedding and matrix product"


# the loss


def test_columns_of_a_sure_prediction_are_accurate():
    """p(1 - p) of a probability that rounds to 1 is lost in float32 unless no nearly equal numbers are subtracted."""
    f = torch.tensor([[0.0, 30.0, 2.0], [25.0, 0.0, 0.0]], requires_grad=True)
    ending = Ending(F.cross_entropy, F.cross_entropy, torch.tensor([1, 0]), 2.0)
    parts = columns(Outputs(f, 2), ending)
    assert isinstance(parts, CrossEntropy)
    made = torch.stack([parts.column(c)[0] for c in range(parts.count)], 2).double()
    for i, row in enumerate(f.detach().double()):
        p = row.softmax(0)
        off = [math.exp(-float(row.max() - v)) for v in row if v != row.max()]
        expected = (
            sum(off) - sum(a * b for a in off for b in off) / 1
        )  # trace, to first order in the small ones
        assert float((made[i] @ made[i].T).trace()) == pytest.approx(2 * expected, rel=1e-5)
        assert float(p.max()) == pytest.approx(1, abs=1e-9)


def test_a_loss_that_couples_examples_is_refused():
    x = normal(6, 3, seed=73)
    loss = lambda f, y: (f * f.flip(0)).sum() + (f.exp() * y).mean()  # noqa: E731
    problem = Problem(double(nn.Linear(3, 2)), loss, [(x, normal(6, 2, seed=74))])
    with pytest.raises(Refused, match="depends on the outputs of others"):
        ggn_trace.exact(problem)


def test_too_many_outputs_of_an_unknown_loss_are_refused():
    problem = Problem(
        double(nn.Linear(2, 5000)), lambda f, y: torch.logsumexp(f, 1).mean(), [(normal(3, 2), labels(3, 2))]
    )
    with pytest.raises(Refused, match="at most 4096"):
        ggn_trace.exact(problem)


# memory, precision, restoration


@pytest.mark.parametrize("name", ["convolution", "tied_embedding", "multihead_attention", "lstm"])
def test_no_result_depends_on_the_memory(name):
    problem = Problem(**BY_NAME[name].arguments())
    expected = ggn_trace.exact(problem).blocks
    for memory in (1, 3000):
        assert_equal(ggn_trace.exact(problem, memory=memory).blocks, expected, rtol=1e-12)


@pytest.mark.parametrize("near", [1, 1000])
def test_no_result_depends_on_what_stays_near_the_processor(near, monkeypatch):
    passed = []
    outputs_of = ggn_passes.outputs_of
    monkeypatch.setattr(ggn_passes, "outputs_of", lambda p, x, n: passed.append(n) or outputs_of(p, x, n))
    for name in ("convolution", "padding", "mse"):
        problem = Problem(**BY_NAME[name].arguments())
        expected = ggn_trace.exact(problem).blocks
        whole = max(passed)
        with monkeypatch.context() as patch:
            patch.setattr(ggn_passes, "_NEAR", near)
            passed.clear()
            assert_equal(ggn_trace.exact(problem).blocks, expected, rtol=1e-12)
        if near == 1:
            assert passed[-1] == 1 < whole


def test_float32_is_within_its_rounding():
    problem = Problem(nets.mlp([6, 20, 20, 4]), nn.CrossEntropyLoss(), [(normal(50, 6), labels(50, 4))])
    found, truth = ggn_trace.exact(problem), ggn_trace.exact(problem.replace(dtype=torch.float64))
    assert problem.dtype == torch.float32
    np.testing.assert_allclose(found.blocks, truth.blocks, rtol=1e-5)


def test_the_model_is_untouched():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 3)
    )
    problem = classified(model, normal(7, 3, seed=75))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    ggn_trace.exact(problem)
    ggn_trace.sampled(problem, [generator(0, "x", 0)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_passes_are_counted():
    problem = Problem(nets.mlp([6, 8, 4]), nn.CrossEntropyLoss(), [(normal(50, 6), labels(50, 4))])
    found = ggn_trace.exact(problem)
    assert (found.columns, found.passes) == (3, 3.0)


# sampled


@pytest.mark.parametrize("name", ["cross_entropy", "tied_embedding", "mse", "own_loss_not_convex", "padding"])
def test_sampled_is_unbiased(name, monkeypatch):
    """The mean over every pattern of signs of two examples is the exact trace."""
    from landscape import curvature_columns

    case = BY_NAME[name]
    arguments = case.arguments((1,) * case.examples)
    arguments["data"] = arguments["data"][:2]
    if name in {"tied_embedding", "padding"}:  # one example and few positions, to keep the patterns few
        places = 2 if name == "padding" else 1
        arguments["data"] = [(x[:, :places], y[:, :places]) for x, y in arguments["data"][:1]]
    else:
        xs, ys = (torch.cat(parts) for parts in zip(*arguments["data"], strict=True))
        arguments["data"] = [(xs, ys)]  # one micro-batch of two, so that cross terms must cancel
    problem = Problem(**arguments)
    exact = ggn_trace.exact(problem)
    total, count, counting = 0.0, 0, {}

    def signs(stream, shape, like):
        counting["bits"] = shape.numel()
        pattern = counting.get("pattern", [0] * shape.numel())
        return (2 * torch.tensor(pattern).reshape(shape.shape) - 1).to(like)

    monkeypatch.setattr(curvature_columns, "_signs", signs)
    ggn_trace.sampled(problem, [torch.Generator()])
    assert counting["bits"] <= 12
    # The sign of all columns together changes nothing: half of the patterns are enough.
    for pattern in itertools.product((0, 1), repeat=counting["bits"] - 1):
        counting["pattern"] = (0, *pattern)
        total = total + ggn_trace.sampled(problem, [torch.Generator()])[0]
        count += 1
    assert_equal(total / count, exact.blocks, rtol=1e-12)


def test_samples_scatter_around_the_exact_trace():
    """400 samples; |mean − truth| < 4.5 standard errors for the whole trace (fails by chance in 1e-5)."""
    problem = tiny_gpt()
    exact = ggn_trace.exact(problem)
    samples = ggn_trace.sampled(problem, [generator(3, "sampled", i) for i in range(400)])
    assert samples.shape == (400, len(problem.names))
    whole = samples.sum(1)
    assert abs(whole.mean() - exact.trace) < 4.5 * whole.std(ddof=1) / 20
    again = ggn_trace.sampled(problem, [generator(3, "sampled", 7)])
    assert np.array_equal(again[0], samples[7])
