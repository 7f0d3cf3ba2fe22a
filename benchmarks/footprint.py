"""How much memory a product takes per example, in units of what autograd saves: the factor of landscape.memory.

    python benchmarks/footprint.py [--networks mlp_tanh conv gpt]

For each network the growth of a fresh process's peak resident memory from N to 2N examples in one batch, per
example, over the bytes that `landscape.memory` counts per example; for H and G, with blocks of four vectors.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NETWORKS = ("mlp_relu", "mlp_tanh", "conv", "resnet20", "lstm", "encoder", "gpt", "gpt_8000_classes")
# N is such that N examples save this many bytes.
SAVED = 40e6


def problem(name: str, count: int) -> Any:
    import torch
    from torch import nn

    import landscape
    from landscape import testbeds
    from landscape.seeds import generator

    def over_tokens(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.LSTM(16, 64, batch_first=True), nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.inner(x)[0][:, -1])  # type: ignore[no-any-return]

    def perceptron(kind: type[nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 256), kind(), nn.Linear(256, 256), kind(), nn.Linear(256, 10))

    draws = generator(0, "benchmark", 4)
    if name.startswith("gpt"):
        classes = 8000 if name.endswith("classes") else 128
        tokens = torch.randint(0, classes, (count, 65), generator=draws)
        model = testbeds.gpt(64, 2, 4, 64, classes)
        return landscape.Problem(model, over_tokens, [(tokens[:, :-1], tokens[:, 1:])], products="autodiff")
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    filters = [nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.GELU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    made = {
        "mlp_relu": (lambda: perceptron(nn.ReLU), (64,)),
        "mlp_tanh": (lambda: perceptron(nn.Tanh), (64,)),
        "conv": (
            lambda: nn.Sequential(*filters, *head),
            (3, 32, 32),
        ),
        "resnet20": (testbeds.resnet20, (3, 32, 32)),
        "lstm": (Recurrent, (50, 16)),
        "encoder": (lambda: nn.Sequential(layer, nn.Flatten(), nn.Linear(64 * 64, 10)), (64, 64)),
    }
    make, shape = made[name]
    x = torch.randn(count, *shape, generator=draws)
    y = torch.randint(0, 10, (count,), generator=draws)
    return landscape.Problem(make(), nn.CrossEntropyLoss(), [(x, y)], products="autodiff")


def inside(name: str, count: int, matrix: str) -> None:
    """Print the peak of one product above what stood before it, in bytes."""
    import torch

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    torch.set_num_threads(1)
    few, many = problem(name, 2), problem(name, count)
    V = torch.ones(many.size, 4)
    product = {"hessian": (few.hvp, many.hvp), "ggn": (few.ggn_vp, many.ggn_vp)}[matrix]
    product[0](V)
    before = peak()
    product[1](V)
    print(peak() - before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        name, count, matrix = arguments.inside
        inside(name, int(count), matrix)
        return
    from landscape import memory

    for name in arguments.networks:
        each = memory.saved_per_example(problem(name, 2))
        count = max(4, int(SAVED / each))
        ratios = []
        for matrix in ("hessian", "ggn"):
            peaks = [
                int(subprocess.run([sys.executable, __file__, "--inside", name, str(n), matrix],
                                   capture_output=True, text=True, check=True).stdout)
                for n in (count, 2 * count)
            ]  # fmt: skip
            ratios.append((peaks[1] - peaks[0]) / count / each)
        print(
            f"{name:18} {each:9} bytes saved per example   H {ratios[0]:4.1f} x   G {ratios[1]:4.1f} x",
            flush=True,
        )


if __name__ == "__main__":
    main()
