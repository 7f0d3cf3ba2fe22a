"""Data divided over ranks: sums equal to those of one process to 1e-12, and one message for what goes wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import torch
from test_ranks import measured
from test_run import Power, same
from torch import Tensor, nn

import landscape
from landscape import journal, metrics, ranks, sharded
from landscape.displaced import Displaced
from landscape.errors import RankLost, Refused


def ragged(*cuts: int) -> landscape.Problem:
    """Twenty examples cut so: batches of very different sizes, or fewer than ranks."""
    x, y = (torch.cat(parts) for parts in zip(*jobs.problem(dtype=torch.float64).batches, strict=True))
    pieces = [(x[a:b], y[a:b]) for a, b in itertools.pairwise((0, *cuts, 20))]
    return jobs.problem(dtype=torch.float64).replace(data=pieces)


def weighted() -> landscape.Problem:
    """Padding targets: batches weigh their valid targets, one of them nothing."""
    problem = ragged(3, 4, 11)
    batches = [(x, y.clone()) for x, y in problem.batches]
    batches[1][1][:] = -100
    batches[2][1][2:5] = -100
    return problem.replace(data=batches)


def convolutions() -> landscape.Problem:
    draws = torch.Generator().manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    x = torch.randn(9, 2, 6, 6, generator=draws)
    y = torch.randn(9, 3, generator=draws)
    return landscape.Problem(
        model, nn.MSELoss(), [(x[:5], y[:5]), (x[5:], y[5:])], dtype=torch.float64, microbatch=2
    )


PROBLEMS: dict[str, Callable[[], landscape.Problem]] = {
    "ragged": lambda: ragged(7, 8, 13, 19),
    "fewer than ranks": lambda: ragged(18),
    "one batch": ragged,
    "no valid target": weighted,
    "convolutions": convolutions,
    "differences": lambda: ragged(5, 6).replace(products="difference"),
    "sum": lambda: ragged(5, 6).replace(loss=nn.CrossEntropyLoss(reduction="sum"), reduction="sum"),
}


def everything(problem: landscape.Problem) -> dict[str, Tensor]:
    """All sums over data, at fixed vectors."""
    draws = torch.Generator().manual_seed(1)
    V = torch.randn(problem.size, 3, generator=draws, dtype=torch.float64)
    value, gradient = problem.value_and_gradient()
    found = {"value": problem.value(), "value too": value, "gradient": gradient}
    found |= {"gradient too": problem.gradient(), "Hv": problem.hvp(V[:, 0]), "HV": problem.hvp(V)}
    found |= {"GV": problem.ggn_vp(V), "EV": problem.empirical_fisher_vp(V)}
    moved = problem.at(problem.parameters_vector() + 0.1 * V[:, 1])
    found |= {"moved": moved.value(), "moved HV": moved.hvp(V)}
    with problem.displaced(V[:, 0], V[:, 1]) as at:
        assert isinstance(at, Displaced)
        found["displaced"] = torch.tensor(at.values([(0.1, 0.2), (0.0, 0.0), (1.0,)]), dtype=torch.float64)
    return found


def on_ranks(number: int, out: Path) -> None:
    with ranks.join(20.0) as team, sharded.group(team, torch.device("cpu")) as shard:  # type: ignore[union-attr]
        for name, build in PROBLEMS.items():
            problem = build().replace()
            problem.shard = shard
            torch.save(everything(problem), out / f"{name}-{number}.pt")


@pytest.mark.parametrize("size", [2, 4])
def test_sums_over_ranks_are_those_of_one_process(size: int, tmp_path: Path) -> None:
    assert jobs.run(size, lambda number: on_ranks(number, tmp_path)) == [0] * size
    for name, build in PROBLEMS.items():
        alone = everything(build())
        shared = [torch.load(tmp_path / f"{name}-{number}.pt") for number in range(size)]
        for key, expected in alone.items():
            # Differences of losses or gradients divide rounding by the step.
            allowed = 1e-8 if name == "differences" and key in {"Hv", "HV", "GV", "moved HV"} else 1e-12
            error = float((shared[0][key] - expected).norm() / expected.norm())
            assert error <= allowed, (name, key, error)
            assert all(torch.equal(shared[0][key], other[key]) for other in shared), (name, key)


@pytest.mark.parametrize(
    "name", ["trace", "eigenvalues", "surface", "adaptive_trace", "sharpness", "fisher_rao"]
)
def test_metrics_over_divided_data(name: str, tmp_path: Path) -> None:
    def measure(number: int) -> None:
        ds = measured(name, tmp_path / "two", shard="data")
        headline = np.asarray(ds[ds.attrs["headline"]].values)
        (tmp_path / f"{number}.json").write_text(json.dumps(headline.tolist()))

    alone = measured(name, tmp_path / "one")
    assert jobs.run(2, measure) == [0, 0]
    stored = landscape.open(tmp_path / "two" / f"{name}.h5")
    expected, found = alone[alone.attrs["headline"]].values, stored[alone.attrs["headline"]].values
    np.testing.assert_allclose(found, expected, rtol=2e-3 if name == "sharpness" else 2e-5)
    said = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert said[0] == said[1] == found.tolist()
    for key in ("parameters_fingerprint", "data_fingerprint", "exit_code", "examples", "products"):
        assert stored.attrs[key] == alone.attrs[key]
    assert stored.attrs["world_size"] == 2
    again = measured(name, tmp_path / "two")  # complete: it does not matter who asks
    assert again.attrs["time"] == stored.attrs["time"]


def test_divided_data_go_on_in_the_middle_of_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, interrupted between steps, end with the bits of two ranks that were not."""
    monkeypatch.setattr(journal, "_UNWRITTEN_SECONDS", 0.0)
    metric = Power(starts=2, steps=30)

    class Stops(Power):
        def step(self, problem: landscape.Problem, shared: Any, block: range, state: Any) -> Any:
            if int(state["step"]) == 17:
                raise KeyboardInterrupt
            return super().step(problem, shared, block, state)

    def whole(_: int) -> None:
        landscape.measure(metric, jobs.problem(), out=tmp_path / "whole", shard="data")

    def cut(_: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            landscape.measure(Stops(starts=2, steps=30), jobs.problem(), out=tmp_path / "cut", shard="data")

    def rest(number: int) -> None:
        seen: list[int] = []

        class Watched(Power):
            def step(self, problem: landscape.Problem, shared: Any, block: range, state: Any) -> Any:
                seen.append(int(state["step"]))
                return super().step(problem, shared, block, state)

        landscape.measure(Watched(starts=2, steps=30), jobs.problem(), out=tmp_path / "cut", shard="data")
        (tmp_path / f"seen{number}").write_text(str(seen[0]))

    assert [jobs.run(2, work) for work in (whole, cut, rest)] == [[0, 0]] * 3
    assert same(landscape.open(tmp_path / "whole/power.h5"), landscape.open(tmp_path / "cut/power.h5"))
    assert (tmp_path / "seen0").read_text() == (tmp_path / "seen1").read_text() != "0"


class FailsOn(nn.Module):
    """A network that cannot do one of its examples, or gives nan for it, once it is asked for derivatives."""

    def __init__(self, how: str):
        super().__init__()
        self.inner, self.how = nn.Linear(4, 2), how

    def forward(self, x: Tensor) -> Tensor:
        marked = bool((x[:, 0] > 50).any())
        if marked and self.how == "raises":
            raise ZeroDivisionError("this example cannot be")
        return self.inner(x) * (torch.where(x[:, :1] > 50, torch.nan, 1.0) if self.how == "nan" else 1.0)


def failing(number: int, how: str, out: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    x[3, 0] = 100.0  # in the second batch, which rank 1 has
    problem = landscape.Problem(
        FailsOn(how), nn.MSELoss(), [(x[:3], y[:3]), (x[3:], y[3:])], products="autodiff"
    )
    try:
        with ranks.join(20.0) as team, sharded.group(team, torch.device("cpu")) as shard:  # type: ignore[union-attr]
            problem.shard = shard
            problem.hvp(torch.ones(problem.size))
    except (RankLost, Refused, ZeroDivisionError) as error:
        (out / f"{number}.txt").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", ["RankLost: rank 1 failed with its part of the data: ZeroDivisionError: this example cannot be",
                    "ZeroDivisionError: this example cannot be"]),
        ("nan", ["Refused: the hessian product is not finite (nan or inf) on the part of the data that rank 1 has",
                 "Refused: the hessian product is not finite (nan or inf) on the part of the data that rank 1 has"]),
    ],
)  # fmt: skip
def test_what_one_rank_meets_all_are_told(how: str, said: list[str], tmp_path: Path) -> None:
    assert jobs.run(2, lambda number: failing(number, how, tmp_path)) == [0, 0]
    assert [(tmp_path / f"{number}.txt").read_text() for number in range(2)] == said


def differing(number: int, what: str, out: Path) -> None:
    problem = jobs.problem()
    if what == "model" and number:
        problem = problem.at(problem.parameters_vector() * 2)
    if what == "data":
        problem = problem.replace(data=list(problem.batches)[number::2])
    metric = metrics.Trace(rtol=0.1 if what == "demands" and number else 0.2)
    try:
        landscape.measure(
            metric, problem, out=out / "run", seed=number if what == "seed" else 0, timeout=20.0
        )
    except Refused as error:
        (out / f"{number}.txt").write_text(str(error))


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("model", "the model's parameters"),
        ("data", "the data"),
        ("seed", "the seed"),
        ("demands", "the metric's demands"),
    ],
)
def test_ranks_that_measure_different_things_are_refused(what: str, named: str, tmp_path: Path) -> None:
    assert jobs.run(2, lambda number: differing(number, what, tmp_path)) == [0, 0]
    for number in range(2):
        said = (tmp_path / f"{number}.txt").read_text()
        assert said.startswith(f"rank 1 measures something else than rank 0; different: {named}")
    assert not (tmp_path / "run/trace.h5").exists()


def test_ranks_that_go_different_ways_say_so(tmp_path: Path) -> None:
    def ways(number: int) -> None:
        problem = jobs.problem()
        try:
            with ranks.join(20.0) as team, sharded.group(team, torch.device("cpu")) as shard:  # type: ignore[union-attr]
                problem.shard = shard
                if number == 0:
                    problem.value()
                else:
                    problem.gradient()
        except Refused as error:
            (tmp_path / f"a{number}.txt").write_text(str(error))
        try:
            with ranks.join(20.0) as team, sharded.group(team, torch.device("cpu")) as shard:  # type: ignore[union-attr]
                problem.shard = shard
                problem.hvp(torch.full((problem.size,), 1.0 + number))
        except Refused as error:
            (tmp_path / f"b{number}.txt").write_text(str(error))

    jobs.run(2, ways)
    for number in range(2):
        assert "rank 1 and rank 0 do different things" in (tmp_path / f"a{number}.txt").read_text()


def test_without_ranks_data_are_whole() -> None:
    ds = landscape.measure(metrics.Trace(), jobs.problem(), shard="data")
    assert float(ds["trace"]) == float(landscape.measure(metrics.Trace(), jobs.problem())["trace"])
