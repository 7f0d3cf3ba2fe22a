"""The metric `input_curvature`: closed forms, dense references, and independence of the batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import landscape
from landscape import Problem, Refused, results
from landscape.estimators.stacks import spectral_norms
from landscape.metrics import InputCurvature
from landscape.testbeds.nets import own_stream

EACH = (
    "gradient_norm",
    "hessian_norm",
    "normalized_curvature",
    "trace",
    "trace_squared",
    "curvature",
    "cure",
)
TIGHT = InputCurvature(rtol=1e-9, epsilon=0.0, step=0.3)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with own_stream(1, "test"):
        return build().double().eval()


def labels(count: int, classes: int) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(5))


def cut(batch: Any, sizes: tuple[int, ...]) -> list[Any]:
    parts, start = [], 0
    for size in sizes:
        parts.append(landscape.problem.batching.cut(batch, start, start + size))
        start += size
    return parts


# --- closed forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [1e-3, 0.3, 10.0])
def test_binary_logistic(h: float) -> None:
    d, x = 7, randn(9, 7)
    model = seeded(lambda: nn.Linear(d, 1, bias=False))
    w = model.weight.detach()[0]
    sign = torch.where(labels(9, 2) == 1, 1.0, -1.0).double()
    problem = Problem(model, nn.BCEWithLogitsLoss(), [(x, ((sign + 1) / 2)[:, None])])
    ds = landscape.measure(InputCurvature(rtol=1e-9, epsilon=0.0, step=h), problem)
    margin = sign * (x @ w)
    assert np.allclose(ds["normalized_curvature"], torch.sigmoid(margin) * w.norm(), rtol=1e-9)
    moved = torch.sigmoid(-margin + h * w.abs().sum() / math.sqrt(d))
    assert np.allclose(ds["curvature"], w.norm() * (moved - torch.sigmoid(-margin)), rtol=1e-9, atol=1e-14)
    assert np.allclose(ds["cure"], ds["curvature"] ** 2)
    assert (ds["step"] == h).all()


def test_softmax_regression() -> None:
    x, y = randn(12, 6), labels(12, 4)
    model = seeded(lambda: nn.Linear(6, 4))
    ds = landscape.measure(TIGHT, Problem(model, nn.CrossEntropyLoss(), [(x, y)]))
    W, p = model.weight.detach(), torch.softmax(model(x).detach(), dim=1)
    H = W.T @ (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) @ W
    assert np.allclose(ds["hessian_norm"], torch.linalg.eigvalsh(H)[:, -1], rtol=1e-9)
    assert np.allclose(ds["gradient_norm"], ((p - F.one_hot(y, 4)) @ W).norm(dim=1), rtol=1e-9)
    off = (ds["trace"].values - H.diagonal(dim1=1, dim2=2).sum(1).numpy()) / ds["trace_stderr"].values
    assert np.abs(off).max() < 6
    assert (ds["label"] == y).all()
    assert (ds["predicted"] == p.argmax(dim=1)).all()
    assert np.allclose(ds["value"], F.cross_entropy(model(x), y, reduction="none").detach())


def quadratic(A: Tensor, count: int = 5) -> Problem:
    """f(x) = xᵀAx/2."""
    return Problem(
        lambda params, x: ((x @ A) * x).sum(dim=1) / 2 + 0 * params["a"],
        lambda output, target: (output + 0 * target).mean(),
        [(randn(count, len(A)), torch.zeros(count, dtype=torch.float64))],
        parameters={"a": torch.zeros((), dtype=torch.float64)},
    )


def test_quadratic() -> None:
    values = torch.tensor([-5.0, 1.0, 2.0, 4.0, 4.5, 0.0, 0.1], dtype=torch.float64)
    Q = torch.linalg.qr(randn(7, 7)).Q
    A = Q @ torch.diag(values) @ Q.T
    problem = quadratic(A)
    ds = landscape.measure(TIGHT, problem)
    assert np.allclose(ds["hessian_eigenvalue"], -5.0)
    x = next(iter(problem.batches))[0]
    z = torch.sign(x @ A) / math.sqrt(7)
    assert np.allclose(ds["curvature"], 0.3 * (z @ A).norm(dim=1), rtol=1e-12)
    # A multiple of the identity has its traces from one probe.
    ds = landscape.measure(InputCurvature(probes=1), quadratic(3 * torch.eye(7, dtype=torch.float64)))
    assert np.allclose(ds["trace"], 21.0)
    assert np.allclose(ds["trace_squared"], 63.0)
    assert float(ds["mean_trace"]) == pytest.approx(21.0)


def test_the_trace_s_interval_covers_95_percent() -> None:
    """4 examples, 120 seeds: 480 intervals, of which by chance fewer than 91 % or more than 98.5 % in 1e-3."""
    A = torch.diag(torch.linspace(1, 3, 20, dtype=torch.float64)) + 0.1 * torch.ones(20, 20)
    problem, hits = quadratic(A, 4), []
    true = {"trace": float(A.trace()), "trace_squared": float((A @ A).trace())}
    for seed in range(120):
        record = landscape.evaluate(InputCurvature(probes=12, max_matvecs=1), problem, seed)
        hits.append([abs(record[q] - t) <= 1.96 * record[f"{q}_stderr"] for q, t in true.items()])
    covered = np.mean(hits, axis=(0, 2))
    assert (covered > 0.91).all()
    assert (covered < 0.985).all(), covered


def test_a_logit_of_a_piecewise_linear_network_has_no_hessian() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    problem = Problem(model, nn.CrossEntropyLoss(), [(randn(6, 5), labels(6, 3))])
    for scalar in ("logit", "prediction", "logit:2"):
        ds = landscape.measure(InputCurvature(scalar=scalar, step=1e-9), problem)
        assert (ds["hessian_norm"] == 0).all()
        assert (ds["trace_squared"] == 0).all()
        assert (ds["curvature"] < 1e-12).all()
        assert bool(ds["converged"])
        assert (ds["gradient_norm"] > 0).all()


# --- dense references in float64, of models of all kinds --------------------------------------------------


@functools.cache
def conv_net() -> nn.Module:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Softplus(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
    )
    model[1].running_mean.copy_(randn(4))
    model[1].running_var.copy_(randn(4).square() + 0.5)
    return model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(11, 8), nn.Embedding(5, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.after(self.token(ids))

    def after(self, embedded: Tensor) -> Tensor:
        x = embedded + self.place(torch.arange(embedded.shape[1]))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return self.head(self.block(x).mean(dim=1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * y[:, None] + shift[:, None])


def one_loss(model: Callable[[Tensor], Tensor], loss: Callable[..., Tensor], target: Tensor) -> Any:
    return lambda x: loss(model(x[None]), target[None])


def case(name: str) -> tuple[Problem, list[tuple[Callable[[Tensor], Tensor], Tensor]], str]:
    """A problem, its f_i with the x_i, and the place."""
    if name == "conv":
        x, y, net = randn(7, 2, 6, 6), labels(7, 3), conv_net()
        loss: Any = nn.CrossEntropyLoss(label_smoothing=0.1)
        problem = Problem(net, loss, cut((x, y), (4, 3)), microbatch=2)
        return problem, [(one_loss(net, loss, t), i) for i, t in zip(x, y, strict=True)], "input"
    if name == "tokens":
        net, ids, y = seeded(Attention), labels(20, 11).view(4, 5), labels(4, 3)
        points = net.token(ids).detach()
        loss = nn.CrossEntropyLoss()
        pairs = [(one_loss(net.after, loss, t), e) for e, t in zip(points, y, strict=True)]
        return Problem(net, loss, [(ids, y)]), pairs, "token"
    if name == "dict":
        net = seeded(TwoInputs)
        given = {"x": randn(6, 3), "y": randn(6, seed=1), "shift": labels(6, 3)}
        target = randn(6, 2, seed=2)
        pairs = []
        for i in range(6):

            def f(v: Tensor, i: int = i) -> Tensor:
                return F.mse_loss(net(v[None, :3], v[3:], given["shift"][i : i + 1]), target[i : i + 1])

            pairs.append((f, torch.cat([given["x"][i], given["y"][i : i + 1]])))
        return Problem(net, nn.MSELoss(), cut((given, target), (2, 4))), pairs, "input"
    if name == "weights":
        net = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)))
        x, y = randn(8, 4), labels(8, 3)
        loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))
        return (
            Problem(net, loss, [(x, y)]),
            [(one_loss(net, loss, t), i) for i, t in zip(x, y, strict=True)],
            "input",
        )
    if name == "sum":
        net = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
        x, y, loss = randn(5, 4), randn(5, 2, seed=3), nn.MSELoss(reduction="sum")
        pairs = [(one_loss(net, loss, t), i) for i, t in zip(x, y, strict=True)]
        return Problem(net, loss, [(x, y)], reduction="sum"), pairs, "input"
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 1)))
    x, y = randn(5, 4), randn(5, 1, seed=3)
    problem = Problem(
        net, forward=lambda model, batch: (model(batch[0]) - batch[1]).cosh().mean(), data=[(x, y)]
    )
    pairs = [(one_loss(net, lambda o, t: (o - t).cosh().mean(), t), i) for i, t in zip(x, y, strict=True)]
    return problem, pairs, "input"


@pytest.mark.parametrize("name", ["conv", "tokens", "dict", "weights", "sum", "blackbox"])
def test_dense_references(name: str) -> None:
    problem, pairs, place = case(name)
    ds = landscape.measure(InputCurvature(rtol=1e-9, epsilon=1e-6, step=0.3, with_respect_to=place), problem)
    assert bool(ds["converged"])
    for i, (f, point) in enumerate(pairs):
        x = point.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(x), x)
        H = torch.autograd.functional.hessian(f, x.detach()).reshape(x.numel(), -1)
        top = float(torch.linalg.eigvalsh(H).abs().max())
        assert float(ds["hessian_norm"][i]) == pytest.approx(top, rel=1e-6)
        assert float(ds["gradient_norm"][i]) == pytest.approx(float(g.norm()), rel=1e-9)
        assert float(ds["normalized_curvature"][i]) == pytest.approx(top / (float(g.norm()) + 1e-6), rel=1e-6)
        for q, true in (("trace", H.trace()), ("trace_squared", (H @ H).trace())):
            assert abs(float(ds[q][i]) - float(true)) < 7 * float(ds[f"{q}_stderr"][i]) + 1e-9
        moved = (x + 0.3 * g.sign() / g.sign().norm()).detach().requires_grad_()
        change = torch.autograd.grad(f(moved), moved)[0] - g
        assert float(ds["curvature"][i]) == pytest.approx(float(change.norm()), rel=1e-8)
        if name != "blackbox":
            assert float(ds["value"][i]) == pytest.approx(float(f(x).detach()), rel=1e-12)


def test_single_precision_keeps_the_digits_of_examples_that_the_model_is_sure_of() -> None:
    model, loss, batches, _ = landscape.testbeds.load_default()
    problem = Problem(model, loss, batches)
    single, double = (
        landscape.measure(InputCurvature(probes=0), p)
        for p in (problem, problem.replace(dtype=torch.float64))
    )
    assert float(double["gradient_norm"].min()) < 1e-4
    for name in ("gradient_norm", "hessian_norm"):
        off = np.abs(single[name] / double[name] - 1)
        assert float(off.max()) < 5e-5, name  # 2e-2 where the loss itself is computed in float32
    assert bool(single["converged"])


def test_the_default_tolerance_gives_six_digits_where_20_power_iterations_miss_per_cents() -> None:
    model, loss, batches, _ = landscape.testbeds.load_default()
    x, y = batches[0][0][:256].double(), batches[0][1][:256]
    ds = landscape.measure(InputCurvature(probes=0), Problem(model.double(), loss, [(x, y)]))
    leaf = x.clone().requires_grad_()
    logits = model(leaf)  # piecewise linear in x
    J = torch.stack(
        [torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=True)[0] for k in range(10)], dim=1
    )
    p = torch.softmax(logits.detach(), dim=1)
    H = J.transpose(1, 2) @ (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) @ J
    top = torch.linalg.eigvalsh(H).abs().max(dim=1).values.numpy()
    assert np.abs(ds["hessian_norm"].values / top - 1).max() < 1e-6
    v = randn(256, 64, 1)
    for _ in range(20):
        v = H @ (v / v.norm(dim=1, keepdim=True))
    assert np.abs(v.norm(dim=1)[:, 0].numpy() / top - 1).max() > 0.01
    assert float(ds["products"].max()) < 12


# --- independence of the batch ----------------------------------------------------------------------------


def network(sizes: tuple[int, ...], order: Tensor | None = None, **options: Any) -> Problem:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 9), nn.Softplus(), nn.Linear(9, 4)))
    x, y = randn(20, 6), labels(20, 4)
    if order is not None:
        x, y = x[order], y[order]
    return Problem(model, nn.CrossEntropyLoss(), cut((x, y), sizes), **options)


def test_values_do_not_depend_on_batch_position_or_microbatch() -> None:
    expected = landscape.measure(InputCurvature(), network((20,)))
    for sizes in ((7, 7, 6), (1,) * 20, (19, 1)):
        found = landscape.measure(InputCurvature(), network(sizes))
        for name in EACH:
            assert np.allclose(found[name], expected[name], rtol=1e-10), name
    order = torch.randperm(20, generator=torch.Generator().manual_seed(7))
    found = landscape.measure(InputCurvature(), network((8, 12), order, microbatch=3))
    for name in (*EACH, "trace_stderr", "label", "predicted"):
        assert np.allclose(found[name], expected[name][order.numpy()], rtol=1e-10), name


def test_blocks_and_batches_need_not_fit() -> None:
    expected = landscape.measure(InputCurvature(), network((20,)))
    problem = network((7, 7, 6))
    unit = InputCurvature().unit_bytes(problem)
    record = landscape.evaluate(InputCurvature(), problem, memory=2 * 3 * unit)
    assert record.attrs["block_size"] == 3
    for name in EACH:
        assert np.allclose(record[name], expected[name], rtol=1e-10), name


def test_rows_of_data_too_large_to_keep_are_read_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("landscape.batches.CACHE_BYTES", 1)
    problem, reads = network((7, 7, 6)), []
    plain = problem.batches.fresh

    def counted() -> Any:
        reads.append(1)
        return plain()

    monkeypatch.setattr(problem.batches, "fresh", counted)
    rows = [list(problem.batches.rows(i, i + 3)) for i in range(0, 18, 3)]
    assert len(reads) == 1
    flat = torch.cat([x for part in rows for x, _ in part])
    assert torch.equal(flat, randn(20, 6)[:18])
    assert torch.equal(next(problem.batches.rows(4, 6))[0], randn(20, 6)[4:6])


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_interrupted_runs_end_with_the_same_bits(stopped_after: int, tmp_path: Path) -> None:
    problem, blocks = network((7, 7, 6)), []

    def stop(progress: object) -> None:
        blocks.append(progress)
        if len(blocks) == stopped_after:
            raise KeyboardInterrupt

    whole = landscape.measure(InputCurvature(), problem)
    with pytest.raises(KeyboardInterrupt):
        landscape.measure(_Small(), problem, out=tmp_path / "a.h5", progress=stop)
    done = int(results.read(tmp_path / "a.h5")["done"].sum())
    assert 0 < done < 20
    resumed = landscape.measure(_Small(), problem, out=tmp_path / "a.h5")
    straight = landscape.measure(_Small(), problem)
    for name in (*EACH, "trace_stderr", "hessian_residual_norm", "mean_trace_stderr"):
        assert np.array_equal(resumed[name], straight[name]), name
        assert np.allclose(resumed[name], whole[name], rtol=1e-9), name
    assert int(resumed["matvecs"]) == int(straight["matvecs"])


class _Small(InputCurvature):
    block = 4


def test_a_larger_demand_measures_again(tmp_path: Path) -> None:
    problem = network((20,))
    first = landscape.measure(InputCurvature(probes=4, max_matvecs=2), problem, out=tmp_path)
    assert not bool(first["converged"])
    missed = np.flatnonzero(~first["hessian_converged"].values)
    assert int(first["unconverged"]) == len(missed) > 0
    assert (first["unconverged_examples"] == missed).all()
    assert (first["hessian_residual_norm"].values[missed] > 1e-4 * first["hessian_norm"].values[missed]).all()
    second = landscape.measure(InputCurvature(probes=16), problem, out=tmp_path)
    assert bool(second["converged"])
    assert second.sizes["unconverged_example"] == 0
    assert (second["trace_stderr"].mean() < first["trace_stderr"].mean()).all()
    again = landscape.measure(InputCurvature(probes=2, rtol=0.1), problem, out=tmp_path)
    assert all(again[name].identical(second[name]) for name in EACH)


# --- what goes wrong --------------------------------------------------------------------------------------


def test_examples_that_influence_each_other_are_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    data = [(randn(8, 4), labels(8, 3))]
    problem = Problem(model, nn.CrossEntropyLoss(), data, mode="train")
    for check in (True, False):
        with pytest.raises(Refused, match=r"influence each other|alone"):
            landscape.measure(InputCurvature(), problem, check=check)
    landscape.measure(InputCurvature(), Problem(model, nn.CrossEntropyLoss(), data))

    def mixing(module: nn.Module, batch: Any) -> Tensor:
        return module(batch[0] - batch[0].mean(dim=0) * 1e-3)

    mixed = Problem(
        seeded(lambda: nn.Linear(4, 3)), nn.CrossEntropyLoss(), data, output=mixing, target=lambda b: b[1]
    )
    with pytest.raises(Refused, match="influence each other"):
        landscape.measure(InputCurvature(), mixed, check=False)


def test_integer_inputs_are_refused_with_what_to_do() -> None:
    net, ids, y = seeded(Attention), labels(20, 11).view(4, 5), labels(4, 3)
    problem = Problem(net, nn.CrossEntropyLoss(), [(ids, y)])
    with pytest.raises(Refused, match=r"no floating-point tensor.*with_respect_to='token'"):
        landscape.measure(InputCurvature(), problem)
    for place, words in (
        ("place", r"first dimension counts the . examples"),
        ("tokens", "no module 'tokens'; allowed is 'input', or one of token, place"),
        ("block.self_attn.out_proj", "0 times"),
    ):
        with pytest.raises(Refused, match=words):
            landscape.measure(InputCurvature(with_respect_to=place), problem)


def test_labels_that_are_missing_or_too_large() -> None:
    net = seeded(lambda: nn.Linear(4, 3))
    regression = Problem(net, nn.MSELoss(), [(randn(5, 4), randn(5, 3, seed=1))])
    assert "label" not in landscape.measure(InputCurvature(), regression)
    with pytest.raises(Refused, match="targets are no integer labels; take 'prediction'"):
        landscape.measure(InputCurvature(scalar="logit"), regression)
    with pytest.raises(Refused, match="there are 3 logits"):
        landscape.measure(InputCurvature(scalar="logit:3"), regression)
    ignored = Problem(net, nn.CrossEntropyLoss(), [(randn(5, 4), torch.tensor([0, -100, 2, 1, 1]))])
    ds = landscape.measure(InputCurvature(), ignored)
    assert np.isnan(ds["hessian_norm"][1])
    assert int(ds["not_finite"]) == 1
    assert np.isfinite(float(ds["mean_hessian_norm"]))
    assert bool(ds["converged"])
    # More classes than labels that occur.
    few = Problem(
        seeded(lambda: nn.Linear(4, 9)), nn.CrossEntropyLoss(), [(randn(5, 4), torch.zeros(5).long())]
    )
    assert np.isfinite(landscape.measure(InputCurvature(scalar="logit"), few)["gradient_norm"]).all()


def test_an_example_that_is_not_finite_stays_alone() -> None:
    x, y = randn(6, 4), labels(6, 3)
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    good = landscape.measure(InputCurvature(), Problem(net, nn.CrossEntropyLoss(), [(x, y)]))
    bad = x.clone()
    bad[4, 2] = math.nan
    problem = Problem(net, nn.CrossEntropyLoss(), [(bad, y)])
    with pytest.raises(Refused, match="not finite"):
        landscape.measure(InputCurvature(), problem)
    ds = landscape.measure(InputCurvature(), problem, check=False)
    others = np.arange(6) != 4
    for name in EACH:
        assert np.isnan(ds[name][4])
        assert np.allclose(ds[name][others], good[name][others], rtol=1e-9), name
    assert int(ds["not_finite"]) == 1
    assert np.isfinite(float(ds["mean_trace"]))


def test_an_example_without_gradient() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        net[0].weight.copy_(randn(4, 3).abs())
        net[0].bias.zero_()
    x = torch.cat([-torch.ones(1, 3), randn(3, 3).abs()]).double()
    ds = landscape.measure(InputCurvature(), Problem(net, nn.CrossEntropyLoss(), [(x, labels(4, 2))]))
    assert int(ds["zero_gradients"]) == 1
    for name in EACH:
        assert float(ds[name][0]) == 0
    assert (ds["hessian_norm"][1:] > 0).all()


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * ctx.saved_tensors[0].cos()


class _Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(x)


def test_a_layer_without_second_derivative_is_measured_by_differences() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 6), _Sine(), nn.Linear(6, 3)))
    data = [(randn(5, 4), labels(5, 3))]
    ds = landscape.measure(InputCurvature(), Problem(net, nn.CrossEntropyLoss(), data))
    assert ds.attrs["input_check"]["setup"]["products"] == "difference"
    smooth = Problem(
        lambda p, x: torch.sin(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"],
        nn.CrossEntropyLoss(), data, parameters={k: v.detach() for k, v in net.named_parameters()},
    )  # fmt: skip
    expected = landscape.measure(InputCurvature(), smooth)
    assert expected.attrs["input_check"]["setup"]["products"] == "autodiff"
    assert np.allclose(ds["hessian_norm"], expected["hessian_norm"], rtol=1e-6)
    with pytest.raises(Refused, match="products='auto' or 'difference'"):
        landscape.measure(InputCurvature(), Problem(net, nn.CrossEntropyLoss(), data, products="autodiff"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scalar": "logits"}, "scalar is 'logits'; allowed is 'loss'"),
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"step": 0.0}, "step is 0.0"),
        ({"rtol": 1.0}, "rtol is 1.0"),
        ({"max_matvecs": 0}, "max_matvecs is 0"),
        ({"image": (8,)}, r"image is \(8,\)"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InputCurvature(**fields)


def test_pictures_are_kept_where_asked_for() -> None:
    problem = network((20,))
    with pytest.raises(Refused, match="9 numbers, but an input has 6"):
        landscape.measure(InputCurvature(image=(3, 3)), problem)
    ds = landscape.measure(InputCurvature(image=(2, 3)), problem)
    assert np.allclose(ds["image"], randn(20, 6).reshape(20, 2, 3))


def test_the_model_is_untouched() -> None:
    net, ids, y = seeded(Attention), labels(20, 11).view(4, 5), labels(4, 3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    landscape.measure(
        InputCurvature(with_respect_to="token"), Problem(net, nn.CrossEntropyLoss(), [(ids, y)])
    )
    assert not any(m._forward_hooks for m in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# --- the estimator ----------------------------------------------------------------------------------------


def stack(count: int, size: int, rank: int, seed: int = 0) -> Tensor:
    Q = torch.linalg.qr(randn(count, size, size, seed=seed)).Q
    values = torch.zeros(count, size, dtype=torch.float64)
    values[:, :rank] = randn(count, rank, seed=seed + 1)
    return Q @ torch.diag_embed(values) @ Q.transpose(1, 2)


@pytest.mark.parametrize(("size", "rank"), [(30, 30), (30, 3), (60, 1), (5, 5), (1, 1), (40, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norms_of_dense_stacks(size: int, rank: int, dtype: torch.dtype) -> None:
    A = stack(200, size, rank)
    found = spectral_norms(A.to(dtype), randn(size, seed=9), rtol=1e-4)
    true = torch.linalg.eigvalsh(A)
    top = true.abs().max(dim=1).values.numpy()
    assert found.converged.all()
    eps = float(torch.finfo(dtype).eps)
    assert (np.abs(np.abs(found.values) - top) <= found.residual_norms + 50 * eps * top).all()
    near = torch.from_numpy(found.values)[:, None]
    assert float((true - near).abs().min(dim=1).values.max()) <= 1e-4 * top.max()
    assert (found.matvecs <= size).all()
    if rank < 4:
        assert found.matvecs.max() <= max(rank + 2, 4)


def test_norms_scale_and_do_not_mix() -> None:
    A = stack(6, 12, 12)
    whole = spectral_norms(A, torch.ones(12, dtype=torch.float64), rtol=1e-8)
    small = spectral_norms(1e-30 * A, torch.ones(12, dtype=torch.float64), rtol=1e-8)
    assert np.allclose(small.values, 1e-30 * whole.values, rtol=1e-10)
    for i in range(6):
        alone = spectral_norms(A[i : i + 1], torch.ones(12, dtype=torch.float64), rtol=1e-8)
        assert alone.matvecs[0] == whole.matvecs[i]
        assert np.allclose(alone.values, whole.values[i], rtol=1e-12)
    opposite = torch.diag(torch.tensor([2.0, -2.0, 1.0], dtype=torch.float64))[None]
    assert abs(spectral_norms(opposite, torch.ones(3).double()).values[0]) == pytest.approx(2.0)
