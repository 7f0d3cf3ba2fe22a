"""The mean derivatives v_cc' of a class c towards an output c', and what they say of other vectors.

One example's vectors are Jᵢᵀ(e_c' - pᵢ), J = ∂f/∂θ the derivative of its logits, p = softmax(f). A mean over
examples is one backward pass of a weighted sum, so no example's vector is ever formed:

    v_cc' = Σ_i a_ic' Jᵢᵀ(e_c' - pᵢ),  a = √p / n_c in the weighting of 2019 (v = δ), p / Σ_i p in that of 2020
    (v = -g).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape import averages, products, vectors
from landscape import batches as batching
from landscape.class_structure.grams import Weights
from landscape.class_structure.labels import ByClass
from landscape.errors import Refused
from landscape.ggn_passes import Passes
from landscape.gradient_readings import ExampleNorms
from landscape.kernels import active
from landscape.problem import Problem


class Source:
    """Makes the vectors of one problem, class by class.

    Args:
        problem: whose loss is the mean over classes (`labels.balanced`).
        data: its data, class after class.
        weighting: "2019" or "2020".
        probabilities: mean of p over the examples of each class, (S, C).
        factor: κ, for a loss that is κ times cross-entropy.

    Attributes:
        weights: of the vectors in G.
    """

    def __init__(
        self,
        problem: Problem,
        data: ByClass,
        weighting: str,
        probabilities: np.ndarray,
        factor: float = 1.0,
    ):
        self.problem, self.data, self.layout = problem, data, data.layout
        self.weighting, self.factor = weighting, factor
        self.weights = Weights.of(weighting, probabilities, np.array(self.layout.labels), factor)
        self._shares = torch.from_numpy(probabilities)

    def pulled(self, c: int, combinations: Tensor) -> Tensor:
        """Σ_c' Y_rc' v_cc' for each row of Y (r, C); float64 (r, n)."""
        problem = self.problem
        total = torch.zeros(len(combinations), problem.size, dtype=torch.float64, device=problem.device)
        for piece in self._pieces(c):
            leaves = problem.leaves()
            with problem.filled(leaves):
                f = problem.evaluator.outputs(piece)
                p, a = self._at(c, f)
                for row, y in zip(total, combinations.to(p), strict=True):
                    tail = y * a - p * (a @ y)[:, None]
                    slopes = torch.autograd.grad(f, leaves, tail.to(f), retain_graph=True, allow_unused=True)
                    for (start, stop), slope in zip(problem.space.ranges.values(), slopes, strict=True):
                        if slope is not None:
                            row[start:stop] += slope.reshape(-1)
        return total

    def part(self, name: str) -> Tensor:
        """F of a part, whose columns have G_part = F Fᵀ; its transpose, float64 (columns, n)."""
        rows = [
            self.pulled(c, torch.from_numpy(self.weights.coefficients(name, c)))
            for c in range(self.layout.classes)
        ]
        return torch.cat(rows)

    def pushed(self, c: int, V: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each micro-batch p and a, (m, C), and (e_c' - p)ᵀ J v for the rows of V (k, n): (k, m, C); float64."""
        problem, by_differences = self.problem, self._by_differences()
        for piece in self._pieces(c):
            leaves = problem.leaves()
            with ExitStack() as stack:
                stack.enter_context(problem.evaluator.twice_differentiable())
                stack.enter_context(active(problem.kernels))
                stack.enter_context(problem.filled(leaves))
                f = problem.evaluator.outputs(piece)
                p, a = self._at(c, f)
                if by_differences:
                    changes = [averages.output_differences(problem, piece, v.to(f))[0] for v in V]
                else:
                    graph = products.JacobianGraph(f, leaves)
                    rows = vectors.aligned_pieces(V.T.to(f), problem.space)
                    changes = [graph.pushed(row)[0] for row in rows]
            z = torch.stack([change.detach().double() for change in changes])
            yield p, a, z - (z * p).sum(2, keepdim=True)

    def squares(self, c: int, memory: int) -> Tensor:
        """The trace of κ Jᵢᵀ(diag p - p pᵀ)Jᵢ / n_c for each example of a class, float64 (n_c,).

        Args:
            c: index of the class.
            memory: bytes for output gradients, and for explicit per-example gradients.
        """
        passes, found = _Together(self.problem, memory, ExampleNorms()), []
        for piece in self._pieces(c):
            blocks = passes.over([piece])[0][0]
            norms = [block for block in blocks if isinstance(block, Tensor)]
            count = batching.examples(piece)
            found.append(sum(norms, torch.zeros(count, dtype=torch.float64, device=self.problem.device)))
        return torch.cat(found)

    def _pieces(self, c: int) -> Iterator[Any]:
        return self.problem.evaluator.cut(self.data.of(c))

    def _at(self, c: int, f: Tensor) -> tuple[Tensor, Tensor]:
        """The p and a of a micro-batch, float64."""
        p, count = torch.softmax(f.detach().double(), 1), int(self.layout.counts[c])
        if self.weighting == "2019":
            return p, p.sqrt() / count
        shares = self._shares[c].to(p)
        return p, torch.where(shares > 0, p / (count * shares), 0.0)

    def _by_differences(self) -> bool:
        problem = self.problem
        if problem.products == "auto":
            found = problem.product_checks.get("ggn") or problem.check_products("ggn")
            return found.products == "difference"
        return problem.products == "difference"


class _Together(Passes):
    """Passes whose pieces stay whole, so that what is read off each example stands in its place."""

    def _cut(self, batch: Any) -> Iterator[Any]:
        yield batch


def mean_probabilities(problem: Problem, data: ByClass) -> np.ndarray:
    """The mean of p over the examples of each class, (S, C) float64.

    Raises:
        Refused: if an example's logits are not finite.
    """
    found = np.zeros((data.layout.classes, data.layout.outputs))
    with problem.session(), torch.no_grad():
        for c, count in enumerate(data.layout.counts):
            for piece in problem.evaluator.cut(data.of(c)):
                with problem.filled(problem.leaves()):
                    p = torch.softmax(problem.evaluator.outputs(piece).double(), 1)
                found[c] += p.sum(0).cpu().numpy() / count
    problem.cost.values += 1
    if len(bad := np.flatnonzero(~np.isfinite(found).all(axis=1))):
        label = data.layout.labels[bad[0]]
        raise Refused(f"the logits of an example of class {label} are not finite; leave such examples out")
    return found
