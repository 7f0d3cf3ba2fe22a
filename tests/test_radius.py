"""Radii along a ray, integrals over it, and the logarithm of a mean with its error: against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import chi2, ncx2

from landscape.estimators.log_mean import HEAVIEST_TAIL, log_mean
from landscape.estimators.radial import log_ball_volume, log_gaussian_mass
from landscape.estimators.radius import CROSSED, NEVER_INSIDE, NOT_FINITE, UNBOUNDED, first_crossings


def square(r: float) -> float:
    return r * r


# --- radii --------------------------------------------------------------------------------------------

# Just below and above powers of two, where a search that doubles once more is off by a factor of two.
RADII = [
    *np.geomspace(1e-3, 1e3, 25),
    *(2.0**k * (1 + sign * 2.0**-j) for k in range(-3, 5) for j in (9, 14, 30) for sign in (-1, 1)),
    *(2.0**k for k in range(-3, 5)),
]


@pytest.mark.parametrize("start", [1e-4, 0.02, 1.0, 64.0, 1e4])
@pytest.mark.parametrize("rtol", [1e-2, 1e-6, 1e-12])
def test_radii_of_a_square_on_a_grid_and_beside_powers_of_two(rtol: float, start: float) -> None:
    for truth in RADII:
        found = first_crossings(square, [truth**2], start=start, limit=1e5, rtol=rtol)
        assert abs(math.log(found.radii[0] / truth)) <= rtol + 1e-15
        assert found.status[0] == CROSSED


FUNCTIONS = {
    "cubic": (lambda r: r**3 + r, lambda e: np.roots([1, 0, 1, -e])),
    "exponential": (lambda r: math.expm1(min(r, 700.0)), math.log1p),
    "flat, then steep": (lambda r: r**40, lambda e: e ** (1 / 40)),
    "first down, then up": (lambda r: r * r - r, lambda e: (1 + math.sqrt(1 + 4 * e)) / 2),
    "a jump": (lambda r: 0.0 if r < 3.7 else 50.0, lambda e: 3.7),
    "an infinite wall": (lambda r: 0.01 * r if r < 0.9 else math.inf, lambda e: 0.9),
    "a kink": (lambda r: 1e-3 * r + max(0.0, 1e4 * (r - 2)), lambda e: 2 + (e - 2e-3) / (1e4 + 1e-3)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_radii_of_other_functions(name: str) -> None:
    function, inverse = FUNCTIONS[name]
    levels = [0.02, 0.5, 3.0]
    found = first_crossings(function, levels, start=0.1, limit=1e4, rtol=1e-10)
    for level, radius in zip(levels, found.radii, strict=True):
        truth = inverse(level)
        truth = max(x.real for x in truth if abs(x.imag) < 1e-9) if isinstance(truth, np.ndarray) else truth
        assert radius == pytest.approx(truth, rel=3e-10)
    if name != "an infinite wall":
        assert found.evaluations < 150


def test_powers_take_few_evaluations() -> None:
    for rtol in (1e-4, 1e-8, 1e-12):
        found = first_crossings(square, [0.01, 0.1, 1.0], start=0.05, limit=1e3, rtol=rtol)
        assert found.evaluations <= 22


def test_the_first_of_several_crossings_within_the_scan() -> None:
    def wavy(r: float) -> float:
        return 0.5 + math.sin(r)

    # leaves {< 1.2} at asin(0.7), comes back, and leaves again
    found = first_crossings(wavy, [1.2], start=0.1, limit=1e3, rtol=1e-10)
    assert found.radii[0] == pytest.approx(math.asin(0.7), rel=1e-9)


def test_a_point_on_the_level_is_not_in_the_set() -> None:
    found = first_crossings(lambda r: 0.0 if r < 1 else 0.1, [0.1], start=0.5, limit=10.0, rtol=1e-12)
    assert found.radii[0] == pytest.approx(1.0, rel=1e-11)


def test_unbounded_rays_end_at_the_limit() -> None:
    found = first_crossings(lambda r: 1 - math.exp(-r), [0.5, 2.0, 3.0], start=0.1, limit=77.0, rtol=1e-9)
    assert found.radii[0] == pytest.approx(math.log(2), rel=1e-8)
    assert list(found.radii[1:]) == [77.0, 77.0]
    assert list(found.status) == [CROSSED, UNBOUNDED, UNBOUNDED]


def test_where_the_function_is_no_number_the_ray_has_left_the_set() -> None:
    found = first_crossings(
        lambda r: math.nan if r > 2.5 else r * r, [1.0, 100.0], start=0.1, limit=50.0, rtol=1e-9
    )
    assert found.radii == pytest.approx([1.0, 2.5], rel=1e-8)
    assert list(found.status) == [CROSSED, NOT_FINITE]
    assert found.not_finite >= 1
    assert found.lowest == pytest.approx(min(0.1**2, found.lowest))


def test_a_pocket_without_numbers_that_a_smaller_level_met_ends_larger_levels_too() -> None:
    def pocket(r: float) -> float:
        return math.nan if 0.3 < r < 0.34 else 1e-3 * r

    found = first_crossings(pocket, [1.0, 2.0], start=0.3 / 1.4, limit=10.0, rtol=1e-9, step=1.5)
    assert list(found.status) == [NOT_FINITE, NOT_FINITE]
    assert found.radii == pytest.approx([0.3, 0.3], rel=1e-8)


def test_a_ray_that_is_never_inside_has_radius_0() -> None:
    found = first_crossings(lambda r: math.nan, [0.1, 1.0], start=1.0, limit=2.0, rtol=1e-6)
    assert list(found.radii) == [0.0, 0.0]
    assert list(found.status) == [NEVER_INSIDE, NEVER_INSIDE]
    assert found.lowest == math.inf


def test_levels_come_back_in_their_order_and_share_evaluations() -> None:
    up = first_crossings(square, [0.1, 1.0, 10.0], start=0.01, limit=1e3, rtol=1e-9)
    down = first_crossings(square, [10.0, 1.0, 0.1], start=0.01, limit=1e3, rtol=1e-9)
    assert list(down.radii) == list(up.radii[::-1])
    alone = [first_crossings(square, [level], start=0.01, limit=1e3, rtol=1e-9) for level in (0.1, 1.0, 10.0)]
    assert up.evaluations < sum(one.evaluations for one in alone)


@pytest.mark.parametrize(
    "wrong",
    [
        {"levels": []}, {"levels": [0.0]}, {"levels": [math.inf]}, {"start": 0.0}, {"start": 3.0, "limit": 2.0},
        {"limit": math.inf}, {"rtol": -1.0}, {"rtol": math.nan}, {"step": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_outside_their_range(wrong: dict[str, object]) -> None:
    arguments = {"levels": [0.1], "start": 1.0, "limit": 2.0, "rtol": 1e-3, **wrong}
    with pytest.raises(ValueError, match="allowed"):
        first_crossings(square, **arguments)


# --- integrals over a ray -----------------------------------------------------------------------------


def test_balls() -> None:
    assert [math.exp(log_ball_volume(d)) for d in (1, 2, 3, 4)] == pytest.approx(
        [2, math.pi, 4 * math.pi / 3, math.pi**2 / 2]
    )
    stirling = 5e7 * math.log(2 * math.pi * math.e / 1e8) - 0.5 * math.log(math.pi * 1e8)
    assert log_ball_volume(10**8) == pytest.approx(stirling, rel=1e-12)


@pytest.mark.parametrize("dimension", [1, 2, 3, 8, 100, 10_000])
def test_a_ball_around_the_priors_centre_has_a_chi_squared_mass(dimension: int) -> None:
    for share in (0.9, 0.99, 1.0, 1.01, 1.5):
        radius = 0.7 * math.sqrt(dimension) * share
        found = log_gaussian_mass(np.array([radius]), np.zeros(1), 0.0, 0.7, dimension)[0]
        assert found == pytest.approx(chi2.logcdf((radius / 0.7) ** 2, dimension), rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("dimension", [10**4, 10**6, 10**8])
def test_masses_far_below_any_float(dimension: int) -> None:
    """ln P(D/2, x) by the first terms of its series, x^a e^-x / Γ(a+1) Σ x^k / ((a+1)...(a+k))."""
    from scipy.special import gammaln

    for share in (0.01, 0.3, 0.8):
        radius = math.sqrt(dimension) * share
        a, x = dimension / 2, radius**2 / 2
        terms = np.cumprod([1.0, *(x / (a + k) for k in range(1, 3000))])
        series = a * math.log(x) - x - float(gammaln(a + 1)) + math.log(terms.sum())
        found = log_gaussian_mass(np.array([radius]), np.zeros(1), 0.0, 1.0, dimension)[0]
        assert found == pytest.approx(series, rel=1e-12)


def test_a_ball_away_from_the_priors_centre_has_a_noncentral_chi_squared_mass() -> None:
    """D = 8, σ = 0.7, r = 1.1: the mean over directions within 4 standard errors (once in 16 000 runs not)."""
    draws = np.random.default_rng(0)
    for dimension, theta in ((8, 1.3), (8, 0.2), (3, 4.0), (2, 0.5)):
        u = draws.standard_normal((20_000, dimension))
        along = theta * u[:, 0] / np.linalg.norm(u, axis=1)
        logs = log_gaussian_mass(np.full(len(u), 1.1), along, theta, 0.7, dimension)
        masses = np.exp(logs)
        truth = ncx2.cdf((1.1 / 0.7) ** 2, dimension, (theta / 0.7) ** 2)
        assert abs(masses.mean() - truth) <= 4 * masses.std() / math.sqrt(len(u))


def test_one_dimension_is_two_intervals() -> None:
    """In one dimension the rays are the two half lines, and the mass a difference of Gaussian integrals."""
    found = log_gaussian_mass(np.array([0.5, 2.0]), np.array([1.5, -1.5]), 1.5, 1.0, 1)
    below = 0.5 * (math.erf(2.0 / math.sqrt(2)) - math.erf(1.5 / math.sqrt(2)))
    above = 0.5 * (math.erf(0.5 / math.sqrt(2)) + math.erf(1.5 / math.sqrt(2)))
    assert np.exp(found) == pytest.approx([2 * below, 2 * above])  # u = +1 goes on from 1.5, u = -1 back


def test_a_radius_of_0_has_no_mass() -> None:
    assert log_gaussian_mass(np.zeros(2), np.ones(2), 1.0, 1.0, 5).tolist() == [-math.inf, -math.inf]


# --- the logarithm of a mean --------------------------------------------------------------------------


def logs_of(spectrum: np.ndarray, rays: int, draws: np.random.Generator) -> tuple[np.ndarray, float]:
    """-(D/2) ln uᵀHu over uniform directions, and ln E of its exponential, -½ ln det H."""
    u = draws.standard_normal((rays, len(spectrum))) ** 2
    logs = -len(spectrum) / 2 * np.log((u @ spectrum) / u.sum(axis=1))
    return logs, -0.5 * float(np.log(spectrum).sum())


SPECTRA = {
    "geometric": lambda d, k: np.geomspace(1, k, d),
    "one steep": lambda d, k: np.array([k, *np.ones(d - 1)]),
    "one flat": lambda d, k: np.array([1 / k, *np.ones(d - 1)]),
}


@pytest.mark.parametrize("shape", SPECTRA)
def test_where_an_error_is_stated_it_covers_the_truth(shape: str) -> None:
    """At least 300 samples with an error per shape: fewer than 90 % inside has probability 3e-4 if 95 % are.

    Of one flat direction mostly the ratios up to 2 are let through.
    """
    draws = np.random.default_rng(1)
    inside, stated = 0, 0
    for dimension in (4, 16, 64):
        for ratio in (1.1, 1.2, 2.0, 30.0):
            for _ in range(60):
                logs, truth = logs_of(SPECTRA[shape](dimension, ratio), 64, draws)
                found = log_mean(logs)
                assert math.isnan(found.stderr) == bool(found.reason)
                if not found.reason:
                    stated += 1
                    inside += abs(found.value - truth) <= 1.96 * found.stderr
    assert stated >= 300
    assert inside / stated >= 0.90


def test_heavy_tails_are_named_and_their_mean_is_low() -> None:
    """One direction 100 times flatter has no variance: none of 200 samples states an error but by rare chance."""
    draws = np.random.default_rng(2)
    below, stated = 0, 0
    for _ in range(200):
        logs, truth = logs_of(SPECTRA["one flat"](64, 100.0), 64, draws)
        found = log_mean(logs)
        below += found.value < truth
        stated += not found.reason
    assert stated <= 2
    assert below >= 150
    assert "tail exponent" in found.reason


def test_equal_samples_have_no_error() -> None:
    found = log_mean(np.full(64, -1e7))
    assert (found.value, found.stderr, found.effective_samples) == (-1e7, 0.0, 64.0)


def test_logarithms_far_beyond_floats() -> None:
    for shift in (-1e9, 0.0, 1e9):
        logs = shift + np.linspace(-0.2, 0.2, 100)
        found = log_mean(logs)
        assert found.value - shift == pytest.approx(
            math.log(np.exp(np.linspace(-0.2, 0.2, 100)).mean()), abs=1e-6
        )
        assert found.stderr < 0.03


def test_samples_that_are_too_few_or_zero() -> None:
    assert "64 may" in log_mean(np.zeros(63)).reason
    nothing = log_mean(np.full(70, -np.inf))
    assert nothing.value == -math.inf
    assert nothing.reason
    assert math.isnan(log_mean(np.zeros(0)).value)
    half = log_mean(np.array([0.0, -np.inf] * 50))
    assert half.value == pytest.approx(math.log(0.5))
    assert half.effective_samples == pytest.approx(50)
    most = log_mean(np.array([0.0, *[-np.inf] * 99]))
    assert math.isnan(most.stderr)
    assert HEAVIEST_TAIL < 0.5
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="allowed"):
            log_mean(np.array([wrong, 1.0]))
