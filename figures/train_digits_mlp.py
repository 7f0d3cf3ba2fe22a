"""Train the embedded default: 64-128-128-10, ReLU, on four of five of scikit-learn's digits.

    python figures/train_digits_mlp.py [weights.safetensors]

trains it anew and, with a file name, writes the weights there; without one it compares them with the
shipped ones. The arithmetic is float64, rounded to float32 once at the end, with one thread.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from landscape.testbeds.digits import SIZES, batches, digits, digits_mlp, split
from landscape.testbeds.nets import mlp
from landscape.testbeds.train import train

TOLERANCE = 1e-5
"""Largest difference of a weight between two runs (a start that is 1e-15 off ends 1.5e-8 away)."""


def recipe() -> tuple[nn.Sequential, list[float]]:
    """Return the trained network and the training loss of each epoch."""
    (inputs, targets), _ = split(*digits())
    model = mlp(SIZES, seed=0)
    history = train(
        model,
        nn.CrossEntropyLoss(),
        batches(inputs, targets, 64),
        epochs=40,
        lr=2e-3,
        seed=0,
        weight_decay=1e-3,
        dtype=torch.float64,
    )
    return model, history


def difference(a: nn.Module, b: nn.Module) -> float:
    """Return the largest difference between two parameters of the same name."""
    theirs = dict(b.named_parameters())
    return max((p - theirs[name]).abs().max().item() for name, p in a.named_parameters())


def main(arguments: list[str]) -> int:
    """Train; write or compare."""
    torch.set_num_threads(1)
    model, history = recipe()
    print(f"mean training loss of the last epoch: {history[-1]:.6f}")
    if arguments:
        Path(arguments[0]).write_bytes(save({name: p.detach() for name, p in model.named_parameters()}))
        print(f"written: {arguments[0]}")
        return 0
    off = difference(model, digits_mlp())
    print(f"largest difference from the shipped weights: {off:.1e} (allowed: {TOLERANCE:.0e})")
    return int(off > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
