"""Products with divided data: two ranks of one thread each against one process of one thread, in turn.

    python benchmarks/ranks.py [--rounds 7] [--ranks 2] [--images 256] [--out ranks.json]

ResNet-20 (272 474 parameters) on images in batches of 64, BatchNorm in evaluation mode. Ranks are forked once; each
round times one product by one process while the others wait, then the same product by all. The demand is a median
ratio of 1.3 with two ranks on two free cores. Beside the ratio of seconds by the clock stands that of processor
seconds (one process over the busiest rank), which is what free cores would give; and the load of the machine.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import socket
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import landscape
from landscape import ranks, sharded, testbeds
from landscape.seeds import generator

GOAL = 1.3


def problem(images: int) -> landscape.Problem:
    """ResNet-20 on random images in batches of 64."""
    draws = generator(0, "benchmark", 0)
    x = torch.randn(images, 3, 32, 32, generator=draws)
    y = torch.randint(0, 10, (images,), generator=draws)
    batches = list(zip(torch.split(x, 64), torch.split(y, 64), strict=True))
    return landscape.Problem(testbeds.resnet20(), nn.CrossEntropyLoss(), batches, products="autodiff")


def timed(problem: landscape.Problem, v: torch.Tensor) -> tuple[float, float]:
    """Seconds of one product, by the clock and of the processor."""
    began = time.perf_counter(), time.process_time()
    problem.hvp(v)
    return time.perf_counter() - began[0], time.process_time() - began[1]


def rank(number: int, rounds: int, images: int, out: Path | None) -> None:
    """Measure as one of the ranks; the first one prints."""
    torch.set_num_threads(1)
    team = ranks.join()
    assert team is not None
    with team, sharded.group(team, torch.device("cpu")) as shard:
        alone = problem(images)
        divided = alone.replace()
        divided.shard = shard
        v = torch.randn(alone.size, generator=generator(0, "benchmark", 1))
        rows: list[tuple[float, float, float, float]] = []
        for _ in range(rounds + 1):
            one = timed(alone, v) if number == 0 else (0.0, 0.0)
            team.sync()
            clock, processor = timed(divided, v)
            busiest = max(map(float, team.exchange(str(processor))))
            rows.append((*one, clock, busiest))
        if number == 0:
            report(rows[1:], team.size, out)  # the first one warms up


def report(rows: list[tuple[float, float, float, float]], size: int, out: Path | None) -> None:
    """Print the ratios, and keep all seconds where that is asked for."""
    load = os.getloadavg()[0]
    print(f"{len(rows)} rounds; load {load:.1f} on {os.cpu_count()} cores")
    ratios = {}
    for name, i in (("by the clock", 0), ("of the processor", 1)):
        one, several = (statistics.median(row[j] for row in rows) for j in (i, i + 2))
        low, middle, high = statistics.quantiles((row[i] / row[i + 2] for row in rows), n=4)
        ratios[name] = middle
        verdict = "reached" if middle >= GOAL else "NOT reached"
        print(f"seconds {name}: 1 process {one:.2f}, {size} ranks {several:.2f}")
        print(f"  ratio {middle:.2f} [{low:.2f}, {high:.2f}]; demanded {GOAL} with 2 ranks: {verdict}")
    if out is not None:
        content = {"seconds": rows, "ratios": ratios, "ranks": size, "load": load, "cores": os.cpu_count()}
        out.write_text(json.dumps(content, indent=1))


def main() -> None:
    """Fork the ranks and wait for them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(given.ranks)}
    children = []
    for number in range(given.ranks):
        child = os.fork()
        if not child:
            os.environ["RANK"] = str(number)
            rank(number, given.rounds, given.images, given.out)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
