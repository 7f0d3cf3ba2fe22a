"""Passes over the data for the exact Gauss-Newton trace; `landscape.ggn_trace` says what is computed.

Here stands which examples go through the model together, which rules hold, and which norms follow.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from landscape import batches as batching
from landscape import output_curvature, per_example, seeds
from landscape.capture import Capture
from landscape.curvature_columns import Columns, CrossEntropy
from landscape.example_norms import single, squares
from landscape.gradient_readings import Reading
from landscape.output_curvature import Ending, Outputs

if TYPE_CHECKING:
    from landscape.problem import Problem

# Bytes of the largest layer's output gradient in one pass, per thread of a processor: what fits its cache, and
# is reused by the allocator. All at once took 1.2 times as long, for an MLP and for ResNet-20.
_NEAR = 1 << 19
# Examples on which the rules are tested before all others follow them: identities, so a few are enough.
_TESTED = 4
_MOST_COLUMNS_AT_ONCE = 64
_ROUNDING = 1e3


class Passes:
    """The passes over the data, and what was found out about the parameters on the way.

    Args:
        problem: with outputs.
        memory: bytes for output gradients and for explicit per-example gradients, each.
        reading: what is read off per-example gradients; by default their squared norms.

    Attributes:
        rules: for each parameter tensor, how its norms were made.
        columns: the most columns of an example.
        work: backward passes so far, in examples.
        examples: that were passed.
    """

    def __init__(self, problem: Problem, memory: int, reading: Reading | None = None):
        self.problem, self.memory, self.reading = problem, memory, reading
        self.blocks: list[Any] = [0.0] * len(problem.names)
        self.rules: list[set[str]] = [set() for _ in problem.names]
        self.columns = 0
        self.confirmed: set[tuple[int, Any]] = set()  # (parameter, its uses) that need no further test
        self.refuted: set[int] = set()  # parameters that no rule covers
        self.apart = True  # whether examples go through the model one by one
        self.steps: dict[Any, int] = {}  # examples in one pass, by the shapes of their tensors
        self.fallback = per_example.PerExample(problem, memory)
        self.tested = False  # whether the loss was found to be what it looks like
        self.work, self.examples = 0, 0

    def over(self, batches: Iterable[Any]) -> tuple[list[list[Any]], np.ndarray]:
        """Return for each batch the sums over its terms, of each tensor, and its weight (batches,)."""
        sums, weights = [], []
        for batch in batches:
            self.blocks, total = [0.0] * len(self.problem.names), 0.0
            for whole in self.problem.evaluator.cut([batch]):
                if self.problem.evaluator.weigh(whole) == 0:
                    continue
                for piece in self._cut(whole):
                    if (weight := self.problem.evaluator.weigh(piece)) > 0:
                        self._piece(piece, weight)
                        total += weight
            sums.append(self.blocks)
            weights.append(total)
        return sums, np.array(weights)

    def _cut(self, batch: Any) -> Iterator[Any]:
        """Cut a micro-batch evenly, so that output gradients fit into the memory, and near the processor."""
        count = examples_of(batch)
        shapes = tuple(t.shape[1:] for t in batching.tensors(batch))
        if shapes not in self.steps and self.apart and count > 1:
            self.steps[shapes] = self._tested(few_of(self.problem, batch)[0])
        if count == 1 or not self.apart or self.steps[shapes] >= count:
            yield batch
            return
        parts = -(-count // self.steps[shapes])
        for i in range(parts):
            yield batching.cut(batch, i * count // parts, (i + 1) * count // parts)

    def _tested(self, piece: Any) -> int:
        """Test examples and rules on a few examples; return how many are to go through the model at once."""
        count = examples_of(piece)
        leaves = self.problem.leaves()
        with self.problem.filled(leaves):
            capture = Capture(leaves, count)
            with capture.watching():
                outputs = outputs_of(self.problem, piece, count)
            if not outputs.heads:
                return sys.maxsize
            self.apart = outputs.examples == count and self._stands_alone(piece, outputs)
            if not self.apart:
                return sys.maxsize
            self._test(capture, outputs, range(len(leaves)))
            weight = self.problem.evaluator.weigh(piece)
            parts = columns_of(self.problem, outputs, piece, weight)
            self.tested = isinstance(parts, CrossEntropy)
        width = outputs.heads[0].element_size()
        each = sum(capture.sizes) * width // count + 8 * outputs.size
        step = self.memory // max(1, min(parts.count, _MOST_COLUMNS_AT_ONCE) * each)
        if self.problem.device.type == "cpu" and capture.sizes:
            step = min(step, torch.get_num_threads() * _NEAR * count // (max(capture.sizes) * width))
        return max(1, step)

    def _stands_alone(self, piece: Any, outputs: Outputs) -> bool:
        """Whether the last example alone has the outputs that it has among the others."""
        last = outputs.examples - 1
        try:
            alone = outputs_of(self.problem, batching.cut(piece, last, last + 1), 1)
            theirs, own = alone.flat()[0], outputs.flat()[last]
        except (RuntimeError, ValueError):  # BatchNorm in training mode refuses a single example
            return False
        allowed = _ROUNDING * torch.finfo(own.dtype).eps
        return theirs.shape == own.shape and float((theirs - own).norm()) <= allowed * float(own.norm())

    def _test(self, capture: Capture, outputs: Outputs, indices: Iterable[int]) -> None:
        """Confirm or refute the rules of some parameters on this pass, with random cotangents of half of it."""
        stream = seeds.generator(0, "ggn_trace", 0)
        half = torch.randperm(outputs.examples, generator=stream)[: (outputs.examples + 1) // 2].sort().values
        tail = torch.zeros(outputs.examples, outputs.size, dtype=torch.float64)
        tail[half] = torch.randn(len(half), outputs.size, dtype=torch.float64, generator=stream)
        agree = capture.confirmed(outputs.heads, outputs.tails(tail), half)
        for index in indices:
            if agree[index]:
                self.confirmed.add((index, capture.signature(index)))
            else:
                self.refuted.add(index)

    def _piece(self, piece: Any, weight: float) -> None:
        count = examples_of(piece)
        leaves = self.problem.leaves()
        with self.problem.filled(leaves):
            capture = Capture(leaves, count if self.apart else 1)
            with capture.watching():
                outputs = outputs_of(self.problem, piece, count if self.apart else 1)
            self.examples += count
            if not outputs.heads:
                return
            parts = columns_of(self.problem, outputs, piece, weight, self.tested)
            self.tested = isinstance(parts, CrossEntropy)
            self.columns = max(self.columns, parts.count)
            self._retest(capture, outputs)
            ruled = [i for i in range(len(leaves)) if capture.uses[i] and i not in self.refuted]
            for flats, signs in _blocks(parts, self._at_once(capture)):
                self.work += len(flats) * count * (bool(ruled) + bool(self.refuted))
                self._by_rules(capture, outputs, ruled, flats, signs)
                self._by_examples(piece, outputs, flats, signs)

    def _at_once(self, capture: Capture) -> int:
        each = max(1, sum(capture.sizes)) * self.problem.dtype.itemsize
        return max(1, min(self.memory // each, _MOST_COLUMNS_AT_ONCE))

    def _retest(self, capture: Capture, outputs: Outputs) -> None:
        """Test what looks otherwise than where it was confirmed; find parameters used for the first time."""
        left = [i for i in range(len(capture.parameters)) if i not in self.refuted]
        new = [i for i in left if (i, capture.signature(i)) not in self.confirmed]
        if new:
            self._test(capture, outputs, new)
        bare = [i for i in left if not capture.uses[i]]
        if bare:
            found = torch.autograd.grad(
                outputs.heads,
                [capture.parameters[i] for i in bare],
                [torch.zeros_like(t) for t in outputs.heads],
                retain_graph=True,
                allow_unused=True,
            )
            self.refuted.update(i for i, g in zip(bare, found, strict=True) if g is not None)

    def _by_rules(
        self, capture: Capture, outputs: Outputs, ruled: list[int], flats: list[Tensor], signs: Tensor
    ) -> None:
        if not ruled:
            return
        # Where an example has one row, the norm of its output gradient is enough, and the gradient is let go.
        factors = {i: single(capture.uses[i]) if self.reading is None else None for i in ruled}
        held = {use.call for i in ruled if factors[i] is None for use in capture.uses[i]}
        measured = {capture.uses[i][0].call for i in ruled if factors[i] is not None}
        at: dict[int, list[Tensor]] = {call: [] for call in held}
        norms: dict[int, list[Tensor]] = {call: [] for call in measured}
        for flat in flats:
            found = capture.output_gradients(sorted(held | measured), outputs.heads, outputs.tails(flat))
            for call, g in found.items():
                if call in measured:
                    norms[call].append(torch.linalg.vector_norm(g.reshape(outputs.examples, -1), dim=1))
                if call in held:
                    at[call].append(g)
        summed = {
            call: (torch.stack(n, 1).double().square() * signs).sum(1) for call, n in norms.items() if n
        }
        for i in ruled:
            reached = [use for use in capture.uses[i] if at.get(use.call) or norms.get(use.call)]
            if not reached:
                continue
            self.rules[i].update(use.kind for use in reached)
            if (factor := factors[i]) is not None:
                self.blocks[i] += float(summed[reached[0].call] @ factor.to(signs))
                continue
            slopes = [at[use.call] for use in reached]
            if self.reading is None:
                self.blocks[i] += float((squares(reached, slopes, self.memory).double() * signs).sum())
            else:
                self.blocks[i] += self.reading.of_uses(i, reached, slopes, signs, self.memory)

    def _by_examples(self, piece: Any, outputs: Outputs, flats: list[Tensor], signs: Tensor) -> None:
        if not self.refuted:
            return
        chosen = sorted(self.refuted)
        count = outputs.examples
        pieces = [batching.cut(piece, i, i + 1) for i in range(count)] if count > 1 else [piece]
        heads = [i for i, t in enumerate(batching.tensors(outputs.nest)) if t.requires_grad]
        cotangents = torch.stack(flats, 1)
        if self.reading is None:
            found = self.fallback.squares(pieces, chosen, heads, cotangents)
            for i, squared in zip(chosen, found, strict=True):
                self.blocks[i] += float((squared.double() * signs).sum())
        else:
            each = sum(self.problem.space.sizes[i] for i in chosen) * self.problem.dtype.itemsize
            step = max(1, self.memory // each)
            for n, k in itertools.product(range(count), range(0, len(flats), step)):
                slopes = self.fallback.gradients(pieces[n], chosen, heads, cotangents[n, k : k + step])
                for i, slope in zip(chosen, slopes, strict=True):
                    read = self.reading.of_gradients(i, slope[None], signs[n : n + 1, k : k + step])
                    self.blocks[i] += self.reading.placed(read, n, count)
        for i in chosen:
            self.rules[i].add(self.fallback.name)


def _blocks(parts: Columns, at_once: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Columns in blocks, with their signs (N, K); those that are zero for every example are left out."""
    chosen = [c for c, present in enumerate(parts.present) if present]
    for start in range(0, len(chosen), at_once):
        made = [parts.column(c) for c in chosen[start : start + at_once]]
        flats = [flat for flat, _ in made]
        signs = [flat.new_ones(len(flat)) if sign is None else sign for flat, sign in made]
        yield flats, torch.stack(signs, 1).double()


def examples_of(piece: Any) -> int:
    """The number of examples; 1 where it is unclear, for one that cannot be cut."""
    try:
        return batching.examples(piece)
    except ValueError:
        return 1


def few_of(problem: Problem, batch: Any) -> tuple[Any, float]:
    """The first examples of a micro-batch, or all if these have no weight."""
    count = examples_of(batch)
    if count > _TESTED:
        few = batching.cut(batch, 0, _TESTED)
        if (weight := problem.evaluator.weigh(few)) > 0:
            return few, weight
    return batch, problem.evaluator.weigh(batch)


def outputs_of(problem: Problem, piece: Any, examples: int) -> Outputs:
    """The outputs of a micro-batch, as one group where their first dimension does not count examples."""
    nest = problem.evaluator.outputs(piece)
    whole = all(
        t.ndim and t.shape[0] and t.shape[0] % examples == 0
        for t in batching.tensors(nest)
        if t.requires_grad
    )
    return Outputs(nest, examples if whole else 1)


def columns_of(
    problem: Problem, outputs: Outputs, piece: Any, weight: float, tested: bool = False
) -> Columns:
    """Cut Λ of a micro-batch of this weight into columns; see `landscape.output_curvature.columns`."""
    evaluator = problem.evaluator
    target, scale = evaluator.target_of(piece), evaluator.scale(weight)
    ending = Ending(evaluator.loss_from, evaluator.loss, target, scale)
    return output_curvature.columns(outputs, ending, tested)
