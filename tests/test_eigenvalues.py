"""The metrics `eigenvalues` and `spectral_norm` on losses whose Hessian is prescribed, and on networks."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import landscape
from landscape import Problem, Refused, testbeds
from landscape.metrics import Eigenvalues, SpectralNorm
from landscape.metrics.base import Journal
from landscape.record import Record
from landscape.testbeds.golden import step

# DEFINITIONS: softmax regression on digits at its minimum, float64, dense.
GOLDEN = [0.4387837249785, 0.30783, 0.26088, 0.21440, 0.16700, 0.15731, 0.13494, 0.12351, 0.09497, 0.03131]

SPECTRA = {
    "both signs": [-5.0, 1.0, 2.0, 3.0, 4.0, *np.linspace(-1, 0.5, 25)],
    "opposite": [3.0, -3.0, *np.linspace(-1, 1, 28)],
    "double": [7.0, 7.0, 5.0, 5.0, 5.0, -2.0, *np.linspace(0, 1, 24)],
    "rank 2": [2.0, -1.0, *np.zeros(28)],
    "negative": [*-np.linspace(1, 4, 30)],
}


def rotated(values: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    n = len(values)
    draws = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=draws, dtype=torch.float64)).Q
    return Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T


def quadratic(values: list[float], scale: float = 1.0) -> Problem:
    """L(θ) = scale · θᵀAθ / 2, whose Hessian is scale · A everywhere."""
    A = scale * rotated(values)
    theta = torch.linspace(-1, 1, len(A), dtype=torch.float64)
    return Problem(
        lambda params, x: params["a"] @ A @ params["a"] / 2 + 0 * x.sum(),
        lambda output, target: output + 0 * target.sum(),
        [(torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))],
        parameters={"a": theta},
        weight=lambda batch: float(len(batch[0])),
    )


@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_prescribed_spectra_within_the_stated_residuals(spectrum: str, which: str) -> None:
    values = sorted(SPECTRA[spectrum], reverse=True)
    ds = landscape.measure(Eigenvalues(k=6, which=which, rtol=1e-9, vectors=True), quadratic(values))
    expected = {"largest": values[:6], "smallest": values[-6:], "both": values[:6] + values[-6:]}[which]
    assert bool(ds["converged"])
    off = np.abs(ds["eigenvalues"].values - np.array(expected))
    assert (off <= ds["residual_norm"].values + 1e-14).all()
    V = ds["eigenvectors"].values
    assert np.allclose(V @ V.T, np.eye(len(expected)), atol=1e-10)
    residual = np.linalg.norm(rotated(values).numpy() @ V.T - V.T * ds["eigenvalues"].values, axis=0)
    assert (residual <= ds["residual_norm"].values).all()


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_both_ends_of_prescribed_spectra(spectrum: str, method: str) -> None:
    values = SPECTRA[spectrum]
    ds = landscape.measure(SpectralNorm(method=method, rtol=1e-6, max_matvecs=4000), quadratic(values))
    assert bool(ds["converged"])
    assert float(ds["eigenvalue_max"]) == pytest.approx(max(values), abs=1e-5)
    assert float(ds["eigenvalue_min"]) == pytest.approx(min(values), abs=1e-5)
    assert float(ds["spectral_norm"]) == pytest.approx(max(map(abs, values)), rel=1e-5)
    for end, value in (("max", max(values)), ("min", min(values))):
        stated = float(ds[f"eigenvalue_{end}_residual_norm"])
        assert abs(float(ds[f"eigenvalue_{end}"]) - value) <= stated + 1e-12


@pytest.mark.parametrize(
    "metric", [Eigenvalues(k=3, which="both"), SpectralNorm(), SpectralNorm(method="power")]
)
def test_all_results_scale_with_the_loss(metric: landscape.metrics.base.Metric) -> None:
    plain = landscape.measure(metric, quadratic(SPECTRA["both signs"]))
    scaled = landscape.measure(metric, quadratic(SPECTRA["both signs"], scale=1e-8))
    names = [name for name in plain if "eigenvalue" in name or "norm" in name]
    assert len(names) >= 2
    for name in names:
        small = 1e-8 * np.abs(plain[name].values).max()
        assert np.allclose(scaled[name].values, 1e-8 * plain[name].values, rtol=1e-6, atol=1e-6 * small)


@functools.cache
def golden() -> Problem:
    model, data = testbeds.softmax_regression()
    return Problem(model, forward=step, data=data)


def test_the_golden_hessian() -> None:
    ds = landscape.measure(Eigenvalues(rtol=1e-6), golden())
    assert np.allclose(ds["eigenvalues"].values, GOLDEN, atol=5e-6)
    assert float(ds["eigenvalues"][0]) == pytest.approx(GOLDEN[0], abs=1e-11)
    ends = landscape.measure(SpectralNorm(rtol=1e-2), golden())
    assert float(ends["spectral_norm"]) == pytest.approx(GOLDEN[0], abs=1e-5)
    assert float(ends["eigenvalue_min"]) == pytest.approx(1e-3, abs=1e-6)


# --- which matrix -------------------------------------------------------------------------------------


@functools.cache
def network() -> Problem:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.Softplus(), nn.Linear(6, 3)).double()
    draws = torch.Generator().manual_seed(4)
    x = torch.randn(20, 5, generator=draws, dtype=torch.float64)
    y = torch.randint(3, (20,), generator=draws)
    return Problem(model, nn.CrossEntropyLoss(), [(x[i : i + 8], y[i : i + 8]) for i in range(0, 20, 8)])


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher", "empirical_fisher"])
def test_matrices_by_name_and_their_blocks(curvature: str) -> None:
    problem = network()
    dense = getattr(landscape, curvature)(problem) @ torch.eye(problem.size, dtype=torch.float64)
    for layer, rows in ((None, slice(None)), ("2.weight", slice(*problem.space.ranges["2.weight"]))):
        expected = torch.linalg.eigvalsh(dense[rows, rows]).flip(0).numpy()
        ds = landscape.measure(Eigenvalues(k=4, curvature=curvature, layer=layer, rtol=1e-8), problem)
        assert np.allclose(ds["eigenvalues"].values, expected[:4], rtol=1e-8)
        ends = landscape.measure(SpectralNorm(curvature=curvature, layer=layer, rtol=1e-8), problem)
        assert float(ends["eigenvalue_max"]) == pytest.approx(expected[0], rel=1e-8)
        assert float(ends["eigenvalue_min"]) == pytest.approx(expected[-1], rel=1e-6, abs=1e-9 * expected[0])


def test_the_input_hessian_of_an_example() -> None:
    problem = network()
    dense = landscape.input_hessian(problem, 9) @ torch.eye(5, dtype=torch.float64)
    metric = Eigenvalues(k=5, curvature="input_hessian", example=9, rtol=1e-10)
    found = landscape.measure(metric, problem)["eigenvalues"].values
    assert np.allclose(found, torch.linalg.eigvalsh(dense).flip(0).numpy(), atol=1e-12)


def test_more_pairs_than_there_are_is_refused() -> None:
    with pytest.raises(Refused, match="k is 31, but the matrix has 30"):
        landscape.measure(Eigenvalues(k=31), quadratic(SPECTRA["rank 2"]))


# --- files ----------------------------------------------------------------------------------------------


class Stops(Journal):
    """Stops an evaluation after some steps, and keeps states as files would."""

    def __init__(self, after: int):
        self.after: int = after
        self.states: dict[int, dict[str, np.ndarray]] = {}

    def load_state(self, block: range) -> dict[str, np.ndarray] | None:
        held = self.states.get(block.start)
        return None if held is None else {k: v.copy() for k, v in held.items()}

    def save_state(self, block: range, state: object) -> None:
        self.states[block.start] = state()  # type: ignore[operator]
        self.after -= 1
        if self.after == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "metric",
    [
        Eigenvalues(k=3, rtol=1e-6, vectors=True),
        Eigenvalues(k=2, which="both"),
        SpectralNorm(),
        SpectralNorm(method="power", max_matvecs=40),
    ],
    ids=lambda m: f"{m.name} {getattr(m, 'which', '')}{getattr(m, 'method', '')}",
)
def test_interrupted_solves_end_as_uninterrupted_ones(metric: landscape.metrics.base.Metric) -> None:
    whole = landscape.evaluate(metric, network())
    for steps in (1, 2, 5):
        journal, record = Stops(steps), Record()
        for _ in range(1000):
            try:
                landscape.evaluate(metric, network(), journal=journal, record=record)
                break
            except KeyboardInterrupt:
                journal.after = steps
        for name, variable in whole.variables.items():
            if name != "wall_seconds":
                assert np.array_equal(variable.data, record[name]), name


def test_a_smaller_tolerance_solves_again_and_a_larger_one_does_not(tmp_path: Path) -> None:
    loose = landscape.measure(Eigenvalues(k=3, rtol=1e-2), network(), out=tmp_path)
    tight = landscape.measure(Eigenvalues(k=3, rtol=1e-8), network(), out=tmp_path)
    assert (tight["residual_norm"] <= 1e-8 * tight["eigenvalues"]).all()
    assert int(tight["matvecs"]) > int(loose["matvecs"])
    again = landscape.measure(Eigenvalues(k=3, rtol=1e-2), network(), out=tmp_path)
    assert again["eigenvalues"].equals(tight["eigenvalues"])
    fresh = landscape.measure(Eigenvalues(k=3, rtol=1e-8), network())
    assert np.array_equal(fresh["eigenvalues"].values, tight["eigenvalues"].values)


def test_products_that_run_out_are_said_and_more_of_them_go_on(tmp_path: Path) -> None:
    few = landscape.measure(Eigenvalues(k=3, rtol=1e-10, max_matvecs=6), network(), out=tmp_path)
    assert not bool(few["converged"])
    assert few.attrs["exit_code"] == 4
    more = landscape.measure(Eigenvalues(k=3, rtol=1e-10, max_matvecs=60), network(), out=tmp_path)
    assert bool(more["converged"])


def test_eigenvectors_lie_beside_the_file(tmp_path: Path) -> None:
    landscape.measure(Eigenvalues(k=3, vectors=True), network(), out=tmp_path)
    ds = landscape.open(tmp_path / "eigenvalues.h5")
    assert ds["eigenvectors"].shape == (3, network().size)
    assert (tmp_path / "eigenvalues.arrays.safetensors").exists()
    H = (landscape.hessian(network()) @ torch.eye(network().size, dtype=torch.float64)).numpy()
    V = ds["eigenvectors"].values
    residual = np.linalg.norm(V @ H - V * ds["eigenvalues"].values[:, None], axis=1)
    assert (residual <= ds["residual_norm"].values + 1e-14).all()


def test_power_iteration_has_not_converged_at_an_end_that_it_did_not_reach() -> None:
    """An end that is small beside the other: its residual has to be small beside itself."""
    values = [5.5, 0.8, -0.044, *np.linspace(-0.03, 0.3, 60)]
    few = landscape.measure(SpectralNorm(method="power", max_matvecs=60), quadratic(values))
    assert not bool(few["converged"])
    many = landscape.measure(SpectralNorm(method="power", max_matvecs=20_000), quadratic(values))
    assert bool(many["converged"])
    assert float(many["eigenvalue_min"]) == pytest.approx(-0.044, rel=2e-3)
