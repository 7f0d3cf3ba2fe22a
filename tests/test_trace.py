"""The metric `trace` against dense and published values, and its error bars against the truth."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

import landscape
from landscape import testbeds
from landscape.metrics import Trace
from landscape.testbeds.golden import step

# DEFINITIONS: softmax regression on digits at its minimum, float64, dense.
GOLDEN_TRACE = 3.152857175749
GOLDEN_FROBENIUS_SQUARED = 0.502918809949


@functools.cache
def golden() -> landscape.Problem:
    model, data = testbeds.softmax_regression()
    return landscape.Problem(model, forward=step, data=data)


def test_the_golden_hessian_exactly() -> None:
    ds = landscape.measure(Trace(frobenius=True), golden())
    assert ds.attrs["method"] == "exact"
    assert float(ds["trace"]) == pytest.approx(GOLDEN_TRACE, abs=1e-12)
    assert float(ds["frobenius_norm"]) ** 2 == pytest.approx(GOLDEN_FROBENIUS_SQUARED, abs=1e-12)
    assert float(ds["trace_stderr"]) == float(ds["frobenius_norm_stderr"]) == 0.0
    assert bool(ds["converged"])


@pytest.mark.parametrize("method", ["hutchinson", "hutchpp", "xtrace"])
def test_the_golden_hessian_by_probes(method: str) -> None:
    options = {"frobenius": True} if method == "hutchinson" else {}
    ds = landscape.measure(Trace(method=method, rtol=0.01, **options), golden())
    # 4.5 stderr of a calibrated error: false alarm below 1e-4.
    assert abs(float(ds["trace"]) - GOLDEN_TRACE) < 4.5 * float(ds["trace_stderr"])
    assert float(ds["trace_stderr"]) <= 0.01 * float(ds["trace"])
    assert bool(ds["converged"])
    if options:
        error = float(ds["frobenius_norm"]) - GOLDEN_FROBENIUS_SQUARED**0.5
        assert abs(error) < 4.5 * float(ds["frobenius_norm_stderr"])


def regression(
    scale: float = 1.0, seed: int = 0, **options: object
) -> tuple[landscape.Problem, torch.Tensor]:
    """A two-layer tanh net, 300 parameters, float64, and its dense Hessian by autograd on the whole data."""
    draws = torch.Generator().manual_seed(seed)
    sizes = [(16, 14), (16,), (4, 16), (4,)]
    values = [torch.randn(s, generator=draws, dtype=torch.float64) * 0.4 for s in sizes]
    model = nn.Sequential(nn.Linear(14, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    with torch.no_grad():
        for p, v in zip(model.parameters(), values, strict=True):
            p.copy_(v)
    x = torch.randn(60, 14, generator=draws, dtype=torch.float64)
    y = torch.randn(60, 4, generator=draws, dtype=torch.float64)

    def loss_of(theta: torch.Tensor) -> torch.Tensor:
        W, b, U, c = (t.view(s) for t, s in zip(theta.split([224, 16, 64, 4]), sizes, strict=True))
        return scale * ((torch.tanh(x @ W.T + b) @ U.T + c - y) ** 2).mean()

    H = torch.autograd.functional.hessian(loss_of, torch.cat([v.reshape(-1) for v in values]))

    def loss(f: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return scale * ((f - t) ** 2).mean()

    cuts = options.pop("cuts", (40, 60))
    data = [(x[a:b], y[a:b]) for a, b in zip((0, *cuts[:-1]), cuts, strict=True)]
    return landscape.Problem(model, loss, data, **options), H


def block_traces(H: torch.Tensor) -> np.ndarray:
    return np.array([float(part.sum()) for part in H.diagonal().split([224, 16, 64, 4])])


def test_layers_add_up_and_equal_the_dense_blocks() -> None:
    problem, H = regression()
    ds = landscape.measure(Trace(), problem)
    assert list(ds["layer"].values) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    np.testing.assert_allclose(ds["layer_trace"], block_traces(H), rtol=1e-12)
    assert float(ds["trace"]) == pytest.approx(float(H.trace()), rel=1e-12)


def test_the_gauss_newton_trace_is_another_number() -> None:
    problem, H = regression()
    x = torch.cat([b[0] for b in problem.batches])
    W, b, U, _ = (p.detach() for p in problem._own.values())
    hidden = torch.tanh(x @ W.T + b)
    # tr G = mean over elements of 2 Σ over outputs ‖∂f/∂θ‖², by hand.
    inner = ((1 - hidden**2) ** 2 * U.square().sum(0)).sum(1) * (x.square().sum(1) + 1)
    outer = 4 * (hidden.square().sum(1) + 1)
    expected = 2 * (inner + outer).sum() / (60 * 4)
    ds = landscape.measure(Trace(curvature="ggn"), problem)
    assert float(ds["trace"]) == pytest.approx(float(expected), rel=1e-12)
    assert abs(float(expected) - float(H.trace())) > 0.01 * abs(float(expected))


@pytest.mark.parametrize("probes", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_the_stated_interval_covers_the_truth(probes: int) -> None:
    """Whole metric, 600 seeds: the total, each layer, and the Frobenius norm.

    Coverage of a 95 % interval over 600 seeds has sd 0.9 %; 92-98 % is the demand. A calibrated error
    leaves 92-98.5 % with probability below 1e-3 for each of the six numbers.
    """
    problem, H = regression()
    dense = _Dense(problem, H)
    truths = np.array([*block_traces(H), float(H.trace()), float(H.norm())])
    metric = Trace(method="hutchinson", max_probes=probes, rtol=0.0, frobenius=True)
    covered = np.zeros(6)
    for seed in range(600):
        record = landscape.evaluate(metric, dense, seed)  # type: ignore[arg-type]
        values = np.array([*record["layer_trace"], record["trace"], record["frobenius_norm"]])
        errors = [*record["layer_trace_stderr"], record["trace_stderr"], record["frobenius_norm_stderr"]]
        covered += np.abs(values - truths) <= 1.96 * np.array(errors)
    share = covered / 600
    assert (share >= 0.92).all(), share
    assert (share <= 0.985).all(), share


class _Dense:
    """A problem whose products are those of its dense Hessian, which makes 600 seeds cheap."""

    def __init__(self, problem: landscape.Problem, H: torch.Tensor):
        self.hvp = lambda V: H @ V
        for name in (
            "space",
            "size",
            "names",
            "dtype",
            "device",
            "cost",
            "session",
            "products",
            "kernels_in_use",
            "products_in_use",
            "apart",
            "evaluator",
            "shard",
        ):
            setattr(self, name, getattr(problem, name))


class _DenseParts(_Dense):
    """The same, in micro-batches."""

    def __init__(self, problem: landscape.Problem, examples: int):
        eye = torch.eye(problem.size, dtype=torch.float64)
        self.parts = [(_Dense(p, p.hvp(eye)), weight) for p, weight in problem.split(examples)]
        super().__init__(problem, eye)

    def split(self, examples: int) -> list[tuple[_Dense, float]]:
        return self.parts


def test_independent_probes_cover_the_truth_with_less_variance() -> None:
    """600 seeds, 16 probes that are drawn anew for each of four micro-batches; bounds as above."""
    problem, H = regression()
    parts = _DenseParts(problem, 18)
    assert [weight for _, weight in parts.parts] == [18, 18, 4, 18, 2]
    truths = np.array([*block_traces(H), float(H.trace())])
    metric = Trace(method="hutchinson", max_probes=16, rtol=0.0)
    covered, errors = np.zeros(5), []
    for seed in range(600):
        record = landscape.evaluate(metric, parts, seed)  # type: ignore[arg-type]
        assert record.attrs["way"] == "probes"
        values = np.array([*record["layer_trace"], record["trace"]])
        stderr = np.array([*record["layer_trace_stderr"], record["trace_stderr"]])
        covered += np.abs(values - truths) <= 1.96 * stderr
        errors.append(values[-1] - truths[-1])
    assert (covered / 600 >= 0.92).all(), covered / 600
    assert (covered / 600 <= 0.985).all(), covered / 600
    # Unbiased: the mean of 600 errors within 4 of its own standard errors (probability 6e-5).
    assert abs(np.mean(errors)) < 4 * np.std(errors) / 600**0.5
    # Variance of one independent probe: Σ (w_b/W)² 2(‖H_b‖² − Σ diag²), signs, of sixteen averaged.
    total = sum(weight for _, weight in parts.parts)
    eye = torch.eye(problem.size, dtype=torch.float64)
    dense = [(part.hvp(eye), weight / total) for part, weight in parts.parts]
    variance = sum(w**2 * 2 * float(D.square().sum() - D.diagonal().square().sum()) for D, w in dense) / 16
    assert np.var(errors) == pytest.approx(variance, rel=0.25)  # sd of a variance from 600 is 6 %


CUTS = [{"cuts": (60,)}, {"cuts": (7, 8, 33, 60)}, {"microbatch": 1}, {"microbatch": 9}]


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_the_number_does_not_depend_on_the_cut_of_the_data(options: dict[str, object]) -> None:
    shared = Trace(method="hutchinson", max_probes=16, rtol=0.0, frobenius=True)
    reference = landscape.evaluate(shared, regression()[0])
    found = landscape.evaluate(shared, regression(**options)[0])
    np.testing.assert_allclose(found["samples"], reference["samples"], rtol=1e-11)
    problem, H = regression(**options)
    for metric in (Trace(), Trace(curvature="ggn")):
        whole = landscape.evaluate(metric, regression(cuts=(60,))[0])
        np.testing.assert_allclose(
            landscape.evaluate(metric, problem)["layer_trace"], whole["layer_trace"], rtol=1e-11
        )
    independent = landscape.evaluate(Trace(method="hutchinson", max_probes=64, rtol=0.0), problem)
    # 4.5 calibrated standard errors: false alarm below 1e-4.
    assert abs(float(independent["trace"]) - float(H.trace())) < 4.5 * float(independent["trace_stderr"])


def test_float32_and_float64_agree_within_rounding() -> None:
    metric = Trace(method="hutchinson", max_probes=32, rtol=0.0, frobenius=True)
    double = landscape.evaluate(metric, regression()[0])
    single = landscape.evaluate(metric, regression(dtype=torch.float32)[0])
    assert float(single["trace"]) == pytest.approx(float(double["trace"]), rel=1e-5)
    assert float(single["frobenius_norm"]) == pytest.approx(float(double["frobenius_norm"]), rel=1e-5)


@pytest.mark.parametrize("method", ["exact", "hutchinson", "hutchpp", "xtrace"])
def test_a_scaled_loss_scales_the_result(method: str) -> None:
    metric = Trace(method=method, max_probes=64, rtol=0.0)
    one = landscape.evaluate(metric, regression()[0])
    small = landscape.evaluate(metric, regression(scale=1e-8)[0])
    for name in ("trace", "trace_stderr"):
        assert float(small[name]) == pytest.approx(1e-8 * float(one[name]), rel=1e-9)


def test_the_tolerance_is_met_or_said_to_be_missed() -> None:
    problem, _ = regression()
    met = landscape.measure(Trace(method="hutchinson", rtol=0.05), problem)
    assert float(met["trace_stderr"]) <= 0.05 * abs(float(met["trace"]))
    assert bool(met["converged"])
    missed = landscape.measure(Trace(method="hutchinson", rtol=1e-4, max_probes=32), problem)
    assert int(missed["matvecs"]) == 32
    assert not bool(missed["converged"])
    np.testing.assert_array_equal(missed["round"], [16, 32])


def test_the_running_estimate_ends_at_the_estimate() -> None:
    ds = landscape.measure(Trace(method="hutchinson", rtol=0.0, max_probes=100), regression()[0])
    np.testing.assert_array_equal(ds["round"], [16, 32, 48, 64, 96, 100])
    totals = ds["samples"].values.sum(axis=1)
    np.testing.assert_allclose(
        ds["running_trace"], [totals[:c].mean() for c in (16, 32, 48, 64, 96, 100)], rtol=1e-13
    )
    assert float(ds["running_trace_stderr"][-1]) == float(ds["trace_stderr"])


def test_a_negative_trace_is_measured_as_well() -> None:
    """A rule that stops on two running means gives up after two probes where the trace is negative."""
    draws = torch.Generator().manual_seed(1)
    A = torch.randn(40, 40, generator=draws, dtype=torch.float64)
    A = A + A.T - 30 * torch.eye(40, dtype=torch.float64)
    problem = landscape.Problem(
        lambda p, x: p["w"], lambda f, t: 0.5 * f @ A @ f, [(torch.zeros(1, 1), torch.zeros(1, 1))],
        parameters={"w": torch.ones(40, dtype=torch.float64)}, weight=lambda b: 1.0,
    )  # fmt: skip
    ds = landscape.measure(Trace(method="hutchinson", rtol=0.01, max_probes=4096), problem)
    assert float(ds["trace"]) == pytest.approx(float(A.trace()), abs=4.5 * float(ds["trace_stderr"]))
    assert int(ds["matvecs"]) >= 16
    assert bool(ds["converged"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, "rtol is -1.0; allowed is a number >= 0"),
        ({"rtol": float("nan")}, "rtol is nan"),
        ({"max_probes": 1}, "max_probes is 1; allowed is a number >= 2"),
        ({"method": "xtrace", "frobenius": True}, "gives no Frobenius norm"),
        ({"method": "exat"}, "method is 'exat'; allowed is 'auto', 'exact'"),
        ({"curvature": "hesian"}, "curvature is 'hesian'; allowed is 'hessian' or 'ggn'"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trace(**options)


def test_the_embedded_default_is_exact_and_its_probes_agree() -> None:
    # Each parameter tensor's Hessian block of a ReLU net equals that of the Gauss-Newton matrix, whose
    # trace is a sum of squared Jacobian rows; made here from the layers by hand.
    model, loss, data, _ = testbeds.load_default()
    truth = relu_net_trace(model, data)
    problem = landscape.Problem(model, loss, data)
    ds = landscape.measure(Trace(), problem)
    assert ds.attrs["way"] == "layers"
    assert float(ds["trace"]) == pytest.approx(truth, rel=1e-5)
    assert float(ds["trace_stderr"]) == 0.0
    assert bool(ds["converged"])
    for options in (
        {"method": "hutchinson"},
        {"method": "hutchinson", "curvature": "ggn"},
        {"method": "xtrace"},
    ):
        probed = landscape.measure(Trace(rtol=0.1, **options), problem)
        assert abs(float(probed["trace"]) - truth) < 4.5 * float(probed["trace_stderr"])
    assert float(landscape.measure(Trace(curvature="ggn"), problem)["trace"]) == pytest.approx(
        truth, rel=1e-5
    )


@pytest.mark.parametrize(
    ("activation", "way"),
    [(nn.ReLU, "layers"), (nn.LeakyReLU, "layers"), (nn.Softplus, "unit_vectors"), (nn.GELU, "unit_vectors")],
)
def test_only_piecewise_linear_networks_take_the_short_way(activation: type[nn.Module], way: str) -> None:
    model = testbeds.mlp([9, 8, 7, 4], activation).double()
    draws = torch.Generator().manual_seed(4)
    x = torch.randn(30, 9, generator=draws, dtype=torch.float64)
    y = torch.randint(0, 4, (30,), generator=draws)
    problem = landscape.Problem(model, nn.CrossEntropyLoss(), [(x[:13], y[:13]), (x[13:], y[13:])])
    theta = problem.parameters_vector()

    def loss_of(vector: torch.Tensor) -> torch.Tensor:
        pieces = dict(zip(problem.names, problem.space.split(vector), strict=True))
        f = torch.func.functional_call(model, pieces, (x,))
        return nn.functional.cross_entropy(f, y)

    H = torch.autograd.functional.hessian(loss_of, theta)
    ds = landscape.measure(Trace(), problem)
    assert ds.attrs["way"] == way
    if way != "layers":
        assert "tr H is not tr G" in ds.attrs["reason"]
    assert float(ds["trace"]) == pytest.approx(float(H.trace()), rel=1e-10)
    blocks = [float(part.sum()) for part in H.diagonal().split(problem.space.sizes)]
    np.testing.assert_allclose(ds["layer_trace"], blocks, rtol=1e-9, atol=1e-12)


def relu_net_trace(model: nn.Sequential, data: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Tr(GGN) of a ReLU net with softmax cross-entropy: Σ over classes of p-weighted Jacobian row norms."""
    x = torch.cat([b[0] for b in data]).double()
    (W1, b1, W2, b2, W3, b3) = (p.detach().double() for p in model.parameters())
    a1 = (x @ W1.T + b1).relu()
    a2 = (a1 @ W2.T + b2).relu()
    p = (a2 @ W3.T + b3).softmax(1)
    total = 0.0
    for c in range(10):
        # Row c of the square root of diag(p) - ppᵀ: √p_c (e_c - p).
        g3 = p[:, c : c + 1].sqrt() * (torch.eye(10, dtype=torch.float64)[c] - p)
        g2 = (g3 @ W3) * (a2 > 0)
        g1 = (g2 @ W2) * (a1 > 0)
        for g, a in ((g3, a2), (g2, a1), (g1, x)):
            total += float((g.square().sum(1) * (a.square().sum(1) + 1)).sum())
    return total / len(x)
