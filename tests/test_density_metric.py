"""The metric `density`: what it stores, on losses whose Hessian is prescribed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_eigenvalues import Stops, golden, network, quadratic

import landscape
from landscape.metrics import Density
from landscape.record import Record


def smoothed(values: np.ndarray, x: np.ndarray, width: float) -> np.ndarray:
    """The density of these eigenvalues with a Gaussian of this width."""
    kernel = np.exp(-(((x[:, None] - values) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
    return kernel.mean(axis=1)


def test_the_density_of_a_prescribed_spectrum_lies_in_its_band() -> None:
    values = np.concatenate([np.linspace(-1, 2, 57), [6.0, 7.5, 9.0]])
    ds = landscape.measure(Density(probes=8, steps=40), quadratic(list(values)))
    x, width = ds["x"].values, float(ds["width"])
    truth = smoothed(values, x, width)
    shown = truth > 1e-3 * truth.max()
    covered = (ds["density_low"].values <= truth) & (truth <= ds["density_high"].values)
    assert covered[shown].mean() > 0.7  # one draw; calibrated over many seeds with the estimator
    assert np.trapezoid(ds["density"].values, x) == pytest.approx(1.0, abs=1e-6)
    assert ds["ritz_values"].shape == (8, 40)
    assert np.allclose(np.nansum(ds["weights"].values, axis=1), 1.0, atol=1e-12)
    assert int(ds["matvecs"]) == 8 * 40
    assert int(ds["outlier_count"]) == 3
    assert np.allclose(ds["outliers"].values, [9.0, 7.5, 6.0], atol=1e-6)
    assert float(ds["bulk_high"]) == pytest.approx(2.0, abs=0.05)


def test_deflated_eigenvalues_are_atoms_and_outliers() -> None:
    values = np.concatenate([np.linspace(-1, 2, 57), [6.0, 7.5, 9.0]])
    ds = landscape.measure(Density(probes=4, steps=30, deflate=3), quadratic(list(values)))
    assert np.allclose(ds["atoms"].values, [9.0, 7.5, 6.0], atol=1e-5)
    assert np.allclose(ds["outliers"].values, [9.0, 7.5, 6.0], atol=1e-5)
    assert np.allclose(np.nansum(ds["weights"].values, axis=1), 57 / 60, atol=1e-12)
    assert np.nanmax(ds["ritz_values"].values) < 2.001
    assert np.trapezoid(ds["density"].values, ds["x"].values) == pytest.approx(57 / 60, abs=1e-6)


def test_the_golden_hessian_has_nine_outliers() -> None:
    ds = landscape.measure(Density(probes=2, steps=60), golden())
    assert int(ds["outlier_count"]) == 9
    assert float(ds["outliers"][0]) == pytest.approx(0.4387837249785, abs=1e-8)


@pytest.mark.parametrize("preset", ["ghorbani", "pyhessian", "papyan", "papyan_code", "papyan_log"])
def test_presets_run_and_say_what_they_are(preset: str) -> None:
    ds = landscape.measure(Density(preset=preset), quadratic(list(np.linspace(0.1, 2, 30))))
    assert ds.attrs["x_scale"] == ("log" if preset == "papyan_log" else "linear")
    assert ds.attrs["smoothing"] == "Gaussian kernel"
    assert np.trapezoid(ds["density"].values, ds["coordinate"].values) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="leave out log and width"):
        Density(preset=preset, width=0.1)


def test_a_signed_logarithmic_axis_keeps_the_sign() -> None:
    ds = landscape.measure(Density(log=True, steps=30), quadratic([-1.0, *np.geomspace(1e-4, 10, 29)]))
    assert ds.attrs["x_scale"] == "symlog"
    assert ds["x"].values.min() < -1.0
    assert np.trapezoid(ds["density"].values, ds["coordinate"].values) == pytest.approx(1.0, abs=1e-6)


def test_everything_scales_with_the_loss() -> None:
    values = list(np.linspace(-1, 2, 40))
    plain = landscape.evaluate(Density(probes=2, steps=20), quadratic(values))
    scaled = landscape.evaluate(Density(probes=2, steps=20), quadratic(values, scale=2.0**-27))
    for name, factor in (
        ("x", 2.0**-27),
        ("ritz_values", 2.0**-27),
        ("density", 2.0**27),
        ("density_high", 2.0**27),
    ):
        assert np.allclose(scaled[name], factor * plain[name], rtol=1e-9, equal_nan=True)


@pytest.mark.parametrize("metric", [Density(probes=3, steps=12), Density(probes=2, steps=8, deflate=2)])
def test_interrupted_chains_end_as_uninterrupted_ones(metric: Density) -> None:
    whole = landscape.evaluate(metric, network(), memory=1 << 22)
    for steps in (1, 3):
        journal, record = Stops(steps), Record()
        for _ in range(200):
            try:
                landscape.evaluate(metric, network(), journal=journal, record=record, memory=1 << 22)
                break
            except KeyboardInterrupt:
                journal.after = steps
        for name, variable in whole.variables.items():
            if name != "wall_seconds":
                assert np.array_equal(
                    variable.data, record[name], equal_nan=variable.data.dtype.kind == "f"
                ), name


def test_more_probes_keep_those_that_are_done(tmp_path: object) -> None:
    few = landscape.measure(Density(probes=2, steps=12), network(), out=tmp_path)
    more = landscape.measure(Density(probes=5, steps=12), network(), out=tmp_path)
    assert np.array_equal(few["ritz_values"].values, more["ritz_values"].values[:2], equal_nan=True)
    whole = landscape.measure(Density(probes=5, steps=12), network())
    assert np.allclose(whole["density"].values, more["density"].values, rtol=1e-9)


def test_one_layer_and_the_input() -> None:
    problem = network()
    for options, matrix in (
        ({"layer": "2.bias"}, landscape.hessian(problem.only("2.bias"))),
        ({"curvature": "input_hessian", "example": 2}, landscape.input_hessian(problem, 2)),
    ):
        values = torch.linalg.eigvalsh(matrix @ torch.eye(matrix.shape[0], dtype=torch.float64)).numpy()
        ds = landscape.measure(Density(steps=50, **options), problem)
        found = np.sort(ds["ritz_values"].values[0])
        assert np.allclose(found[np.isfinite(found)], values, atol=1e-9 * np.abs(values).max())


def test_a_logarithmic_density_is_per_decade() -> None:
    values = np.geomspace(1e-3, 10, 400)  # a hundred eigenvalues in each of four decades
    ds = landscape.measure(Density(log=True, probes=16, steps=120, width=0.1), quadratic(list(values)))
    assert float(ds["width"]) == pytest.approx(0.1)
    inside = (ds["x"].values > 1e-2) & (ds["x"].values < 1)
    assert ds["density"].values[inside].mean() == pytest.approx(0.25, rel=0.05)


def test_chains_that_end_early_leave_blanks() -> None:
    ds = landscape.measure(Density(probes=2, steps=25), quadratic([3.0, 3.0, 1.0, 1.0, *np.zeros(26)]))
    assert ds["ritz_values"].shape == ds["alpha"].shape == (2, 25)
    assert np.isfinite(ds["ritz_values"].values).sum(axis=1).max() <= 3
    assert np.allclose(np.nansum(ds["weights"].values, axis=1), 1.0)


def test_a_logarithmic_kernel_is_at_most_a_third_of_a_decade() -> None:
    values = [*np.geomspace(1e-3, 1, 30), *-np.geomspace(1e-3, 1e-2, 10), *np.zeros(60)]
    ds = landscape.measure(Density(log=True, probes=4, steps=12), quadratic(values))
    assert float(ds["width"]) <= 0.3 + 1e-12
