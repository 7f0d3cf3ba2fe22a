"""The density of the Hessian's eigenvalues by stochastic Lanczos quadrature: time per probe and ghosts, next to peers.

    python benchmarks/density.py [--batches 1] [--batches 4] [--rounds 5] [--clock cpu] ...

A probe is one Lanczos chain, 100 products by default, and the eigenvalues of its tridiagonal matrix. Ours run 8
in lockstep; the peers run one after the other, so one is enough to time them. A ghost is a node within 1e-3 of
the largest one, which is a single eigenvalue here: copies that a chain without reorthogonalisation makes.
"""

from __future__ import annotations

from typing import Any

import peers_problems
import peers_rounds
import torch
from peers_rounds import OURS, Reply, Rounds

NETWORKS = ("MLP", "ResNet-20")
GHOST = 1e-3
BASE = (OURS, "lockstep")
MEANINGS = {
    "seconds": ("s", "time per probe"),
    "ghosts": ("1", "nodes within 1e-3 of the largest, without itself: the most of a probe"),
    "largest": ("1", "largest node"),
}


def counted(reply: Reply) -> Reply:
    """Return time, ghosts and the largest node of a reply."""
    tops = [max(nodes) for nodes in reply["nodes"]]
    ghosts = [
        sum(abs(x - top) <= GHOST * abs(top) for x in nodes) - 1
        for nodes, top in zip(reply["nodes"], tops, strict=True)
    ]
    return {"seconds": reply["seconds"], "ghosts": max(ghosts), "largest": max(tops)}


def table(found: Rounds) -> str:
    """Return the lines of one problem."""
    lines = [f"\n{found.problem}: seconds per probe [least, most], times ours, ghosts, largest node"]
    for method in found.replies:
        ghosts, largest = found.values(method, "ghosts"), found.values(method, "largest")
        lines.append(f"  {found.line(method, [BASE])}  {max(ghosts):.0f}  {max(largest):.6g}")
    return "\n".join(lines + [f"  {name}: {text}" for name, text in found.failures.items()])


def measure(network: str, batches: int, arguments: Any) -> Rounds:
    """Measure one network with its data cut into batches."""
    peers_problems.prepare(arguments.work, network)
    request = {"steps": arguments.steps, "probes": arguments.probes}
    return peers_rounds.measure(network, "density", arguments, cut=batches, judge=counted, **request)


def main() -> None:
    made = peers_rounds.parser(__doc__, NETWORKS, "density.h5")
    made.add_argument(
        "--batches", type=int, action="append", help="batches of the data; may be repeated (default: 1, 4)"
    )
    made.add_argument("--steps", type=int, default=100, help="products of a chain (default: 100)")
    made.add_argument("--probes", type=int, default=8, help="chains of ours, run together (default: 8)")
    arguments = peers_rounds.parsed(made)
    arguments.batches = arguments.batches or [1, 4]
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.rounds} rounds, {arguments.clock}, "
        f"{arguments.steps} steps"
    )
    outcomes = []
    for network in arguments.problem or NETWORKS[:1]:
        for batches in arguments.batches:
            outcomes.append(measure(network, batches, arguments))
            print(table(outcomes[-1]), flush=True)
            # After each problem: nothing is lost with the next one.
            peers_rounds.write(
                arguments, "Lanczos quadrature of the Hessian, ours and peers'", outcomes, MEANINGS
            )


if __name__ == "__main__":
    main()
