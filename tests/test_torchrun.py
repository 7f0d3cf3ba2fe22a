"""Ranks as torchrun starts them: the command line, and what becomes of a job that loses a rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jobs
import numpy as np
import pytest
from test_run import same

import landscape
from landscape import parts, results
from landscape.metrics import registry

COMMAND = ["-m", "landscape_cli", "measure"]

METRIC = '''
"""A unit is one product with its own random vector, and takes its time."""
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from landscape.checks import Need
from landscape.metrics.base import Metric, Round, setting
from landscape.results import Record, Variable


@dataclass(frozen=True)
class Slow(Metric):
    name: ClassVar[str] = "slow"
    headline: ClassVar[str] = "mean"
    unit: ClassVar[str] = "probe"
    block: ClassVar[int] = 2
    count: int = setting(24, "units", grows=True)
    pause: float = setting(0.0, "seconds a unit", grows=True)

    def needs(self):
        return frozenset({Need.HESSIAN})

    def prepare(self, problem, seed):
        return Record({"theta": Variable((), np.float64(problem.parameters_vector().norm()))})

    def units(self, record):
        return None if record.attrs["stop"] >= self.count else Round(self.count)

    def measure(self, problem, shared, block, generators):
        rows = [torch.randn(problem.size, generator=g, dtype=torch.float64).to(problem.dtype) for g in generators]
        time.sleep(self.pause * len(rows))
        return {"quadratic": Variable(("probe",), np.array([float(v @ problem.hvp(v)) for v in rows]))}

    def summarize(self, record):
        return {"mean": Variable((), np.asarray(record["quadratic"][record["done"]].mean()))}

    def outlook(self, problem):
        return self.count, self.count
'''
PROBLEM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import jobs


def make(dtype="float32"):
    import torch
    return jobs.problem(dtype=getattr(torch, dtype))
"""


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., list[str]]:
    """The words of a command that measures `slow` on a small problem into a run."""
    (tmp_path / "slow.py").write_text(METRIC)
    (tmp_path / "problem.py").write_text(PROBLEM)

    def words(out: str, *more: object) -> list[str]:
        fixed = ["--metric", tmp_path / "slow.py", "--problem", f"{tmp_path / 'problem.py'}:make"]
        return [*COMMAND, *map(str, [*fixed, "--out", tmp_path / out, *more])]

    return words


def alone(tmp_path: Path, **options: object) -> object:
    slow = registry.load(str(tmp_path / "slow.py"))
    return landscape.measure(slow(), jobs.problem(**options))


def test_two_ranks_share_the_units(job: Callable[..., list[str]], tmp_path: Path) -> None:
    done = jobs.torchrun(2, job("run"))
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^mean ", done.stdout, re.M)) == 1  # one of them prints
    stored = landscape.open(tmp_path / "run/slow.h5")
    assert same(alone(tmp_path), stored)
    assert stored.attrs["world_size"] == 2


def test_four_ranks_share_the_data(job: Callable[..., list[str]], tmp_path: Path) -> None:
    done = jobs.torchrun(4, job("run", "--shard", "data", "--problem-arg", "dtype=float64"))
    assert done.returncode == 0, done.stderr
    import torch

    expected, stored = alone(tmp_path, dtype=torch.float64), landscape.open(tmp_path / "run/slow.h5")
    np.testing.assert_allclose(stored["quadratic"], expected["quadratic"], rtol=1e-12)  # type: ignore[index]
    assert stored.attrs["world_size"] == 4
    assert stored.attrs["data_fingerprint"] == expected.attrs["data_fingerprint"]  # type: ignore[attr-defined]


def rank_of(launcher: subprocess.Popen[str], number: int) -> int:
    """The process of a rank."""
    for _ in range(2000):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                words = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == launcher.pid and f"RANK={number}".encode() in words:
                return int(folder.name)
        time.sleep(0.01)
    raise AssertionError("no such rank")


def until(there: Callable[[], bool], launcher: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not there():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("how", "lost", "shard"),
    [
        (signal.SIGKILL, 1, "units"),
        # Its twin in tests/test_ranks.py is forked, which costs a third.
        pytest.param(signal.SIGSTOP, 1, "data", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 0, "data", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, "units", marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_lost_rank_ends_the_job_with_one_line(
    how: signal.Signals, lost: int, shard: str, job: Callable[..., list[str]], tmp_path: Path
) -> None:
    launcher = jobs.start_torchrun(2, job("run", "--shard", shard, "--pause", "0.2", "--timeout", "5"))
    path = tmp_path / "run/slow.h5"
    until(path.exists, launcher)
    pid = rank_of(launcher, lost)
    time.sleep(0.5)
    os.kill(pid, how)
    began = time.monotonic()
    _, said = launcher.communicate(timeout=120)
    assert time.monotonic() - began < 60  # 5 of silence; the rest is a busy machine
    assert launcher.returncode == 1
    lines = [line for line in said.splitlines() if line.startswith("landscape:")]
    word = "died" if how == signal.SIGKILL else "stopped: no sign of life for"
    assert len(lines) == 1, said
    assert re.search(rf"rank {lost} \(process {pid} on .*\) {word}", lines[0]), lines
    assert "run the same command again on any number of ranks, to go on" in lines[0]
    stored = results.read(path)
    assert stored.attrs["exit_code"] == 130
    assert not stored.attrs["complete"]
    # It goes on alone, and ends as if nothing had been; divided data add up in another order.
    resumed = landscape.measure(registry.load(str(tmp_path / "slow.py"))(), jobs.problem(), out=path)
    if shard == "units":
        assert same(alone(tmp_path), resumed)
    else:
        np.testing.assert_allclose(resumed["quadratic"], alone(tmp_path)["quadratic"], rtol=1e-4)  # type: ignore[index]
    assert not parts.paths(path)
