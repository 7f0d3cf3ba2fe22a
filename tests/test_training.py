"""Penalties, layers of low curvature, and coresets, against closed forms and dense matrices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from landscape_cli import app
from torch import Tensor, nn

import landscape
from landscape import Problem, results, training
from landscape.metrics import InputCurvature
from landscape.results import Record, Variable
from landscape.testbeds.nets import own_stream


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Module:
    with own_stream(1, "test"):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def losses_of(model: nn.Module, y: Tensor) -> Any:
    return lambda x: F.cross_entropy(model(x), y, reduction="none")


LABELS = torch.arange(12) % 3
PENALTIES = {
    "gradient": training.gradient_penalty,
    "Curv": lambda losses, x: training.curvature_penalty(losses, x, 0.3),
    "CURE": lambda losses, x: training.cure_penalty(losses, x, 0.3),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_what_is_measured_and_do_not_depend_on_the_batch(name: str) -> None:
    model, x = network(), randn(12, 6)
    ds = landscape.measure(InputCurvature(step=0.3), Problem(model, nn.CrossEntropyLoss(), [(x, LABELS)]))
    each = {"gradient": ds["gradient_norm"] ** 2, "Curv": ds["curvature"], "CURE": ds["cure"]}[name]
    whole = PENALTIES[name](losses_of(model, LABELS), x)
    assert float(whole.detach()) == pytest.approx(float(each.mean()), rel=1e-9)
    parts = [
        PENALTIES[name](losses_of(model, LABELS[a:b]), x[a:b]).detach() * (b - a) / 12
        for a, b in ((0, 1), (1, 5), (5, 12))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole.detach()), rel=1e-12)


@pytest.mark.parametrize("name", PENALTIES)
def test_the_slope_of_a_penalty_is_that_of_differences(name: str) -> None:
    model, x = network(), randn(12, 6)
    weight = model[0].weight
    (slope,) = torch.autograd.grad(PENALTIES[name](losses_of(model, LABELS), x), weight)
    direction, values = randn(8, 6, seed=4), []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-6 * direction
        values.append(float(PENALTIES[name](losses_of(model, LABELS), x).detach()))
        with torch.no_grad():
            weight -= sign * 1e-6 * direction
    assert float((slope * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


def test_a_flat_example_has_a_finite_slope() -> None:
    w = torch.ones(3, requires_grad=True, dtype=torch.float64)
    value = training.curvature_penalty(
        lambda x: torch.relu(x @ w), torch.tensor([[-1.0] * 3, [1.0] * 3]).double(), 0.1
    )
    assert float(value.detach()) == 0
    (slope,) = torch.autograd.grad(value, w, allow_unused=True, materialize_grads=True)
    assert (slope == 0).all()
    with pytest.raises(ValueError, match="reduction='none'"):
        training.gradient_penalty(lambda x: (x @ w).mean(), torch.ones(2, 3).double())


# --- layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 5.0, 1e3])
def test_centered_softplus(beta: float) -> None:
    layer = training.CenteredSoftplus(beta).double()
    x = (
        torch.cat([torch.linspace(-60, 60, 2001) / beta, torch.tensor([-1e4, 0.0, 1e4])])
        .double()
        .requires_grad_()
    )
    s = layer(x)
    off = (s - x.relu()).detach()
    assert float(layer.beta.detach()) == pytest.approx(beta, rel=1e-6)  # log β is kept in float32
    bound = math.log(2) / float(layer.beta.detach())
    assert float(off.max()) <= 1e-12
    assert float(off.min()) >= -bound * (1 + 1e-9)
    assert off[-3].item() == pytest.approx(-bound)
    assert off[-1].item() == pytest.approx(-bound, rel=1e-9, abs=1e-11)
    assert s[-2].item() == 0
    (first,) = torch.autograd.grad(s.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    first = first.detach()
    live = (first > 1e-12) & ((x.detach() * beta).abs() < 25)
    assert torch.allclose(
        second[live], (first * layer.beta.detach() * (1 - first))[live], rtol=1e-6, atol=1e-12 * beta
    )
    assert sum(p.requires_grad for p in layer.parameters()) == 1
    assert not any(p.requires_grad for p in training.CenteredSoftplus(2.0, learnable=False).parameters())


@pytest.mark.parametrize("gamma", [0.2, 10.0])
def test_the_constant_of_lipschitz_batch_norm(gamma: float) -> None:
    layer = training.LipschitzBatchNorm(4, gamma).double()
    for i in range(30):
        layer(randn(16, 4, 3, seed=i) * torch.tensor([0.3, 1.0, 2.0, 5.0])[:, None] + 1)
    layer.eval()
    J = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0], randn(4, 3)).reshape(12, 12)
    norm = float(torch.linalg.matrix_norm(J, 2))
    assert norm == pytest.approx(float(layer.lipschitz.detach() / (layer.running_var + 1e-5).sqrt().min()))
    assert norm == pytest.approx(min(gamma, float(1 / (layer.running_var.min() + 1e-5).sqrt())), rel=1e-6)
    assert norm <= gamma * (1 + 1e-6)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 6, 5)), (lambda: nn.Conv2d(4, 2, 3, stride=2, groups=2), (4, 8, 8)),
        (lambda: nn.Conv2d(2, 2, 2, stride=3, dilation=2, padding=1), (2, 7, 9)), (lambda: nn.Conv1d(3, 4, 3), (3, 9)),
        (lambda: nn.Linear(7, 5), (7,)),
    ],
)  # fmt: skip
def test_normalized_maps_have_norm_one(layer: Any, size: tuple[int, ...]) -> None:
    with own_stream(2, "test"):
        model = nn.Sequential(layer()).double()
    plain = {k: v.clone() for k, v in model[0].named_parameters()}
    training.spectrally_normalized(model, randn(1, *size))
    model.train()
    for _ in range(300):
        model(randn(1, *size))
    model.eval()
    zero = model(torch.zeros(1, *size).double()).detach()
    J = torch.autograd.functional.jacobian(lambda x: model(x[None])[0] - zero[0], randn(*size))
    dense = J.reshape(zero[0].numel(), -1)
    assert float(torch.linalg.matrix_norm(dense, 2)) == pytest.approx(1.0, rel=1e-3)
    ratio = (plain["weight"] / model[0].weight.detach()).flatten()
    assert torch.allclose(ratio, ratio[0], rtol=1e-9)


def test_conversion_and_penalty() -> None:
    with own_stream(3, "test"):
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
            nn.Flatten(), nn.Linear(144, 3),
        )  # fmt: skip
    training.to_low_curvature(model, torch.zeros(2, 1, 8, 8), beta=3.0, gamma=7.0)
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("CenteredSoftplus") == 2
    assert kinds.count("LipschitzBatchNorm") == 1
    assert "ReLU" not in kinds
    value = training.low_curvature_penalty(model, beta=0.1, gamma=1.0)
    assert float(value.detach()) == pytest.approx(0.6 + math.log(7))
    x, y = torch.rand(9, 1, 8, 8), LABELS[:9]
    before = float(F.cross_entropy(model(x), y).detach())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + training.low_curvature_penalty(model)).backward()
        optimizer.step()
    assert float(F.cross_entropy(model(x), y).detach()) < before
    assert float(training.low_curvature_penalty(model, 0.1, 1.0).detach()) < float(value.detach())
    model.eval()
    ds = landscape.measure(InputCurvature(), Problem(model, nn.CrossEntropyLoss(), [(x, y)]))
    assert bool(ds["converged"])
    for broken, words in (
        (nn.Linear(3, 3), "neither nn.ReLU"),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 3, padding="same")), "padding"),
    ):
        with pytest.raises(ValueError, match=words):
            training.to_low_curvature(broken, torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match="convert it first"):
        training.low_curvature_penalty(nn.Linear(2, 2))


# --- coresets -----------------------------------------------------------------------------------------


def measured(count: int = 60) -> Record:
    values = np.random.default_rng(0).permutation(count).astype(float)
    values[7] = np.nan
    return Record(
        {
            "curvature": Variable(("example",), values),
            "gradient_norm": Variable(("example",), -values),
            "label": Variable(("example",), np.arange(count) % 3),
            "done": Variable(("example",), np.arange(count) != 9),
        },
        {"metric": "input_curvature", "headline": "curvature"},
    )


def test_the_coreset_has_the_lowest_of_each_class() -> None:
    record = measured()
    chosen = training.select_coreset(record, per_class=4)
    assert (record["label"][chosen] == np.repeat([0, 1, 2], 4)).all()
    for label in range(3):
        own = chosen[4 * label : 4 * label + 4]
        values = record["curvature"][own]
        assert (np.diff(values) > 0).all()
        rest = np.setdiff1d(np.flatnonzero(record["label"] == label), [*own, 7, 9])
        assert record["curvature"][rest].min() > values.max()
    assert not np.isin([7, 9], chosen).any()
    other = training.select_coreset(record, np.zeros(60), 2, by="gradient_norm")
    assert (record["curvature"][other] == np.sort(record["curvature"][np.r_[:7, 8, 10:60]])[:-3:-1]).all()
    assert (training.select_coreset(record.to_xarray(), per_class=4) == chosen).all()
    for words, options in (
        ("per_class is 0", {"per_class": 0}), ("at most per_class=19", {"per_class": 20}),
        ("no 'Curv'", {"by": "Curv"}),
        ("each needs one", {"labels": [1, 2]}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            training.select_coreset(record, **options)  # type: ignore[arg-type]
    del record.variables["label"]
    with pytest.raises(ValueError, match="give labels="):
        training.select_coreset(record)


def test_the_command(tmp_path: Path) -> None:
    results.write(tmp_path / "input_curvature.h5", measured())

    def ran(*words: str) -> Any:
        return CliRunner().invoke(app.app, ["coreset", *words])

    done = ran(str(tmp_path), "--per-class", "5", "-o", str(tmp_path / "indices.npy"))
    assert done.exit_code == 0, done.output
    chosen = np.load(tmp_path / "indices.npy")
    assert (chosen == training.select_coreset(measured(), per_class=5)).all()
    printed = ran(str(tmp_path / "input_curvature.h5"), "--per-class", "5").stdout
    assert [int(line) for line in printed.split()] == chosen.tolist()
    for words, code, text in (
        (["--per-class", "50"], 2, "at most per_class="), (["--per-class", "5", "-o", "x.txt"], 2, ".npy"),
        (["--per-class", "5", "--by", "x"], 2, "no 'x'"),
    ):  # fmt: skip
        failed = ran(str(tmp_path), *words)
        assert failed.exit_code == code
        assert text in failed.stderr
        assert failed.stderr.count("\n") == 1
    assert ran(str(tmp_path / "none.h5"), "--per-class", "5").exit_code == 3
