"""The 10 largest eigenpairs of the Hessian to relative residual 1e-3: ours, and the peers'.

    python benchmarks/eigenpairs.py [--problem MLP] [--rounds 5] [--clock cpu] ...

Each peer runs in its own process and environment, as in `peers.py`; the processes work in turn. Residuals
|Hv - θv| / |θ| are the same for everyone: v at unit length, H in float64 by plain automatic differentiation, θ
the value that was returned. A method has reached 1e-3 if the worst pair of every round has. hessian-eigenthings
does not stop by itself: its best guess is the smallest `max_iter` of those tried that reaches it.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path

import peers_envs
import peers_problems
import torch
from peers_search import PeerFailedError, Process
from torch import Tensor

import landscape

OURS = "ours"
GOAL = 1e-3
PROBLEMS = ("MLP", "ResNet-20")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--envs", type=Path, default=peers_envs.default_folder(), help="where the peers' environments are")
    add("--work", type=Path, default=None, help="where trained weights are (default: `work` in --envs)")
    add("--problem", choices=PROBLEMS, action="append", help="only this one; may be repeated")
    add("--peer", choices=peers_envs.PEERS, action="append", help="only this peer; may be repeated")
    add("--pip", action="append", default=[], metavar="OPTION", help="passed on to pip install")
    add(
        "--skip",
        action="append",
        default=[],
        metavar="METHOD",
        help="a method to leave out, such as 'tol 1e-9'",
    )
    add("--rounds", type=int, default=5, help="alternating rounds, each with a seed of its own (default: 5)")
    add("--threads", type=int, default=1, help="of each process (default: 1)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread on a crowded machine")
    add("--timeout", type=float, default=1800.0, help="seconds that one answer may take (default: 1800)")
    return parser.parse_args()


class Judge:
    """Residuals of anyone's pairs, by float64 products that share no code with what is measured."""

    def __init__(self, case: peers_problems.Case) -> None:
        model = case.model.double()
        self.weights = list(model.parameters())
        loss = case.loss(model(case.inputs.double()), case.targets)
        gradient = torch.autograd.grad(loss, self.weights, create_graph=True)
        self.gradient = torch.cat([piece.flatten() for piece in gradient])

    def product(self, v: Tensor) -> Tensor:
        pieces = torch.autograd.grad(self.gradient, self.weights, v, retain_graph=True)
        return torch.cat([piece.flatten() for piece in pieces])

    def worst(self, path: Path) -> float:
        """Return the largest relative residual of the stored pairs."""
        stored = torch.load(path, weights_only=True)
        found = 0.0
        for value, column in zip(stored["values"], stored["vectors"].T, strict=True):
            v = column / column.norm()
            found = max(found, float((self.product(v) - value * v).norm() / value.abs()))
        return found


def measure(problem: str, pythons: dict[str, Path], package: Path, arguments: argparse.Namespace) -> None:
    """Measure one problem with all methods in turn, and print the table."""
    peers_problems.prepare(arguments.work, problem)
    judge = Judge(peers_problems.load(arguments.work, problem))
    seconds: dict[tuple[str, str], list[float]] = {}
    products: dict[tuple[str, str], list[int]] = {}
    residuals: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, python in pythons.items():
            process = Process(
                name, python, problem, arguments.work, package=package,
                threads=arguments.threads, clock=arguments.clock, timeout=arguments.timeout,
            )  # fmt: skip
            stack.callback(process.close)
            for method in process.ask("setup")["pairs"]:
                if method not in arguments.skip:
                    processes[name, method] = process
            process.ask("product")
        path = package / "pairs.pt"
        for turn in range(arguments.rounds + 1):  # the first warms up
            for key in list(processes):
                try:
                    reply = processes[key].ask("eigenpairs", method=key[1], seed=turn, path=str(path))
                except PeerFailedError as error:
                    print(f"{' '.join(key)}: {error}", flush=True)
                    del processes[key]
                    continue
                if turn == 0:
                    continue
                seconds.setdefault(key, []).append(reply["seconds"])
                products.setdefault(key, []).append(reply["taken"])
                residuals.setdefault(key, []).append(judge.worst(path))
    ours = statistics.median(seconds[OURS, "eigsh"])
    print(f"\n{problem}: seconds [least, most], times ours, products, worst relative residual of all rounds")
    for key, times in seconds.items():
        middle, worst = statistics.median(times), max(residuals[key])
        print(
            f"  {' '.join(key):28} {middle:8.3f} [{min(times):.3f}, {max(times):.3f}] {middle / ours:6.2f} x"
            f"  {min(products[key])}-{max(products[key])}  {worst:.1e}{'' if worst <= GOAL else '  NOT REACHED'}",
            flush=True,
        )


def main() -> None:
    arguments = options()
    arguments.work = arguments.work or arguments.envs / "work"
    torch.set_num_threads(arguments.threads)
    pythons = {OURS: Path(sys.executable)}
    for name in arguments.peer or peers_envs.PEERS:
        try:
            wanted = peers_envs.PEERS[name].requirement
            pythons[name] = peers_envs.python_of(arguments.envs, name, wanted, arguments.pip)
        except (peers_envs.EnvironmentFailedError, OSError) as error:
            print(f"{name} is not installed: {error}")
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.rounds} rounds, {arguments.clock}"
    )
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder)
        (package / "landscape").symlink_to(Path(landscape.__file__).resolve().parent)
        for problem in arguments.problem or PROBLEMS:
            measure(problem, pythons, package, arguments)


if __name__ == "__main__":
    main()
