"""A point of a loss surface in units of the bare forward passes at their best batch size, next to loss-landscapes.

    python benchmarks/surface.py [--problem MLP] [--rounds 7] [--clock cpu] [--peer ~/.cache/landscape-peers/surface]

The bare passes are `loss(model(x), y)` in inference mode over all data in batches of 16 to all examples, whichever
is fastest. Ours are those of the metric `surface`, without and with accuracy, with the user's batches and
layers (`exact`), in bfloat16, and, of the digits' network, a whole `landscape.measure` of 51 by 51 points with its
check and its file. The peer draws a plane of its own of fewer points, in a process of its own with bare passes of
its own beside it; it takes all data as one batch, as its documentation has it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timing  # sets the waiting policy before torch is imported
import torch
from torch import Tensor, nn

import landscape
from landscape.displaced import Displaced
from landscape.metrics import Surface
from landscape.seeds import generator
from landscape.testbeds import digits_mlp, resnet20
from landscape.testbeds.digits import digits
from landscape.ways import choose

PEER = "loss-landscapes==3.0.6"
POINTS = {"MLP": 51, "ResNet-20": 3}  # along each axis, of ours
PEER_POINTS = {"MLP": 20, "ResNet-20": 4}
IMAGES = 512


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network in evaluation mode, its inputs and its targets."""
    if name == "MLP":
        return digits_mlp(), *digits()
    model, draws = resnet20(), generator(0, "benchmark", 0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics and scales as training leaves them
            module.running_mean.normal_(0, 0.2, generator=draws)
            module.running_var.uniform_(0.5, 2.0, generator=draws)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=draws)
    inputs = torch.randn(IMAGES, 3, 32, 32, generator=draws)
    return model.eval(), inputs, torch.randint(10, (IMAGES,), generator=draws)


def bare(model: nn.Module, inputs: Tensor, targets: Tensor, size: int, times: int) -> Callable[[], None]:
    """Return a task of so many passes over all data in batches of this size."""
    data, loss = list(zip(inputs.split(size), targets.split(size), strict=True)), nn.CrossEntropyLoss()

    def task() -> None:
        with torch.inference_mode():
            for _ in range(times):
                for x, y in data:
                    float(loss(model(x), y))

    return task


def ours(name: str, arguments: argparse.Namespace) -> None:
    """Time our ways and the bare passes in turn, and print them."""
    model, inputs, targets = problem(name)
    made = landscape.Problem(model, nn.CrossEntropyLoss(), [(inputs, targets)])
    d = landscape.directions.filter_normalized(made)
    # Two half rows of a grid, as `surface` goes through it.
    half = 25 if name == "MLP" else 1
    places = [(i / 25 - 1, y) for y in (-0.04, 0.04) for i in range(half)]
    times = len(places)
    sizes = [size for size in (16, 32, 64, 128, 256, 512, 1024) if size < len(inputs)] + [len(inputs)]
    tasks = {f"bare, batches of {size}": bare(model, inputs, targets, size, times) for size in sizes}
    with made.session():
        ways = choose(made)
        kept, half = choose(made, exact=True), choose(made, bfloat16=True)
        for words, way, accuracy in (
            ("surface", ways, False), ("surface with accuracy", ways, True), ("exact", kept, False),
            ("bfloat16", half, False),
        ):  # fmt: skip
            at = Displaced(made, list(d), ways=way, accuracy=accuracy)
            tasks[words] = lambda at=at: at.values(places)
        print(f"\n{name}: {ways}")
        seconds = timing.alternate(tasks, arguments.rounds, clock=arguments.time)
    best = min(sizes, key=lambda size: sorted(seconds[f"bare, batches of {size}"])[arguments.rounds // 2])
    base = f"bare, batches of {best}"
    for words, (low, middle, high) in timing.ratios(seconds, base).items():
        each = 1e3 * sorted(seconds[words])[arguments.rounds // 2] / times
        print(
            f"  {words:24} {each:9.3f} ms a point, {middle:.3f} [{low:.3f}, {high:.3f}] of the best bare passes"
        )
    if name == "MLP":
        whole(made, bare(model, inputs, targets, best, 1), arguments)


def whole(made: landscape.Problem, passed: Callable[[], None], arguments: argparse.Namespace) -> None:
    """Time a whole measurement with its check and its file, against as many bare passes."""
    count = POINTS["MLP"]
    with tempfile.TemporaryDirectory() as folder:
        tasks = {
            "bare": lambda: [passed() for _ in range(count**2)],
            "loss": lambda: landscape.measure(
                Surface(points=count, accuracy=False), made, out=folder, overwrite=True
            ),
            "loss and accuracy": lambda: landscape.measure(
                Surface(points=count), made, out=folder, overwrite=True
            ),
        }
        seconds = timing.alternate(tasks, max(3, arguments.rounds // 2), clock=arguments.time)
    for words, (low, middle, high) in timing.ratios(seconds, "bare").items():
        print(f"  measure {count}x{count}, {words}: {middle:.3f} [{low:.3f}, {high:.3f}] of the bare passes")


def peer(name: str, arguments: argparse.Namespace) -> None:
    """Time the peer in a process of its own."""
    if not (arguments.peer / "loss_landscapes").exists():
        command = ["pip", "install", "--quiet", "--no-deps", "--target", str(arguments.peer), PEER]
        subprocess.run([sys.executable, "-m", *command], check=True)
    path = os.pathsep.join([str(arguments.peer), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        __file__,
        "--worker",
        name,
        "--rounds",
        str(min(5, arguments.rounds)),
        "--clock",
        arguments.clock,
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"  {PEER}: failed, {done.stderr.strip().splitlines()[-1]}")
        return
    low, middle, high = json.loads(done.stdout.splitlines()[-1])
    print(f"  {PEER}: {middle:.3f} [{low:.3f}, {high:.3f}] of the best bare passes, per point")


def worker(name: str, arguments: argparse.Namespace) -> None:
    """In the peer's process: time its plane and bare passes in turn."""
    import loss_landscapes
    from loss_landscapes.metrics import Loss

    model, inputs, targets = problem(name)
    count, size = PEER_POINTS[name], 32 if name == "ResNet-20" else len(inputs)
    metric = Loss(nn.CrossEntropyLoss(), inputs, targets)
    tasks = {
        "bare": bare(model, inputs, targets, size, count**2),
        "peer": lambda: loss_landscapes.random_plane(model, metric, 1, count, "model", deepcopy_model=True),
    }
    seconds = timing.alternate(tasks, arguments.rounds, clock=arguments.time)
    print(json.dumps(timing.ratios(seconds, "bare")["peer"]))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--problem", choices=[*POINTS], action="append", help="may be repeated (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", type=Path, default=Path.home() / ".cache/landscape-peers/surface")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.time = time.process_time if arguments.clock == "cpu" else time.perf_counter
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        worker(arguments.worker, arguments)
        return
    for name in arguments.problem or POINTS:
        ours(name, arguments)
        peer(name, arguments)


if __name__ == "__main__":
    main()
