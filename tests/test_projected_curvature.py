"""The metric `projected_curvature` on saddles of known spectrum, on networks, and on black boxes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES
from cases_base import Case
from torch import Tensor, nn

import landscape
from landscape import Problem, Refused, testbeds
from landscape.metrics import ProjectedCurvature, Trace

# DEFINITIONS §8, check 1: eigenvalues +1 and -1, how often; expected κ₋ and κ₊; probability of a saddle.
SADDLES = [
    (500, 500, -39.63, 39.63, 0.7071),
    (520, 480, 0.37, 79.63, 0.4740),
    (550, 450, 60.37, 139.63, 0.0580),
    (800, 200, 560.37, 639.63, 6e-40),
]
# Tests of random numbers below allow this many standard errors: each fails by chance once in 150 000 seeds.
SIGMAS = 4.5


def found(metric: ProjectedCurvature, problem: Problem, **options: Any) -> Any:
    return landscape.measure(metric, problem, **options)


# --- the four saddles -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "count"), [("losses", 200), ("products", 1500)])
@pytest.mark.parametrize(("positive", "negative", "minus", "plus", "probability"), SADDLES)
def test_random_planes_through_saddles(
    positive: int, negative: int, minus: float, plus: float, probability: float, method: Any, count: int
) -> None:
    problem = Problem(*testbeds.saddle(positive, negative))
    ds = found(ProjectedCurvature(planes=count, method=method, hessian_plane=True), problem)
    spread = math.sqrt(1000 * (3 - math.pi / 2) / count)  # Var κ± = (3 - π/2) F²
    np.testing.assert_allclose(ds["kappa"].mean("plane"), [minus, plus], rtol=0, atol=SIGMAS * spread + 0.5)
    share = math.sqrt(probability * (1 - probability) / count)
    assert float(ds["saddle_fraction"]) == pytest.approx(probability, abs=SIGMAS * share + 0.005)
    assert ds["saddle_fraction_low"] <= ds["saddle_fraction"] <= ds["saddle_fraction_high"]
    trace, error = positive - negative, math.sqrt(1000 / count)  # Var (A + C)/2 = F²
    assert float(ds["trace"]) == pytest.approx(trace, abs=SIGMAS * error)
    assert float(ds["trace_stderr"]) == pytest.approx(error, rel=0.2)
    norm_error = float(ds["frobenius_norm_stderr"])
    assert float(ds["frobenius_norm"]) == pytest.approx(math.sqrt(1000), abs=SIGMAS * norm_error)
    assert norm_error == pytest.approx(math.sqrt(1000 / count) / 2, rel=0.3)
    np.testing.assert_allclose(ds["hessian_kappa"], [-1, 1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ds["hessian_eigenvalues"], [-1, 1], rtol=0, atol=1e-12)
    assert not bool(ds["dominated"])
    assert bool(ds["converged"])
    assert ds.attrs["warning"] == ""


def test_losses_and_products_see_the_same_planes() -> None:
    problem = Problem(*testbeds.saddle(30, 10))
    by_losses, by_products = (found(ProjectedCurvature(method=m), problem) for m in ("losses", "products"))
    np.testing.assert_allclose(by_losses["kappa"], by_products["kappa"], rtol=1e-12, atol=1e-12)
    assert int(by_losses["matvecs"]) == int(by_losses["gradients"]) == int(by_products["values"]) == 0
    assert int(by_products["matvecs"]) == 2 * 64


def test_the_shares_of_saddles_that_are_known_exactly() -> None:
    """Two dimensions: the signature itself. diag(1, 1, -1): the normal u of a plane has |u₃| < 1/√2."""
    for signs, probability in [((1, 1), 1.0), ((2, 0), 0.0), ((0, 2), 0.0), ((2, 1), math.sqrt(0.5))]:
        ds = found(
            ProjectedCurvature(planes=800, method="products"), Problem(*testbeds.saddle(*signs)), seed=1
        )
        error = math.sqrt(probability * (1 - probability) / 800)
        assert float(ds["saddle_fraction"]) == pytest.approx(probability, abs=SIGMAS * error)
        assert bool(ds["dominated"])
        assert "few eigenvalues dominate" in ds.attrs["warning"]


# --- networks ---------------------------------------------------------------------------------------------


@functools.cache
def network(activation: Callable[[], nn.Module] = nn.Softplus, dtype: torch.dtype = torch.float64) -> Problem:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), activation(), nn.Linear(6, 3)).to(dtype)
    draws = torch.Generator().manual_seed(4)
    x = torch.randn(20, 5, generator=draws, dtype=torch.float64).to(dtype)
    y = torch.randint(3, (20,), generator=draws)
    return Problem(model, nn.CrossEntropyLoss(), [(x[i : i + 8], y[i : i + 8]) for i in range(0, 20, 8)])


def dense(problem: Problem) -> Tensor:
    wide = problem.in_float64() or problem
    return wide.hvp(torch.eye(problem.size, dtype=torch.float64))


@pytest.mark.parametrize(("seeds", "least"), [(60, 51), pytest.param(400, 363, marks=pytest.mark.slow)])
def test_trace_from_losses_is_unbiased_and_calibrated(seeds: int, least: int) -> None:
    """With a true 95 %, fewer than 51 of 60, or 363 of 400, intervals cover less than once in 1000."""
    torch.manual_seed(5)
    x = torch.randn(9, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 3)).double()
    problem, runs = Problem(model, nn.CrossEntropyLoss(), [(x, torch.arange(9) % 3)]), []
    true = float(dense(problem).trace())
    with problem.session():
        for seed in range(seeds):
            record = landscape.evaluate(ProjectedCurvature(planes=8), problem, seed=seed)
            runs.append((float(record["trace"]), float(record["trace_stderr"])))
    values, errors = np.array(runs).T
    assert values.mean() == pytest.approx(true, abs=SIGMAS * values.std() / math.sqrt(seeds))
    assert np.sum(np.abs(values - true) <= 1.96 * errors) >= least


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_curvatures_agree_with_products_within_their_stated_error(case: Case) -> None:
    problem = Problem(**case.arguments())
    by_losses, by_products = (
        found(ProjectedCurvature(planes=2, method=m), problem) for m in ("losses", "products")
    )
    off = np.abs(by_losses["kappa"] - by_products["kappa"]).max("which")
    allowed = 2 * by_losses["kappa_error"] + 2 * by_products["kappa_error"]
    assert (off <= allowed).all(), (off.values, allowed.values)
    assert bool(by_losses["settled"])
    if case.name != "only_unused":  # whose Hessian is 0
        assert float(by_losses["difference_error"]) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_over_planes_is_the_dense_trace(dtype: torch.dtype) -> None:
    problem = network(nn.GELU, dtype)
    eigenvalues = torch.linalg.eigvalsh(dense(problem))
    ds = found(ProjectedCurvature(planes=100, hessian_plane=True), problem)
    assert abs(float(ds["trace"]) - float(eigenvalues.sum())) <= SIGMAS * float(ds["trace_stderr"])
    norm = float(eigenvalues.norm())
    assert abs(float(ds["frobenius_norm"]) - norm) <= SIGMAS * float(ds["frobenius_norm_stderr"])
    np.testing.assert_allclose(ds["hessian_kappa"], eigenvalues[[0, -1]], rtol=0, atol=2e-3 * norm)
    assert ds["hessian_directions"].shape == (2, problem.size)


def test_kinks_are_passed_in_float64_and_told_in_float32() -> None:
    """The shipped ReLU network: losses that meet kinks show up to twice the curvature of the smooth pieces."""
    problem = Problem(*testbeds.load_default()[:3])
    exact = float(found(Trace(method="exact"), problem)["trace"])
    by_losses, by_products = (
        found(ProjectedCurvature(planes=16, method=m), problem) for m in ("losses", "products")
    )
    assert float(by_losses["trace"]) == pytest.approx(float(by_products["trace"]), rel=2e-3)
    assert abs(float(by_losses["trace"]) - exact) <= SIGMAS * float(by_losses["trace_stderr"])
    assert bool(by_losses["converged"])
    rough = found(ProjectedCurvature(planes=4, precision="working"), problem)
    assert not bool(rough["converged"])
    assert "do not settle" in rough.attrs["warning"]
    assert rough.attrs["exit_code"] == 4


# --- black boxes --------------------------------------------------------------------------------------------


def test_a_black_box_that_only_gives_values() -> None:
    problem, calls = network(), []
    model, loss = problem.evaluator.model, nn.CrossEntropyLoss()

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(len(batch[0]))
        with torch.no_grad():  # no derivative can be had
            return torch.tensor(float(loss(model(batch[0]), batch[1])), dtype=torch.float64)

    box = Problem(model, forward=step, data=list(problem.batches))
    seen, known = (found(ProjectedCurvature(planes=8), p) for p in (box, problem))
    np.testing.assert_allclose(seen["kappa"], known["kappa"], rtol=1e-2)
    assert bool(seen["converged"])
    passes = int(seen["values"])
    assert len(calls) >= 3 * passes > 3 * 12 * 8  # three batches


def test_a_model_that_runs_in_float32_only() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ij,bj->bi", self.weight, torch.tanh(x.float()).to(torch.float32))

    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    problem = Problem(Stubborn(), nn.CrossEntropyLoss(), [(x, torch.arange(32) % 3)])
    ds = found(ProjectedCurvature(), problem)
    assert ds.attrs["losses_in"] == "float32"
    assert bool(ds["converged"])
    by_products = found(ProjectedCurvature(method="products"), problem)
    off = np.abs(ds["kappa"] - by_products["kappa"]).max("which")
    assert float((off <= 2 * ds["kappa_error"]).mean()) > 0.9
    assert (off <= 0.02 * np.abs(by_products["kappa"]).max()).all()


# --- degenerate losses ------------------------------------------------------------------------------------


def function(loss: Callable[[Tensor], Tensor], theta: Tensor) -> Problem:
    one = torch.zeros(1, 1, dtype=torch.float64)
    return Problem(
        lambda params, x: loss(params["w"]) + 0 * x.sum(), lambda output, target: output + 0 * target.sum(),
        [(one, one)], parameters={"w": theta}, weight=lambda batch: 1.0,
    )  # fmt: skip


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("theta", [torch.zeros(40), torch.linspace(-1, 1, 40)], ids=["zero", "not zero"])
@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_without_curvature_no_plane_is_a_saddle(offset: float, theta: Tensor, slope: float) -> None:
    problem = function(lambda w: slope * w.sum() + offset + 0 * w.sum(), theta.double())
    ds = found(ProjectedCurvature(planes=32), problem)
    assert (np.abs(ds["kappa"]).max("which") <= 2 * ds["kappa_error"]).mean() > 0.9
    assert abs(float(ds["trace"])) <= SIGMAS * float(ds["trace_stderr"]) + 1e-12
    assert float(ds["saddle_fraction"]) <= 0.1
    assert float(ds["saddle_fraction_high"]) > 0.9
    assert bool(ds["converged"]) == (float(ds["kappa_error"].max()) == 0)


@pytest.mark.parametrize("room", [1e-2, 1e-14])
def test_losses_that_end_nearby(room: float) -> None:
    """−Σ log(1 − w) at w = 1 − room: the curvature is 1/room², and there is no loss beyond w = 1."""
    theta = torch.full((6,), 1 - room, dtype=torch.float64)
    problem = function(lambda w: -torch.log(1 - w).sum(), theta)
    by_losses, by_products = (
        found(ProjectedCurvature(planes=8, method=m), problem) for m in ("losses", "products")
    )
    if room > 1e-10:
        np.testing.assert_allclose(by_losses["kappa"], by_products["kappa"], rtol=2e-2)
        assert bool(by_losses["converged"])
    else:  # what no step can reach is not a number, and not made up
        assert not np.isfinite(by_losses["kappa"]).any()
        assert np.isnan(float(by_losses["trace"]))
        assert not bool(by_losses["converged"])
        assert "do not settle" in by_losses.attrs["warning"]


@pytest.mark.parametrize("theta", [0.0, 1e-3, 1.0, 1e4])
def test_quadratics_at_any_distance_from_zero(theta: float) -> None:
    signs = torch.tensor([1.0, -1.0] * 20, dtype=torch.float64)
    problem = function(lambda w: (w * w) @ signs / 2, torch.full((40,), theta, dtype=torch.float64))
    by_losses, by_products = (
        found(ProjectedCurvature(planes=16, method=m), problem) for m in ("losses", "products")
    )
    off = np.abs(by_losses["kappa"] - by_products["kappa"]).max("which")
    assert (off <= 2 * by_losses["kappa_error"] + 1e-9).all()
    assert float(off.max()) < 0.1


def test_results_scale_with_the_loss() -> None:
    def at(scale: float) -> Any:
        problem = network()
        model, batches = problem.evaluator.model, list(problem.batches)
        loss = nn.CrossEntropyLoss()
        scaled = Problem(model, lambda o, t: scale * loss(o, t), batches)
        return found(ProjectedCurvature(planes=8, hessian_plane=True), scaled)

    plain, small = at(1.0), at(2.0**-30)
    assert float(small["step"]) == pytest.approx(float(plain["step"]), rel=0.2)
    for name in ("trace", "trace_stderr", "frobenius_norm", "kappa", "hessian_kappa"):
        size = float(np.abs(plain[name]).max())
        np.testing.assert_allclose(2.0**30 * small[name], plain[name], rtol=0, atol=5e-3 * size)
    for name in ("saddle_fraction", "participation", "saddle_limit"):
        assert float(small[name]) == pytest.approx(float(plain[name]), rel=0.02)


# --- runs ---------------------------------------------------------------------------------------------------


def test_the_cut_of_the_data_does_not_matter() -> None:
    problem = network()
    x, y = (torch.cat([batch[i] for batch in problem.batches]) for i in (0, 1))
    whole = Problem(problem.evaluator.model, nn.CrossEntropyLoss(), [(x, y)])
    singles = [(x[i : i + 1], y[i : i + 1]) for i in range(20)]
    every = [
        found(ProjectedCurvature(planes=4), p)
        for p in (problem, whole, Problem(problem.evaluator.model, nn.CrossEntropyLoss(), singles))
    ]
    for other in every[1:]:
        off = np.abs(other["kappa"] - every[0]["kappa"]).max("which")
        assert (off <= 2 * (other["kappa_error"] + every[0]["kappa_error"])).all()


def same(a: Any, b: Any, names: set[str]) -> bool:
    return all(np.array_equal(a[n].values, b[n].values, equal_nan=a[n].dtype.kind == "f") for n in names)


@pytest.mark.parametrize("method", ["losses", "products"])
def test_interrupted_and_larger_runs_keep_their_planes(method: Any, tmp_path: Path) -> None:
    metric = ProjectedCurvature(planes=24, method=method, hessian_plane=True)
    whole = found(metric, network())
    names = set(whole.variables) - {"wall_seconds"}

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    for _ in range(20):
        try:
            cut = found(metric, network(), out=tmp_path / "cut", progress=stop)
        except KeyboardInterrupt:
            continue
        break
    assert same(whole, cut, names)
    few = found(ProjectedCurvature(planes=10, method=method, hessian_plane=True), network(), out=tmp_path)
    more = found(metric, network(), out=tmp_path)
    assert few["kappa"].sizes["plane"] == 10
    names -= {"values", "matvecs"}  # a block that was half done is measured whole
    assert same(whole, more, names)
    assert same(whole, landscape.open(tmp_path / "projected_curvature.h5"), names)


def test_blocks_of_any_size_hold_the_same_planes() -> None:
    problem = network()
    every = [
        landscape.evaluate(ProjectedCurvature(planes=9, method=m), problem, memory=size)["kappa"]
        for m in ("losses", "products")
        for size in (1 << 30, 1)
    ]
    assert np.array_equal(every[0], every[1])
    assert np.array_equal(every[2], every[3])


def test_the_model_is_what_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    problem = Problem(model, nn.CrossEntropyLoss(), [(x, torch.arange(12) % 2)])
    found(ProjectedCurvature(planes=4, hessian_plane=True), problem)
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"planes": 1}, "planes is 1; allowed is a number >= 2"),
        ({"step": 0.0}, "step is 0.0; allowed is a number > 0"),
        ({"step": math.inf}, "step is inf"),
        ({"step": 1e-3, "method": "products"}, "products take no step"),
        ({"method": "guess"}, "method is 'guess'; allowed is 'losses' or 'products'"),
        ({"precision": "half"}, "allowed is 'float64' or 'working'"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ProjectedCurvature(**fields)


def test_a_single_parameter_has_no_plane() -> None:
    with pytest.raises(Refused, match="a plane needs two parameters, but 1 is measured"):
        found(ProjectedCurvature(), function(lambda w: w @ w, torch.ones(1, dtype=torch.float64)))


def test_saddles_of_the_testbed() -> None:
    problem = Problem(*testbeds.saddle(3, 2))
    assert float(problem.value()) == 0.0
    assert torch.equal(dense(problem), torch.diag(torch.tensor([1.0, 1, 1, -1, -1], dtype=torch.float64)))
    assert float(problem.at(torch.tensor([2.0, 0, 0, 1, 0])).value()) == 1.5
    for numbers in ((-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="allowed are numbers >= 0, not both 0"):
            testbeds.saddle(*numbers)


def test_a_step_of_ones_own_is_taken() -> None:
    problem = network()
    ds = found(ProjectedCurvature(planes=8, step=1e-4), problem)
    assert float(ds["step"]) == 1e-4
    assert bool(ds["converged"])
    coarse = found(ProjectedCurvature(planes=8, step=0.7), problem)
    assert not bool(coarse["converged"])
    assert "%" in coarse.attrs["warning"] or "settle" in coarse.attrs["warning"]
