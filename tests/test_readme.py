"""What the README says is true: its commands run, its table is the registry, its pictures have recipes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
NETS = """
import torch, landscape

def make_net(width=50):
    return torch.nn.Sequential(torch.nn.Linear(20, width), torch.nn.GELU(), torch.nn.Linear(width, 4))

x = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
y = torch.arange(300) % 4
batches = [(x[:256], y[:256]), (x[256:], y[256:])]

def make_problem():
    torch.manual_seed(0)
    return landscape.Problem(make_net(), torch.nn.CrossEntropyLoss(), batches)
"""


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.S)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


def landscape(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("landscape", path=str(Path(sys.executable).parent))
    assert program, "the console script `landscape` is not installed"
    return subprocess.run(
        [program, *shlex.split(line)[1:]], cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )


def test_every_command_runs_in_order(tmp_path: Path) -> None:
    import torch

    (tmp_path / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    weights = torch.nn.Sequential(
        torch.nn.Linear(20, 50), torch.nn.GELU(), torch.nn.Linear(50, 4)
    ).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    main = re.search(r"\.venv/bin/(landscape measure .*)$", commands()[0])
    assert main
    ran = [main[1], *(line for line in commands() if line.startswith("landscape "))]
    assert len(ran) == 8
    for line in ran:
        done = landscape(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs/digits_mlp/trace.h5").stat().st_size > 10_000
    assert (tmp_path / "trace.png").read_bytes()[:4] == b"\x89PNG"


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    assert (tmp_path / "runs/mine/trace.h5").exists()


def test_the_table_is_the_registry() -> None:
    from landscape.metrics import registry

    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|$", TEXT, re.M)
    first_lines = {name: (m.__doc__ or "").splitlines()[0] for name, m in registry.registered().items()}
    assert {name: text.replace(r"\|", "|") for name, text in rows} == first_lines


def test_every_picture_has_a_recipe() -> None:
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", TEXT)
    recipes = {recipe.name: recipe.read_text() for recipe in (ROOT / "figures").glob("*.py")}
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).exists()
        name = Path(picture)
        # of the same name, or a second picture that its recipe names
        assert f"{name.stem}.py" in recipes or any(f" {picture}]" in text for text in recipes.values())


def test_ci_runs_exactly_the_test_line() -> None:
    script = r"sed -n '/<!-- tests -->/,/```$/p' README.md | grep '^python3.11'"
    assert script in (ROOT / ".ci/run").read_text()
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == commands()[-1]
    assert done.stdout.strip().endswith("&& .venv/bin/pytest -n 2")


@pytest.mark.slow
def test_the_main_line_works_on_a_fresh_copy(tmp_path: Path) -> None:
    """Installs everything into a new environment: a minute or two, and the network."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        ["bash", "-c", commands()[0]], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trace" in done.stdout
    assert (tmp_path / "runs/digits_mlp/trace.h5").exists()
