"""The embedded default, the small networks, the trainer, and the golden Hessian."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from landscape import testbeds
from landscape.problem import Problem
from landscape.testbeds import golden, softmax_regression
from landscape.testbeds.digits import batches, digits, digits_mlp, load_default, split
from landscape.testbeds.nets import gpt, mlp, own_stream, resnet20
from landscape.testbeds.train import train

RECIPE = Path(__file__).parent.parent / "figures" / "train_digits_mlp.py"


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# digits and the shipped network


def test_digits_are_all_rows_scaled_to_one():
    inputs, targets = digits()
    assert inputs.shape == (1797, 64)
    assert targets.shape == (1797,)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert inputs.min() == 0
    assert inputs.max() == 1
    assert sorted(set(targets.tolist())) == list(range(10))
    assert digits(torch.float64)[0].dtype == torch.float64


def test_batches_keep_order_and_every_row():
    inputs, targets = digits()
    cut = batches(inputs, targets, 500)
    assert [len(x) for x, _ in cut] == [500, 500, 500, 297]
    assert torch.equal(torch.cat([x for x, _ in cut]), inputs)
    assert torch.equal(torch.cat([y for _, y in cut]), targets)


@pytest.mark.parametrize(
    ("rows", "size", "message"), [(10, 0, "not positive"), (9, 4, "10 inputs but 9 targets")]
)
def test_batches_refuse(rows, size, message):
    with pytest.raises(ValueError, match=message):
        batches(torch.zeros(10, 2), torch.zeros(rows), size)


def test_split_is_a_partition():
    rows = torch.arange(1797)
    (trained, _), (held_out, _) = split(rows, rows)
    assert len(trained) == 1438
    assert len(held_out) == 359
    assert torch.equal(torch.cat([trained, held_out]).sort().values, rows)


def test_default_is_trained_but_not_to_zero_loss():
    model, loss, data, info = load_default()
    assert parameter_count(model) == 26122
    assert not model.training
    assert info.trained_accuracy >= 0.985
    assert 0.02 <= info.loss <= 0.06
    # Measured here once more, by batches.
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in data)
    total = sum(loss(model(x), y).item() * len(x) for x, y in data)
    assert (info.rows, info.trained_rows, info.held_out_rows) == (1797, 1438, 359)
    assert info.accuracy == pytest.approx(right / 1797, abs=1e-12)
    assert info.loss == pytest.approx(total / 1797, rel=1e-5)
    assert info.accuracy * 1797 == pytest.approx(info.trained_accuracy * 1438 + info.held_out_accuracy * 359)
    assert info.loss * 1797 == pytest.approx(info.trained_loss * 1438 + info.held_out_loss * 359)


def test_default_says_what_it_is():
    info = load_default()[3]
    assert info.sentence.startswith(
        "a 64-128-128-10 ReLU network trained on 1438 of scikit-learn's 1797 digits"
    )
    assert f"{info.accuracy:.1%}" in info.sentence
    assert f"{info.loss:.4f}" in info.sentence
    assert "\n" not in info.sentence


def test_recipe_reproduces_the_shipped_weights():
    spec = importlib.util.spec_from_file_location("train_digits_mlp", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, _ = module.recipe()
    assert module.difference(model, digits_mlp()) <= module.TOLERANCE


def test_package_loads_lazily():
    code = "import sys, landscape.testbeds; sys.exit(int('torch' in sys.modules or 'sklearn' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_exported_names_exist():
    for name in testbeds._HOMES:
        assert callable(getattr(testbeds, name))
        assert name in dir(testbeds)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = testbeds.nonsense


# networks


@pytest.mark.parametrize(
    ("build", "count"), [(lambda: mlp([64, 128, 128, 10]), 26122), (resnet20, 272474), (gpt, 1288640)]
)
def test_parameter_counts(build, count):
    assert parameter_count(build()) == count


def test_resnet20_has_twenty_layers():
    layers = [
        m
        for m in resnet20().modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    ]
    assert len(layers) == 20


def test_tiny_networks_have_the_shapes_they_promise():
    assert mlp([3, 2], nn.Tanh)(torch.zeros(5, 3)).shape == (5, 2)
    net = resnet20(width=2, classes=3, channels=1, blocks=1).eval()
    assert net(torch.zeros(4, 1, 8, 8)).shape == (4, 3)
    model = gpt(width=4, layers=1, heads=2, context=6, vocabulary=7)
    assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 7)
    assert parameter_count(model) < 400


def test_gpt_head_is_tied_and_the_future_is_hidden():
    model = gpt(width=8, layers=2, heads=2, context=6, vocabulary=11).double()
    assert model.head.weight is model.token.weight
    tokens = torch.arange(6)[None]
    other = tokens.clone()
    other[0, 4] = 9
    a, b = model(tokens), model(other)
    assert torch.allclose(a[0, :4], b[0, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(a[0, 4:], b[0, 4:])


def test_gpt_attention_matches_the_formula():
    block = gpt(width=6, layers=1, heads=2, context=5, vocabulary=7).double().blocks[0]
    x = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query, key, value = block.query_key_value(x).split(6, dim=-1)
    heads = []
    for h in (slice(0, 3), slice(3, 6)):
        scores = query[..., h] @ key[..., h].transpose(1, 2) / 3**0.5
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        heads.append(torch.softmax(scores, -1) @ value[..., h])
    assert torch.allclose(block._attend(x), torch.cat(heads, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "build", [lambda seed: mlp([3, 4, 2], seed=seed), lambda seed: gpt(4, 1, 1, 3, 5, seed=seed)]
)
def test_networks_follow_their_seed_and_leave_the_global_state(build):
    before = torch.get_rng_state()
    first, again, other = build(0), build(0), build(1)
    assert torch.equal(torch.get_rng_state(), before)
    flat = [nn.utils.parameters_to_vector(m.parameters()) for m in (first, again, other)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


def test_own_stream_restores_after_an_error():
    before = torch.get_rng_state()

    def draw_and_fail() -> None:
        with own_stream(0, "x"):
            torch.rand(3)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        draw_and_fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_refuse_impossible_sizes():
    with pytest.raises(ValueError, match="at least an input and an output"):
        mlp([3])
    with pytest.raises(ValueError, match="multiple of heads"):
        gpt(width=5, heads=2)


# trainer


def trained(seed: int) -> tuple[nn.Module, list[float]]:
    inputs, targets = digits()
    model = mlp([64, 8, 10])
    model.insert(1, nn.Dropout(0.2))
    history = train(
        model, nn.CrossEntropyLoss(), batches(inputs[:300], targets[:300], 64), epochs=5, lr=1e-2, seed=seed
    )
    return model, history


def test_training_is_seeded_and_leaves_the_global_state():
    before = torch.get_rng_state()
    (a, history), (b, _), (c, _) = trained(0), trained(0), trained(1)
    assert torch.equal(torch.get_rng_state(), before)
    flat = [nn.utils.parameters_to_vector(m.parameters()) for m in (a, b, c)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])
    assert len(history) == 5
    assert history[-1] < 0.9 * history[0]
    assert not a.training
    assert all(p.grad is None for p in a.parameters())


def test_training_in_float64_gives_back_float32():
    inputs, targets = digits()
    model = mlp([64, 4, 10])
    train(
        model,
        nn.CrossEntropyLoss(),
        batches(inputs[:50], targets[:50], 20),
        epochs=1,
        lr=1e-2,
        dtype=torch.float64,
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_training_refuses_nothing_to_do():
    with pytest.raises(ValueError, match="at least one of each"):
        train(mlp([2, 1]), nn.MSELoss(), [], epochs=1, lr=0.1)


# golden: DEFINITIONS gives these digits; the Hessian here is a sum of Kronecker products in numpy


def dense_hessian(weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    logits = inputs @ weight.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    hessian = golden.PENALTY * np.eye(weight.size)
    for a in range(10):
        for b in range(10):
            factor = p[:, a] * ((a == b) - p[:, b]) / len(inputs)
            hessian[64 * a : 64 * (a + 1), 64 * b : 64 * (b + 1)] += (inputs * factor[:, None]).T @ inputs
    return hessian


def test_golden_hessian():
    model, data = softmax_regression(size=500)
    assert [len(x) for x, _ in data] == [500, 500, 500, 297]
    weight = model.weight.detach().numpy()
    inputs = torch.cat([x for x, _ in data]).numpy()
    hessian = dense_hessian(weight, inputs)
    spectrum = np.linalg.eigvalsh(hessian)[::-1]
    value = sum(golden.step(model, (x, y)).item() * len(x) for x, y in data) / 1797
    assert value == pytest.approx(0.2645544391190, abs=1e-13)
    assert spectrum[0] == pytest.approx(0.4387837249785, abs=1e-13)
    top = [0.43878, 0.30783, 0.26088, 0.21440, 0.16700, 0.15731, 0.13494, 0.12351, 0.09497, 0.03131]
    assert spectrum[:10] == pytest.approx(top, abs=5e-6)
    assert np.trace(hessian) == pytest.approx(3.152857175749, abs=1e-12)
    assert np.sum(hessian**2) == pytest.approx(0.502918809949, abs=1e-12)
    assert spectrum[-1] == pytest.approx(1e-3, abs=1e-12)
    assert np.sum(np.abs(spectrum - 1e-3) < 1e-6) == 156
    sign, logdet = np.linalg.slogdet(hessian)
    assert sign == 1
    assert logdet == pytest.approx(-4117.18776645, abs=1e-8)


def test_golden_hessian_through_the_adapter():
    model, data = softmax_regression(size=500)
    problem = Problem(model, forward=golden.step, data=data)
    hessian = problem.hvp(torch.eye(640, dtype=torch.float64)).numpy()
    assert problem.value().item() == pytest.approx(0.2645544391190, abs=1e-13)
    assert problem.gradient().norm() < 1e-15
    assert np.trace(hessian) == pytest.approx(3.152857175749, abs=1e-12)
    assert np.sum(hessian**2) == pytest.approx(0.502918809949, abs=1e-12)
    assert np.linalg.eigvalsh(hessian)[[0, -1]] == pytest.approx([1e-3, 0.4387837249785], abs=1e-12)
    assert np.linalg.slogdet(hessian)[1] == pytest.approx(-4117.18776645, abs=1e-8)


def test_golden_is_a_minimum():
    model, ((inputs, targets),) = softmax_regression()
    gradient = torch.autograd.grad(golden.step(model, (inputs, targets)), model.weight)[0]
    assert gradient.norm() < 1e-15
