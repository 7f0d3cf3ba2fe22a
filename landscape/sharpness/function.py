"""The function whose rise is measured: the loss around θ, of some examples, of normalized logits, on a subspace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landscape import batches as batching
from landscape import losses
from landscape.errors import Refused
from landscape.problem import Problem

_LEAST_LENGTH = 1e-10  # by which logits are divided at least (Andriushchenko et al.)


@dataclass(frozen=True)
class Around:
    """δ -> L(θ + Aδ) and its gradient in δ.

    Attributes:
        problem: at θ.
        centre: θ, (n,).
        A: (n, p); None for the identity.
    """

    problem: Problem
    centre: Tensor
    A: Tensor | None = None

    @classmethod
    def of(cls, problem: Problem, A: Tensor | None = None) -> Around:
        """Return the loss around where a problem is; A is brought to its device and precision."""
        centre = problem.parameters_vector()
        return cls(problem, centre, None if A is None else A.to(centre))

    def __call__(self, delta: Tensor) -> tuple[float, Tensor]:
        """Return value and gradient (d,)."""
        value, slope = self._at(delta).value_and_gradient()
        return float(value), slope if self.A is None else self.A.T @ slope

    def value(self, delta: Tensor) -> float:
        """Return the value alone."""
        return float(self._at(delta).value())

    def _at(self, delta: Tensor) -> Problem:
        return self.problem.at(
            self.centre + (delta if self.A is None else self.A @ delta), self.problem.buffers()
        )


def with_normalized_logits(problem: Problem) -> Problem:
    """Return the problem with outputs of mean 0 and length 1 over the classes (axis 1, or the only one).

    Scaling the last layer then changes nothing.

    Raises:
        Refused: with `forward=`, or when outputs are not one tensor.

    Source: Andriushchenko et al. 2023 (arXiv 2302.07011).
    """
    problem.require_outputs("normalized logits")
    outputs_of = problem.evaluator.outputs_of

    def normalized(model: Any, batch: Any) -> Tensor:
        logits = outputs_of(model, batch)
        if not isinstance(logits, Tensor):
            raise Refused(
                f"the model's outputs are a {type(logits).__name__}; logits to normalize are one tensor. "
                "Say which part is meant: Problem(..., output=lambda model, batch: ...)"
            )
        axis = min(1, logits.ndim - 1)
        centred = logits - logits.mean(axis, keepdim=True)
        length = torch.linalg.vector_norm(centred, dim=axis, keepdim=True)
        divided: Tensor = centred / length.clamp(min=_LEAST_LENGTH)
        return divided

    return problem.replace(output=normalized)


def ceiling(problem: Problem) -> float:
    """Return the largest cross-entropy that normalized logits can have; NaN for any other loss.

    ln(1 + (C − 1) e^{√(C/(C−1))}): a logit of −√((C−1)/C) for the right class, all others equal.
    """
    name, options = losses.describe(problem.evaluator.loss)
    if name != "cross_entropy" or options.get("label_smoothing"):
        return math.nan
    batch = next(iter(problem.batches))
    if problem.evaluator.target_of(batch).is_floating_point():
        return math.nan
    with problem.session(), torch.no_grad(), problem.filled(problem.leaves()):
        outputs = problem.evaluator.outputs(batching.cut(batch, 0, 1))
    classes = outputs.shape[min(1, outputs.ndim - 1)]
    return (
        math.log1p((classes - 1) * math.exp(math.sqrt(classes / (classes - 1)))) if classes > 1 else math.nan
    )


def group_count(problem: Problem, size: int) -> int:
    """Return how many groups of `size` consecutive examples there are; the last may be smaller.

    Raises:
        Refused: if batches do not tell how many examples they hold.
    """
    if (count := problem.examples()) is None:
        raise Refused(
            "the number of examples is unclear, so they cannot be grouped; leave out m, or give batches whose "
            "first dimension counts examples in every tensor"
        )
    return -(-count // size)


def group(problem: Problem, index: int, size: int) -> Problem:
    """Return the problem on one group of consecutive examples, however batches cut them.

    Raises:
        Refused: if examples of several batches cannot be put together.
    """
    start, stop, seen, parts = index * size, (index + 1) * size, 0, []
    for batch in problem.batches:
        count = batching.examples(batch)
        if seen < stop and seen + count > start:
            parts.append(batching.cut(batch, max(0, start - seen), min(count, stop - seen)))
        seen += count
    on = problem.on([_joined(parts)])
    on.cost = problem.cost
    return on


def _joined(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(batching.tensors(part) for part in parts), strict=True)
    try:
        whole = iter([torch.cat(column) for column in columns])
    except (RuntimeError, ValueError) as error:
        raise Refused(
            "a group of examples reaches over two batches that cannot be put together (sequences of other "
            "lengths?); choose batches of a multiple of m examples"
        ) from error
    return batching.tree_map(lambda _: next(whole), parts[0])
