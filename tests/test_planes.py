"""What random planes say of a matrix, on prescribed spectra."""

from __future__ import annotations

import math

import numpy as np
import pytest

from landscape.estimators import planes

# Tests of random numbers below allow this many standard errors: each fails by chance once in 150 000 seeds.
SIGMAS = 4.5

SPECTRA = {
    "half up, half down": np.repeat([1.0, -1.0], 60),
    "i^-2": np.arange(1, 121.0) ** -2,
    "0.9^i": 0.9 ** np.arange(120),
    "5, 2, -1": np.array([5.0, 2.0, -1.0]),
    "one above a bulk": np.array([19.0, *np.ones(119)]),
}


def forms(spectrum: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[[A, B], [B, C]] of random planes through a matrix with these eigenvalues, (count, 2, 2)."""
    P = rng.standard_normal((count, len(spectrum), 2))
    return np.einsum("kni,n,knj->kij", P, spectrum, P)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_intervals_of_trace_and_norm_cover_them(spectrum: str) -> None:
    """600 seeds of 32 planes; a true 95 % covers less than 92 % of them once in 1000 (binomial)."""
    values, rng = SPECTRA[spectrum], np.random.default_rng(5)
    runs = [planes.estimate(forms(values, 32, rng), len(values)) for _ in range(600)]
    trace, norm = values.sum(), math.sqrt((values**2).sum())
    off = np.array([(r.trace - trace) / r.trace_stderr for r in runs])
    assert 0.92 <= np.mean(np.abs(off) <= 1.96) <= 0.985
    mean_error = np.std([r.trace for r in runs]) / math.sqrt(600)
    assert np.mean([r.trace for r in runs]) == pytest.approx(trace, abs=SIGMAS * mean_error)
    square = np.array([r.frobenius_norm**2 for r in runs])
    assert square.mean() == pytest.approx(norm**2, abs=SIGMAS * square.std() / math.sqrt(600))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_participation_is_that_of_the_spectrum(spectrum: str) -> None:
    values = SPECTRA[spectrum]
    true = (values**2).sum() ** 2 / (values**4).sum()
    estimate = planes.estimate(forms(values, 40_000, np.random.default_rng(6)), len(values))
    # 4 / participation scatters by √(Var)/√k: 2/√k for the Gaussian limit, up to 30/√k for one eigenvalue
    assert 4 / estimate.participation == pytest.approx(4 / true, abs=0.6 if true < 2 else 0.15)


def test_few_eigenvalues_are_told_from_many() -> None:
    rng = np.random.default_rng(8)
    shares = {}
    for name in ("half up, half down", "i^-2"):
        runs = [planes.estimate(forms(SPECTRA[name], 64, rng), 120) for _ in range(400)]
        shares[name] = np.mean([r.participation < 8 for r in runs])
    # 2.5 and 98 % were measured; 400 seeds move that by less than 5 % at 4.5 standard errors
    assert shares["half up, half down"] < 0.08
    assert shares["i^-2"] > 0.9


def test_the_limit_is_the_probability_for_gaussian_planes() -> None:
    """m ~ N(t, F²), r² = F²(x² + y²): 200 000 draws, standard error at most 0.0012."""
    rng = np.random.default_rng(7)
    m, x, y = rng.standard_normal((3, 200_000))
    for t, norm in [(0, 1), (1.3, 1), (40, math.sqrt(1000)), (5e-9, 2e-9)]:
        share = np.mean(np.hypot(x, y) * norm > np.abs(t + norm * m))
        assert planes.saddle_probability(t, norm) == pytest.approx(share, abs=SIGMAS * 0.0012)
    assert planes.saddle_probability(0.0, 0.0) == 0.0


def test_the_error_of_the_limit_follows_from_those_of_trace_and_norm() -> None:
    values, rng = np.repeat([1.0, -1.0], [540, 460]), np.random.default_rng(9)
    runs = [planes.estimate(forms(values, 64, rng), 1000) for _ in range(150)]
    scatter = np.std([r.saddle_limit for r in runs])
    assert np.median([r.saddle_limit_stderr for r in runs]) == pytest.approx(scatter, rel=0.3)


def test_share_intervals_cover() -> None:
    for share in (0.0, 0.02, 0.5, 0.98, 1.0):
        counts = np.random.default_rng(3).binomial(30, share, 2000)
        ends = np.array([planes.share_interval(int(c), int(c), 30) for c in counts])
        assert np.mean((ends[:, 0] <= share) & (share <= ends[:, 1])) >= 0.935  # 95 % less 3 standard errors
    assert planes.share_interval(0, 5, 5) == (0.0, 1.0)


def test_two_planes_are_needed_for_an_error() -> None:
    with pytest.raises(ValueError, match="got 1 planes"):
        planes.estimate(np.eye(2)[None], 5)
