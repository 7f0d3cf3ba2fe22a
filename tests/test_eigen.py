"""Eigenpairs of prescribed spectra: residuals, multiplicities, scale, resumed states; power iteration."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as arpack
from torch import Tensor

import landscape
from landscape import testbeds
from landscape.estimators import eigsh, power_iteration
from landscape.estimators.eigen import Lanczos
from landscape.estimators.krylov import Krylov

RNG = np.random.default_rng(0)
BULK = RNG.uniform(-0.5, 0.5, 150)
SPECTRA = {
    "line": np.linspace(-1, 1, 120),
    "decaying": 0.8 ** np.arange(60),
    "double": np.r_[5, 5, 4, 4, 3, 3, 2, 2, 1, 1, BULK],
    "double at both ends": np.r_[5, 5, 4, -4, -4, -6, BULK],
    "triple": np.r_[5, 5, 5, 4, 3, 3, 3, 2, 1, BULK],
    "five copies": np.r_[[5] * 5, 4, 3, BULK],
    "opposite": np.r_[1, -1, 0.8, -0.8, BULK],
    "rank 3": np.r_[3, 2, -1, [0] * 80],
    "clustered": np.r_[1 + 1e-4 * np.arange(5), BULK],
    "zero": np.zeros(30),
    "identity": np.ones(30),
    "negative": -np.ones(20) - np.arange(20) // 2,
}


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


class Counted:
    """The whole protocol: nothing but shape, dtype, device and products, which are counted."""

    def __init__(self, A: Tensor) -> None:
        self._A, self.products = A, 0
        self.shape, self.dtype, self.device = A.shape, A.dtype, A.device

    def __matmul__(self, V: Tensor) -> Tensor:
        self.products += V.shape[1] if V.ndim == 2 else 1
        return self._A @ V


def wanted(A: Tensor, k: int, which: str) -> np.ndarray:
    values = np.linalg.eigvalsh(A.double().numpy())[::-1]
    if which == "both" and 2 * k < len(values):
        return np.r_[values[:k], values[-k:]]
    return {"largest": values[:k], "smallest": values[-k:], "both": values}[which]


def check(A: Tensor, k: int, which: str = "largest", **options) -> None:
    """Values, multiplicities, true residuals and orthogonality against the dense solution."""
    counted = Counted(A)
    result = eigsh(counted, k, which, **options)
    truth = wanted(A, k, which)
    assert result.matvecs == counted.products
    assert result.values.shape == result.residual_norms.shape == truth.shape
    assert bool(result.converged.all())
    # At the level of rounding, the k-th eigenvalue is not to be told from the next one.
    own = 20 * torch.finfo(A.dtype).eps * float(A.double().norm(2))
    assert (np.abs(result.values.numpy() - truth) <= result.residual_norms.numpy() + own).all()
    V = result.vectors.double()
    true = (A.double() @ V - V * result.values).norm(dim=0)
    slack = 2 * torch.finfo(A.dtype).eps * float(A.double().norm(2))
    assert (true <= 1.01 * result.residual_norms + slack).all()
    gram = V.T @ V - torch.eye(len(truth), dtype=torch.float64)
    assert gram.abs().max() <= (1e-10 if A.dtype == torch.float64 else 1e-6)
    assert (np.diff(result.values.numpy()) <= 0).all()


# --- prescribed spectra ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
@pytest.mark.parametrize("name", SPECTRA)
def test_prescribed_spectrum(name, which, dtype):
    A = rotated(SPECTRA[name]).to(dtype)
    for k in (1, 2, 7):
        check(A, k, which, seed=k)


def random_case(seed: int) -> tuple[Tensor, int, str]:
    """Up to triple eigenvalues of any kind, often with a null space, at any scale."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(20, 120)), int(rng.integers(1, 11))
    distinct = rng.normal(size=rng.integers(2, 25)) if seed % 2 else rng.normal(size=60)
    values = np.repeat(distinct, rng.integers(1, 4, size=len(distinct)))[:n]
    rest = np.zeros(n - len(values)) if seed % 4 < 2 else rng.uniform(-0.3, 0.3, n - len(values))
    A = rotated(np.r_[values, rest] * 10.0 ** rng.integers(-8, 8), seed, householder=seed % 7 == 0)
    return (
        A.to(torch.float32 if seed % 5 == 4 else torch.float64),
        k,
        ("largest", "smallest", "both")[seed % 3],
    )


@pytest.mark.parametrize("part", range(4))
def test_multiplicities_over_random_spectra(part):
    # No miss in these 200 and the slow twin's 1000: below 0.25 % a spectrum, with 95 % confidence.
    for seed in range(50 * part, 50 * part + 50):
        A, k, which = random_case(seed)
        check(A, k, which, seed=seed)


@pytest.mark.slow
def test_multiplicities_over_many_random_spectra():
    for seed in range(200, 1200):
        A, k, which = random_case(seed)
        check(A, k, which, seed=seed, block=1 + seed % 4)


def test_plain_lanczos_finds_one_copy_and_says_no_more():
    A = rotated(SPECTRA["double"])
    plain = eigsh(A, 4, block=1, copies=False)
    assert plain.values.numpy() == pytest.approx([5, 4, 3, 2], rel=1e-3)
    assert eigsh(A, 4, block=1).values.numpy() == pytest.approx([5, 5, 4, 4], rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
def test_all_eigenvalues_of_small_matrices(n, which):
    A = rotated(np.linspace(-1, 2, n) if n > 1 else np.array([3.0]))
    check(A, n, which, rtol=0.0)
    check(A, 1, which, rtol=0.0)


def test_both_ends_are_algebraic():
    # DEFINITIONS 4, check 1: the eigenvalue of largest modulus is -5, and the largest is 4.
    A = torch.diag(torch.cat([torch.tensor([-5.0]), torch.linspace(1, 4, 60)]).double())
    high, low = eigsh(A, 1, "both", rtol=1e-8).values.tolist()
    assert (high, low) == (pytest.approx(4.0, abs=1e-12), pytest.approx(-5.0, abs=1e-12))
    assert eigsh(A, 1, "smallest", rtol=1e-8).values.tolist() == [pytest.approx(-5.0)]


def test_no_ghosts_after_200_steps():
    values = np.r_[10.0, 5.0, 3.0, RNG.uniform(-1, 1, 397)]
    A = rotated(values)
    solver = Lanczos.for_operator(A, 60, rtol=0.0, block=1, copies=False)
    state = solver.init()
    while state.matvecs < 200:
        solver.step(A, state)
    found = state.ritz().values
    assert len(found) == 200
    for outlier in (10.0, 5.0, 3.0):
        assert (np.abs(found - outlier) < 1e-3).sum() == 1
    Q = state.vectors[: state.rows]
    assert (Q @ Q.T - torch.eye(state.rows, dtype=torch.float64)).abs().max() < 1e-13


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("name", ["decaying", "double", "line"])
def test_few_sweeps_over_the_basis_make_it_orthogonal(monkeypatch, name, block):
    sweeps, project = [], Krylov._project

    def counted(self, X, since=0):
        sweeps.append(len(X) * (self.rows - since) / self.rows)
        return project(self, X, since)

    monkeypatch.setattr(Krylov, "_project", counted)
    A = rotated(SPECTRA[name])
    solver = Lanczos.for_operator(A, 5, rtol=0.0, block=block, copies=False)
    state = solver.init()
    while state.matvecs < 40:
        solver.step(A, state)
    # One each, some over the last vectors alone, a second one where little is left of a product.
    assert sum(sweeps) <= (1.4 if block == 1 else 1.6) * 40
    Q = state.vectors[: state.rows]
    assert (Q @ Q.T - torch.eye(state.rows, dtype=torch.float64)).abs().max() < 1e-13


class Returned:
    """An operator that writes the product into the vector that it is given, and returns that."""

    def __init__(self, d):
        self.d, self.shape, self.dtype, self.device = d, (len(d), len(d)), d.dtype, d.device

    def __matmul__(self, V):
        return V.mul_(self.d if V.ndim == 1 else self.d[:, None])


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("values", [np.ones(6), np.arange(1.0, 41.0)], ids=["identity", "line"])
def test_an_operator_may_return_the_vector_that_it_is_given(values, block):
    d = torch.from_numpy(values)
    found = eigsh(Returned(d), 2, block=block, rtol=1e-9)
    assert found.values.tolist() == pytest.approx(sorted(values)[-1:-3:-1])
    rest = d[:, None] * found.vectors - found.vectors * found.values
    assert rest.norm(dim=0).max() < 1e-8
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(2, dtype=torch.float64))


# --- scale, memory, start -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["decaying", "double", "rank 3"])
def test_results_scale_with_the_operator(name):
    A = rotated(SPECTRA[name])
    one = eigsh(A, 5, "both")
    for power in (-30, 30, -400):
        scaled = eigsh(A * 2.0**power, 5, "both")
        assert torch.equal(scaled.values, one.values * 2.0**power)
        assert torch.equal(scaled.vectors, one.vectors)
        assert torch.equal(scaled.residual_norms, one.residual_norms * 2.0**power)
    for factor in (1e-8, 1e8):
        check(A * factor, 5, "both")
        scaled = eigsh(A * factor, 5, "both")
        error = (scaled.values / factor - one.values).abs().max()
        assert error <= one.residual_norms.max() + 1e-12


@pytest.mark.parametrize("name", ["line", "double", "triple"])
def test_little_memory_means_more_restarts_and_the_same_pairs(name):
    A = rotated(SPECTRA[name])
    check(A, 4, memory=24 * len(A) * 8)
    check(A, 2, "both", memory=24 * len(A) * 8)
    check(A.float(), 4, memory=24 * len(A) * 4)


def test_too_little_memory_is_refused_with_the_amount_needed():
    A = rotated(SPECTRA["line"])
    with pytest.raises(ValueError, match=f"allow {20 * len(A) * 8} bytes"):
        eigsh(A, 10, memory=1000)
    with pytest.raises(ValueError, match="too few for 9 eigenpairs"):
        eigsh(rotated(np.r_[[9.0] * 8, BULK]), 9, memory=20 * 158 * 8)


def test_a_warm_start_does_not_hide_what_it_does_not_hold():
    A = rotated(np.r_[6.0, 5.0, 4.0, 3.0, 2.0, BULK])
    vectors = torch.linalg.eigh(A)[1].flip(1)
    check(A, 3, start=vectors[:, 1:4])
    check(A, 1, start=vectors[:, 2])
    check(A, 3, start=torch.zeros(len(A)))
    near = vectors[:, 0] + 1e-3 * torch.ones(len(A)).double()
    cold, warm = (eigsh(A, 1, rtol=1e-6, start=s, copies=False) for s in (None, near))
    assert warm.matvecs < cold.matvecs


def test_more_products_are_not_spent_than_allowed():
    A = Counted(rotated(SPECTRA["line"]))
    result = eigsh(A, 5, rtol=1e-8, max_matvecs=20)
    assert 20 <= A.products == result.matvecs <= 21
    assert not bool(result.converged.any())
    truth = np.linspace(-1, 1, 120)
    for value, residual in zip(result.values, result.residual_norms, strict=True):
        assert np.abs(truth - float(value)).min() <= float(residual)


# --- state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("decaying", {}),
        ("triple", {"which": "both", "memory": 34 * 160 * 8}),
        ("rank 3", {}),
        ("double", {"block": 1}),
    ],
)
def test_a_stored_state_goes_on_to_the_same_bits(name, options):
    A = rotated(SPECTRA[name]).float()
    whole = eigsh(A, 4, **options)
    solver = Lanczos.for_operator(A, 4, **options)
    for every in (1, 2, 5):
        state, steps = solver.init(), 0
        while (result := solver.result(state)) is None:
            state = solver.step(A, state)
            steps += 1
            if steps % every == 0:
                state = Krylov.from_arrays({k: v.copy() for k, v in state.arrays().items()})
        for part in ("values", "vectors", "residual_norms", "converged"):
            assert torch.equal(getattr(result, part), getattr(whole, part)), part
        assert result.matvecs == whole.matvecs


def test_seeds_are_reproducible_and_independent():
    A = rotated(SPECTRA["decaying"])
    assert torch.equal(eigsh(A, 3, seed=5).vectors, eigsh(A, 3, seed=5).vectors)
    assert not torch.equal(eigsh(A, 3, seed=5).vectors, eigsh(A, 3, seed=6).vectors)
    before = torch.random.get_rng_state()
    eigsh(A, 3)
    assert torch.equal(before, torch.random.get_rng_state())


# --- networks -------------------------------------------------------------------------------------------


def test_golden_hessian():
    model, data = testbeds.softmax_regression()
    H = landscape.hessian(landscape.Problem(model, forward=testbeds.golden.step, data=data))
    result = eigsh(H, 10, rtol=1e-8)
    published = [0.43878, 0.30783, 0.26088, 0.21440, 0.16700, 0.15731, 0.13494, 0.12351, 0.09497, 0.03131]
    assert result.values.numpy() == pytest.approx(published, abs=6e-6)
    assert float(result.values[0]) == pytest.approx(0.4387837249785, abs=1e-12)
    reference = np.sort(arpack(H.to_scipy(), 10, which="LA", tol=1e-10)[0])[::-1]
    assert np.abs(result.values.numpy() - reference).max() < 1e-12
    # 156 of 640 eigenvalues lie within 1e-6 of the smallest
    low = eigsh(H, 1, "smallest", rtol=1e-2)
    assert bool(low.converged.all())
    assert float(low.values[0]) == pytest.approx(1e-3, abs=float(low.residual_norms[0]))


def test_products_on_the_shipped_network_are_no_more_than_arpacks():
    model, loss, batches, _ = testbeds.load_default(1797)
    A = landscape.hessian(landscape.Problem(model, loss, batches))
    counted = 0

    def matvec(v):
        nonlocal counted
        counted += 1
        return (A @ torch.from_numpy(v).float().reshape(-1)).numpy()

    reference = arpack(LinearOperator(A.shape, matvec=matvec, dtype=np.float32), 10, which="LA", tol=1e-3)[0]
    plain, full = eigsh(A, 10, block=1, copies=False), eigsh(A, 10)
    for result in (plain, full):
        assert bool(result.converged.all())
        assert result.values.numpy() == pytest.approx(np.sort(reference)[::-1], rel=1e-4)
    assert plain.matvecs <= counted
    assert full.matvecs <= 1.6 * counted


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k = 0 eigenvalues.*allowed is 1 to 20"),
        ({"k": 21}, "allowed is 1 to 20"),
        ({"which": "LM"}, "which = 'LM' is unknown; allowed are 'largest', 'smallest', 'both'"),
        ({"rtol": -1.0}, "0 <= rtol < 1"),
        ({"rtol": float("nan")}, "0 <= rtol < 1"),
        ({"block": 0}, "block = 0"),
        ({"k": 5, "max_matvecs": 4}, "need at least 5 products"),
        ({"start": torch.ones(19)}, r"start has shape \(19,\)"),
        ({"start": torch.full((20,), float("nan"))}, "start holds NaN"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        eigsh(torch.eye(20), **({"k": 2} | options))


def test_operators_that_are_none():
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        eigsh(torch.ones(3, 4), 1)
    with pytest.raises(ValueError, match="not symmetric"):
        eigsh(torch.triu(torch.ones(30, 30)), 3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        eigsh(torch.full((5, 5), float("nan")), 1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        power_iteration(torch.full((5, 5), float("inf")))


# --- power iteration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-8, -1e8])
def test_power_iteration_finds_the_sign_and_its_residual_is_true(scale):
    A = scale * rotated(np.r_[-5.0, 4.0, BULK])
    low = power_iteration(A, rtol=1e-6)
    assert low.converged
    assert low.value == pytest.approx(-5 * scale, rel=1e-6)
    assert torch.linalg.vector_norm(A @ low.vector - low.value * low.vector) == pytest.approx(
        low.residual_norm
    )
    high = power_iteration(A, rtol=1e-6, shift=low.value)
    assert high.converged
    assert high.value == pytest.approx(4 * scale, rel=1e-5)


@pytest.mark.parametrize("values", [np.r_[1, -1, [0.3] * 30], np.r_[[1.0] * 10, [-1.0] * 10]])
def test_power_iteration_claims_nothing_at_opposite_eigenvalues(values):
    A = rotated(values)
    for seed in range(20):
        result = power_iteration(A, seed=seed)
        assert not result.converged
        assert result.opposite
        assert result.residual_norm > 1e-3 * abs(result.value)
        assert "Use another shift" in result.message
        assert result.matvecs < 30
    shifted = power_iteration(A, shift=-0.5)
    assert shifted.converged
    assert shifted.value == pytest.approx(1.0, abs=1e-3)


def test_power_iteration_goes_on_where_the_moduli_differ():
    result = power_iteration(rotated(np.r_[1.0, -0.98, BULK]), rtol=1e-4)
    assert result.converged
    assert result.value == pytest.approx(1.0, abs=1e-4)
    slow = power_iteration(rotated(np.r_[1.0, 0.999, BULK]), rtol=1e-9, max_matvecs=30)
    assert (slow.converged, slow.opposite, slow.matvecs) == (False, False, 30)
    assert "Allow more products" in slow.message


def test_power_iteration_edges():
    assert power_iteration(torch.zeros(4, 4)).value == 0.0
    assert power_iteration(torch.tensor([[-3.0]])).value == -3.0
    assert power_iteration(torch.eye(5), start=torch.ones(5)).matvecs == 1
    with pytest.raises(ValueError, match="length 0"):
        power_iteration(torch.eye(5), start=torch.zeros(5))
    with pytest.raises(ValueError, match=r"start has shape \(4,\)"):
        power_iteration(torch.eye(5), start=torch.zeros(4))
    with pytest.raises(ValueError, match="max_matvecs = 0"):
        power_iteration(torch.eye(5), max_matvecs=0)
