"""The 10 largest eigenpairs of the Hessian to relative residual 1e-3: ours, and the peers'.

    python benchmarks/eigenpairs.py [--problem MLP] [--rounds 5] [--clock cpu] ...

Each peer runs in its own process and environment, as in `peers.py`; the processes work in turn. Residuals
|Hv - θv| / |θ| are the same for everyone: v at unit length, H in float64 by plain automatic differentiation, θ
the value that was returned. A method has reached 1e-3 if the worst pair of every round has. hessian-eigenthings
does not stop by itself: its best guess is the smallest `max_iter` of those tried that reaches it.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import peers_problems
import peers_rounds
import torch
from peers_rounds import OURS, Rounds
from torch import Tensor

GOAL = 1e-3
PROBLEMS = ("MLP", "ResNet-20")
# Ours as it comes, and without the search for copies of eigenvalues, which no peer makes.
BASES = ((OURS, "eigsh"), (OURS, "eigsh, block=1, copies=False"))
MEANINGS = {
    "seconds": ("s", "time to the pairs"),
    "taken": ("1", "products with a vector"),
    "worst": ("1", "largest |Hv - θv| / |θ| of the pairs"),
}


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


def measure(problem: str, arguments: Any) -> Rounds:
    """Measure one problem with all methods in turn."""
    peers_problems.prepare(arguments.work, problem)
    judge = Judge(peers_problems.load(arguments.work, problem))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.pt"
        return peers_rounds.measure(
            problem, "eigenpairs", arguments, path=str(path),
            judge=lambda reply: reply | {"worst": judge.worst(path)},
        )  # fmt: skip


def table(found: Rounds) -> str:
    """Return the lines of one problem."""
    bases = [base for base in BASES if base in found.replies]
    lines = [
        f"\n{found.problem}: seconds [least, most], times ours (as it comes, without copies), products, "
        "worst relative residual of all rounds"
    ]
    for method in found.replies:
        products, worst = found.values(method, "taken"), max(found.values(method, "worst"))
        lines.append(
            f"  {found.line(method, bases)}  {min(products):.0f}-{max(products):.0f} "
            f"({statistics.median(products):.0f})  {worst:.1e}{'' if worst <= GOAL else '  NOT REACHED'}"
        )
    return "\n".join(lines + [f"  {name}: {text}" for name, text in found.failures.items()])


def main() -> None:
    arguments = peers_rounds.parsed(peers_rounds.parser(__doc__, PROBLEMS, "eigenpairs.h5"))
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.rounds} rounds, {arguments.clock}"
    )
    outcomes = []
    for problem in arguments.problem or PROBLEMS:
        outcomes.append(measure(problem, arguments))
        print(table(outcomes[-1]), flush=True)
        # After each problem: nothing is lost with the next one.
        peers_rounds.write(
            arguments, "the 10 largest eigenpairs of the Hessian, ours and peers'", outcomes, MEANINGS
        )


if __name__ == "__main__":
    main()
