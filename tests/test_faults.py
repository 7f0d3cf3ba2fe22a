"""The list of faults (`python tests/faults.py`), but for those that mount file systems; and the kills."""

from __future__ import annotations

from pathlib import Path

import faults
import kills
import pytest


@pytest.mark.parametrize("entry", [f for f in faults.FAULTS if not f.mounts], ids=lambda f: f.name)
def test_what_goes_wrong_loses_nothing(entry: faults.Fault, tmp_path: Path) -> None:
    try:
        entry.run(tmp_path)
    except faults.SkippedError as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.parametrize("entry", [f for f in faults.FAULTS if f.mounts], ids=lambda f: f.name)
def test_what_goes_wrong_with_a_file_system_loses_nothing(entry: faults.Fault, tmp_path: Path) -> None:
    test_what_goes_wrong_loses_nothing(entry, tmp_path)


def campaign(count: int, seed: int) -> None:
    tally = kills.campaign(count, seed)
    assert not tally.faults, tally.faults
    assert sum(tally.kills.values()) == count
    assert tally.kept > count // 4  # 70 % as measured; how many depends on the machine
    assert sum(tally.kills.values()) > tally.ended, "most were to be killed in the middle"


def test_killed_measurements_of_all_metrics_end_bit_identical() -> None:
    campaign(40, 0)


@pytest.mark.slow
def test_many_killed_measurements_of_all_metrics_end_bit_identical() -> None:
    campaign(200, 1)
