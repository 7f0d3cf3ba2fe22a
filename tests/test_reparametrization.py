"""Reparametrization against closed forms and dense Hessians; verdicts; refusals; what is shown of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import landscape
from landscape.errors import Refused, UnknownMetric
from landscape.metrics.reparametrization import Reparametrization, measure_of
from landscape.transforms.verdicts import judge


def net(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(*layers).double()
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws, dtype=torch.float64) * 0.6)
    return model


def classified(model: nn.Module, shape: tuple[int, ...], classes: int, count: int = 24) -> landscape.Problem:
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(count, *shape, generator=draws, dtype=torch.float64)
    y = torch.randint(0, classes, (count,), generator=draws)
    data = [(x[: count // 3], y[: count // 3]), (x[count // 3 :], y[count // 3 :])]
    return landscape.Problem(model, nn.CrossEntropyLoss(), data)


def mlp() -> landscape.Problem:
    return classified(net(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), (5,), 3)


def dense(problem: landscape.Problem) -> Tensor:
    return problem.hvp(torch.eye(problem.size, dtype=torch.float64))


def test_scalar_net_follows_the_closed_form():
    # L = ½ (w₂ w₁ x - y)² at w₁ w₂ x = y: λ₁(α) = x² (α² w₁² + w₂²/α²), the only eigenvalue that is not 0.
    model = net(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    w1, w2, x = 0.7, 1.9, 1.3
    with torch.no_grad():
        model[0].weight.fill_(w1)
        model[2].weight.fill_(w2)
    data = [
        (torch.full((1, 1), x, dtype=torch.float64), torch.full((1, 1), w1 * w2 * x, dtype=torch.float64))
    ]
    problem = landscape.Problem(model, lambda f, y: 0.5 * (f - y).square().mean(), data)
    alpha = (0.25, 0.5, 1.0, 2.0, 4.0)
    ds = landscape.measure(Reparametrization(measures=("trace", "spectral_norm"), alpha=alpha), problem)
    expected = x**2 * (np.square(alpha) * w1**2 + w2**2 / np.square(alpha))
    assert ds["value"].dims == ("measure", "alpha")
    for measure in ("trace", "spectral_norm"):
        np.testing.assert_allclose(ds["value"].sel(measure=measure), expected, rtol=1e-9)
        np.testing.assert_allclose(ds["predicted"].sel(measure=measure), expected, rtol=1e-9)
    assert float(ds["function_change"].max()) <= 1e-15
    assert ds["verdict"].values.tolist() == ["broken", "broken"]


@pytest.mark.parametrize("layers", ["auto", "all", "2"])
def test_values_are_those_of_the_congruent_dense_hessian(layers):
    problem, alpha = mlp(), (0.1, 1.0, 5.0)
    metric = Reparametrization(measures=("trace", "spectral_norm:rtol=1e-8"), alpha=alpha, layers=layers)
    record = landscape.evaluate(metric, problem)
    H, p = dense(problem), torch.from_numpy(np.array(record["parameter_exponents"]))
    for column, factor in enumerate(alpha):
        d = factor**-p
        moved = d[:, None] * H * d
        assert record["value"][0, column] == pytest.approx(float(moved.trace()), rel=1e-10)
        largest = float(torch.linalg.eigvalsh(moved).abs().max())
        assert record["value"][1, column] == pytest.approx(largest, rel=1e-7)
        assert record["predicted"][0, column] == pytest.approx(float(moved.trace()), rel=1e-10)
        assert record["predicted"][1, column] == pytest.approx(largest, rel=1e-7)
    assert record["function_change"].max() <= 1e-12
    assert record["hessian_identity_error"].max() <= 1e-12


def test_one_layers_block_is_covariant_with_exponent_minus_two():
    measures = (
        "spectral_norm:layer=0.weight",
        "spectral_norm:layer=2.weight",
        "spectral_norm:layer=4.weight",
    )
    record = landscape.evaluate(Reparametrization(measures=measures, alpha=(0.2, 1.0, 3.0)), mlp())
    assert record["verdict"].tolist() == ["covariant", "covariant", "invariant"]
    assert record["exponent"].tolist() == [-2.0, 2.0, 0.0]
    assert record["factor"][0] == pytest.approx((3.0 / 0.2) ** 2, rel=1e-3)


def test_buffers_of_a_batch_norm_move_with_the_parameters(tmp_path: Path):
    model = net(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    draws = torch.Generator().manual_seed(3)
    model[1].running_mean.copy_(torch.randn(4, generator=draws))
    model[1].running_var.copy_(torch.rand(4, generator=draws) + 0.5)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    problem = classified(model, (2, 6, 6), 3)
    metric = Reparametrization(measures=("trace",), alpha=(0.1, 10.0), layers="all")
    record = landscape.evaluate(metric, problem)
    assert record["function_change"].max() <= 1e-12
    assert record["hessian_identity_error"].max() <= 1e-12
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # the second α is moved with the exponents that the file holds
        landscape.measure(metric, problem, out=tmp_path, progress=stop)
    stored = landscape.measure(metric, problem, out=tmp_path)
    np.testing.assert_array_equal(stored["value"], record["value"])


def test_a_measure_without_a_value_is_undefined_and_says_why():
    problem = mlp().replace(loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    record = landscape.evaluate(Reparametrization(measures=("evidence", "trace"), alpha=(0.5, 2.0)), problem)
    assert record["verdict"].tolist() == ["undefined", "broken"]
    assert "nats" in record["note"][0]
    assert record["note"][1] == ""
    assert np.isnan(record["value"][0]).all()


def test_stochastic_measures_share_their_draws_over_alpha():
    problem = mlp()
    measure = "trace:method='hutchinson':max_probes=16:rtol=0.5"
    record = landscape.evaluate(Reparametrization(measures=(measure,), alpha=(1.0, 1.0 + 1e-9)), problem)
    assert record["value_stderr"][0, 0] > 0
    assert record["value"][0, 1] == pytest.approx(record["value"][0, 0], rel=1e-7)
    assert record["verdict"].tolist() == ["invariant"]


def test_a_network_without_a_symmetry_is_refused_with_its_layers():
    problem = classified(net(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)), (5,), 3)
    with pytest.raises(Refused, match=r"0\.weight"):
        landscape.evaluate(Reparametrization(measures=("trace",)), problem)


def test_resumed_after_each_alpha_it_is_bit_identical(tmp_path: Path):
    metric = Reparametrization(measures=("trace", "spectral_norm"), alpha=(0.5, 1.0, 2.0))
    whole = landscape.measure(metric, mlp(), out=tmp_path / "whole")

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            landscape.measure(metric, mlp(), out=tmp_path / "cut", progress=stop)
    resumed = landscape.measure(metric, mlp(), out=tmp_path / "cut")
    for name in set(whole.variables) - {"wall_seconds", "gradients", "values", "matvecs"}:
        assert np.array_equal(whole[name], resumed[name], equal_nan=whole[name].dtype.kind == "f"), name
    moved = json.loads(str(resumed.attrs["moved"]))
    assert moved == {"0.weight": [1.0], "0.bias": [1.0], "2.weight": [-1.0]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"alpha": (1.0,)}, "two positive numbers"),
        ({"alpha": (-1.0, 1.0)}, "two positive numbers"),
        ({"tolerance": 0.0}, "between 0 and 1"),
        ({"measures": ()}, "one or more"),
        ({"measures": ("trace", "trace")}, "none of them twice"),
        ({"measures": ("trace:colour=red",)}, "no field of trace"),
        ({"measures": ("trace:method='quick'",)}, "allowed is"),
        ({"measures": ("reparametrization",)}, "other metrics"),
    ],
)
def test_arguments_outside_their_range(arguments, words):
    with pytest.raises(ValueError, match=words):
        Reparametrization(**arguments)


def test_an_unknown_measure_or_layer_names_the_known_ones():
    with pytest.raises(UnknownMetric, match="did you mean trace"):
        Reparametrization(measures=("trase",))
    with pytest.raises(ValueError, match=r"no symmetry group 'head'; allowed is 'auto'"):
        landscape.evaluate(Reparametrization(measures=("trace",), layers="head"), mlp())


def test_settings_of_a_measure():
    assert measure_of("spectral_norm:method=power:rtol=1e-2").configuration()["method"] == "power"
    assert measure_of("eigenvalues:k=3").configuration()["k"] == 3


@pytest.mark.parametrize(
    ("values", "errors", "verdict", "exponent"),
    [
        ([2.0, 2.0, 2.0], 0.0, "invariant", 0.0),
        ([2.0, 2.03, 2.0], 0.0, "invariant", 0.0),  # within the tolerance of 2 %
        ([2.0, 2.2, 2.0], 0.05, "invariant", 0.0),  # within four standard errors of both
        ([2.0, 2.2, 2.0], 0.01, "broken", np.nan),
        ([0.0, 0.0, 0.0], 0.0, "invariant", 0.0),
        ([9.0, 1.0, 1 / 9], 0.0, "covariant", -2.0),
        ([-3.0, -1.0, -1 / 3], 0.0, "covariant", -1.0),
        ([-3.0, 1.0, 3.0], 0.0, "broken", np.nan),
        ([9.0, 1.0, 9.0], 0.0, "broken", np.nan),
        ([1.0, np.nan, 1.0], 0.0, "undefined", np.nan),
        ([1.0, np.inf, 1.0], 0.0, "undefined", np.nan),
    ],
)
def test_verdicts(values, errors, verdict, exponent):
    found = judge([1 / 3, 1.0, 3.0], values, np.full(3, errors), 0.02)
    assert found.verdict == verdict
    assert found.exponent == pytest.approx(exponent, nan_ok=True)


@pytest.mark.parametrize(
    ("values", "errors", "verdict", "exponent"),
    [
        ([-1000.0, -1000.01, -1000.0], 0.0, "invariant", 0.0),
        ([-1000.0, -1001.0, -1000.0], 0.0, "broken", np.nan),  # a factor e, however large the logarithm
        ([-1000.0, -1001.0, -1000.0], 0.3, "invariant", 0.0),
        ([-1000.0, -1001.0, -1000.0], np.nan, "undefined", np.nan),
        ([np.log(1 / 3) * 5, 0.0, np.log(3) * 5], 0.0, "covariant", 5.0),
    ],
)
def test_verdicts_of_logarithms(values, errors, verdict, exponent):
    found = judge([1 / 3, 1.0, 3.0], values, np.full(3, errors), 0.02, logarithmic=True)
    assert found.verdict == verdict
    assert found.exponent == pytest.approx(exponent, nan_ok=True)
