"""Run a function in several processes that form a gloo group, and bring back what each returns."""

from __future__ import annotations

import datetime
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import torch.distributed as dist


def run(function: Callable[[int], Any], ranks: int = 2, seconds: float = 60.0) -> list[Any]:
    """Call `function(rank)` in that many forked processes; return what they return, in order.

    Raises:
        AssertionError: with the first process's trace, if one raises, dies or is not done in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [
            forks.start(lambda rank=rank: _one(function, rank, ranks, Path(folder))) for rank in range(ranks)
        ]
        codes = _waited(children, time.monotonic() + seconds)
        files = [Path(folder) / f"{rank}.pickle" for rank in range(ranks)]
        found = [pickle.loads(f.read_bytes()) if f.exists() else ("error", "no answer") for f in files]
    wrong = [text for kind, text in found if kind == "error" and text != "no answer"]
    told = "\n".join([f"exit codes {codes}", *wrong])
    assert codes == [0] * ranks, told
    return [value for _, value in found]


def _one(function: Callable[[int], Any], rank: int, ranks: int, folder: Path) -> int:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    try:
        answer = ("value", function(rank))
    except BaseException:  # noqa: BLE001
        answer = ("error", f"rank {rank}: {traceback.format_exc()}")
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(answer))
    return int(answer[0] == "error")  # the fork ends by os._exit: a broken group ends in "terminate called"


def _waited(children: list[int], end: float) -> list[int | str]:
    codes: list[int | str] = []
    for child in children:
        done = (0, 0)
        while not done[0] and time.monotonic() < end:
            done = os.waitpid(child, os.WNOHANG)
            time.sleep(0.005)
        if not done[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        codes.append(os.waitstatus_to_exitcode(done[1]) if done[0] else "hang")
    return codes
