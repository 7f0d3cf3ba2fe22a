"""Several processes at once: ranks of a job, forked or started by torchrun; and problems for them to share."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import forks
import torch
from torch import nn

import landscape

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(size: int, function: Callable[[int], int | None], seconds: float = 120.0) -> list[int]:
    """Fork so many ranks; each calls the function with its number. Return their exit codes, -9 where killed."""
    port = str(free_port())

    def rank(number: int) -> int | None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {"RANK": str(number), "WORLD_SIZE": str(size)}
        torch.set_num_threads(1)
        return function(number)

    children = [forks.start(lambda number=i: rank(number)) for i in range(size)]  # type: ignore[misc]
    return [wait(child, seconds) for child in children]


def wait(child: int, seconds: float) -> int:
    """Return a child's exit code; kill it after that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    forks.kill(child)
    return -signal.SIGKILL


def torchrun(
    size: int, arguments: Sequence[object], seconds: float = 120.0, **options: str
) -> subprocess.CompletedProcess[str]:
    """Start ranks by torchrun on this machine alone."""
    started = start_torchrun(size, arguments, **options)
    out, err = started.communicate(timeout=seconds)
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


def start_torchrun(size: int, arguments: Sequence[object], **options: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1"]
    launcher += ["--master-port", str(free_port()), "--nproc-per-node", str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options}
    words = [*launcher, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)


def problem(**options: object) -> landscape.Problem:
    """A rectifier network of 83 parameters on 20 examples in five ragged batches."""
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) * 0.5)
    x, y = torch.randn(20, 6, generator=draws), torch.randint(0, 3, (20,), generator=draws)
    cuts = [0, 7, 8, 13, 19, 20]
    batches = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(cuts)]
    return landscape.Problem(model, nn.CrossEntropyLoss(), batches, **options)
