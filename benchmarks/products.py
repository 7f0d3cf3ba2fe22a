"""What a curvature product costs, in gradients: alone, and per vector in a block of 16.

    python benchmarks/products.py [--rounds 7] [--threads 1] [--clock cpu] [--switches]

Each figure is the median over rounds of (seconds of the task) / (seconds of a gradient in the same round),
the first graph included; quartiles in brackets. The data are one pass in the stated micro-batches. The
gradient is what a user's own would cost: none of the cheaper kernels is on in it. With --switches, the
kernels are switched on one after the other, all in one alternating run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import timing
import torch
from torch import nn

import landscape
from landscape import kernels, matmul, testbeds
from landscape.seeds import generator

BLOCK = 16
# Gradients per vector in a block that are to be reached, the first graph included; without the faster
# matrix product, 2.3 for what consists of matrix products.
GOALS = {"MLP": 1.4, "ResNet-20": 1.95, "GPT": 1.4}
GOAL_WITHOUT = {"MLP": 2.3, "ResNet-20": 1.95, "GPT": 2.3}


def mlp() -> landscape.Problem:
    """The embedded default: 26 122 parameters, all 1797 digits in one batch."""
    model, loss, batches, _ = testbeds.load_default()
    whole = tuple(torch.cat([b[i] for b in batches]) for i in range(2))
    return landscape.Problem(model, loss, [whole])


def resnet20() -> landscape.Problem:
    """ResNet-20, 272 474 parameters, BatchNorm in evaluation mode, 128 images in micro-batches of 64."""
    draws = generator(0, "benchmark", 0)
    images = torch.randn(128, 3, 32, 32, generator=draws)
    labels = torch.randint(0, 10, (128,), generator=draws)
    return landscape.Problem(testbeds.resnet20(), nn.CrossEntropyLoss(), [(images, labels)], microbatch=64)


def gpt() -> landscape.Problem:
    """A byte-level GPT, 1 288 640 parameters, tied embedding, 16 sequences of 64 in micro-batches of 8."""
    draws = generator(0, "benchmark", 1)
    text = torch.randint(0, 256, (16, 65), generator=draws)

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    return landscape.Problem(testbeds.gpt(), loss, [(text[:, :-1], text[:, 1:])], microbatch=8)


MODELS: dict[str, Callable[[], landscape.Problem]] = {"MLP": mlp, "ResNet-20": resnet20, "GPT": gpt}


def steps(full: kernels.Kernels) -> dict[str, kernels.Kernels]:
    """The switches of `full`, each on beside those before it; what is off in `full` is left out."""
    found = {"none": kernels.NONE}
    for name in ("matmul", "convolution", "norm", "channels_last"):
        last = list(found.values())[-1]
        step = replace(last, **{name: getattr(full, name)})
        if step != last:
            found[f"+ {name}"] = step
    return found


def tasks(problem: landscape.Problem, switches: bool) -> Mapping[str, tuple[int, Callable[[], object]]]:
    """Name -> (number of products, task)."""
    V = torch.randn(problem.size, BLOCK, generator=generator(0, "benchmark", 2))
    v = V[:, 0].clone()
    found: dict[str, tuple[int, Callable[[], object]]] = {
        "gradient": (1, problem.gradient),
        "H v alone": (1, lambda: problem.hvp(v)),
        f"H v in {BLOCK}": (BLOCK, lambda: problem.hvp(V)),
        f"G v in {BLOCK}": (BLOCK, lambda: problem.ggn_vp(V)),
    }
    if switches:
        for name, step in steps(problem.kernels).items():
            other = problem.replace(kernels=step)
            found[f"H v in {BLOCK}, {name}"] = BLOCK, lambda p=other: p.hvp(V)  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread on a busy machine"
    )
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--switches", action="store_true", help="each switch beside those before it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    errors = {p: matmul.error(p) for p in ("none", "bf16")}
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.rounds} alternating rounds, "
        f"{arguments.clock} clock\nerror of matrix products: {errors['none']:.1e}, of the faster ones "
        f"{errors['bf16']:.1e} ({'exact' if matmul.faster_is_exact() else 'refused'})\n"
    )
    for name in arguments.model or MODELS:
        problem = MODELS[name]()
        goal = (GOALS if problem.kernels.matmul != "default" else GOAL_WITHOUT)[name]
        todo = tasks(problem, arguments.switches)
        seconds = timing.alternate({k: t for k, (_, t) in todo.items()}, arguments.rounds, clock=clock)
        middle = sorted(seconds["gradient"])[len(seconds["gradient"]) // 2]
        print(f"{name}: gradient {middle * 1e3:.1f} ms; goal in a block {goal} gradients")
        for task, relative in timing.ratios(seconds, "gradient").items():
            if task != "gradient":
                low, median, high = (r / todo[task][0] for r in relative)
                print(f"  {task:28} {median:.2f} [{low:.2f}, {high:.2f}]", flush=True)


if __name__ == "__main__":
    main()
