"""How long finding the rescaling symmetries takes on ResNet-20, and how much memory.

    python benchmarks/symmetries.py [--width 64] [--balanced]

Seconds and the peak resident memory of a fresh process, imports apart: export of the graph, the equations, their
solution in rational numbers, and the verification of every layer in float64 on two images of 32 by 32.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

GOALS = {64: (4928, 33, 10.0, 2.0)}  # nodes, layer groups, seconds, GiB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--balanced", action="store_true", help="also go to the balanced point of the orbit")
    arguments = parser.parse_args()

    import torch
    from torch import nn

    import landscape
    from landscape import testbeds, transforms
    from landscape.seeds import generator

    torch.set_num_threads(arguments.threads)
    images = torch.randn(2, 3, 32, 32, generator=generator(0, "benchmark", 5))
    data = [(images, torch.tensor([0, 1]))]
    problem = landscape.Problem(testbeds.resnet20(arguments.width), nn.CrossEntropyLoss(), data)
    began, processor = time.perf_counter(), time.process_time()
    found = transforms.find(problem)
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    print(
        f"width {arguments.width}: {problem.size / 1e6:.1f} M parameters, {len(found.nodes)} nodes in "
        f"{len(found.groups)} groups, {seconds:.1f} s ({processor:.1f} s of processor), peak {peak():.2f} GiB, "
        f"largest relative change of an output {max(g.change for g in found.groups):.0e}"
    )
    if arguments.width in GOALS:
        nodes, groups, limit, memory = GOALS[arguments.width]
        met = (
            (len(found.nodes), len(found.groups)) == (nodes, groups)
            and processor <= limit
            and peak() <= memory
        )
        print(
            f"goal: {nodes} nodes in {groups} groups, {limit:.0f} s, {memory:.0f} GiB: {'met' if met else 'MISSED'}"
        )
    if arguments.balanced:
        began, processor = time.perf_counter(), time.process_time()
        there = found.balanced()
        print(
            f"balanced point: |θ| from {problem.parameters_vector().norm():.2f} to {there.vector.norm():.2f}, "
            f"{time.perf_counter() - began:.1f} s ({time.process_time() - processor:.1f} s of processor)"
        )


def peak() -> float:
    """The process's highest resident memory so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    main()
