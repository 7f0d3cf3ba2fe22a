"""How much memory one product takes on a model of the size of GPT-2 small, in units of its parameters' bytes.

    python benchmarks/memory.py [--tasks gradient hvp ggn]

The peak resident memory of a fresh process above that of the imported interpreter: the parameters, the
vector and the result are in it, 3 units. 124 M parameters, one sequence of 128 tokens. Takes up to 3 GiB.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

GOALS = {"hvp": 4.8}
TASKS = ("gradient", "hvp", "ggn")


def peak() -> float:
    """The process's highest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(task: str, vocabulary: int, width: int, layers: int, context: int) -> None:
    import torch
    from torch import nn

    import landscape
    from landscape import testbeds
    from landscape.seeds import generator

    _ = landscape.Problem  # its modules count as imported
    torch.set_num_threads(1)
    imported = peak()
    draws = generator(0, "benchmark", 3)
    text = torch.randint(0, vocabulary, (1, context + 1), generator=draws)
    model = testbeds.gpt(width, layers, width // 64, context, vocabulary)

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    batch = (text[:, :-1], text[:, 1:])
    problem = landscape.Problem(model, loss, [batch], products="autodiff")  # the product alone, unchecked
    unit = sum(p.numel() * p.element_size() for p in model.parameters())
    built = peak()
    began = time.perf_counter()
    if task == "gradient":
        problem.gradient()
    else:
        v = torch.randn(problem.size, generator=draws)
        problem.hvp(v) if task == "hvp" else problem.ggn_vp(v)
    seconds = time.perf_counter() - began
    goal = f"goal {GOALS[task]}" if task in GOALS else ""
    print(
        f"{task:10} {problem.size / 1e6:6.1f} M parameters   built {(built - imported) / unit:5.2f}   "
        f"peak {(peak() - imported) / unit:5.2f} x their bytes   {seconds:6.1f} s   {goal}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["hvp"])
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = [arguments.vocabulary, arguments.width, arguments.layers, arguments.context]
    if arguments.inside:
        measure(arguments.tasks[0], *shape)
        return
    names = ("--vocabulary", "--width", "--layers", "--context")
    flags = [str(part) for pair in zip(names, shape, strict=True) for part in pair]
    for task in arguments.tasks:  # each in a process of its own: a peak does not go down
        subprocess.run([sys.executable, __file__, "--inside", "--tasks", task, *flags], check=True)


if __name__ == "__main__":
    main()
