"""Lanczos chains and their quadrature: identities, prescribed spectra, breakdowns, resumption."""

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from landscape.errors import Refused
from landscape.estimators import lanczos
from landscape.estimators.quadrature import Rule, gauss, merged, padded, radau
from landscape.seeds import generator


def rotated(eigenvalues: np.ndarray, seed: int = 1) -> Tensor:
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    A = torch.from_numpy((Q * eigenvalues) @ Q.T)
    return (A + A.T) / 2


def starts(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, dtype=torch.float64, generator=generator(seed, "test starts", 0))


def copied(state: dict) -> dict:
    """As a file would give it back."""
    return pickle.loads(pickle.dumps(lanczos.arrays(state)))


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 2e-14), (torch.float32, 1e-5)])
def test_recurrence_and_orthogonality(dtype, off):
    """A Qᵀ = Qᵀ T + beta q eᵀ, Q Qᵀ = I, also where eigenvalues have long converged."""
    A = rotated(np.r_[np.linspace(-1, 1, 140), 50.0, 100.0]).to(dtype)
    state = lanczos.start(starts(142, 3).to(dtype), 60)
    while (found := lanczos.result(state)) is None:
        state = lanczos.step(A, state)
    for Q, (alpha, beta) in zip(state["basis"].double(), found.rows(), strict=True):
        np.testing.assert_allclose(Q @ Q.T, np.eye(61), atol=off)
        T = np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1)
        rest = np.zeros((142, 60))
        rest[:, -1] = beta[-1] * Q[-1].numpy()
        np.testing.assert_allclose(A.double() @ Q[:-1].T, Q[:-1].T.numpy() @ T + rest, atol=100 * off)


def test_quadrature_is_exact_to_degree_2m_minus_1_and_no_further():
    A, V, m = rotated(np.linspace(-1, 2, 40)), starts(40, 4), 5
    rules = [gauss(*row) for row in lanczos.chains(A, V, m).rows()]
    power = V / V.norm(dim=0)
    unit = power.clone()
    for degree in range(2 * m + 1):
        truth = (unit * power).sum(0).numpy()
        ours = np.array([r.weights @ r.nodes**degree for r in rules])
        error = np.abs(ours - truth).max()
        assert error < 1e-12 * 2.0**degree if degree < 2 * m else error > 1e-3
        power = A @ power


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_ghosts_at_200_steps(dtype):
    outliers = np.array([2.0, 3.0, 10.0, 100.0])
    A = rotated(np.r_[np.linspace(-1, 1, 300), outliers]).to(dtype)
    for alpha, beta in lanczos.chains(A, starts(304, 4).to(dtype), 200).rows():
        above = gauss(alpha, beta).nodes
        np.testing.assert_allclose(above[above > 1.5], outliers, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "distinct",
    [[0.0], [3.0], [0.0, 1.0], [-5.0, 0.0, 1.0, 1.5], [-1.0, 1.0], [1e-6, 1.0], list(np.linspace(1, 2, 9))],
)
@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_an_invariant_subspace_ends_a_chain_exactly(distinct, dtype, scale):
    """One node for each distinct eigenvalue, whatever its multiplicity; weights are the start's shares."""
    values = scale * np.sort(np.resize(distinct, 60))
    A = torch.diag(torch.from_numpy(values)).to(dtype)
    V = starts(60, 3)
    found = lanczos.chains(A, V.to(dtype), 30)
    eps = torch.finfo(dtype).eps
    for v, (alpha, beta) in zip(V.T.numpy() ** 2, found.rows(), strict=True):
        rule = merged(gauss(alpha, beta), eps)
        assert rule.weights.sum() == pytest.approx(1.0, rel=1e-14)
        shares = [v[values == scale * x].sum() / v.sum() for x in distinct]
        size = abs(scale) * max(map(abs, distinct))
        # Copies of an eigenvalue that have not converged when the chain ends weigh nothing.
        kept = rule.weights > 1e-8
        np.testing.assert_allclose(rule.nodes[kept], scale * np.array(distinct), atol=100 * eps * size)
        np.testing.assert_allclose(rule.weights[kept], shares, atol=200 * eps)
        assert rule.nodes.min() >= values.min() - 100 * eps * size
        assert rule.nodes.max() <= values.max() + 100 * eps * size


def test_one_chain_ends_and_the_others_go_on():
    values = np.linspace(1, 2, 50)
    A = torch.diag(torch.from_numpy(values))
    V = starts(50, 3)
    V[:, 1] = torch.eye(50, dtype=torch.float64)[7]  # an eigenvector
    found = lanczos.chains(A, V, 12)
    assert found.lengths.tolist() == [12, 1, 12]
    assert (found.alpha[1, 0], found.beta[1, 0]) == (values[7], 0.0)
    alone = lanczos.chains(A, V[:, [0]], 12)
    np.testing.assert_allclose(found.alpha[0], alone.alpha[0], rtol=1e-12)


def test_a_chain_of_full_length_holds_all_eigenvalues():
    values = np.sort(np.random.default_rng(0).normal(size=25))
    found = lanczos.chains(rotated(values), starts(25, 2), 400)
    for alpha, beta in found.rows():
        np.testing.assert_allclose(gauss(alpha, beta).nodes, values, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-8, -1.0, 1e20])
def test_everything_scales_with_the_operator(scale):
    A, V = rotated(0.9 ** np.arange(60)), starts(60, 2)
    one, scaled = lanczos.chains(A, V, 20), lanczos.chains(A * scale, V, 20)
    np.testing.assert_allclose(scaled.alpha, scale * one.alpha, rtol=1e-8, atol=1e-12 * abs(scale))
    np.testing.assert_allclose(scaled.beta, abs(scale) * one.beta, rtol=1e-8)


def test_residuals_are_those_of_the_ritz_vectors():
    A = rotated(np.linspace(-1, 2, 80))
    state = lanczos.start(starts(80, 1), 15)
    while (found := lanczos.result(state)) is None:
        state = lanczos.step(A, state)
    alpha, beta = next(found.rows())
    rule = gauss(alpha, beta)
    T = np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1)
    Y = state["basis"][0, :15].T.numpy() @ np.linalg.eigh(T)[1]
    np.testing.assert_allclose(
        rule.residual_norms, np.linalg.norm(A.numpy() @ Y - Y * rule.nodes, axis=0), atol=1e-13
    )


@pytest.mark.parametrize("stop", [0, 1, 2, 9, 19])
def test_resumed_from_a_stored_state_is_the_same_to_the_last_bit(stop):
    A = rotated(0.8 ** np.arange(40)).float()
    V = starts(40, 3).float()
    V[:, 2] = 0
    V[:5, 2] = 1
    through = lanczos.chains(A, V, 20)
    state = lanczos.start(V, 20)
    for _ in range(stop):
        state = lanczos.step(A, state)
    state = copied(state)
    while (found := lanczos.result(state)) is None:
        state = copied(lanczos.step(A, state))
    np.testing.assert_array_equal(found.alpha, through.alpha)
    np.testing.assert_array_equal(found.beta, through.beta)


def test_memory_says_how_many_chains_run_together():
    assert lanczos.chains_that_fit(1000, 100, torch.float32, 4 * 1000 * 107 * 3) == 3
    with pytest.raises(
        ValueError, match=r"428,000 bytes; memory = 100,000: take at most 18 steps or more mem"
    ):
        lanczos.chains_that_fit(1000, 100, torch.float32, 100_000)
    with pytest.raises(ValueError, match="take more memory"):
        lanczos.chains_that_fit(1000, 100, torch.float32, 100)


def test_radau_is_exact_to_degree_2m_and_bounds_the_logarithm_from_below():
    values = np.linspace(0.5, 4, 50)
    A, V = torch.diag(torch.from_numpy(values)), starts(50, 3)
    shares = (V**2 / (V**2).sum(0)).T.numpy()
    for m in (2, 4, 6):
        for share, (alpha, beta) in zip(shares, lanczos.chains(A, V, m).rows(), strict=True):
            rule, plain = radau(alpha, beta, 0.4), gauss(alpha, beta)
            assert rule.nodes[0] == pytest.approx(0.4, rel=1e-12)
            for degree in range(2 * m + 1):
                assert rule.weights @ rule.nodes**degree == pytest.approx(share @ values**degree, rel=1e-11)
            truth = share @ np.log(values)
            assert rule.weights @ np.log(rule.nodes) < truth < plain.weights @ np.log(plain.nodes)
    with pytest.raises(ValueError, match="must lie below all Ritz values"):
        radau(alpha, beta, 1.0)


def test_radau_of_a_chain_that_ended_is_the_exact_rule():
    assert radau([2.0, 2.0], [1.0, 0.0], 0.5).nodes.tolist() == gauss([2.0, 2.0], [1.0, 0.0]).nodes.tolist()


def test_copies_within_rounding_are_one_node():
    rule = Rule(np.array([0.0, 1.0, 1 + 1e-15, 3.0]), np.array([0.1, 0.2, 0.4, 0.3]), np.arange(4.0))
    one = merged(rule, 2e-16)
    assert one.nodes.tolist() == [0.0, 1 + 1e-15, 3.0]
    assert one.weights == pytest.approx([0.1, 0.6, 0.3])
    assert one.residual_norms.tolist() == [0.0, 2.0, 3.0]
    assert merged(one, 2e-16) is one


def test_padded_rows():
    np.testing.assert_array_equal(padded([np.ones(2), np.ones(1)]), [[1, 1], [1, np.nan]])


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"V has shape \(3,\)"):
        lanczos.start(torch.ones(3), 2)
    with pytest.raises(ValueError, match="steps = 0"):
        lanczos.start(torch.ones(3, 1), 0)
    with pytest.raises(ValueError, match="zero or not finite"):
        lanczos.start(torch.zeros(3, 1), 2)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(Refused, match="product 1 of a Lanczos chain is not finite"):
            lanczos.chains(torch.full((3, 3), bad), torch.ones(3, 1), 2)
