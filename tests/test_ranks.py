"""Units over ranks: the same bits as one process, any number of ranks to go on, and one line for a lost rank."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jobs
import pytest
from test_run import Draws, Power, same

import landscape
from landscape import journal, metrics, parts, ranks
from landscape.errors import RankLost
from landscape.metrics import registry

# Cheap settings; a small memory cuts the units of every metric into several blocks.
MEMORY = 20_000
SETTINGS: dict[str, dict[str, Any]] = {
    "class_structure": {"steps": 6},
    "density": {"probes": 5, "steps": 6},
    "evidence": {"curvature": "ggn"},
    "input_curvature": {},
    "reparametrization": {"measures": ("trace", "fisher_rao"), "alpha": (0.5, 1.0, 2.0)},
    "sharpness": {"epsilon": (1e-3, 1e-2), "restarts": 3},
    "surface": {"points": (9, 7)},
    "volume": {"rays": 40},
    "trace": {"method": "hutchinson", "max_probes": 48, "rtol": 0.0},
    "adaptive_trace": {"method": "hutchinson", "max_probes": 32},
}


def measured(name: str, out: Path | None, **options: Any) -> Any:
    metric = registry.load(name)(**SETTINGS.get(name, {}))
    memory = 300_000 if name == "evidence" else MEMORY
    return landscape.measure(metric, jobs.problem(), out=out, memory=memory, **options)


@pytest.mark.parametrize("name", sorted(registry.registered()))
def test_ranks_give_the_bits_of_one_process(name: str, tmp_path: Path) -> None:
    alone = measured(name, tmp_path / "one")
    assert jobs.run(3, lambda _: measured(name, tmp_path / "three") and None) == [0, 0, 0]
    stored = landscape.open(tmp_path / "three" / f"{name}.h5")
    assert same(alone, stored)
    assert stored.attrs["complete"]
    assert stored.attrs["exit_code"] == alone.attrs["exit_code"]
    assert stored.attrs["products"] == alone.attrs["products"]
    assert stored.attrs["world_size"] == 3
    assert not list((tmp_path / "three/.parts").glob("*.h5"))


def test_rounds_that_depend_on_all_units_and_chains(tmp_path: Path) -> None:
    for metric in (Draws(rounds=3), Power(starts=5, steps=8)):
        alone = landscape.measure(metric, jobs.problem())
        assert (
            jobs.run(4, lambda _, m=metric: landscape.measure(m, jobs.problem(), out=tmp_path) and None)
            == [0] * 4
        )
        assert same(alone, landscape.open(tmp_path / f"{metric.name}.h5"))


def test_more_ranks_than_blocks_and_no_file(tmp_path: Path) -> None:
    def measure(number: int) -> None:
        ds = landscape.measure(Draws(rounds=1), jobs.problem())
        (tmp_path / str(number)).write_text(repr(float(ds["mean"])))
        landscape.measure(Power(starts=1, steps=5), jobs.problem(), out=tmp_path)

    assert jobs.run(3, measure) == [0, 0, 0]
    expected = repr(float(landscape.measure(Draws(rounds=1), jobs.problem())["mean"]))
    assert {(tmp_path / str(number)).read_text() for number in range(3)} == {expected}
    assert same(
        landscape.measure(Power(starts=1, steps=5), jobs.problem()), landscape.open(tmp_path / "power.h5")
    )


def interrupted(after: int) -> Any:
    """A callback that interrupts after so many blocks of this rank."""
    seen = [0]

    def stop(_: object) -> None:
        seen[0] += 1
        if seen[0] == after:
            raise KeyboardInterrupt

    return stop


def test_a_run_goes_on_with_any_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_UNWRITTEN_SECONDS", 0.0)
    metric = Draws(rounds=4)
    alone = landscape.measure(metric, jobs.problem())

    def stopped(_: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            landscape.measure(metric, jobs.problem(), out=tmp_path, progress=interrupted(1), timeout=20.0)

    for size in (3, 2, 4):
        assert jobs.run(size, stopped) == [0] * size
        assert landscape.open(tmp_path / "draws.h5").attrs["exit_code"] == 130
    assert jobs.run(2, lambda _: landscape.measure(metric, jobs.problem(), out=tmp_path) and None) == [0, 0]
    assert same(alone, landscape.open(tmp_path / "draws.h5"))
    assert not parts.paths(tmp_path / "draws.h5")


def test_parts_that_killed_ranks_left_are_taken_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_UNWRITTEN_SECONDS", 0.0)
    metric = Draws(rounds=3, pause=0.05)
    run, delay = tmp_path, 0.4
    for attempt in range(40):  # how fast this machine is now is not known

        def killed(number: int, seconds: float = delay, out: Path = run) -> None:
            signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends a process that does not expect it
            landscape.measure(metric, jobs.problem(), out=out, timeout=60.0)
            assert number >= 0

        codes = jobs.run(3, killed)
        if parts.paths(run / "draws.h5"):
            break
        # nothing begun: more time; all done: anew, with less
        delay, run = (0.7 * delay, tmp_path / str(attempt)) if codes == [0, 0, 0] else (1.2 * delay, run)
    assert parts.paths(run / "draws.h5")
    resumed = landscape.measure(metric, jobs.problem(), out=run)
    assert same(landscape.measure(metric, jobs.problem()), resumed)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
@pytest.mark.parametrize("shard", ["units", "data"])
def test_a_lost_rank_is_named(how: signal.Signals, shard: Any, tmp_path: Path) -> None:
    metric = Power(starts=4, steps=2000, pause=0.01) if shard == "data" else Draws(rounds=2, pause=0.3)

    def lose() -> None:
        """Go once something is written: then all have met."""
        while not any(tmp_path.rglob("*.h5")) and not any(tmp_path.rglob("*.safetensors")):
            time.sleep(0.01)
        os.kill(os.getpid(), how)

    def measure(number: int) -> int:
        (tmp_path / f"pid{number}").write_text(str(os.getpid()))
        if number == 1:
            threading.Thread(target=lose, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(RankLost) as lost:
            landscape.measure(metric, jobs.problem(), out=tmp_path, shard=shard, timeout=3.0)
        (tmp_path / "said").write_text(str(lost.value))
        return 5 if lost.value.ranks == [1] and time.monotonic() - began < 25 else 6

    assert jobs.run(2, measure) == [5, -signal.SIGKILL]
    pid, said = (tmp_path / "pid1").read_text(), (tmp_path / "said").read_text()
    assert said.startswith(f"rank 1 (process {pid} on ")
    assert said.endswith(") died" if how == signal.SIGKILL else ") stopped: no sign of life for 3 s")
    assert landscape.open(tmp_path / f"{metric.name}.h5").attrs["exit_code"] == 130


def test_a_rank_that_never_comes_is_named() -> None:
    def measure(number: int) -> int:
        if number == 0:
            with pytest.raises(
                RankLost, match=r"rank 1 did not arrive within 1 s; every rank has to make the same"
            ):
                landscape.measure(metrics.Trace(), jobs.problem(), shard="data", timeout=1.0)
        else:
            ranks._job_store(20.0)  # it is there, and does something else
            time.sleep(4)
        return 0

    assert jobs.run(2, measure) == [0, 0]


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    ranks.use_own_device()  # alone: the default one stays
    monkeypatch.setenv("WORLD_SIZE", "4")
    for number in range(4):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("LOCAL_RANK", str(number))
        ranks.use_own_device()
    assert taken == [0, 1, 0, 1]
