"""What holds for every registered metric, present and future: none is named here.

What a metric has to say for itself stands in its class: `loss_powers`, `seed_chooses`, and with which variable
`<headline>_stderr` it states its error. Ranks are tested in the same way where they are tested at all.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import every
import h5py
import netCDF4
import numpy as np
import pytest
import torch
import xarray
from torch import nn

import landscape
from landscape import Problem
from landscape.errors import Refused
from landscape.metrics.base import Metric
from landscape.record import Record

# Standard errors that two estimates may differ by; once in a million.
_SIGMAS = 5.0
# Of what is not estimated: solves and searches that begin elsewhere stop within their tolerances, all else agrees
# to rounding.
_SOLVED, _ROUNDED = 2e-3, 1e-9

each = pytest.mark.parametrize("name", every.names())


def test_there_is_something_to_test() -> None:
    assert len(every.names()) >= 18


def compared(metric: Metric, a: Record, b: Record, rtol: float) -> None:
    """Both headlines agree within their stated errors, or to `rtol` where none is stated."""
    x, y = (np.asarray(r[metric.headline], float) for r in (a, b))
    assert x.shape == y.shape
    room = rtol * max(np.abs(x).max(initial=0.0), np.abs(y).max(initial=0.0)) + 1e-12
    key = f"{metric.headline}_stderr"
    if key not in a and not all(bool(r["converged"]) for r in (a, b) if "converged" in r):
        return  # a solve that says it did not converge claims nothing
    if key in a and key in b:
        room = room + _SIGMAS * np.hypot(np.asarray(a[key]), np.asarray(b[key]))
    if "residual_norm" in a:
        room = room + np.asarray(a["residual_norm"]) + np.asarray(b["residual_norm"])
    # An estimate that states no error (NaN) claims nothing.
    assert np.all((np.abs(x - y) <= room) | ~np.isfinite(room)), (x, y, room)


# --- data ------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("sizes", [(5, 6, 1), (1,) * 12], ids=["ragged", "single"])
def test_the_cut_of_the_data_does_not_matter(name: str, sizes: tuple[int, ...]) -> None:
    metric = every.tiny(name)
    whole, cut = (
        landscape.evaluate(metric, every.problem(batches=every.data(s), dtype=torch.float64), 3)
        for s in ((6, 6), sizes)
    )
    compared(metric, whole, cut, _ROUNDED)


@each
def test_the_order_of_the_data_does_not_matter(name: str) -> None:
    metric = every.tiny(name)
    turned = [(x.flip(0), y.flip(0)) for x, y in reversed(every.data())]
    there, back = (
        landscape.evaluate(metric, every.problem(batches=b, dtype=torch.float64), 3)
        for b in (every.data(), turned)
    )
    compared(metric, there, back, _ROUNDED)


@pytest.mark.slow
@each
def test_neither_matters_for_smooth_networks_and_other_settings(name: str) -> None:
    ragged = every.data((5, 6, 1))
    for label, metric in every.variants(name):
        found = [
            every.evaluated(
                metric, every.problem(every.network(smooth=True), batches, dtype=torch.float64), seed
            )
            for batches, seed in ((every.data(), 3), (ragged, 3), (every.data(), 4))
        ]
        if found[0] is None or found[1] is None or found[2] is None:
            assert found == [None] * 3, label
            continue
        compared(metric, found[0], found[1], _ROUNDED)
        if not metric.seed_chooses:
            compared(metric, found[0], found[2], _SOLVED)


@each
def test_float32_agrees_with_float64(name: str) -> None:
    metric = every.tiny(name)
    wide, narrow = (
        landscape.evaluate(metric, every.problem(dtype=dtype), 3) for dtype in (torch.float64, torch.float32)
    )
    compared(metric, wide, narrow, _SOLVED)


@each
def test_a_nan_in_one_example_is_refused_or_told(name: str) -> None:
    """A number that comes of it must be NaN, or must say what it leaves out, or must not depend on the data."""
    metric = every.tiny(name)
    bad = every.data()
    bad[0][0][3, 1] = math.nan
    other = [(x + 1, y) for x, y in every.data()]
    independent = not every.differing(
        *(
            _headline(metric, landscape.evaluate(metric, every.problem(batches=b)))
            for b in (every.data(), other)
        )
    )
    for check in (True, False):
        found, refusal = _measured_or_refused(metric, every.problem(batches=bad), check)
        if found is None:
            assert not check or any(word in refusal for word in ("nan", "NaN", "finite")), refusal
            continue
        silent = np.isfinite(found[metric.headline].values.astype(float)).all()
        assert not silent or independent or int(found.get("not_finite", 0)) > 0, found[metric.headline]


def _measured_or_refused(metric: Metric, measured: Problem, check: bool) -> tuple[xarray.Dataset | None, str]:
    try:
        return landscape.measure(metric, measured, check=check), ""
    except (Refused, ValueError) as error:
        return None, str(error)


def _headline(metric: Metric, record: Record) -> Record:
    return Record({metric.headline: record.variables[metric.headline]})


# --- seeds ------------------------------------------------------------------------------------------------


@each
def test_a_seed_gives_the_same_bits_and_another_one_the_same_within_errors(name: str) -> None:
    metric = every.tiny(name)
    first, again, other = (landscape.evaluate(metric, every.problem(), seed) for seed in (3, 3, 4))
    assert not every.differing(first, again)
    if not metric.seed_chooses:
        compared(metric, first, other, _SOLVED)


# --- the loss ---------------------------------------------------------------------------------------------


@each
def test_scaling_the_loss_scales_the_result(name: str) -> None:
    """By a power of two near 1e-8, for which rounding is the same."""
    plain, scale = nn.CrossEntropyLoss(), 2.0**-27
    for label, metric in every.variants(name):
        found = [
            every.evaluated(
                metric,
                every.problem(
                    loss=lambda f, y, c=c: c * plain(f, y), weight=lambda b: len(b[0]), dtype=torch.float64
                ),
            )
            for c in (1.0, scale)
        ]
        if found[0] is None or found[1] is None:
            assert found[0] is found[1] or not metric.loss_powers, label
            continue
        for key, power in metric.loss_powers.items():
            if key not in found[0]:
                continue
            x, y = np.asarray(found[0][key], float), np.asarray(found[1][key], float)
            np.testing.assert_allclose(y, x * scale**power, rtol=1e-6, err_msg=f"{label}: {key}")


# --- the model --------------------------------------------------------------------------------------------


@each
def test_frozen_parameters_are_left_out(name: str) -> None:
    metric = every.tiny(name)
    frozen = every.network()
    frozen[0].weight.requires_grad_(False)
    found = every.evaluated(metric, every.problem(frozen))
    named = every.evaluated(metric, every.problem(parameters=["0.bias", "2.*"]))
    assert (found is None) == (named is None)
    if found is not None and named is not None:
        assert not every.differing(found, named)
    assert not frozen[0].weight.requires_grad


class Fused(nn.Sequential):
    """Raises at one of its passes."""

    def __init__(self, *layers: nn.Module, at: int):
        super().__init__(*layers)
        self.passes, self.at = 0, at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes == self.at:
            raise KeyboardInterrupt
        return super().forward(x)


def fused(at: int = -1) -> Fused:
    """A network in a state that is easily lost: training mode but for a part, statistics, gradients."""
    draws = torch.Generator().manual_seed(0)
    model = Fused(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3), at=at)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) * 0.6)
        model[1].running_mean.add_(0.3)
    model.train()
    model[0].eval()
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draws)
    model[4].bias.grad = None
    model[1].bias.requires_grad_(False)
    return model


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a measurement must leave alone, and where it lies."""
    return {
        "tensors": {k: (t.data_ptr(), t.numpy().tobytes()) for k, t in model.state_dict().items()},
        "grads": {
            k: p.grad if p.grad is None else p.grad.numpy().tobytes() for k, p in model.named_parameters()
        },
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in model.named_modules()},
        "hooks": {k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in model.named_modules()},
        "parameters": {k: id(p) for k, p in model.named_parameters()},
        "attributes": {k: sorted(vars(m)) for k, m in model.named_modules()},
        "random": torch.get_rng_state().numpy().tobytes(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad_mode": torch.is_grad_enabled(),
    }


@each
def test_the_model_is_left_as_it_was_also_when_it_raises(name: str) -> None:
    metric, model = every.tiny(name), fused()
    before = state_of(model)
    with contextlib.suppress(Refused):
        landscape.measure(metric, every.problem(model))
    assert state_of(model) == before
    for share in (0.0, 0.3, 0.6, 0.95):
        broken = fused(at=max(1, int(share * model.passes)))
        before = state_of(broken)
        with pytest.raises(KeyboardInterrupt):
            landscape.measure(metric, every.problem(broken))
        after = state_of(broken)
        assert {k for k in before if before[k] != after[k]} == set(), share


# --- files ------------------------------------------------------------------------------------------------

PROVENANCE = set(
    "metric configuration fixed_configuration seed complete exit_code landscape_version python_version "  # noqa: SIM905
    "torch_version numpy_version machine git_commit git_dirty command time device dtype mode threads world_size "
    "parameters_fingerprint data_fingerprint parameter_ranges examples memory memory_plan check products kernels "
    "headline unit citation block_size reduction microbatch".split()
)


@each
def test_the_file_is_complete_and_opens_everywhere(name: str, tmp_path: Path) -> None:
    metric, path = every.tiny(name), tmp_path / f"{name}.h5"
    ds = landscape.measure(metric, every.problem(), out=path)
    stored = landscape.open(path)
    assert not every.differing(ds, stored)
    assert not PROVENANCE - set(stored.attrs)
    assert json.loads(stored.attrs["configuration"]) == json.loads(json.dumps(metric.configuration()))
    assert stored.attrs["complete"] is True
    assert stored.attrs["exit_code"] in {0, 4}
    assert stored.attrs["citation"]
    assert {"matvecs", "gradients", "values", "wall_seconds", "done", metric.headline} <= set(
        stored.variables
    )
    assert {"converged"} & set(stored.variables) or "done" in stored.variables
    for key, variable in stored.variables.items():
        assert variable.attrs["long_name"] or key in stored.dims, f"{key} is without words"
        assert all(dim in stored.dims for dim in variable.dims)
    expected = np.asarray(stored[metric.headline].values)
    for engine in ("h5netcdf", "netcdf4"):
        with xarray.open_dataset(path, engine=engine) as opened:
            np.testing.assert_array_equal(opened[metric.headline].values, expected)
            assert set(opened.variables) <= set(stored.variables)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file[metric.headline][()], expected)
        assert PROVENANCE | {"schema_version"} <= set(file.attrs)
    with netCDF4.Dataset(path) as file:
        np.testing.assert_array_equal(np.ma.filled(file[metric.headline][...], np.nan), expected)


# --- interruptions ----------------------------------------------------------------------------------------


def interrupted(metric: Metric, make: Callable[[], Problem], stride: int) -> tuple[Record, int, int]:
    """The record after an interruption at every `stride`-th moment, how many there were, and the loss's passes."""
    journal, stops, spent = every.Memory(stride), 0, 0
    while True:
        measured = make()
        record = every.Memory()
        record.record, record.states, record.left = journal.record, journal.states, stride
        journal = record
        try:
            held = journal.record or Record()
            return landscape.evaluate(metric, measured, 3, journal=journal, record=held), stops, spent
        except every.StoppedError:
            stops += 1
            assert stops < 1000, "it does not get on"


def resumes(label: str, metric: Metric, make: Callable[[], Problem], most: int) -> int:
    counted = every.Memory()
    try:
        whole = landscape.evaluate(metric, make(), 3, journal=counted)
    except Refused:
        return 0
    found, stops, _ = interrupted(metric, make, max(1, counted.moments // most))
    assert not every.differing(whole, found), (label, every.differing(whole, found))
    attrs = {k: (v, found.attrs.get(k)) for k, v in whole.attrs.items() if v != found.attrs.get(k)}
    assert not attrs, (label, attrs)
    return stops


@each
def test_interrupted_anywhere_it_ends_with_the_same_bits(name: str) -> None:
    stops = [resumes(label, metric, every.problem, 6) for label, metric in every.variants(name)]
    assert sum(stops) > 0


@pytest.mark.slow
@each
def test_interrupted_at_every_moment_smooth_networks_too(name: str) -> None:
    for label, metric in every.variants(name):
        resumes(label, metric, every.problem, 25)
        resumes(label, metric, lambda: every.problem(every.network(smooth=True), microbatch=4), 25)
