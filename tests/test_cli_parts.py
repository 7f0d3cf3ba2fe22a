"""`landscape measure --part`, `landscape merge`: what a job array types, and what it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from landscape_cli import app as cli_app

from landscape import results

# Little memory: blocks of few probes, of which each part has one.
# Little memory: blocks of few probes, of which each part has one.
TRACE = [
    "--metric",
    "trace",
    "--method",
    "hutchinson",
    "--max-probes",
    "16",
    "--rtol",
    "0.5",
    "--memory",
    "6MiB",
]


def run(*words: object) -> Result:
    return CliRunner().invoke(cli_app.app, [str(word) for word in words])


def test_parts_and_a_merge_give_what_one_command_gives(tmp_path: Path) -> None:
    whole = run("measure", *TRACE, "--out", tmp_path / "whole", "--json")
    assert whole.exit_code == 0, whole.stderr
    for index in (1, 2):
        part = run("measure", *TRACE, "--out", tmp_path / "parts", "--part", f"{index}/3")
        assert part.exit_code == 0, part.stderr
        assert f"part {index}/3 of trace is done" in part.stderr
        assert f"landscape merge {tmp_path / 'parts'}" in part.stderr
        assert part.stdout == ""
    early = run("merge", tmp_path / "parts")
    assert early.exit_code == 3
    assert "part 3/3 missing; run it, then merge again" in early.stderr
    assert run("measure", *TRACE, "--out", tmp_path / "parts", "--part", "3/3").exit_code == 0
    merged = run("merge", tmp_path / "parts", "--json")
    assert merged.exit_code == 0, merged.stderr
    told, expected = json.loads(merged.stdout)[0], json.loads(whole.stdout)[0]
    assert told["estimates"] == expected["estimates"]
    assert run("merge", tmp_path / "parts").stdout.count("parts/trace.h5") == 1  # again: it is complete
    assert run("show", tmp_path / "parts").exit_code == 0
    one, other = (results.read(tmp_path / out / "trace.h5") for out in ("whole", "parts"))
    assert one["samples"].tobytes() == other["samples"].tobytes()
    assert one.attrs["block_size"] < 16


@pytest.mark.parametrize("text", ["3", "0/4", "5/4", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_part_that_cannot_be_is_a_usage_error(text: str) -> None:
    said = run("measure", "--metric", "trace", "--part", text)
    assert said.exit_code == 2
    assert "allowed is I/N with 1 <= I <= N, such as 3/16" in said.stderr


def test_what_ranks_divide_is_one_of_three() -> None:
    said = run("measure", "--metric", "trace", "--shard", "half")
    assert said.exit_code == 2
    assert "'units', 'data', 'none'" in said.stderr


def test_a_merge_of_nothing(tmp_path: Path) -> None:
    said = run("merge", tmp_path)
    assert said.exit_code == 3
    assert "holds no measurement" in said.stderr


def test_ranks_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = run("measure", *TRACE, "--out", tmp_path / "run")
    assert said.exit_code == 3
    assert "MASTER_ADDR" in said.stderr
    assert "--shard none" in said.stderr
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert "allowed is 0 <= RANK < WORLD_SIZE" in run("measure", *TRACE, "--out", tmp_path / "run").stderr
    assert run("measure", *TRACE, "--out", tmp_path / "run", "--shard", "none").exit_code == 0


def test_parts_of_a_metric_of_the_users_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom landscape.metrics.trace import Trace\n"
        "@dataclass(frozen=True)\nclass Mine(Trace):\n    name: ClassVar[str] = 'mine'\n"
    )
    out = tmp_path / "run"
    for index in (1, 2):
        assert (
            run("measure", "--metric", mine, "--rtol", "0.5", "--out", out, "--part", f"{index}/2").exit_code
            == 0
        )
    unknown = run("merge", out)
    assert unknown.exit_code == 2
    assert "unknown metric 'mine'" in unknown.stderr
    merged = run("merge", out, "--metric", mine)
    assert merged.exit_code == 0, merged.stderr
    assert "mine.h5" in merged.stdout
