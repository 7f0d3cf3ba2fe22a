"""The ways to a smooth network's trace: residual, second differences, deflation, bf16, and the pilot's choice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from cases_traces import Smooth, smooth
from torch import Tensor, nn

import landscape
from landscape import seeds
from landscape.errors import Refused
from landscape.metrics import Trace
from landscape.metrics.base import Journal
from landscape.record import Record
from landscape.second_differences import Centre
from landscape.testbeds import nets
from landscape.traces import deflation, pilot
from landscape.traces.plan import PAIRS, Plan

WAYS: dict[str, dict[str, object]] = {
    "probes": {"method": "hutchinson"},
    "residual": {"method": "residual"},
    "differences": {"method": "differences"},
    "auto": {"method": "auto", "max_probes": 32},
    "auto, total": {"method": "auto", "per_layer": False, "max_probes": 32},
    "deflated": {"method": "hutchinson", "deflate": 3},
}


def rough(A: object, count: int, seed: int) -> Tensor:
    """Directions that are no eigenvectors at all."""
    return torch.randn(A.shape[0], count, generator=seeds.generator(3, "rough", 0), dtype=A.dtype)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deflation, "top_directions", rough)


def metric(name: str, **options: object) -> Trace:
    return Trace(**{"rtol": 0.0, "max_probes": 32, **WAYS[name], **options})


def within(values: object, errors: object, truth: object) -> bool:
    """4.5 calibrated standard errors: false alarm below 1e-4 for each number."""
    return bool(np.all(np.abs(np.asarray(values) - truth) <= 4.5 * np.asarray(errors)))


@pytest.mark.parametrize("case", ["gelu", "tied", "gpt"])
@pytest.mark.parametrize("name", list(WAYS))
def test_every_way_finds_the_trace(name: str, case: str) -> None:
    small = smooth(case)
    record = landscape.evaluate(metric(name), small.problem, 1)
    assert within(record["trace"], record["trace_stderr"], float(small.H.trace()))
    assert 0 < float(record["trace_stderr"]) < 2 * abs(float(small.H.trace()))
    assert ("layer_trace" in record) == (record.attrs["way"] != "differences")
    if "layer_trace" in record:
        assert within(record["layer_trace"], record["layer_trace_stderr"] + 1e-9, small.blocks(small.H))
        assert float(record["layer_trace"].sum()) == pytest.approx(float(record["trace"]), rel=1e-9)


@pytest.mark.parametrize("name", list(WAYS))
def test_more_probes_resume_to_the_same_bits(name: str, tmp_path: Path) -> None:
    small, path = smooth("gelu"), tmp_path / "trace.h5"
    whole = landscape.measure(metric(name), small.problem, check=False)
    landscape.measure(metric(name, max_probes=16), small.problem, out=path, check=False)
    resumed = landscape.measure(metric(name), small.problem, out=path, check=False)
    assert float(resumed["trace"]) == float(whole["trace"])
    assert float(resumed["trace_stderr"]) == float(whole["trace_stderr"])
    for key in {"samples", "totals", "output_samples", "corrections", "pilot_ggn"} & set(whole.variables):
        np.testing.assert_array_equal(resumed[key], whole[key])


class _Broken(Journal):
    """Stops an evaluation after some blocks."""

    def __init__(self, blocks: int):
        self.left = blocks

    def progress(self, record: Record, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", list(WAYS))
def test_block_size_and_interruption_change_no_sample(name: str) -> None:
    small = smooth("gelu")
    whole = landscape.evaluate(metric(name), small.problem)
    # Memory for three vectors at a time.
    memory = 3 * 2 * small.problem.size * 32
    record = Record()
    with pytest.raises(KeyboardInterrupt):
        landscape.evaluate(metric(name), small.problem, memory=memory, journal=_Broken(4), record=record)
    cut = landscape.evaluate(metric(name), small.problem, memory=memory, record=record)
    assert cut.attrs["block_size"] == 3
    assert cut.attrs["plan"] == whole.attrs["plan"]
    # The Gram matrix of a block is one matrix product, whose last bit follows its width.
    assert float(cut["trace"]) == pytest.approx(float(whole["trace"]), rel=1e-13)
    for key in {"totals", "output_samples", "corrections"} & set(whole.variables):
        np.testing.assert_array_equal(cut[key], whole[key])


# --- the pilot -------------------------------------------------------------------------------------------


def piloted(residual: float, ggn: float, noise: float, **changes: object) -> pilot.Pilot:
    """A pilot of independent spreads around a trace of 10, of a network with 1000 parameters."""
    draws = np.random.default_rng(0)
    r, g, o = draws.normal(size=(3, 400)) * np.array([[residual], [ggn], [noise]])
    made = pilot.Pilot(
        residual=4 + r, ggn=6 + g, output=6 + o, products=np.array([10.0, 11.0]),
        differences=np.array([10.0, 11.0]), measured=8, size=1000, examples=640, largest=64,
        operations=2000.0, columns=500,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


BOTH = {"matrices": ["hessian", "residual"], "forms": ["products", "differences"]}


def test_the_pilot_weighs_variance_and_work() -> None:
    plain, words = pilot.choose(piloted(1.0, 1.0, 5.0), **BOTH)
    assert (plain.plan.matrix, plain.plan.form) == ("hessian", "differences")
    assert "hessian by differences" in words
    assert "residual by" in words
    split, _ = pilot.choose(piloted(0.3, 5.0, 0.3), **BOTH)
    assert (split.plan.matrix, split.plan.form) == ("residual", "differences")
    assert split.plan.outputs >= 1
    noisy, _ = pilot.choose(piloted(0.3, 5.0, 2.0), **BOTH)
    assert noisy.plan.outputs > split.plan.outputs
    exact, _ = pilot.choose(piloted(0.3, 5.0, 2.0, columns=5), **BOTH)
    assert exact.exact_ggn
    assert exact.plan.outputs == 0
    layered, _ = pilot.choose(piloted(1.0, 1.0, 5.0), matrices=BOTH["matrices"], forms=["products"])
    assert layered.plan.form == "products"


def test_second_differences_that_are_off_are_not_chosen() -> None:
    kinks, words = pilot.choose(piloted(1.0, 1.0, 5.0, differences=np.array([14.0, 3.0])), **BOTH)
    assert kinks.plan == Plan("hessian")
    assert "kinks" in words
    little, _ = pilot.choose(piloted(1.0, 1.0, 5.0, differences=np.array([10.2, 11.2])), **BOTH)
    assert little.plan.form == "products"
    forced, _ = pilot.choose(
        piloted(1.0, 1.0, 5.0, differences=np.array([10.2, 11.2])),
        matrices=BOTH["matrices"],
        forms=["differences"],
    )
    assert forced.plan.form == "differences"


def test_groups_follow_from_counts() -> None:
    wide = pilot.choose(piloted(1.0, 1.0, 5.0, operations=1e7), **BOTH)[0]
    assert wide.plan.examples == 1
    assert pilot.choose(piloted(1.0, 1.0, 5.0), **BOTH)[0].plan.examples == 64
    assert pilot.choose(piloted(1.0, 1.0, 5.0, largest=9), **BOTH)[0].plan.examples == 9


def test_no_output_probes_no_residual() -> None:
    none = piloted(0.1, 5.0, 1.0, output=None, columns=None)
    assert pilot.choose(none, **BOTH)[0].plan.matrix == "hessian"
    with pytest.raises(Refused, match="use method='hutchinson'"):
        pilot.choose(none, matrices=["residual"], forms=["products"])


def test_the_choice_and_the_pilot_are_stored() -> None:
    record = landscape.evaluate(metric("auto"), smooth("gelu").problem)
    assert "least predicted work" in record.attrs["reason"]
    assert Plan.of(record.attrs["plan"]).form == "products"
    for name in ("pilot_residual", "pilot_ggn", "pilot_output"):
        assert record[name].shape == (12,)
    other = landscape.evaluate(metric("auto", rtol=0.1, max_probes=16), smooth("gelu").problem)
    assert other.attrs["plan"] == record.attrs["plan"]


def test_the_pilot_sees_what_dense_matrices_say() -> None:
    small = smooth("gelu")
    found = pilot.run(small.problem, 0)
    first, _ = next(small.problem.split(5))
    eye = torch.eye(small.problem.size, dtype=torch.float64)
    assert found.measured == 5
    assert found.examples == 40
    assert found.largest == 13
    assert found.operations == 2 * (6 * 8 + 8 * 4 + 4 * 3)  # multiplications and additions of the layers
    H, G = first.hvp(eye), first.ggn_vp(eye)
    for values, A in ((found.residual, H - G), (found.ggn, G), (found.output, G)):
        assert abs(values.mean() - float(A.trace())) < 5 * values.std(ddof=1) / 12**0.5
    np.testing.assert_allclose(found.products, found.differences, rtol=1e-3)


def test_a_piecewise_linear_network_with_many_columns_is_probed_in_output_space() -> None:
    model = nets.mlp([5, 30, 6], nn.ReLU).double()
    x = torch.randn(30, 5, generator=seeds.generator(0, "many columns", 0), dtype=torch.float64)
    problem = landscape.Problem(model, nn.CrossEntropyLoss(), [(x, torch.arange(30) % 6)])
    truth = float(landscape.evaluate(Trace(), problem)["trace"])
    record = landscape.evaluate(Trace(max_probes=4, rtol=0.0), problem)
    assert record.attrs["way"] == "output_probes"
    assert "more than max_probes = 4" in record.attrs["reason"]
    found = landscape.evaluate(Trace(method="hutchinson", curvature="ggn", rtol=0.0, max_probes=64), problem)
    assert within(found["trace"], found["trace_stderr"], truth)


def test_black_boxes_and_training_mode_are_probed_plainly() -> None:
    small = smooth("gelu").problem
    model = small.evaluator.model
    black = landscape.Problem(
        model, forward=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), data=small.batches.data
    )
    total = landscape.evaluate(Trace(per_layer=False, max_probes=64, rtol=0.0), black)
    assert total.attrs["way"] in {"probes", "differences"}
    assert within(total["trace"], total["trace_stderr"], float(smooth("gelu").H.trace()))
    with pytest.raises(Refused, match="cannot be had from forward="):
        landscape.evaluate(Trace(method="residual"), black)
    training = landscape.evaluate(Trace(max_probes=32), small.replace(mode="train"))
    assert training.attrs["way"] == "probes"
    assert "pilot_ggn" not in training
    with pytest.raises(Refused, match="mode='train'"):
        landscape.evaluate(Trace(method="differences"), small.replace(mode="train"))


# --- deflation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("converged", [False, True])
def test_deflation_splits_the_trace_whatever_the_directions(converged: bool) -> None:
    small = smooth("tied")
    H, n = small.H, small.problem.size
    U = torch.linalg.eigh(H)[1][:, -3:] if converged else rough(H, 3, 0)
    known = deflation.deflation(lambda V: H @ V, U, small.problem.space)
    eye = torch.eye(n, dtype=torch.float64)
    rest = deflation.projected(lambda V: H @ V, known.vectors, eye)
    torch.testing.assert_close(known.layers.sum(), known.quotients.sum(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(known.layers.numpy() + small.blocks(rest), small.blocks(H), atol=1e-12)
    if converged:
        torch.testing.assert_close(known.quotients, torch.linalg.eigvalsh(H)[-3:], rtol=1e-10, atol=1e-12)


def test_deflation_by_top_eigenvectors_takes_variance_out(monkeypatch: pytest.MonkeyPatch) -> None:
    small = smooth("gelu")
    top = torch.linalg.eigh(small.H)[1][:, -6:]
    monkeypatch.setattr(deflation, "top_directions", lambda *_: top)
    plain = landscape.evaluate(
        Trace(method="hutchinson", frobenius=True, max_probes=64, rtol=0.0), small.problem
    )
    found = landscape.evaluate(metric("deflated", deflate=6, max_probes=64), small.problem)
    assert found.attrs["way"] == "deflated"
    assert found.variables["deflation_vectors"].sidecar
    assert float(found["trace_stderr"]) < 0.5 * float(plain["trace_stderr"])
    assert within(found["trace"], found["trace_stderr"], float(small.H.trace()))


def test_deflation_by_our_own_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    small = smooth("gelu")
    found = landscape.evaluate(metric("deflated"), small.problem)
    top = torch.linalg.eigvalsh(small.H).flip(0)[:3].numpy()
    np.testing.assert_allclose(np.sort(found["deflation_quotients"])[::-1], top, rtol=0.05)


# --- bf16 --------------------------------------------------------------------------------------------------


def in_float32(small: Smooth) -> landscape.Problem:
    return small.problem.replace(dtype=torch.float32)


@pytest.mark.parametrize("method", ["hutchinson", "residual"])
def test_what_bf16_misses_is_measured_and_corrected(method: str) -> None:
    small = smooth("gpt")
    metric = Trace(method=method, probe_dtype="bfloat16", rtol=0.0, max_probes=64)
    record = landscape.evaluate(metric, in_float32(small))
    assert Plan.of(record.attrs["plan"]).bfloat16
    assert np.isnan(record["corrections"][PAIRS:]).all()
    missed = record["corrections"][:PAIRS]
    assert 0 < np.abs(missed.sum(axis=1)).max() < 0.1 * float(small.H.trace())
    assert within(record["trace"], record["trace_stderr"], float(small.H.trace()))
    assert within(record["layer_trace"], record["layer_trace_stderr"], small.blocks(small.H))
    exact = landscape.evaluate(dataclasses.replace(metric, probe_dtype="working"), in_float32(small))
    if method == "hutchinson":  # the same vectors in both precisions
        off = np.abs(record["samples"] - exact["samples"]).sum(axis=1) / np.abs(exact["samples"]).sum(axis=1)
        assert 1e-5 < off.max() < 0.05


def test_the_correction_is_the_mean_of_what_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cheap probe that is off by a tenth of v·Hv: the correction brings it back."""
    small = smooth("gelu")
    honest = Centre.along
    monkeypatch.setattr(Centre, "along", lambda *a: tuple(0.9 * part for part in honest(*a)))
    record = landscape.evaluate(metric("differences", max_probes=256), small.problem)
    truth = float(small.H.trace())
    share = float(record["corrections"][:PAIRS].mean()) / truth
    assert share == pytest.approx(0.1, abs=0.2)
    assert within(record["trace"], record["trace_stderr"], truth)
    # The error of the correction is part of the stated one.
    plain = record["totals"].std(ddof=1) / 256**0.5
    pairs = record["corrections"][:PAIRS].std(ddof=1) / PAIRS**0.5
    assert float(record["trace_stderr"]) > 0.95 * np.hypot(plain, pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe_dtype": "bfloat16", "method": "exact"}, "probe_dtype='bfloat16' goes with"),
        ({"probe_dtype": "bfloat16", "method": "xtrace"}, "probe_dtype='bfloat16' goes with"),
        ({"probe_dtype": "bfloat16", "frobenius": True}, "probe_dtype='bfloat16' goes with"),
        ({"deflate": -1}, "deflate is -1; allowed is a number of eigenvectors >= 0"),
        ({"deflate": 2, "method": "xtrace"}, "deflate=2 goes with method='hutchinson' or 'auto'"),
        ({"deflate": 2, "frobenius": True}, "deflate=2 goes with"),
        ({"method": "residual", "frobenius": True}, "gives no Frobenius norm"),
        ({"method": "residual", "curvature": "ggn"}, "is for curvature='hessian'"),
    ],
)
def test_settings_that_exclude_each_other_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trace(**options)


def test_bf16_of_float64_is_refused() -> None:
    with pytest.raises(Refused, match="makes products of float32 problems cheaper"):
        landscape.evaluate(Trace(method="hutchinson", probe_dtype="bfloat16"), smooth("gelu").problem)
