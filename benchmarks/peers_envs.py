"""An environment of its own for each peer, so that nothing of theirs enters ours."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
SHARED = ("torch==2.13.0", "numpy", "scipy")
# Gigabytes that a measurement on the CPU does not need; the plain Linux torch of PyPI asks for them.
_UNWANTED = ("nvidia-", "cuda-", "triton")
_MARK = "ready.json"


@dataclass(frozen=True)
class Peer:
    """A package to measure against: its name on PyPI and the version that was looked at."""

    package: str
    version: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


PEERS = {
    "pyhessian": Peer("PyHessian", "0.1"),
    "curvlinops": Peer("curvlinops-for-pytorch", "3.0.1"),
    "eigenthings": Peer("hessian-eigenthings", "1.0.0a5"),
}


class EnvironmentFailedError(Exception):
    """A peer cannot be installed; the message says why."""


def default_folder() -> Path:
    """Return the cache folder of the user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "landscape-peers"


def python_of(folder: Path, name: str, requirement: str, pip_options: list[str]) -> Path:
    """Return the interpreter of a peer's environment; make the environment if it is not there.

    Raises:
        EnvironmentFailedError: if pip fails, or would draw CUDA packages.
    """
    home = folder / name
    python = home / "bin" / "python"
    wanted = [*SHARED, requirement]
    mark = home / _MARK
    if mark.exists() and json.loads(mark.read_text()) == wanted and python.exists():
        return python
    venv.create(home, with_pip=True, clear=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), *pip_options, *wanted]
    _refuse_cuda(_run([*install, "--dry-run", "--report", "-"]))
    _run(install)
    mark.write_text(json.dumps(wanted))
    return python


def _refuse_cuda(report: str) -> None:
    # Warnings of pip can stand before the report.
    planned = json.loads(report[report.index("{") :])["install"]
    names = [entry["metadata"]["name"].lower() for entry in planned]
    drawn = [name for name in names if name.startswith(_UNWANTED)]
    if drawn:
        raise EnvironmentFailedError(
            f"pip would install {len(drawn)} CUDA packages ({', '.join(drawn[:3])}, ...); name an index with "
            "torch for the CPU: --pip=--extra-index-url=https://download.pytorch.org/whl/cpu"
        )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise EnvironmentFailedError(f"pip: {''.join(last)[:200] or f'exit status {done.returncode}'}")
    return done.stdout
