"""Standard errors against brute force, the equation behind them, and prescribed spectra."""

from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from landscape.estimators import calibration
from landscape.estimators.calibration import block_moments, calibrated_stderr

Array = NDArray[np.float64]


def test_block_moments_are_means_over_distinct_probes():
    rng = np.random.default_rng(0)
    G = rng.normal(size=(2, 6, 6))
    G = G + np.swapaxes(G, 1, 2)
    rows = block_moments(G)
    assert rows.shape == (6, 2, 3)
    for layer in range(2):
        g = G[layer]
        for i in range(6):
            others = [j for j in range(6) if j != i]
            second = np.mean([g[i, j] ** 2 for j in others])
            third = np.mean([g[i, j] * g[j, k] * g[k, i] for j, k in permutations(others, 2)])
            cycles = permutations(others, 3)
            fourth = np.mean([g[i, j] * g[j, k] * g[k, m] * g[m, i] for j, k, m in cycles])
            assert rows[i, layer] == pytest.approx([second, third, fourth], rel=1e-12)


def test_block_moments_do_not_read_the_diagonal_and_are_nan_in_small_blocks():
    G = np.array([[np.nan, 2.0], [2.0, np.nan]])
    np.testing.assert_array_equal(block_moments(G), [[4.0, np.nan, np.nan]] * 2)
    assert np.isnan(block_moments([[3.0]])).all()


def test_widening_solves_its_equation():
    for g, tabulated in zip(calibration._SKEWNESS[1:], calibration._WIDENING[1:], strict=True):
        law = stats.pearson3(g)

        def excess(A: float, c: float = g / 2, law: object = law) -> float:
            above = law.cdf(A / (1 - A * c)) if A * c < 1 else 1.0
            return above - law.cdf(-A / (1 + A * c)) - 0.95

        assert optimize.brentq(excess, 1.0, 40.0) / 1.959963985 == pytest.approx(tabulated, abs=6e-5)


def test_trailing_axes_are_treated_one_by_one():
    rng = np.random.default_rng(1)
    samples, moments = rng.normal(size=(20, 3)) + 1.0, rng.random((20, 3, 3))
    together = calibrated_stderr(samples, moments)
    assert together.shape == (3,)
    alone = [float(calibrated_stderr(samples[:, i], moments[:, i])) for i in range(3)]
    np.testing.assert_allclose(together, alone, rtol=1e-13)


@pytest.mark.parametrize("scale", [1e-8, -3.0, 1e-50])
def test_stderr_scales_with_the_samples(scale):
    samples, moments = _simulate(0.8 ** np.arange(30), 20, 5, seed=2)
    scaled = calibrated_stderr(samples * scale, moments * scale ** np.array([2, 3, 4]))
    np.testing.assert_allclose(scaled, abs(scale) * calibrated_stderr(samples, moments), rtol=1e-12)
    alone = calibrated_stderr(samples * scale**3)
    np.testing.assert_allclose(alone, abs(scale) ** 3 * calibrated_stderr(samples), rtol=1e-12)


def test_limits():
    assert np.isinf(calibrated_stderr([1.0]))
    assert float(calibrated_stderr(np.zeros(5))) == 0.0
    assert float(calibrated_stderr(np.full(5, 2.0), np.zeros((5, 3)))) == 0.0
    assert np.isfinite(calibrated_stderr(np.arange(17.0), np.full((17, 3), np.nan)))
    # Blocks of 16: of 17 probes the last has no partner, and its row is NaN.
    samples, moments = _simulate(np.ones(20), 17, 1, seed=0)
    assert np.isnan(moments[16]).all()
    assert np.isfinite(calibrated_stderr(samples, moments)).all()


def test_many_probes_give_the_plain_standard_error():
    samples, moments = _simulate(np.linspace(1, 3, 50), 4096, 4, seed=3)
    plain = samples.std(axis=0, ddof=1) / 64
    np.testing.assert_allclose(calibrated_stderr(samples, moments), plain, rtol=0.05)
    np.testing.assert_allclose(calibrated_stderr(samples), plain, rtol=0.01)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(4, 2\); needed is \(5, 3\)"):
        calibrated_stderr(np.zeros(5), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="needed is"):
        calibrated_stderr(np.zeros((0, 3)))


def _simulate(eigenvalues: Array, k: int, runs: int, seed: int) -> tuple[Array, Array]:
    """Samples (k, runs) and moments (k, runs, 3) of Gaussian probes, which need no eigenvectors."""
    rng = np.random.default_rng(seed)
    samples, moments = [], []
    for start in range(0, k, 16):
        V = rng.normal(size=(runs, len(eigenvalues), min(16, k - start)))
        gram = np.swapaxes(V, 1, 2) @ (eigenvalues[:, None] * V)
        samples.append(np.diagonal(gram, axis1=1, axis2=2).T)
        moments.append(block_moments(gram))
    return np.concatenate(samples), np.concatenate(moments)


N = 60
INDEX = np.arange(1.0, N + 1)
SPECTRA = {
    "flat": np.linspace(1, 3, N),
    "inverse square": INDEX**-2,
    "fast": 0.7**INDEX,
    "step": np.where(INDEX <= 5, 1.0, 1e-3),
    "one": np.where(INDEX <= 1, 1.0, 0.0),
    "three": np.where(INDEX <= 3, [*[5.0, 2.0, -1.0], *[0.0] * (N - 3)], 0.0),
    "dominant": np.where(INDEX <= 1, 20.0, 1.0),
    "signs": (-1.0) ** INDEX,
}


@pytest.mark.parametrize("k", [8, 20, 64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_coverage_with_mixed_products(spectrum, k):
    """Measured over 2000 seeds; a true coverage in 93-97 % fails with probability under 2 % a cell.

    The seed is fixed: a failure means that the code has changed, not luck. Spectra with a plain Student-t
    interval under 88 % at k = 8 ("one", "inverse square") are among them.
    """
    samples, moments = _simulate(SPECTRA[spectrum], k, 2000, seed=k)
    error = np.abs(samples.mean(axis=0) - SPECTRA[spectrum].sum())
    assert 0.92 <= (error <= 1.96 * calibrated_stderr(samples, moments)).mean() <= 0.98


@pytest.mark.parametrize("k", [8, 20, 64])
def test_coverage_of_samples_alone(k):
    """Squared norms have no mixed products: 90-98 %, where the Student-t interval has down to 84 %."""
    for eigenvalues in SPECTRA.values():
        samples, _ = _simulate(eigenvalues**2, k, 1500, seed=k)
        error = np.abs(samples.mean(axis=0) - (eigenvalues**2).sum())
        assert 0.9 <= (error <= 1.96 * calibrated_stderr(samples)).mean() <= 0.98


def test_plain_interval_covers_too_seldom_where_one_eigenvalue_dominates():
    """What the calibration is for: it must not pass by being the plain interval."""
    samples, _ = _simulate(SPECTRA["one"], 8, 2000, seed=8)
    student = stats.t.ppf(0.975, 7) * samples.std(axis=0, ddof=1) / 8**0.5
    assert (np.abs(samples.mean(axis=0) - 1.0) <= student).mean() < 0.88
