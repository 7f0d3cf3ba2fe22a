"""Whether a rescaling that was read off a graph leaves the outputs alone in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from landscape import batches as batching
from landscape import seeds
from landscape.transforms import graph as graphs
from landscape.transforms.exponents import Exponents
from landscape.transforms.layout import Layout
from landscape.transforms.transformed import outputs, relative_change

if TYPE_CHECKING:
    from landscape.problem import Problem

_SPREAD = 0.3  # standard deviation of the random log-scales
_MOST_EXAMPLES = 32
_ENTRIES = 4096  # numbers in the batch on which rescalings are verified
_AWAY = 0.1  # by which parameters are moved before, in units of their own size


class Verifier:
    """Random rescalings of a problem on its first examples.

    They are applied not at θ but close by: at an initialisation, where biases and running means are 0, much
    that is wrong goes unnoticed.

    Args:
        problem: at θ.
        layout: of the unknowns.
        exponents: of the nodes.
        seed: of all draws.
    """

    def __init__(self, problem: Problem, layout: Layout, exponents: Exponents, seed: int):
        self._layout, self._exponents, self._seed = layout, exponents, seed
        moving = {name: t for name, t in problem.buffers().items() if name in layout.terms}
        nearby = [_beside(t, seed, i) for i, t in enumerate(problem.space.split(problem.parameters_vector()))]
        beside = {name: _beside(t, seed, len(nearby) + i) for i, (name, t) in enumerate(moving.items())}
        self._problem = problem.at(problem.space.flatten(nearby), {**problem.buffers(), **beside})
        self._piece = graphs.example(problem, examples=_examples(problem))
        try:
            self._before = outputs(self._problem, self._piece)
        except (RuntimeError, ValueError, IndexError):  # a model that does not take a batch of one
            self._piece = graphs.example(problem)
            self._before = outputs(self._problem, self._piece)

    def change(self, nodes: Sequence[int], index: int) -> float:
        """The largest relative change of the outputs when these nodes move by random factors."""
        z = torch.zeros(self._exponents.shape[1], dtype=torch.float64)
        draws = seeds.generator(self._seed, "symmetries", index)
        z[list(nodes)] = _SPREAD * torch.randn(len(nodes), dtype=torch.float64, generator=draws)
        diagonal, buffers = moves(self._layout, self._exponents, self._problem, z)
        theta = self._problem.parameters_vector()
        there = self._problem.at(theta.mul_(diagonal.to(theta)), {**self._problem.buffers(), **buffers})
        return relative_change(self._before, outputs(there, self._piece))


def _examples(problem: Problem) -> int:
    """As many as there is little work in: a unit that is silent on all of them hides what is wrong with it."""
    two = graphs.example(problem)
    entries = sum(t.numel() for t in batching.tensors(two)) // 2
    least = 1 if problem.mode == "eval" else 2
    return max(least, min(_MOST_EXAMPLES, _ENTRIES // max(entries, 1)))


def moves(
    layout: Layout, exponents: Exponents, problem: Problem, z: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What log-scales of the nodes do.

    Args:
        layout: of the unknowns.
        exponents: of the nodes.
        problem: at θ.
        z: log-scales (nodes,).

    Returns:
        D (n,), float64, and the new values of the buffers that move.
    """
    logs, of_buffers = log_moves(layout, exponents, problem, z)
    held = problem.buffers()
    buffers = {
        name: (held[name].double() * log.exp().to(held[name].device)).to(problem.dtype)
        for name, log in of_buffers.items()
    }
    return logs.exp_(), buffers


def log_moves(
    layout: Layout, exponents: Exponents, problem: Problem, z: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same as logarithms of factors: of the parameters, (n,), and of the buffers that move."""
    s = exponents.times(z)
    touched = {name for name, terms in layout.terms.items() if any(bool(s[ids].any()) for ids in terms)}
    logs = torch.zeros(problem.size, dtype=torch.float64)
    for name, (start, stop) in problem.space.ranges.items():
        if name in touched:
            logs[start:stop].view(layout.shapes[name]).copy_(layout.log_scale(name, s))
    held = [name for name in layout.terms if name in touched and name in problem.buffers()]
    return logs, {name: layout.log_scale(name, s).expand(layout.shapes[name]) for name in held}


def _beside(t: Tensor, seed: int, index: int) -> Tensor:
    size = float(t.double().square().mean().sqrt()) if t.numel() else 0.0
    noise = torch.randn(t.shape, dtype=torch.float64, generator=seeds.generator(seed, "beside", index))
    return t + _AWAY * (size or 1.0) * noise.to(t.device, t.dtype)
