"""The path of training in the plane that holds most of it, on the digits.

    python figures/trajectory.py [--out figures/trajectory.png] [--epochs 30] [--points 41]

The network of the embedded default is trained from its random weights with SGD; its weights are kept after each
epoch. Drawn is the loss on the plane of the two principal directions of these checkpoints about the last one
(not centred, so that the plane goes through it), and their path in it. After Li, Xu, Taylor, Studer & Goldstein
2018 (arXiv 1712.09913), section 7. Prints the explained variance and how far the path leaves the plane.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import landscape
from landscape import plots
from landscape.metrics import Surface
from landscape.seeds import generator
from landscape.testbeds import batches, mlp, split
from landscape.testbeds.digits import SIZES, digits

BATCH, LEARNING_RATE, MOMENTUM = 64, 0.05, 0.9


def train(model: nn.Module, epochs: int, folder: Path) -> list[str]:
    """Train with SGD; return the files of the weights before the first epoch and after each."""
    (inputs, targets), _ = split(*digits())
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    files = [str(folder / f"epoch{epoch}.pt") for epoch in range(epochs + 1)]
    torch.save(model.state_dict(), files[0])
    for epoch in range(epochs):
        order = torch.randperm(len(inputs), generator=generator(0, "trajectory", epoch))
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
        torch.save(model.state_dict(), files[epoch + 1])
    return files


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--points", type=int, default=41)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (inputs, targets), _ = split(*digits())
    model = mlp(SIZES, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        files = train(model, arguments.epochs, Path(folder))
        problem = landscape.Problem(model, nn.CrossEntropyLoss(), batches(inputs, targets, 512))
        metric = Surface(directions="pca", points=arguments.points, trajectory=tuple(files))
        run = Path(folder) / "digits_mlp"
        ds = landscape.measure(metric, problem, out=run)
        first, second = ds["explained_variance"].values
        moved = float(ds["trajectory_residual"].max())
        print(
            f"explained variance {first:.4f} and {second:.4f}; the path is at most {moved:.3f} from the plane"
        )
        plots.plot(run / "surface.h5", arguments.out)


if __name__ == "__main__":
    main()
