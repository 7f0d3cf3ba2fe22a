"""The loss around deep networks with and without skip connections, on the digits.

    python figures/li_skip.py [--out figures/li_skip.png] [--depth 40] [--epochs 30] [--points 31]

The same convolutional network with BatchNorm is trained twice from the same weights, once with the skip
connections of its blocks and once without. Drawn is the training loss on the plane of the same two random
directions, normalized filter by filter, with one scale for both. After Li, Xu, Taylor, Studer & Goldstein 2018
(arXiv 1712.09913), who find that without skip connections the loss of deep networks turns from nearly convex to
chaotic. Prints depth, loss and accuracy of both.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import landscape
from landscape import plots
from landscape.metrics import Surface
from landscape.testbeds import batches, split
from landscape.testbeds.digits import digits
from landscape.testbeds.nets import own_stream
from landscape.testbeds.train import train

WIDTH, BATCH, LEARNING_RATE = 16, 128, 5e-3
MEASURED = 512  # training images on which the surfaces are measured


class Block(nn.Module):
    """Two convolutions, with or without the sum with their input."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.body = nn.Sequential(*layer(WIDTH), nn.ReLU(), *layer(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.body(x)
        return torch.relu(y + x if self.skip else y)


def layer(inner: int) -> tuple[nn.Module, ...]:
    """Return a convolution and its norm."""
    return nn.Conv2d(inner, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)


def network(depth: int, skip: bool) -> nn.Module:
    """Return a network with so many convolutions on images of 8 by 8; the same weights with and without skips."""
    with own_stream(0, "li_skip"):
        blocks = [Block(skip) for _ in range((depth - 1) // 2)]
        return nn.Sequential(
            *layer(1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(WIDTH, 10),
        )


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--depth", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--points", type=int, default=31)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (inputs, targets), _ = split(*digits())
    inputs = inputs.view(-1, 1, 8, 8)
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for skip in (True, False):
            model = network(arguments.depth, skip)
            cut = batches(inputs, targets, BATCH)
            train(model, nn.CrossEntropyLoss(), cut, epochs=arguments.epochs, lr=LEARNING_RATE)
            data = batches(inputs[:MEASURED], targets[:MEASURED], MEASURED)
            problem = landscape.Problem(model, nn.CrossEntropyLoss(), data)
            run = Path(folder) / ("with skip connections" if skip else "without skip connections")
            ds = landscape.measure(Surface(points=arguments.points), problem, out=run)
            right = float((model(inputs[:MEASURED]).argmax(1) == targets[:MEASURED]).double().mean())
            print(
                f"{run.name}: {arguments.depth} convolutions, loss {float(ds['loss_origin']):.4f}, accuracy {right:.1%}"
            )
            found.append(run / "surface.h5")
        plots.plot(found, arguments.out)


if __name__ == "__main__":
    main()
