"""Where a result comes from."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from landscape import provenance as module
from landscape.provenance import provenance

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", *who, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "tree"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_versions_and_time(tree: Path) -> None:
    found = provenance()
    assert found["numpy_version"] == np.__version__
    assert found["python_version"] == platform.python_version()
    assert found["machine"] == platform.machine()
    age = (datetime.now(UTC) - datetime.fromisoformat(found["time"])).total_seconds()
    assert -1 <= age < 60
    assert json.loads(json.dumps(found)) == found
    if platform.node() and platform.node() not in ("localhost", platform.machine()):
        assert platform.node() not in {str(v) for v in found.values()}


@needs_git
def test_the_commit_of_the_current_tree_and_whether_it_was_changed(tree: Path) -> None:
    assert (provenance()["git_commit"], provenance()["git_dirty"]) == (None, None)
    git(tree, "init", "-q")
    assert (provenance()["git_commit"], provenance()["git_dirty"]) == (None, None)
    (tree / "model.py").write_text("a = 1\n")
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", "one")
    commit = git(tree, "rev-parse", "HEAD")
    assert (provenance()["git_commit"], provenance()["git_dirty"]) == (commit, False)
    (tree / "runs").mkdir()
    (tree / "runs" / "trace.h5").write_text("")
    assert provenance()["git_dirty"] is False
    (tree / "model.py").write_text("a = 2\n")
    assert provenance()["git_dirty"] is True
    assert provenance(tree.parent)["git_commit"] is None
    assert provenance(tree / "runs")["git_commit"] == commit


@needs_git
def test_a_repository_cannot_have_its_programs_run(tree: Path) -> None:
    git(tree, "init", "-q")
    (tree / "tracked.txt").write_text("one")
    (tree / ".gitattributes").write_text("*.txt filter=own")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "x")
    for name in ("filter.own.clean", "filter.own.process", "core.fsmonitor"):
        git(tree, "config", name, "touch RAN; cat")
    (tree / "tracked.txt").write_text("another")
    found = provenance()
    assert not (tree / "RAN").exists()
    assert re.fullmatch("[0-9a-f]{40}", found["git_commit"])
    assert found["git_dirty"] is None


def test_without_git_or_with_a_slow_one(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    assert provenance()["git_commit"] is None
    (tools / "git").write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    (tools / "git").chmod(0o755)
    monkeypatch.setattr(module, "_GIT_SECONDS", 0.2)
    assert provenance()["git_commit"] is None
    assert provenance(tmp_path / "absent")["git_commit"] is None


def test_the_command_line_names_nobody(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    given = [
        "/home/ada/bin/landscape",
        "--out=/home/ada",
        "/home/ada/a b.pt",
        "/home/adam/x",
        "/data/home/ada/y",
        "'",
    ]
    monkeypatch.setattr(sys, "argv", given)
    command = "landscape --out=~ '~/a b.pt' /home/adam/x /data/home/ada/y ''\"'\"''"
    assert provenance()["command"] == command
    monkeypatch.setenv("HOME", "/")
    assert provenance()["command"].startswith("landscape --out=/home/ada")
