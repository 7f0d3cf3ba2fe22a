"""Trace estimators: exact cases, a naive XTrace, and the coverage of their intervals."""

import numpy as np
import pytest
import torch
from torch import Tensor

from landscape.estimators import hutchinson, hutchpp, xtrace
from landscape.estimators.calibration import xtrace_stderr
from landscape.estimators.probes import draw, exact_trace, inner, probe_gram
from landscape.estimators.xtrace import _LeaveOut
from landscape.seeds import generator

ALL = [
    pytest.param(lambda A, m, seed=0: hutchinson(A, m, seed=seed), id="hutchinson-signs"),
    pytest.param(lambda A, m, seed=0: hutchinson(A, m, "gaussian", seed=seed), id="hutchinson-gaussian"),
    pytest.param(hutchpp, id="hutchpp"),
    pytest.param(xtrace, id="xtrace"),
]


def rotated(eigenvalues: np.ndarray, seed: int = 1, householder: bool = False) -> Tensor:
    n = len(eigenvalues)
    rng = np.random.default_rng(seed)
    if householder:
        w = rng.normal(size=n)
        Q = np.eye(n) - 2 * np.outer(w, w) / (w @ w)
    else:
        Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    A = torch.from_numpy((Q * eigenvalues) @ Q.T)
    return (A + A.T) / 2


class Operator:
    """The whole protocol: nothing but shape, dtype, device and products, which are counted."""

    def __init__(self, A: Tensor) -> None:
        self._A, self.products = A, 0
        self.shape, self.dtype, self.device = A.shape, A.dtype, A.device

    def __matmul__(self, V: Tensor) -> Tensor:
        self.products += V.shape[1] if V.ndim == 2 else 1
        return self._A @ V


# --- exact cases ---------------------------------------------------------------------------------------


def test_signs_are_exact_on_a_diagonal_matrix_and_normal_probes_are_not():
    A = torch.diag(torch.linspace(-1, 3, 40, dtype=torch.float64))
    for seed in range(50):
        result = hutchinson(A, 2, seed=seed)
        assert abs(result.value - 40.0) <= 1.96 * result.stderr < 1e-11
    result = hutchinson(A, 64, "gaussian")
    assert abs(result.value - 40.0) > 0.01
    assert result.stderr > 0.1


@pytest.mark.parametrize("estimate", [hutchpp, xtrace])
def test_low_rank_is_exact_to_rounding(estimate):
    A = rotated(np.array([5.0, 2.0, -1.0] + [0.0] * 57))
    for seed in range(100):
        result = estimate(A, 20, seed=seed)
        assert result.value == pytest.approx(6.0, abs=1e-10)
        assert abs(result.value - 6.0) <= 1.96 * result.stderr < 1e-10


@pytest.mark.parametrize("estimate", ALL)
def test_zero_operator(estimate):
    result = estimate(torch.zeros(50, 50), 20)
    assert (result.value, result.stderr) == (0.0, 0.0)


@pytest.mark.parametrize("estimate", [hutchpp, xtrace])
@pytest.mark.parametrize("n", [1, 7, 20])
def test_as_many_products_as_rows_are_spent_on_the_exact_trace(estimate, n):
    A = Operator(rotated(np.arange(1.0, n + 1)))
    result = estimate(A, 20)
    assert result.value == pytest.approx(n * (n + 1) / 2, rel=1e-13)
    assert (result.stderr, result.matvecs, A.products) == (0.0, n, n)


@pytest.mark.parametrize("estimate", [hutchpp, xtrace])
def test_one_product_less_than_rows(estimate):
    A = rotated(np.linspace(-1, 2, 21))
    result = estimate(A, 20)
    assert abs(result.value - 10.5) <= 4 * result.stderr < 20


def test_exact_trace_in_uneven_blocks():
    A = torch.arange(49.0).reshape(7, 7)
    assert exact_trace(A, 7, block=3) == float(A.trace())


# --- any number of products, any scale, any precision -----------------------------------------------------


@pytest.mark.parametrize("estimate", ALL)
@pytest.mark.parametrize("matvecs", [6, 7, 8, 11, 16, 17, 33])
def test_products_are_counted(estimate, matvecs):
    A = Operator(rotated(np.linspace(1, 2, 60)))
    result = estimate(A, matvecs)
    assert result.matvecs == A.products
    assert matvecs - 1 <= A.products <= matvecs
    assert result.value == pytest.approx(90.0, abs=4 * result.stderr)


@pytest.mark.parametrize("estimate", ALL)
@pytest.mark.parametrize("scale", [1e-8, -1.0, 1e30])
def test_result_scales_with_the_operator(estimate, scale):
    A = rotated(0.9 ** np.arange(60))
    one, scaled = estimate(A, 24), estimate(A * scale, 24)
    assert scaled.value == pytest.approx(scale * one.value, rel=1e-12)
    assert scaled.stderr == pytest.approx(abs(scale) * one.stderr, rel=1e-9)


@pytest.mark.parametrize("estimate", ALL)
def test_single_precision_agrees_within_its_rounding(estimate):
    A = rotated(0.8 ** np.arange(80))
    double, single = estimate(A, 30), estimate(A.float(), 30)
    assert single.value == pytest.approx(double.value, rel=1e-5)
    assert single.stderr == pytest.approx(double.stderr, rel=1e-2)


@pytest.mark.parametrize("estimate", ALL)
def test_same_seed_same_result_and_other_seed_another(estimate):
    A = rotated(np.linspace(1, 2, 50))
    state = torch.random.get_rng_state()
    assert estimate(A, 20, seed=3) == estimate(A, 20, seed=3)
    assert estimate(A, 20, seed=3).value != estimate(A, 20, seed=4).value
    assert torch.equal(state, torch.random.get_rng_state())


def test_block_size_changes_no_probe():
    A = rotated(np.linspace(1, 2, 50))
    values = [hutchinson(A, 33, block=block).value for block in (1, 5, 16, 64)]
    np.testing.assert_allclose(values, values[0], rtol=1e-13)


# --- the stop rule ----------------------------------------------------------------------------------------


def test_growth_stops_at_fixed_counts_when_the_error_is_small_enough():
    A = rotated(np.linspace(1, 3, 100))
    for rtol in (0.1, 0.03, 0.015):
        result = hutchinson(A, seed=1, rtol=rtol)
        assert result.converged
        assert result.stderr <= rtol * result.value
        assert result.matvecs in (16 * 2**i for i in range(7))
        assert result == hutchinson(A, seed=1, rtol=rtol, max_probes=result.matvecs)
        if result.matvecs > 16:
            before = hutchinson(A, result.matvecs // 2, seed=1)
            assert before.stderr > rtol * before.value
        fixed = hutchinson(A, result.matvecs, seed=1)
        assert (fixed.value, fixed.stderr, fixed.converged) == (result.value, result.stderr, None)


def test_growth_ends_at_the_limit_and_says_so():
    A = rotated(np.array([1.0, -1.0] * 30))
    result = hutchinson(A, rtol=1e-3, max_probes=40)
    assert (result.matvecs, result.converged) == (40, False)
    assert hutchinson(torch.zeros(9, 9), rtol=0.1).converged


# --- XTrace against its definition --------------------------------------------------------------------------


def naive_xtrace(A: np.ndarray, omega: np.ndarray, left_out: list[int], test: int) -> float:
    n = len(A)
    Q = np.linalg.qr(A @ np.delete(omega, left_out, axis=1))[0]
    nu = omega[:, test] - Q @ (Q.T @ omega[:, test])
    return float(np.trace(Q.T @ A @ Q) + (n - Q.shape[1]) * (nu @ A @ nu) / (nu @ nu))


@pytest.mark.parametrize("eigenvalues", [0.8 ** np.arange(30), np.linspace(-1, 2, 30)])
def test_fast_xtrace_equals_the_naive_one(eigenvalues):
    A, n, k = rotated(eigenvalues), 30, 6
    omega = draw(generator(5, "xtrace", 0), n, k, "gaussian")
    omega = omega * (n**0.5 / omega.norm(dim=0))
    Q, R = torch.linalg.qr(A @ omega)
    leave = _LeaveOut(n, R, Q.T @ A @ Q, Q.T @ omega, omega.T @ omega)
    dense, probes = A.numpy(), omega.numpy()
    single = [naive_xtrace(dense, probes, [i], i) for i in range(k)]
    np.testing.assert_allclose(leave.one(), single, rtol=1e-11)
    assert xtrace(A, 2 * k + 1, seed=5).value == pytest.approx(np.mean(single), rel=1e-11)
    double, mixed = leave.two(float(np.mean(single)))
    for i in range(k):
        for j in set(range(k)) - {i}:
            assert double[i, j] == pytest.approx(naive_xtrace(dense, probes, [i, j], i), rel=1e-10)
            basis = np.linalg.qr(dense @ np.delete(probes, [i, j], axis=1))[0]
            nu = probes[:, [i, j]] - basis @ (basis.T @ probes[:, [i, j]])
            nu *= (n - k + 2) ** 0.5 / np.linalg.norm(nu, axis=0)
            beta = (np.mean(single) - np.trace(basis.T @ dense @ basis)) / (n - k + 2)
            assert mixed[i, j] == pytest.approx(
                nu[:, 0] @ dense @ nu[:, 1] - beta * nu[:, 0] @ nu[:, 1], abs=1e-10
            )


@pytest.mark.parametrize(
    ("base", "matvecs"), [(lambda i: i**-2, 60), (lambda i: 0.9**i, 60), (lambda i: 0.7**i, 18)]
)
def test_errors_order_as_published_on_falling_eigenvalues(base, matvecs):
    """DEFINITIONS §3 check 3: Hutchinson > Hutch++ > XTrace, by the root mean square over 60 seeds."""
    eigenvalues = base(np.arange(1, 201.0))
    A, truth = rotated(eigenvalues), eigenvalues.sum()
    plain, sketched, exchanged = [
        np.sqrt(np.mean([(f(A, matvecs, seed=s).value - truth) ** 2 for s in range(60)]))
        for f in (hutchinson, hutchpp, xtrace)
    ]
    assert plain > 2 * sketched
    assert sketched > 1.2 * exchanged


# --- probes ---------------------------------------------------------------------------------------------------


def test_probes_have_unit_covariance_and_any_type_holds_the_same_numbers():
    for distribution in ("rademacher", "gaussian"):
        V = draw(torch.Generator().manual_seed(0), 4, 40_000, distribution)
        np.testing.assert_allclose(V @ V.T / 40_000, np.eye(4), atol=0.03)
        single = draw(torch.Generator().manual_seed(0), 4, 40_000, distribution, dtype=torch.float32)
        assert torch.equal(V.float(), single)


def test_inner_sums_in_double_precision():
    V = torch.full((3_000_000, 1), 0.1)
    assert float(inner(V, V)) == pytest.approx(3e6 * float(V[0, 0].double() ** 2), rel=1e-10)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0, 10.0])
def test_mixed_products_of_signs_leave_the_diagonal_out(share):
    """E G_ij² = ‖A‖_F² - Σ a_ii², within 12 %, whatever part of the norm stands on the diagonal."""
    off = rotated(np.random.default_rng(0).normal(size=80))
    off.fill_diagonal_(0.0)
    sizes = torch.from_numpy(np.random.default_rng(1).normal(size=80))
    A = off + torch.diag(sizes) * share * off.norm() / sizes.norm()
    squares = []
    for index in range(200):
        V = draw(generator(0, "test", index), 80, 16)
        gram = probe_gram(V, A @ V)
        np.testing.assert_allclose(gram.diagonal(), (V * (A @ V)).sum(0), rtol=1e-10)
        squares.append(float(gram.triu(1).square().sum()) / 120)
    assert np.mean(squares) == pytest.approx(float(off.square().sum()), rel=0.12)


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda A: hutchinson(A, probes=1), "probes = 1; at least 2"),
        (
            lambda A: hutchinson(A, distribution="uniform"),
            "'uniform' is unknown; allowed are rademacher, gaussian",
        ),
        (lambda A: hutchinson(A, rtol=0.0), "rtol = 0.0; allowed"),
        (lambda A: hutchinson(A, rtol=float("nan")), "rtol = nan; allowed"),
        (lambda A: hutchinson(A, rtol=0.1, max_probes=1), "max_probes = 1; at least 2"),
        (lambda A: hutchinson(A, max_probes=8), "max_probes = 8 without rtol"),
        (lambda A: hutchinson(A, block=0), "block = 0; allowed"),
        (lambda A: hutchpp(A, 3), "matvecs = 3; Hutch\\+\\+ needs at least 4"),
        (lambda A: xtrace(A, 5), "matvecs = 5; XTrace needs at least 6"),
        (lambda A: xtrace(A[:3]), r"shape \(3, 9\); a trace needs \(n, n\)"),
        (lambda A: hutchpp(A[0]), r"shape \(9,\)"),
        (lambda A: hutchinson(A.long()), "torch.int64; allowed are real"),
        (lambda A: hutchinson(A.to(torch.complex64)), "complex64; allowed are real"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.eye(9))


# --- calibration ---------------------------------------------------------------------------------------------------


def spectra(n: int) -> dict[str, np.ndarray]:
    i, rng = np.arange(1.0, n + 1), np.random.default_rng(7)
    half = rng.normal(size=(2 * n, n))
    square = rng.normal(size=(n, n))
    bulk = rng.normal(size=n - 14) * 0.1
    return {
        "flat": np.linspace(1, 3, n),
        "inverse square": i**-2,
        "0.9^i": 0.9**i,
        "0.7^i": 0.7**i,
        "step 1e-3": np.where(i <= n // 20, 1.0, 1e-3),
        "step 1e-8": np.where(i <= n // 20, 1.0, 1e-8),
        "rank 1": np.where(i <= 1, 1.0, 0.0),
        "rank 3": np.concatenate([[5.0, 2.0, -1.0], np.zeros(n - 3)]),
        "one dominant": np.concatenate([[n / 3], np.linspace(0.5, 1.5, n - 1)]),
        "Wishart": np.linalg.eigvalsh(half.T @ half / (2 * n)),
        "plus and minus one": (-1.0) ** i,
        "GOE": np.linalg.eigvalsh(square + square.T),
        "network": np.concatenate([np.geomspace(40, 2, 10), [-3, -2, -1.5, -1], bulk]),
    }


def check_coverage(
    estimate, A: Tensor, truth: float, matvecs: int, seeds: int, low: float, high: float
) -> None:
    results = [estimate(A, matvecs, seed=seed) for seed in range(seeds)]
    covered = np.mean([abs(r.value - truth) <= 1.96 * r.stderr for r in results])
    # Where the estimator is exact, each interval covers, and must be as small as rounding is.
    exact = np.median([r.stderr for r in results]) <= 1e-11 * float(torch.linalg.matrix_norm(A, "nuc"))
    assert low <= covered <= (1.0 if exact else high), f"{covered:.3f} of {seeds} seeds"


@pytest.mark.parametrize("estimate", ALL)
@pytest.mark.parametrize(
    ("spectrum", "matvecs"),
    [("flat", 8), ("network", 16), ("inverse square", 16), ("GOE", 20), ("one dominant", 20), ("0.9^i", 40)],
)
def test_intervals_cover_the_truth(spectrum, matvecs, estimate):
    """600 seeds a cell: at a true coverage of 95 % a cell leaves 92-98 % with probability 0.1 %.

    The seeds are fixed: a failure means that the code has changed. Measured: 93-98 %. Many probes at
    more seeds: test_calibration.
    """
    eigenvalues = spectra(60)[spectrum]
    check_coverage(estimate, rotated(eigenvalues), eigenvalues.sum(), matvecs, 600, 0.92, 0.98)


GRID = [(e, m, False) for e in ALL for m in (8, 20, 64)] + [(e, 200, False) for e in ALL[2:]]
# Signs on a Householder-rotated diagonal are a stated limit of calibration.py; Hutch++ draws signs.
GRID += [(e, m, True) for e in (ALL[1], ALL[3]) for m in (8, 64)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimate", "matvecs", "householder"),
    [pytest.param(*e.values, m, h, id=f"{e.id}-{m}-{'householder' if h else 'haar'}") for e, m, h in GRID],
)
@pytest.mark.parametrize("spectrum", list(spectra(60)))
def test_intervals_cover_the_truth_on_the_whole_grid(spectrum, estimate, matvecs, householder):
    """600 fixed seeds a cell, 234 cells; true coverages are 92.5-98 %, and chance adds 1 % (one sigma)."""
    eigenvalues = spectra(250)[spectrum]
    A = rotated(eigenvalues, householder=householder)
    check_coverage(estimate, A, eigenvalues.sum(), matvecs, 600, 0.905, 0.987)


def test_signs_on_two_opposite_eigenvalues_err_on_the_safe_side():
    """The stated limit: never too seldom, at few probes too often, at many calibrated."""
    A = rotated(np.linspace(1, 3, 60), householder=True)
    for probes, high in ((8, 1.0), (64, 0.985)):
        check_coverage(hutchinson, A, 120.0, probes, 300, 0.92, high)


def test_published_error_of_xtrace_is_too_small_and_ours_is_not():
    """√k / std of the leave-one-out estimates, at 20 vectors on 0.9^i: the true error is larger."""
    eigenvalues = 0.9 ** np.arange(100)
    A = rotated(eigenvalues)
    errors, plain, ours = [], [], []
    for seed in range(300):
        omega = draw(generator(seed, "xtrace", 0), 100, 20, "gaussian")
        omega = omega * (10.0 / omega.norm(dim=0))
        Q, R = torch.linalg.qr(A @ omega)
        leave = _LeaveOut(100, R, Q.T @ A @ Q, Q.T @ omega, omega.T @ omega)
        t = leave.one()
        errors.append(t.mean() - eigenvalues.sum())
        plain.append(t.std(ddof=1) / 20**0.5)
        ours.append(xtrace_stderr(t, *leave.two(float(t.mean()))))
    covered = [np.mean(np.abs(errors) <= 1.96 * np.array(stderr)) for stderr in (plain, ours)]
    assert covered[0] < 0.85
    assert 0.92 <= covered[1] <= 0.98
