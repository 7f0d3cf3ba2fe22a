"""Time and memory of `class_structure` against the number of classes C and of examples N.

    python benchmarks/class_structure.py [--classes 10 30 100] [--per-class 5 20 80] [--memory 1GiB]

A CNN of three convolutions with BatchNorm on synthetic images of 12 by 12 pixels that are a class's own picture and
noise, trained for a few epochs. Each row is a fresh process on one thread: CPU seconds of the mean vectors and their
inner products or sketches, of the whole measurement with two densities and the attribution to examples, and the highest
resident memory. First C is varied with the fewest examples of each class, then N with the fewest classes.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from itertools import pairwise
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SIZE, WIDTHS = 12, (3, 16, 32, 64)


def problem(classes: int, per_class: int) -> Any:
    import torch
    from torch import nn

    import landscape
    from landscape.seeds import generator
    from landscape.testbeds.nets import own_stream
    from landscape.testbeds.train import train

    draws = generator(0, "benchmark", 5)
    pictures = torch.randn(classes, 3, SIZE, SIZE, generator=draws)
    y = torch.arange(classes).repeat(per_class)
    x = pictures[y] + 0.5 * torch.randn(len(y), 3, SIZE, SIZE, generator=draws)
    layers: list[nn.Module] = []
    with own_stream(0, "benchmark"):
        for inner, outer in pairwise(WIDTHS):
            stride = 1 if inner == WIDTHS[0] else 2
            layers += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], classes))
    data = list(zip(x.split(100), y.split(100), strict=True))
    train(model, nn.functional.cross_entropy, data, epochs=8, lr=3e-3)
    return landscape.Problem(model, nn.CrossEntropyLoss(), data)


def inside(classes: int, per_class: int, memory: int) -> None:
    """Measure, and print a row."""
    import torch

    import landscape
    from landscape.metrics import ClassStructure

    torch.set_num_threads(1)
    built = problem(classes, per_class)
    began = time.process_time()
    landscape.evaluate(ClassStructure(k=1, rtol=0.5, spectra=(), attribution=False), built, memory=memory)
    means = time.process_time() - began
    began = time.process_time()
    metric = ClassStructure(spectra=("hessian", "G"), probes=1, steps=32)
    ds = landscape.measure(metric, built, memory=memory)
    whole = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    exact = f"sketched to {ds.attrs['sketch']}" if ds.attrs["sketch"] else "all inner products"
    print(
        f"{classes:8} {per_class * classes:7} {built.size:10} {means:9.1f} {whole:9.1f} {peak / 2**30:9.2f}   {exact}, "
        f"converged {bool(ds['converged'])}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 30, 100])
    parser.add_argument("--per-class", nargs="+", type=int, default=[5, 20, 80])
    parser.add_argument("--memory", type=float, default=1.0, help="GiB, as stated to the measurement")
    parser.add_argument("--inside", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        inside(*arguments.inside, int(arguments.memory * 2**30))
        return
    print(" classes       N parameters   means s   whole s  peak GiB")
    rows = [(c, arguments.per_class[0]) for c in arguments.classes]
    rows += [(arguments.classes[0], n) for n in arguments.per_class[1:]]
    for row in rows:  # each in a process of its own: a peak does not go down
        command = [sys.executable, __file__, "--memory", str(arguments.memory), "--inside", *map(str, row)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
