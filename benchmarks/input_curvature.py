"""What curvature in the input costs, for every example at once, in gradients of the batch with respect to it.

    python benchmarks/input_curvature.py [--rounds 7] [--threads 1] [--clock cpu] [--model MLP]

Each figure is the median over rounds of (seconds of the task) / (seconds of a plain gradient of the same
round); quartiles in brackets. The gradient is what a user's own would cost: none of our kernels is on in
it. "product, graph kept" is one of 16 with one graph, whose making is counted in "graph and gradient". The loop
makes the same product example after example, each with a kept graph of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable

import timing
import torch
from torch import Tensor, nn

import landscape
from landscape import testbeds
from landscape.example_hessians import Hessians
from landscape.example_scalars import ExampleScalars, Setup
from landscape.input_checks import examine
from landscape.metrics import InputCurvature
from landscape.seeds import generator

BLOCK, LOOPED = 16, 16
# In gradients: a product with a kept graph, and Curv(X) in all.
GOALS = {"MLP": (1.3, 3.2), "ResNet-20": (2.6, 3.2)}


def mlp() -> landscape.Problem:
    """The embedded default, 512 digits."""
    model, loss, batches, _ = testbeds.load_default()
    return landscape.Problem(model, loss, batches[:1])


def resnet20() -> landscape.Problem:
    """ResNet-20, BatchNorm in evaluation mode, 64 images."""
    draws = generator(0, "benchmark", 0)
    data = [(torch.randn(64, 3, 32, 32, generator=draws), torch.randint(0, 10, (64,), generator=draws))]
    return landscape.Problem(testbeds.resnet20(), nn.CrossEntropyLoss(), data)


MODELS: dict[str, Callable[[], landscape.Problem]] = {"MLP": mlp, "ResNet-20": resnet20}


def plain_gradient(model: nn.Module, x: Tensor, y: Tensor, *, graph: bool = False) -> tuple[Tensor, Tensor]:
    """The gradient of the summed losses, as a user makes it."""
    x = x.detach().requires_grad_()
    total = nn.functional.cross_entropy(model(x), y, reduction="sum")
    return torch.autograd.grad(total, x, create_graph=graph)[0], x


def loop(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A product for each of some examples, one after the other, with kept graphs."""
    graphs = [plain_gradient(model, x[i : i + 1], y[i : i + 1], graph=True) for i in range(LOOPED)]
    v = torch.randn(1, *x.shape[1:], generator=generator(0, "benchmark", 3))
    return lambda: [torch.autograd.grad(g, at, v, retain_graph=True) for g, at in graphs]


def measure(name: str, rounds: int, clock: Callable[[], float]) -> None:
    problem = MODELS[name]()
    model = problem.evaluator.model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    x, y = next(iter(problem.batches))
    scalars = ExampleScalars(problem, (x, y), examine(problem, Setup()).setup)
    V = torch.randn(BLOCK, len(x), x[0].numel(), 1, generator=generator(0, "benchmark", 2))

    def graph_and_gradient() -> object:
        with contextlib.ExitStack() as held:
            return Hessians(scalars, held).gradient

    def curv() -> object:
        gradient = scalars.gradient()
        sign = gradient.sign()
        return scalars.gradient(sign / sign.norm(dim=1, keepdim=True).clamp(min=1.0)) - gradient

    with contextlib.ExitStack() as held:
        H = Hessians(scalars, held)
        held_products = held.pop_all()
    tasks: dict[str, tuple[float, Callable[[], object]]] = {
        # As many as products, so that both find their data in the cache.
        "gradient": (BLOCK, lambda: [plain_gradient(model, x, y) for _ in range(BLOCK)]),
        "graph and gradient": (BLOCK, lambda: [graph_and_gradient() for _ in range(BLOCK)]),
        "product, graph kept": (BLOCK, lambda: [H @ v for v in V]),
        "loop over examples": (LOOPED / len(x), loop(model, x, y)),
        "Curv(X), in all": (BLOCK, lambda: [curv() for _ in range(BLOCK)]),
        "input_curvature, in all": (1, lambda: landscape.evaluate(InputCurvature(), problem)),
    }
    with problem.session():  # as a measurement does
        seconds = timing.alternate({k: t for k, (_, t) in tasks.items()}, rounds, clock=clock)
    held_products.close()
    product, whole = GOALS[name]
    middle = sorted(seconds["gradient"])[rounds // 2] / BLOCK
    print(
        f"{name}: {len(x)} examples, gradient {middle * 1e3:.2f} ms; goals {product} a product, {whole} Curv(X)"
    )
    for task, relative in timing.ratios(seconds, "gradient").items():
        if task != "gradient":
            low, median, high = (r * BLOCK / tasks[task][0] for r in relative)
            print(f"  {task:26} {median:.2f} [{low:.2f}, {high:.2f}]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--model", choices=MODELS, action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    for name in arguments.model or MODELS:
        measure(name, arguments.rounds, clock)


if __name__ == "__main__":
    main()
