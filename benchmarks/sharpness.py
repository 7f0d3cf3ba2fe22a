"""Keskar's sharpness on the digits network: the native maximizer next to scipy's L-BFGS-B.

    python benchmarks/sharpness.py [--rounds 5] [--clock cpu]

Both search the box |δ_i| <= ε (|θ_i| + 1) for the largest loss of all 1797 digits, from the same random points in it,
through the same `Problem.value_and_gradient`. L-BFGS-B gets 10 and 40 iterations; the native search as many
steps as fit into less than a third of its time, 7 and 16, and its default of 20. Rounds alternate;
each is one search from one start.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import timing
import torch

import landscape
from landscape.estimators.apgd import Apgd
from landscape.estimators.ascent import Ascent
from landscape.estimators.lbfgsb import lbfgsb
from landscape.estimators.regions import Region
from landscape.estimators.search import Maximum, maximize
from landscape.testbeds import load_default

SIZES = (5e-4, 1e-3, 5e-3)
# Each of ours next to the one that it has to reach in a third of its time.
RIVALS = {
    "ascent, 7 steps": "L-BFGS-B, 10 iterations",
    "ascent, 16 steps": "L-BFGS-B, 40 iterations",
    "ascent, 20 steps": "L-BFGS-B, 40 iterations",
}


def searches(
    box: Region, loss: Callable[[Any], Any], found: dict[str, list[Maximum]]
) -> dict[str, Callable[[], None]]:
    """Return a task for each method; each call searches from its next start."""
    methods: dict[str, Callable[[torch.Generator], Maximum]] = {
        "L-BFGS-B, 10 iterations": lambda g: lbfgsb(loss, box, box.draw(g), 10),
        "L-BFGS-B, 40 iterations": lambda g: lbfgsb(loss, box, box.draw(g), 40),
        "ascent, 7 steps": lambda g: maximize(loss, Ascent(box, 7), g),
        "ascent, 16 steps": lambda g: maximize(loss, Ascent(box, 16), g),
        "ascent, 20 steps": lambda g: maximize(loss, Ascent(box, 20), g),
        "APGD, 20 steps": lambda g: maximize(loss, Apgd(box, 20), g),
    }

    def task(name: str) -> Callable[[], None]:
        def once() -> None:
            start = torch.Generator().manual_seed(len(found[name]))
            found[name].append(methods[name](start))

        return once

    found.update({name: [] for name in methods})
    return {name: task(name) for name in methods}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="searches of each method, each from its own start"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problem = landscape.Problem(*load_default()[:3])
    theta, least = problem.parameters_vector(), float(problem.value())

    def loss(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return problem.at(theta + delta).value_and_gradient()

    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    print(f"torch {torch.__version__}, 1 thread, {arguments.rounds} rounds, {arguments.clock} clock")
    with problem.session():
        for epsilon in SIZES:
            found: dict[str, list[Maximum]] = {}
            tasks = searches(Region(epsilon * (theta.abs() + 1)), loss, found)
            seconds = timing.alternate(tasks, rounds=arguments.rounds, warmup=0, clock=clock)
            print(f"\nε = {epsilon:g}: sharpness, median (least - most) of starts; milliseconds; evaluations")
            for name, maxima in found.items():
                values = [100 * (m.value - least) / (1 + least) for m in maxima]
                median, low, high = statistics.median(values), min(values), max(values)
                times = 1e3 * statistics.median(seconds[name])
                count = statistics.median(m.evaluations for m in maxima)
                line = f"  {name:24s} {median:9.4f} ({low:.4f} - {high:.4f})  {times:6.0f} ms  {count:3.0f}"
                if name in RIVALS:
                    rival = RIVALS[name]
                    ratio = timing.ratios({name: seconds[name]} | {rival: seconds[rival]}, rival)[name][1]
                    pairs = zip(maxima, found[rival], strict=True)
                    wins = sum(ours.value >= theirs.value for ours, theirs in pairs)
                    line += f"  {ratio:.2f} of {rival}'s time, as high from {wins} of {len(values)} starts"
                print(line, flush=True)


if __name__ == "__main__":
    main()
