"""What a curvature product costs, in gradients: alone, and per vector in a block of 16.

    python benchmarks/products.py [--rounds 7] [--threads 1]

Each figure is the median over rounds of (seconds of the task) / (seconds of a gradient in the same round),
the first graph included; quartiles in brackets. The data are one pass in the stated micro-batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import timing
import torch
from torch import nn

import landscape
from landscape import testbeds
from landscape.seeds import generator

BLOCK = 16
# Gradients per vector in a block that are to be reached, the first graph included.
GOALS = {"MLP": 2.2, "ResNet-20": 2.9, "GPT": 2.5}


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=MODELS, action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.rounds} alternating rounds\n"
    )
    print(
        f"{'':10} {'gradient':>10} {'H v alone':>20} {f'H v in {BLOCK}':>20} {f'G v in {BLOCK}':>20}   goal"
    )
    for name in arguments.model or MODELS:
        problem = MODELS[name]()
        V = torch.randn(problem.size, BLOCK, generator=generator(0, "benchmark", 2))
        v = V[:, 0].clone()
        tasks = {
            "gradient": problem.gradient,
            "alone": lambda p=problem, v=v: p.hvp(v),
            "block": lambda p=problem, V=V: p.hvp(V),
            "ggn": lambda p=problem, V=V: p.ggn_vp(V),
        }
        seconds = timing.alternate(tasks, arguments.rounds)
        found = timing.ratios(seconds, "gradient")
        per = {"alone": 1, "block": BLOCK, "ggn": BLOCK}
        cells = ["{1:.2f}x [{0:.2f}, {2:.2f}]".format(*(r / per[t] for r in found[t])) for t in per]
        middle = sorted(seconds["gradient"])[len(seconds["gradient"]) // 2]
        print(
            f"{name:10} {middle * 1e3:7.1f} ms " + " ".join(f"{c:>20}" for c in cells) + f"   {GOALS[name]}x"
        )


if __name__ == "__main__":
    main()
