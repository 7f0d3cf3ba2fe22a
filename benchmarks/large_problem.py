"""The GPT that `benchmarks/large.py` measures: its text, its brief training, and the problem.

A file for `landscape measure --problem`. The trained weights are kept in the working folder, so that it is
trained once.
"""

from __future__ import annotations

import argparse
import ast
import collections
import inspect
import re
import textwrap
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import landscape
from landscape import kernels, testbeds

SEQUENCES, BATCH, MODULES = 16, 2, (argparse, ast, inspect, textwrap, typing)


@dataclass(frozen=True)
class Size:
    """The shape of a GPT and of its training.

    Attributes:
        width: of the residual stream, 64 per head.
        layers: number of blocks.
        vocabulary: number of tokens.
        context: tokens in a sequence.
        learned: sequences that it is trained on; the first 16 are measured.
        epochs: passes over them.
        lr: step size of Adam at the start.
    """

    width: int
    layers: int
    vocabulary: int
    context: int
    learned: int
    epochs: int
    lr: float

    def model(self) -> nn.Module:
        """The network with its initial weights."""
        return testbeds.gpt(self.width, self.layers, self.width // 64, self.context, self.vocabulary)


# 150 steps each but "tiny"; random weights are the worst case of all: indefinite, close eigenvalues.
SIZES = {
    "full": Size(768, 12, 50257, 128, learned=60, epochs=5, lr=3e-4),
    "small": Size(192, 5, 4096, 128, learned=60, epochs=5, lr=1e-3),
    "tiny": Size(192, 5, 4096, 16, learned=24, epochs=4, lr=2e-3),
}


def text(size: Size) -> tuple[Tensor, Tensor]:
    """Inputs and targets (learned, context): words and signs of the source of some modules, numbered by frequency."""
    words = re.findall(r"\w+|[^\w\s]|\s+", "".join(inspect.getsource(module) for module in MODULES))
    ranks = {w: i for i, (w, _) in enumerate(collections.Counter(words).most_common(size.vocabulary - 1), 1)}
    numbers = torch.tensor([ranks.get(w, 0) for w in words[: size.learned * (size.context + 1)]])
    rows = numbers.view(size.learned, size.context + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def output(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Logits (batch, classes, time), as `nn.CrossEntropyLoss` takes them."""
    logits: Tensor = model(batch[0]).transpose(1, 2)
    return logits


def trained(name: str, work: Path) -> nn.Module:
    """The network of a size after its training, from the working folder where it is there."""
    from landscape.testbeds.train import train

    size, path = SIZES[name], work / f"gpt-{name}.pt"
    model = size.model()
    if not path.exists():
        inputs, targets = text(size)
        batches = list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

        with kernels.active(kernels.choose(torch.device("cpu"), torch.float32)):
            history = train(model, loss, batches, epochs=size.epochs, lr=size.lr)
        print(f"trained: loss {' '.join(f'{value:.2f}' for value in history)}", flush=True)
        work.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path.with_suffix(".unfinished"))
        path.with_suffix(".unfinished").replace(path)
    model.load_state_dict(torch.load(path, weights_only=True, mmap=True), assign=True)
    model.head.weight = model.token.weight  # tied again: each name was given its own tensor
    return model.eval()


def make_problem(name: str = "full", work: str = "large-work") -> landscape.Problem:
    """The problem: 16 sequences, one at a time."""
    model = trained(name, Path(work))
    inputs, targets = (t[:SEQUENCES] for t in text(SIZES[name]))
    data = list(zip(inputs.split(1), targets.split(1), strict=True))
    return landscape.Problem(model, nn.CrossEntropyLoss(), data, output=output)
