"""The run: rounds, blocks, resume to the bit, refusals; with metrics made for the test."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import landscape
from landscape import journal, results, seeds
from landscape.checks import Need
from landscape.metrics import Trace, registry
from landscape.metrics.base import Metric, Round, SequentialMetric, State, Values, setting
from landscape.results import Record, Variable


def small_problem(**options: object) -> landscape.Problem:
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) * 0.5)
    x, y = torch.randn(20, 6, generator=draws), torch.randint(0, 3, (20,), generator=draws)
    return landscape.Problem(model, nn.CrossEntropyLoss(), [(x[:12], y[:12]), (x[12:], y[12:])], **options)


@dataclass(frozen=True)
class Draws(Metric):
    """Each unit is a random number; a refinement round adds units at points that depend on the first."""

    name: ClassVar[str] = "draws"
    headline: ClassVar[str] = "mean"
    unit: ClassVar[str] = "draw"
    block: ClassVar[int] = 3
    rounds: int = setting(2, "how many rounds", grows=True)
    pause: float = setting(0.0, "seconds a block")

    def needs(self) -> frozenset[Need]:
        return frozenset({Need.VALUE})

    def prepare(self, problem: landscape.Problem, seed: int) -> Record:
        direction = torch.randn(problem.size, generator=seeds.generator(seed, "draws/direction", 0)).numpy()
        return Record({"direction": Variable(("parameter",), direction, sidecar=True)}, {"note": "prepared"})

    def units(self, record: Record) -> Round | None:
        stop = record.attrs["stop"]
        if stop == 7 * self.rounds:
            return None
        coordinates = np.arange(stop + 7, dtype=float)
        if stop:
            coordinates[:stop] = record["place"]
            coordinates[stop:] = record["draw_value"][:stop].max()
        return Round(stop + 7, {"place": Variable(("draw",), coordinates)})

    def measure(
        self, problem: landscape.Problem, shared: Record, block: range, generators: Sequence[torch.Generator]
    ) -> Values:
        time.sleep(self.pause)
        drawn = [float(torch.rand((), generator=g, dtype=torch.float64)) for g in generators]
        place = shared["place"][block.start : block.stop]
        total = np.array(drawn) + place + float(problem.value()) + shared["direction"][0]
        return {"draw_value": Variable(("draw",), total)}

    def summarize(self, record: Record) -> Values:
        return {"mean": Variable((), np.asarray(record["draw_value"][record["done"]].mean()))}

    def outlook(self, problem: landscape.Problem) -> tuple[int, int]:
        return 7, 7 * self.rounds


@dataclass(frozen=True)
class Power(SequentialMetric):
    """Power iteration: a unit is a start vector, its state a vector and a count."""

    name: ClassVar[str] = "power"
    headline: ClassVar[str] = "largest"
    unit: ClassVar[str] = "start"
    block: ClassVar[int] = 2
    starts: int = setting(3, "start vectors", grows=True)
    steps: int = setting(40, "iterations")
    pause: float = setting(0.0, "seconds a step")

    def needs(self) -> frozenset[Need]:
        return frozenset({Need.HESSIAN})

    def prepare(self, problem: landscape.Problem, seed: int) -> Record:
        return Record()

    def units(self, record: Record) -> Round | None:
        return None if record.attrs["stop"] == self.starts else Round(self.starts)

    def start(
        self, problem: landscape.Problem, shared: Record, block: range, generators: Sequence[torch.Generator]
    ) -> State:
        columns = [torch.randn(problem.size, generator=g) for g in generators]
        return {"V": torch.stack(columns, dim=1).numpy(), "step": np.int64(0)}

    def step(self, problem: landscape.Problem, shared: Record, block: range, state: State) -> State:
        time.sleep(self.pause)
        V = torch.from_numpy(state["V"])
        return {"V": problem.hvp(V / V.norm(dim=0)).numpy(), "step": state["step"] + 1}

    def result(self, problem: landscape.Problem, shared: Record, block: range, state: State) -> Values | None:
        if state["step"] < self.steps:
            return None
        return {"norms": Variable(("start",), np.linalg.norm(state["V"], axis=0))}

    def summarize(self, record: Record) -> Values:
        return {"largest": Variable((), np.asarray(record["norms"][record["done"]].max()))}

    def outlook(self, problem: landscape.Problem) -> tuple[int, int]:
        return self.starts * self.steps, self.starts * self.steps


@dataclass(frozen=True)
class Nested(Draws):
    """A metric that measures another one, by name, through `evaluate`."""

    name: ClassVar[str] = "nested"
    headline: ClassVar[str] = "mean"

    def measure(
        self, problem: landscape.Problem, shared: Record, block: range, generators: Sequence[torch.Generator]
    ) -> Values:
        theta = problem.parameters_vector()
        inner = registry.load("trace")()
        found = [float(landscape.evaluate(inner, problem.at(theta * (1 + 0.1 * i)))["trace"]) for i in block]
        return {"draw_value": Variable(("draw",), np.array(found))}


METRICS = [Draws(), Power(), Trace(max_probes=48, rtol=0.0), Trace(method="exact", frobenius=True)]


def same(a: object, b: object) -> bool:
    """Whether two datasets agree to the bit, time apart."""
    names = set(a.variables) | set(b.variables)  # type: ignore[attr-defined]
    return all(
        np.array_equal(a[n].values, b[n].values, equal_nan=a[n].dtype.kind == "f")  # type: ignore[index]
        for n in names - {"wall_seconds"}
    )


def test_rounds_and_refinement_depend_on_stored_values_only() -> None:
    problem = small_problem()
    record = landscape.evaluate(Draws(rounds=3), problem, seed=5)
    drawn = [
        float(torch.rand((), generator=seeds.generator(5, "draws", i), dtype=torch.float64))
        for i in range(21)
    ]
    rest = float(problem.value()) + float(
        torch.randn(problem.size, generator=seeds.generator(5, "draws/direction", 0))[0]
    )
    first = np.arange(7) + np.array(drawn[:7]) + rest
    second = first.max() + np.array(drawn[7:14]) + rest
    np.testing.assert_allclose(record["draw_value"][:14], [*first, *second], rtol=1e-14)
    assert record["done"].all()
    assert int(record["values"]) == 3 * 3  # three rounds of seven units in blocks of three


def test_a_sequential_metric_finds_the_largest_eigenvalue() -> None:
    problem = small_problem(dtype=torch.float64)
    dense = problem.hvp(torch.eye(problem.size, dtype=torch.float64))
    found = landscape.evaluate(Power(steps=300), small_problem())["largest"]
    assert found == pytest.approx(float(torch.linalg.eigvalsh(dense).abs().max()), rel=1e-4)


def test_a_metric_can_measure_another() -> None:
    problem = small_problem(dtype=torch.float64)
    record = landscape.evaluate(Nested(rounds=1), problem)
    moved = problem.at(problem.parameters_vector() * 1.2)
    eye = torch.eye(problem.size, dtype=torch.float64)
    assert record["draw_value"][2] == pytest.approx(float(moved.hvp(eye).trace()), rel=1e-12)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name + str(getattr(m, "method", "")))
def test_interrupted_runs_end_as_uninterrupted_ones(metric: Metric, tmp_path: Path) -> None:
    whole = landscape.measure(metric, small_problem(), out=tmp_path / "whole")
    without_file = landscape.measure(metric, small_problem())
    assert same(whole, without_file)
    stop_after = 0
    for attempt in range(200):

        def stop(_: object, limit: int = attempt) -> None:
            nonlocal stop_after
            stop_after += 1
            if stop_after > limit % 3:
                stop_after = 0
                raise KeyboardInterrupt

        try:
            resumed = landscape.measure(metric, small_problem(), out=tmp_path / "cut", progress=stop)
        except KeyboardInterrupt:
            assert landscape.open(tmp_path / "cut" / f"{metric.name}.h5").attrs["exit_code"] == 130
            continue
        break
    assert attempt > 0
    assert resumed.attrs["exit_code"] == whole.attrs["exit_code"] == (4 if metric == METRICS[2] else 0)
    assert same(whole, resumed)
    assert same(whole, landscape.open(tmp_path / "cut" / f"{metric.name}.h5"))


def test_the_state_of_a_sequential_block_is_kept_between_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_UNWRITTEN_SECONDS", 0.0)
    seen: list[int] = []

    @dataclass(frozen=True)
    class Watched(Power):
        def step(self, problem: landscape.Problem, shared: Record, block: range, state: State) -> State:
            seen.append(int(state["step"]))
            if len(seen) == 30:
                raise KeyboardInterrupt
            return super().step(problem, shared, block, state)

    metric = Watched(starts=2, steps=40, pause=0.001)
    with pytest.raises(KeyboardInterrupt):
        landscape.measure(metric, small_problem(), out=tmp_path)
    ds = landscape.measure(metric, small_problem(), out=tmp_path)
    assert seen[30] > 0  # it went on, it did not begin again
    assert same(ds, landscape.measure(Power(starts=2, steps=40), small_problem()))
    assert not list((tmp_path / ".parts").iterdir())


def test_a_larger_demand_keeps_all_units(tmp_path: Path) -> None:
    calls: list[object] = []
    landscape.measure(Trace(max_probes=20, rtol=0.0, method="hutchinson"), small_problem(), out=tmp_path)
    grown = landscape.measure(
        Trace(max_probes=64, rtol=0.0, method="hutchinson"),
        small_problem(),
        out=tmp_path,
        progress=calls.append,
    )
    fresh = landscape.measure(Trace(max_probes=64, rtol=0.0, method="hutchinson"), small_problem())
    names = set(fresh.variables) - {"wall_seconds", "matvecs"}  # half a block was measured again
    assert all(np.array_equal(grown[n], fresh[n], equal_nan=grown[n].dtype.kind == "f") for n in names)
    assert len(calls) == 3
    calls.clear()
    again = landscape.measure(
        Trace(max_probes=64, rtol=0.0, method="hutchinson"),
        small_problem(),
        out=tmp_path,
        progress=calls.append,
    )
    assert not calls
    assert same(grown, again)


def other_data() -> landscape.Problem:
    problem = small_problem()
    return problem.replace(data=[(x + 1, y) for x, y in problem.batches])


def other_cut() -> landscape.Problem:
    return small_problem(microbatch=5)


def other_model() -> landscape.Problem:
    problem = small_problem()
    return problem.at(problem.parameters_vector() * 2)


@pytest.mark.parametrize(
    ("metric", "problem", "seed", "named"),
    [
        (Trace(curvature="ggn"), small_problem, 0, "the metric's settings"),
        (Trace(), other_data, 0, "the data or their batches"),
        (Trace(), other_cut, 0, "the micro-batch"),
        (Trace(), other_model, 0, "the model's parameters"),
        (Trace(), small_problem, 1, "the seed"),
        (Trace(), lambda: small_problem(dtype=torch.float64), 0, "the dtype"),
    ],
)
def test_another_measurement_is_refused_and_named(
    metric: Trace, problem: object, seed: int, named: str, tmp_path: Path
) -> None:
    landscape.measure(Trace(), small_problem(), out=tmp_path)
    before = (tmp_path / "trace.h5").read_bytes()
    with pytest.raises(landscape.Refused, match=named) as refusal:
        landscape.measure(metric, problem(), out=tmp_path, seed=seed)  # type: ignore[operator]
    assert "overwrite" in str(refusal.value)
    assert (tmp_path / "trace.h5").read_bytes() == before
    landscape.measure(metric, problem(), out=tmp_path, seed=seed, overwrite=True)  # type: ignore[operator]
    assert (tmp_path / "trace.h5").read_bytes() != before


def test_the_file_says_what_was_measured(tmp_path: Path) -> None:
    ds = landscape.measure(Trace(), small_problem(), out=tmp_path / "x.h5")
    stored = landscape.open(tmp_path / "x.h5")
    told = (
        "metric configuration seed parameters_fingerprint data_fingerprint torch_version device dtype threads "
        "products kernels check citation time command"
    )
    for key in told.split():
        assert stored.attrs[key] == ds.attrs[key]
    assert stored.attrs["parameter_ranges"]["0.bias"] == [48, 56]
    assert stored.attrs["check"]["product_error"] < 1e-6
    assert int(stored["matvecs"]) == 83
    assert stored.attrs["examples"] == 20


def test_the_loader_is_read_once_to_keep_and_once_to_compare(tmp_path: Path) -> None:
    reads: list[int] = []
    batches = list(small_problem().batches)

    class Loader:
        def __iter__(self) -> Iterator[object]:
            reads.append(1)
            yield from batches

    def problem() -> landscape.Problem:
        return small_problem().replace(data=Loader())

    for options, expected in (({}, 2), ({"check": False}, 1), ({"out": tmp_path}, 2), ({"out": tmp_path}, 1)):
        reads.clear()
        landscape.measure(Trace(), problem(), **options)
        assert len(reads) == expected, options
    reads.clear()
    landscape.measure(Trace(method="hutchinson", max_probes=20), problem(), out=tmp_path, overwrite=True)
    landscape.measure(Trace(method="hutchinson", max_probes=40, rtol=0.0), problem(), out=tmp_path)
    assert len(reads) == 2 + 2  # each has its own check


def test_a_short_measurement_is_written_once_and_a_long_one_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bool] = []
    write = results.write

    def counted(path: Path, record: Record) -> None:
        written.append(bool(record.attrs["complete"]))
        write(path, record)

    monkeypatch.setattr(results, "write", counted)
    monkeypatch.setattr(journal, "_UNWRITTEN_SECONDS", 60.0)
    landscape.measure(Draws(), small_problem(), out=tmp_path / "short")
    assert written == [True]
    written.clear()
    monkeypatch.setattr(journal, "_UNWRITTEN_SECONDS", 0.0)
    landscape.measure(Draws(), small_problem(), out=tmp_path / "long")
    assert written[0] is False
    assert written[-1] is True


def test_without_check_it_says_so() -> None:
    ds = landscape.measure(Trace(), small_problem(), check=False)
    assert ds.attrs["check"] is None


def test_the_model_is_untouched_and_so_is_the_random_state() -> None:
    problem = small_problem(mode="eval")
    model = problem._arguments["model"]
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    landscape.measure(Trace(), problem)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_memory_cuts_blocks_not_results() -> None:
    wide = landscape.measure(Trace(method="hutchinson", max_probes=32, rtol=0.0), small_problem())
    tight = landscape.measure(
        Trace(method="hutchinson", max_probes=32, rtol=0.0), small_problem(), memory=20_000
    )
    assert tight.attrs["block_size"] < wide.attrs["block_size"] == 16
    np.testing.assert_array_equal(wide["samples"], tight["samples"])


def test_metrics_are_found_by_name_and_from_a_file(tmp_path: Path) -> None:
    assert registry.load("trace") is Trace
    with pytest.raises(landscape.UnknownMetric, match=r"did you mean trace\?.*Known: .*trace"):
        registry.load("trcae")
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom landscape.metrics.trace import Trace\n"
        "@dataclass(frozen=True)\nclass Mine(Trace):\n    name: ClassVar[str] = 'mine'\n"
    )
    assert registry.load(str(mine)).name == "mine"
    with pytest.raises(landscape.UnknownMetric, match="does not exist"):
        registry.load(str(tmp_path / "absent.py"))


def test_what_comes_before_the_first_unit_is_kept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = Trace(deflate=2, max_probes=16, rtol=0.0)
    path, write = tmp_path / "trace.h5", results.write_state

    def write_and_stop(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    assert journal.kept_in(path) is None
    monkeypatch.setattr(journal, "_UNWRITTEN_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_state", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            landscape.measure(metric, small_problem(), out=path)
    assert not path.exists()
    assert journal.kept_in(path) == tmp_path / ".parts" / "trace.state-prepare.safetensors"
    assert same(
        landscape.measure(metric, small_problem(), out=path), landscape.measure(metric, small_problem())
    )
    assert journal.kept_in(path) == path
    assert not list((tmp_path / ".parts").iterdir())


def test_a_state_is_of_one_demand_and_overwriting_takes_up_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_UNWRITTEN_SECONDS", 0.0)
    loaded: list[bool] = []

    @dataclass(frozen=True)
    class Watched(Power):
        def run_block(self, problem, shared, block, generators, journal):  # type: ignore[no-untyped-def]
            loaded.append(journal.load_state(block) is not None)
            return super().run_block(problem, shared, block, generators, journal)

        def step(self, problem: landscape.Problem, shared: Record, block: range, state: State) -> State:
            if len(loaded) == 1 and state["step"] == 5:
                raise KeyboardInterrupt
            return super().step(problem, shared, block, state)

    for changes, options, expected in (
        ({}, {}, True),
        ({"starts": 4}, {}, False),
        ({}, {"overwrite": True}, False),
    ):
        loaded.clear()
        out = tmp_path / f"{changes}{options}".replace("'", "")
        with pytest.raises(KeyboardInterrupt):
            landscape.measure(Watched(starts=2, steps=9), small_problem(), out=out)
        found = landscape.measure(
            Watched(**{"starts": 2, "steps": 9, **changes}), small_problem(), out=out, **options
        )
        assert loaded[1] is expected, (changes, options)
        assert same(found, landscape.measure(Power(**{"starts": 2, "steps": 9, **changes}), small_problem()))
