"""Damaged files of every kind, by the command that anybody can run; and that the command sees what goes wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import fuzz  # noqa: E402  (lies beside the benchmarks)

from landscape.results import ResultsError  # noqa: E402


def command(cases: int, seed: int, *metrics: str) -> str:
    words = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--cases", str(cases), "--seed", str(seed)]
    words += ["--metrics", *metrics] if metrics else []
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def counted(printed: str) -> list[int]:
    return [int(word) for word in re.search(r"^ *all(.*)$", printed, re.M)[1].split()]


def test_no_damaged_file_crashes_hangs_or_raises_a_stray_error() -> None:
    counts = counted(command(300, 0, "trace", "surface"))
    assert sum(counts) == 300
    assert sum(counts[4:]) == 0
    assert min(counts[:2]) > 30  # most are refused, some are as good as before


@pytest.mark.slow
def test_no_file_of_any_metric_does_so_in_many_cases() -> None:
    counts = counted(command(3000, 1))
    assert sum(counts) == 3000
    assert sum(counts[4:]) == 0


@pytest.mark.parametrize(
    ("action", "outcome"),
    [
        (lambda: None, "read"),
        (lambda: raised(ResultsError("x")), "refused"),
        (
            lambda: raised(ResultsError("reading it took more than the allowed 20 s")),
            "reader killed at its limit",
        ),
        (lambda: raised(ResultsError("it crashed the reader")), "reader crashed"),
        (lambda: raised(KeyError("x")), "another error"),
        (lambda: bytearray(8 << 30) and None, "out of memory"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "crashed"),
        (lambda: os._exit(77), "crashed"),
        (lambda: os.kill(os.getpid(), signal.SIGSTOP), "hang"),
    ],
)
def test_the_command_tells_outcomes_apart(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], action: object, outcome: str
) -> None:
    monkeypatch.setattr(fuzz, "LIMIT", 0.5 if outcome == "hang" else 30.0)
    assert fuzz.run(action) == outcome
    counts = Counter({("trace", outcome): 2})
    assert bool(fuzz.failures(counts)) == (outcome in fuzz.FAILURES)
    assert "2" in fuzz.table(counts)
    capfd.readouterr()


def raised(error: Exception) -> None:
    raise error
