"""What is measured stays within the memory that was stated, or is refused with what it would take."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from landscape_cli.app import app
from torch import Tensor, nn

import landscape
from landscape import memory, run
from landscape.checks import Need
from landscape.metrics import Trace

MIB = 1 << 20


def signals(count: int = 24, length: int = 512, **options: Any) -> landscape.Problem:
    """A small filter over long signals: few parameters, large graphs."""
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 8, 3), nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) * 0.5)
    x, y = torch.randn(count, 1, length, generator=draws), torch.randint(0, 3, (count,), generator=draws)
    return landscape.Problem(model, options.pop("loss", nn.CrossEntropyLoss()), [(x, y)], **options)


CHILD = """
    import json, resource, sys
    import torch
    from torch import nn
    sys.path.insert(0, sys.argv[1])
    import landscape
    from landscape.metrics import Trace
    from test_memory import signals
    torch.set_num_threads(1)
    def peak():
        try:  # getrusage's maximum outlives exec: it would be that of the tests' own process
            status = open("/proc/self/status").read()
            return 1024 * int(status.partition("VmHWM:")[2].split()[0])
        except OSError:
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    metric = Trace(method="exact")
    landscape.measure(metric, signals(4, 64))
    problem = signals(256, 4096, parameters="0.bias")
    before = peak()
    ds = landscape.measure(metric, problem, memory=int(sys.argv[2]) or None)
    print(json.dumps([peak() - before, float(ds["trace"]), ds.attrs["memory_plan"]]))
"""


def in_a_process(allowed: int) -> tuple[int, float, dict[str, Any]]:
    """Peak memory of a measurement above what stood before it, the trace, and the plan."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(Path(__file__).parent), str(allowed)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, trace, plan = json.loads(done.stdout.splitlines()[-1])
    return peak, trace, plan


def test_a_model_that_would_take_far_more_is_measured_within_its_memory() -> None:
    """The bound is the budget and 24 MiB, which stand for what the allocator and the libraries keep.

    In float32 a million terms of both signs are summed in another order: traces agree to 1e-3. The next test
    has the same in float64.
    """
    allowed = 48 * MIB
    whole, expected, loose = in_a_process(0)
    peak, trace, plan = in_a_process(allowed)
    assert whole > 3 * allowed
    assert loose["microbatch"] is None
    assert 1 <= plan["microbatch"] < 256
    assert plan["needed"] <= allowed
    assert peak < allowed + 24 * MIB
    assert trace == pytest.approx(expected, rel=1e-3)


def test_cut_to_fit_it_is_the_same_number() -> None:
    problem, metric = signals(dtype=torch.float64), Trace(method="exact")
    whole, cut = landscape.measure(metric, problem), landscape.measure(metric, problem, memory=2 * MIB)
    assert whole.attrs["memory_plan"]["microbatch"] is None
    assert 1 <= cut.attrs["memory_plan"]["microbatch"] < 24
    assert float(cut["trace"]) == pytest.approx(float(whole["trace"]), rel=1e-12)


def wanted(problem: landscape.Problem, allowed: int, **options: Any) -> memory.Plan:
    return run.memory_plan(Trace(method="hutchinson"), problem, allowed, **options)


def test_batches_that_fit_stay_whole() -> None:
    assert wanted(signals(), 8 << 30).microbatch is None
    needed = wanted(signals(), 8 << 30).needed
    assert needed is not None
    assert wanted(signals(), needed) == memory.Plan(None, 16, needed)
    assert wanted(signals(), needed - 1).microbatch == 23


def test_a_plan_follows_from_shapes_alone() -> None:
    p = signals()
    other = p.at(torch.zeros(p.size)).replace(data=[(x * 0, y) for x, y in p.batches])
    assert wanted(p, 2 * MIB) == wanted(other, 2 * MIB) == wanted(signals(), 2 * MIB)


def test_the_micro_batch_gives_way_before_the_block_does() -> None:
    plans = [wanted(signals(), allowed) for allowed in (8 * MIB, 2 * MIB, 700_000, 560_000)]
    cuts = [p.microbatch or 24 for p in plans]
    assert cuts == sorted(cuts, reverse=True)
    assert [p.block for p in plans if p.microbatch != 1] == [16] * sum(c > 1 for c in cuts)


def test_the_longest_examples_count() -> None:
    def batch(count: int, length: int) -> tuple[Tensor, Tensor]:
        return torch.ones(count, 1, length), torch.zeros(count, dtype=torch.int64)

    ragged = signals().replace(data=[batch(4, 64), batch(4, 2048), batch(9, 64)])
    alone = signals().replace(data=[batch(9, 2048)])
    assert wanted(ragged, 8 << 30).needed == wanted(alone, 8 << 30).needed


def test_what_does_not_fit_is_refused_with_what_it_takes() -> None:
    with pytest.raises(landscape.Refused) as refusal:
        landscape.measure(Trace(method="hutchinson"), signals(), memory=50_000)
    text = str(refusal.value)
    assert "for one example at once is about" in text
    assert "allowed is 48.8 KiB" in text
    for remedy in ("--memory", "parameters=", "products='difference'"):
        assert remedy in text
    with pytest.raises(landscape.Refused, match=r"for 20 examples at once .* a smaller microbatch"):
        landscape.measure(Trace(method="hutchinson"), signals(microbatch=20), memory=MIB)
    assert wanted(signals(microbatch=20), 64 * MIB).microbatch == 20


def test_the_prediction_itself_stops_at_what_is_allowed() -> None:
    """Where one example is too large already, its graph is not built to the end."""
    layers = 0

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal layers
            layers += 1
            return torch.tanh(x) * x

    model = nn.Sequential(nn.Linear(1000, 1000), *[Counting() for _ in range(50)], nn.Linear(1000, 2))
    data = [(torch.ones(3, 1000), torch.ones(3, 2))]
    problem = landscape.Problem(model, nn.MSELoss(), data, parameters=["51.*", "0.bias"])
    with pytest.raises(landscape.Refused, match="for one example at once"):
        wanted(problem, 120_000)
    assert layers < 50


def test_more_than_the_machine_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda device: MIB)
    with pytest.raises(landscape.Refused, match=r"this machine has 1 MiB in all.*--memory"):
        wanted(signals(), 8 << 30)
    assert wanted(signals(), MIB).microbatch is not None


def test_the_machine_has_some_memory() -> None:
    assert 1 << 28 < memory.machine_memory(torch.device("cpu")) < 1 << 50


def test_a_run_goes_on_with_the_same_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric, allowed, path = Trace(method="hutchinson", max_probes=48, rtol=0.0), MIB, tmp_path / "x.h5"
    whole = landscape.measure(metric, signals(), memory=allowed)

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        landscape.measure(metric, signals(), memory=allowed, out=path, progress=stop)
    monkeypatch.setattr(memory, "plan", lambda *_, **__: pytest.fail("the stored plan is there"))
    resumed = landscape.measure(metric, signals(), memory=allowed, out=path)
    assert resumed.attrs["memory_plan"] == whole.attrs["memory_plan"]
    assert resumed.attrs["memory_plan"]["microbatch"] < 24
    assert float(resumed["trace"]) == float(whole["trace"])


def test_a_cut_of_our_own_does_not_hide_a_loss_that_does_not_add_up() -> None:
    """At one example a pass, adding-up is tested on two."""

    def weighted(f: Tensor, y: Tensor) -> Tensor:
        w = 1.0 + y
        return (F.cross_entropy(f, y, reduction="none") * w).sum() / w.sum()

    single = wanted(signals(), 560_000)
    assert single.microbatch == 1
    p = signals(loss=weighted)
    with pytest.raises(landscape.Refused, match="not the sum of its parts"):
        landscape.measure(Trace(method="hutchinson"), p, memory=560_000)


def test_examples_that_cannot_stand_alone_are_not_predicted() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    p = landscape.Problem(model, nn.MSELoss(), [(torch.ones(8, 4), torch.ones(8, 2))], mode="train")
    assert wanted(p, 8 << 30) == memory.Plan(None, 16, None)
    assert p.check(frozenset({Need.VALUE})).loss >= 0


def test_batches_that_cannot_be_cut_are_weighed_whole() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0].T), batch[1])

    data = [(torch.ones(4, 8), torch.ones(8, 2))]
    p = landscape.Problem(nn.Linear(4, 2), forward=step, data=data, weight=lambda b: 8.0)
    assert wanted(p, 8 << 30).microbatch is None
    with pytest.raises(landscape.Refused, match="smaller batches"):
        wanted(p, 1000)


def test_the_command_line_tells_the_plan_and_refuses(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["measure", "--metric", "trace", "--dry-run", "--memory", "8GiB"])
    assert "batches as they come, 16 vectors at once" in said.stdout
    assert "of 8.0 GiB beside the model" in said.stdout
    refused = CliRunner().invoke(
        app, ["measure", "--metric", "trace", "--memory", "10KiB", "--out", str(tmp_path)]
    )
    assert refused.exit_code == 3
    assert "allowed is 10 KiB" in refused.stderr
    assert "Traceback" not in refused.stderr
