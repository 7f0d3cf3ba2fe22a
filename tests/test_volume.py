"""The metric `volume` on sets whose volume and mass are known, and on networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2, ncx2
from test_eigenvalues import rotated
from torch import Tensor, nn

import landscape
from landscape import Problem, Refused
from landscape.estimators.radial import log_ball_volume
from landscape.metrics import Volume
from landscape.metrics.base import Journal
from landscape.record import Record

LEVELS = (0.01, 0.1, 1.0)
EXACT = {"preconditioner": "eigenvectors", "top": 1000, "damping": 1e-14}


def quadratic(A: Tensor, theta: Tensor | None = None, cut: int = 40) -> Problem:
    """Linear least squares with Hessian A and minimum θ, which is where it stands; also G = A."""
    size = len(A)
    theta = torch.zeros(size, dtype=torch.float64) if theta is None else theta
    values, U = torch.linalg.eigh(A)
    X = ((U * values.sqrt()) @ U.T * math.sqrt(size / 2)).repeat(2, 1)
    model = nn.Linear(size, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(theta[None])
    # what is left over is the same with both signs: the loss at the minimum is 0.01
    y = X @ theta[:, None] + torch.tensor([0.1, -0.1], dtype=torch.float64).repeat_interleave(size)[:, None]
    cuts = range(0, 2 * size, cut)
    return Problem(model, nn.MSELoss(), [(X[i : i + cut], y[i : i + cut]) for i in cuts])


def free(loss: Callable[[Tensor], Tensor], theta: Tensor, **options: Any) -> Problem:
    """Any function of a vector as a problem."""
    data = [(torch.zeros(2, 1, dtype=theta.dtype), torch.zeros(2, 1, dtype=theta.dtype))]
    return Problem(
        lambda params, x: loss(params["a"]) + 0 * x,
        lambda output, target: (output - target).mean(),
        data,
        parameters={"a": theta},
        weight=lambda batch: float(len(batch[0])),
        **options,
    )


def ellipsoid(values: np.ndarray, level: float) -> float:
    """ln of the volume of {θᵀAθ / 2 < ε}."""
    size = len(values)
    return log_ball_volume(size) + size / 2 * math.log(2 * level) - 0.5 * float(np.log(values).sum())


def network(seed: int = 0, dtype: torch.dtype = torch.float64, microbatch: int | None = None) -> Problem:
    """A classifier that no issue names: a gated recurrent unit with a head, on two batches of short sequences."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gates, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.gates(x)[0][:, -1])

        model = Net().to(dtype)
        x, y = torch.randn(11, 5, 3).to(dtype), torch.randint(0, 3, (11,))
    return Problem(model, nn.CrossEntropyLoss(), [(x[:7], y[:7]), (x[7:], y[7:])], microbatch=microbatch)


# --- ellipsoids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_an_ellipsoid_has_no_variance_under_the_right_preconditioner(curvature: str) -> None:
    values = np.geomspace(1, 1e3, 20)
    theta = torch.linspace(-1, 1, 20, dtype=torch.float64)
    ds = landscape.measure(
        Volume(epsilon=LEVELS, **EXACT, curvature=curvature), quadratic(rotated(list(values)), theta)
    )
    for level, found in zip(LEVELS, ds["log_volume"].values, strict=True):
        assert found == pytest.approx(ellipsoid(values, level), abs=1e-7)
    assert ds["log_volume"].values[0] == pytest.approx(-77.3161, abs=1e-4)
    per_ray = 20 * np.log(ds["radius"].values) + ds["log_weight"].values[:, None]
    assert per_ray.std(axis=0).max() < 1e-7
    assert ds["effective_samples"].values == pytest.approx(64)
    assert (ds["log_volume_stderr"].values <= 1.01e-3).all()
    assert set(ds["stderr_reason"].values) == {""}


def test_the_gauss_newton_diagonal_is_the_right_one_for_axes() -> None:
    values = np.geomspace(0.1, 30, 15)
    ds = landscape.measure(
        Volume(epsilon=(0.3,), rays=64, preconditioner="ggn_diagonal", damping=1e-12),
        quadratic(torch.diag(torch.tensor(values)), cut=15),  # each batch sees each axis once
    )
    assert float(ds["log_volume"][0]) == pytest.approx(ellipsoid(values, 0.3), abs=1e-7)
    assert float(ds["effective_samples"][0]) == pytest.approx(64)


def test_any_preconditioner_is_unbiased() -> None:
    """The mean of the estimated volumes over 30 seeds is the volume, within 4 standard errors of that mean."""
    values = np.array([0.5, 1.0, 2.0, 4.0])
    problem, truth = quadratic(rotated(list(values))), ellipsoid(values, 0.1)
    ways: list[dict[str, Any]] = [
        {}, {"preconditioner": "ggn_diagonal"}, {"preconditioner": "eigenvectors", "top": 2}
    ]  # fmt: skip
    for way in ways:
        shares = [
            math.exp(
                float(landscape.evaluate(Volume(rays=16, **way), problem, seed=s)["log_volume"][0]) - truth
            )
            for s in range(30)
        ]
        assert abs(np.mean(shares) - 1) <= 4 * np.std(shares) / math.sqrt(30), way


def test_without_preconditioner_most_estimates_are_too_low_and_say_that_they_have_no_error() -> None:
    values = np.geomspace(1, 1e3, 20)
    problem = quadratic(rotated(list(values)))
    found = [landscape.evaluate(Volume(), problem, seed=seed) for seed in range(9)]
    assert np.median([float(r["log_volume"][0]) for r in found]) < ellipsoid(values, 0.1) - 1
    for record in found:
        assert np.isnan(record["log_volume_stderr"][0])
        assert "tail exponent" in record["stderr_reason"][0]
        assert record["effective_samples"][0] < 20


def test_a_stated_error_covers_the_truth() -> None:
    """Of 40 measurements at most 7 miss: more has probability 7e-4 where 95 % cover."""
    values = np.geomspace(1, 1.5, 6)
    problem, truth = quadratic(rotated(list(values))), ellipsoid(values, 0.1)
    inside = stated = 0
    for seed in range(40):
        record = landscape.evaluate(Volume(tolerance=1e-2), problem, seed=seed)
        if np.isfinite(record["log_volume_stderr"][0]):
            stated += 1
            error = abs(float(record["log_volume"][0]) - truth)
            inside += error <= 1.96 * float(record["log_volume_stderr"][0])
    assert stated >= 30
    assert inside >= stated - 7


# --- the prior ----------------------------------------------------------------------------------------


def test_the_mass_of_a_ball_is_a_noncentral_chi_squared_probability() -> None:
    """D = 8, σ = 0.7, r = 1.1, θ off centre; 4 standard errors (missed once in 16 000 seeds)."""
    for distance in (0.0, 0.6):
        theta = torch.full((8,), distance / math.sqrt(8), dtype=torch.float64)
        ds = landscape.measure(
            Volume(epsilon=(1.1**2 / 2,), rays=400, prior=0.7),
            quadratic(torch.eye(8, dtype=torch.float64), theta, cut=7),
        )
        truth = math.log(ncx2.cdf((1.1 / 0.7) ** 2, 8, (distance / 0.7) ** 2 + 1e-300))
        assert abs(float(ds["log_mass"][0]) - truth) <= 4 * float(ds["log_mass_stderr"][0])
        assert float(ds["log_mass_stderr"][0]) < 0.15
        assert float(ds["log_volume"][0]) == pytest.approx(log_ball_volume(8) + 8 * math.log(1.1), abs=1e-6)
    assert float(ds["mass_effective_samples"][0]) < 400


@pytest.mark.parametrize("way", [{}, {"preconditioner": "ggn_diagonal"}, {"preconditioner": "eigenvectors", "top": 2}],
                         ids=str)  # fmt: skip
def test_volume_and_mass_of_a_convex_set_by_hit_or_miss(way: dict[str, Any]) -> None:
    """Logistic regression: points drawn from the prior and from a box, 4 standard errors of the two shares."""
    draws = torch.Generator().manual_seed(5)
    x = torch.randn(60, 3, generator=draws, dtype=torch.float64) * torch.tensor([1.0, 0.7, 1.5])
    y = (torch.rand(60, 1, generator=draws) < torch.sigmoid(x.sum(1, keepdim=True))).double()
    model = nn.Linear(3, 1, bias=False).double()
    theta = torch.tensor([0.9, 0.8, 1.2], dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(theta[None])
    ds = landscape.measure(
        Volume(epsilon=(0.05,), rays=500, prior=1.1, **way), Problem(model, nn.BCEWithLogitsLoss(), [(x, y)])
    )

    def inside(points: Tensor) -> np.ndarray:
        logits = x @ points.T
        losses = F.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none").mean(0)
        here = F.binary_cross_entropy_with_logits(x @ theta[:, None], y)
        return (losses < here + 0.05).numpy()

    normal = torch.randn(100_000, 3, generator=draws, dtype=torch.float64)
    side = 2 * float(ds["radius"].max()) * 1.5
    box = theta + side * (torch.rand(100_000, 3, generator=draws, dtype=torch.float64) - 0.5)
    for name, points, scale in (("mass", 1.1 * normal, 0.0), ("volume", box, 3 * math.log(side))):
        share = inside(points).mean()
        effective = float(ds["mass_effective_samples" if name == "mass" else "effective_samples"][0])
        error = math.hypot(math.sqrt((1 - share) / share / 1e5), math.sqrt(1 / effective - 1 / 500))
        assert error < 0.2
        assert np.isnan(ds[f"log_{name}_stderr"][0]) or float(ds[f"log_{name}_stderr"][0]) < 0.5
        assert abs(float(ds[f"log_{name}"][0]) - math.log(share) - scale) <= 4 * error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twenty_thousand_dimensions(dtype: torch.dtype) -> None:
    size = 20_000
    theta = torch.zeros(size, dtype=dtype)
    problem = Problem(
        lambda params, x: params["a"][None] + 0 * x,
        nn.MSELoss(),
        [(torch.zeros(1, size, dtype=dtype), torch.zeros(1, size, dtype=dtype))],
        parameters={"a": theta},
    )
    ds = landscape.measure(Volume(epsilon=(0.157, 0.16), rays=64, prior=0.4), problem)
    for i, level in enumerate((0.157, 0.16)):
        radius = math.sqrt(level * size)
        truth = log_ball_volume(size) + size * math.log(radius)
        allowed = 4 * float(ds["log_volume_stderr"][i])
        assert allowed < (0.01 if dtype == torch.float64 else 0.1)
        assert abs(float(ds["log_volume"][i]) - truth) <= allowed
        mass = chi2.logcdf((radius / 0.4) ** 2, size)
        assert float(ds["log_mass"][i]) == pytest.approx(mass, abs=allowed)


# --- rectifier networks and boxes ---------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.05, 3.0, 30.0])
def test_the_image_of_an_ellipsoid_shifts_by_the_jacobian(alpha: float) -> None:
    first, second = 7, 4
    scale = torch.cat([torch.full((first,), alpha), torch.full((second,), 1 / alpha)]).double()
    A = rotated(list(np.geomspace(0.3, 20, first + second)))
    theta = torch.linspace(-1, 1, first + second, dtype=torch.float64)
    congruent = A / scale[:, None] / scale
    found = [
        float(landscape.measure(Volume(rays=64, **EXACT), p)["log_volume"][0])
        for p in (quadratic(A, theta), quadratic(congruent, theta * scale))
    ]
    assert found[1] - found[0] == pytest.approx((first - second) * math.log(alpha), abs=1e-5)


def test_boxes_and_their_images() -> None:
    """A box has the product of its sides as volume, within 4 standard errors, and so has its image."""
    half = torch.tensor([1.0, 0.8, 1.2, 1.0, 0.9], dtype=torch.float64)
    for alpha in (1.0, 1.15):
        scale = torch.tensor([alpha, alpha, alpha, alpha, 1 / alpha], dtype=torch.float64)

        def within(a: Tensor, sides: Tensor = half * scale) -> Tensor:
            return (a / sides).abs().max()

        ds = landscape.measure(
            Volume(epsilon=(0.5,), rays=512), free(within, torch.zeros(5, dtype=torch.float64)), check=False
        )
        truth = float((half * scale).log().sum())
        assert abs(float(ds["log_volume"][0]) - truth) <= 4 * 0.1
        assert float(ds["log_volume"][0]) == pytest.approx(truth, abs=0.3)


def hidden_layer(alpha: float) -> Problem:
    """A one-hidden-layer rectifier network at T_α θ: 4·3 weights times α, 3·2 over α."""
    draws = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False)).double()
    x = torch.randn(40, 4, generator=draws, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws, dtype=torch.float64))
        y = model(x)
        model[0].weight *= alpha
        model[2].weight /= alpha
    return Problem(model, nn.MSELoss(), [(x, y)])


def test_a_rectifier_networks_star_shifts_by_the_jacobian_and_its_truncation_is_bounded() -> None:
    """The set is the same; its star around T_α θ is the image of that around θ: ray by ray, α^(n₁ - n₂)."""
    base = landscape.measure(Volume(epsilon=(0.05,), rays=64), hidden_layer(1.0))
    for alpha in (2.0, 8.0):
        moved = hidden_layer(alpha)
        scale = torch.cat([torch.full((12,), alpha), torch.full((6,), 1 / alpha)]).double()
        theta = moved.parameters_vector()
        # the image of a ray of the first measurement, up to the stated radius and a little beyond
        for ray in range(3):
            u = torch.randn(18, generator=landscape.seeds.generator(0, "volume", ray), dtype=torch.float64)
            step = scale * u / u.norm() * float(base["radius"][ray, 0])
            base_loss = float(moved.value())
            assert float(moved.at(theta + 0.9999 * step).value()) - base_loss < 0.05
            assert float(moved.at(theta + 1.0001 * step).value()) - base_loss > 0.05
    truncated = []
    for alpha in (1.0, 100.0):
        ds = landscape.measure(Volume(epsilon=(0.05,), truncation=1e-2), hidden_layer(alpha))
        limit = log_ball_volume(18) + 18 * math.log(float(ds["truncation_radius"]))
        assert float(ds["log_volume"][0]) <= limit + 1e-9
        truncated.append(float(ds["unbounded_fraction"][0]))
    assert max(truncated) > 0


# --- rays that do not end as they should --------------------------------------------------------------


def test_rays_that_never_leave_are_truncated_and_counted() -> None:
    def one_sided(a: Tensor) -> Tensor:
        return a[0].clamp(min=0)

    ds = landscape.measure(
        Volume(epsilon=(0.1, 0.2), rays=100, truncation=7.0),
        free(one_sided, torch.zeros(3, dtype=torch.float64)),
    )
    # leaves where r u₀ = ε; with u₀ < ε / 7 not within the truncation radius, half of all rays and a little
    assert 0.35 < float(ds["unbounded_fraction"][0]) < 0.67
    assert float(ds["truncation_radius"]) == 7.0
    assert (ds["radius"].values[ds["status"].values == 2] == 7.0).all()
    assert float(ds["log_volume"].max()) <= log_ball_volume(3) + 3 * math.log(7.0)


def test_a_flat_loss_gives_the_truncated_ball() -> None:
    ds = landscape.measure(
        Volume(rays=64), free(lambda a: 0 * a.sum(), torch.ones(9, dtype=torch.float64)), check=False
    )
    assert float(ds["unbounded_fraction"][0]) == 1.0
    assert float(ds["truncation_radius"]) == pytest.approx(400.0)
    assert float(ds["log_volume"][0]) == pytest.approx(log_ball_volume(9) + 9 * math.log(400.0))


def test_where_the_loss_is_no_number_a_ray_ends_and_is_counted() -> None:
    def walled(a: Tensor) -> Tensor:
        return (a * a).sum() + 0 * (0.2 - a[0]).sqrt()

    ds = landscape.measure(Volume(rays=100), free(walled, torch.zeros(2, dtype=torch.float64)))
    radius, status = ds["radius"].values[:, 0], ds["status"].values[:, 0]
    assert 0.1 < float(ds["not_finite_fraction"][0]) == (status == 1).mean() < 0.6
    assert ds["not_finite"].values[status == 1].min() >= 1
    assert np.allclose(radius[status == 0], math.sqrt(0.1), rtol=1e-3)
    assert (radius[status == 1] < math.sqrt(0.1)).all()
    assert np.isfinite(ds["log_volume"].values).all()


def test_a_point_that_is_no_minimum_is_measured_and_told() -> None:
    ds = landscape.measure(
        Volume(rays=64), free(lambda a: (a * a).sum() - a[0], torch.zeros(2, dtype=torch.float64))
    )
    assert float(ds["lowest_excess"]) < -0.1
    at_minimum = landscape.measure(Volume(rays=64), quadratic(torch.eye(3, dtype=torch.float64)))
    assert float(at_minimum["lowest_excess"]) >= 0


# --- divergence ---------------------------------------------------------------------------------------


def test_the_divergence_of_a_classifier_near_its_parameters_is_the_fishers_ellipsoid() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=draws, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 4, generator=draws, dtype=torch.float64))
    y = (torch.rand(50, 1, generator=draws) < 0.5).double()
    problem = Problem(model, nn.BCEWithLogitsLoss(), [(x[:30], y[:30]), (x[30:], y[30:])])
    p = torch.sigmoid(model(x)).detach()
    fisher = (x * p * (1 - p)).T @ x / 50
    truth = ellipsoid(torch.linalg.eigvalsh(fisher).numpy(), 1e-8)
    ds = landscape.measure(Volume(epsilon=(1e-8,), cost="kl", **EXACT, tolerance=1e-6), problem)
    assert float(ds["log_volume"][0]) == pytest.approx(truth, abs=1e-3)


def test_the_divergence_against_its_formula() -> None:
    from landscape.divergence import Divergence

    problem = network()
    theta = problem.parameters_vector()
    other = theta + 0.3 * torch.linspace(-1, 1, len(theta), dtype=torch.float64)
    x = torch.cat([batch[0] for batch in problem.batches])
    with torch.no_grad(), problem.filled(problem.leaves()):
        p = F.softmax(problem.evaluator.model(x), 1)
    with torch.no_grad(), problem.filled(problem.at(other).leaves()):
        q = F.softmax(problem.evaluator.model(x), 1)
    expected = float((p * (p / q).log()).sum(1).mean())
    for memory in (1 << 20, 100, 0):
        measured = Divergence(problem, memory)
        assert measured.at(other) == pytest.approx(expected, rel=1e-12)
        assert measured.at(theta) == 0.0
    ignoring = Problem(
        problem.evaluator.model,
        nn.CrossEntropyLoss(ignore_index=7),
        [(x, torch.tensor([0, 1, 2, *[7] * 8]))],
    )
    rows = (p * (p / q).log()).sum(1)[:3]
    assert Divergence(ignoring, 0).at(other) == pytest.approx(float(rows.mean()), rel=1e-12)


def test_a_divergence_needs_a_classifier() -> None:
    with pytest.raises(Refused, match=r"needs a classifier: .*cross_entropy.* mse_loss\. cost='loss'"):
        landscape.measure(Volume(cost="kl"), quadratic(torch.eye(3, dtype=torch.float64)))
    model = nn.Linear(2, 2)
    black_box = Problem(
        model, forward=lambda m, b: m(b[0]).square().mean(), data=[(torch.ones(3, 2), torch.ones(3))]
    )
    for options in ({"cost": "kl"}, {"preconditioner": "ggn_diagonal"}, {"preconditioner": "eigenvectors"}):
        with pytest.raises(Refused, match="output="):
            landscape.measure(Volume(**options), black_box)
    ds = landscape.measure(Volume(rays=3, preconditioner="eigenvectors", curvature="hessian"), black_box)
    assert np.isfinite(ds["log_volume"][0])


# --- any model, any cut, any interruption -------------------------------------------------------------

WAYS: list[dict[str, Any]] = [
    {},
    {"cost": "kl", "prior": 0.5},
    {"preconditioner": "ggn_diagonal"},
    {"preconditioner": "eigenvectors", "top": 4},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_recurrent_network_and_its_cut_into_batches(way: dict[str, Any]) -> None:
    metric = Volume(epsilon=(0.05, 0.2), rays=8, **way)
    whole = landscape.measure(metric, network())
    assert np.isfinite(whole["log_volume"].values).all()
    assert (np.diff(whole["radius"].values, axis=1) >= 0).all()
    if way.get("preconditioner") == "ggn_diagonal":
        return  # its sampled diagonal depends on the cut, within its scatter
    cut = landscape.measure(metric, network(microbatch=2))
    assert np.allclose(whole["radius"], cut["radius"], rtol=1e-4)
    assert np.allclose(whole["log_volume"], cut["log_volume"], atol=0.01)


def test_levels_share_the_rays_and_do_not_depend_on_one_another() -> None:
    together = landscape.measure(Volume(epsilon=(0.2, 0.05), rays=6, tolerance=1e-6), network())
    for i, level in enumerate((0.2, 0.05)):
        alone = landscape.measure(Volume(epsilon=(level,), rays=6, tolerance=1e-6), network())
        assert np.allclose(together["radius"][:, i], alone["radius"][:, 0], rtol=1e-6)
        assert int(alone["values"]) < int(together["values"])


class Stops(Journal):
    """Interrupts after each block."""

    def commit(self, record: Record, *, final: bool = False) -> None:
        if "done" in record and record["done"].any() and not final:
            raise KeyboardInterrupt


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_interrupted_rays_end_as_uninterrupted_ones(way: dict[str, Any]) -> None:
    metric = Volume(epsilon=(0.05, 0.2), rays=10, **way)
    whole = landscape.evaluate(metric, network())
    record = Record()
    stopped = 0
    while not record.attrs.get("complete"):
        try:
            landscape.evaluate(metric, network(), journal=Stops(), record=record)
        except KeyboardInterrupt:
            stopped += 1
    assert stopped == 3
    for name, variable in whole.variables.items():
        if name != "wall_seconds":
            numeric = variable.data.dtype.kind == "f"
            assert np.array_equal(variable.data, record[name], equal_nan=numeric), name


def test_more_rays_keep_those_that_are_done(tmp_path: Path) -> None:
    few = landscape.measure(Volume(rays=5), network(), out=tmp_path)
    more = landscape.measure(Volume(rays=12), network(), out=tmp_path)
    assert np.array_equal(few["radius"].values, more["radius"].values[:5])
    assert np.array_equal(more["radius"], landscape.measure(Volume(rays=12), network())["radius"])
    with pytest.raises(Refused, match="epsilon"):
        landscape.measure(Volume(rays=12, epsilon=(0.2,)), network(), out=tmp_path)


def test_the_volume_does_not_depend_on_the_losss_offset_and_scales() -> None:
    A = rotated([1.0, 2.0, 3.0])
    plain = landscape.measure(
        Volume(epsilon=(0.1,), rays=8), free(lambda a: a @ A @ a, torch.zeros(3, dtype=torch.float64))
    )
    scaled = landscape.measure(
        Volume(epsilon=(1e-9,), rays=8),
        free(lambda a: 1e-8 * (a @ A @ a), torch.zeros(3, dtype=torch.float64)),
    )
    negative = landscape.measure(
        Volume(epsilon=(0.1,), rays=8), free(lambda a: a @ A @ a - 5, torch.zeros(3, dtype=torch.float64))
    )
    for other in (scaled, negative):
        assert np.allclose(plain["radius"], other["radius"], rtol=1e-3)


# --- bad input and pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": ()}, {"epsilon": (0.0,)}, {"epsilon": (-0.1,)}, {"epsilon": (0.1, 0.1)}, {"epsilon": 0.1},
        {"epsilon": (math.nan,)}, {"rays": 0}, {"prior": 0.0}, {"truncation": 0.0}, {"truncation": math.inf},
        {"tolerance": 0.0}, {"damping": -1.0}, {"top": 0}, {"scan": 1.0}, {"scan": 10.0}, {"cost": "KL"},
        {"preconditioner": "adam"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="allowed") as error:
        Volume(**wrong)
    assert next(iter(wrong)) in str(error.value)


def test_a_loss_that_is_no_number_is_refused() -> None:
    broken = free(lambda a: a.sum() * math.nan, torch.zeros(2, dtype=torch.float64))
    with pytest.raises(Refused, match="the loss at θ is nan"):
        landscape.measure(Volume(), broken, check=False)


def test_a_flat_problem_has_no_preconditioner() -> None:
    flat = Problem(
        nn.Linear(2, 1).double(), nn.MSELoss(), [(torch.zeros(4, 2).double(), torch.zeros(4, 1).double())],
        parameters="weight",
    )  # fmt: skip
    for way in ("ggn_diagonal", "eigenvectors"):
        with pytest.raises(Refused, match="preconditioner='none'"):
            landscape.measure(Volume(preconditioner=way), flat)


def test_the_command_measures_shows_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner
    from landscape_cli import app

    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    words = ["measure", "--metric", "volume", "--rays", "3", "--examples", "60", "--out", "x"]
    first = run(app.app, [*words, "--epsilon", "1e-2:1:3", "--prior", "0.3", "--volume.scan", "2"])
    assert first.exit_code == 0, first.output
    for told in ("log_volume(epsilon=0.01)", "log_mass(epsilon=1)", "unbounded_fraction(epsilon=0.1)"):
        assert told in first.stdout
    shown = run(app.app, ["show", "x"]).stdout
    assert "no error" in shown
    assert "3 samples do not show how heavy the tail is" in shown
    assert "3 of 3 rays, complete" in shown
    assert run(app.app, ["plot", "x/volume.h5", "-o", "x.png"]).exit_code == 0
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert run(app.app, [*words, "--epsilonn", "1"]).exit_code == 2
    wrong = run(app.app, [*words, "--epsilon", "0.1,-1"])
    assert wrong.exit_code == 2
    assert "allowed are different numbers > 0" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
