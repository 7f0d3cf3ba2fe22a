"""How many eigenvalues stand apart from the bulk, by a stated rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from landscape.estimators.quadrature import Array, Rule

# At the soft edge of a random matrix the first gap is about 1.5 times the mean of the next five, and exceeds
# ten times it with probability 1e-15 (Airy's zeros; Wigner's surmise for the tail). Hessians need this much:
# below their outliers a second tier stands apart a little. On the digits' softmax regression (9 outliers for
# 10 classes) the gap after the 9th eigenvalue is 18 times the next ones, after the 10th 8 times.
_GAP: Final = 10.0
_NEXT: Final = 5
_MINORITY: Final = 0.05


@dataclass(frozen=True)
class Outliers:
    """Eigenvalues beyond the bulk.

    Attributes:
        above: those above it, descending; each distinct value once.
        below: those below it, ascending.
    """

    above: Array
    below: Array

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.above) + len(self.below)


def count_outliers(rules: Sequence[Rule], dimension: int) -> Outliers:
    """Separate outliers from the bulk by the last wide gap.

    Rule: going inwards from an end of the spectrum, x_1, x_2, ... are the Ritz values, each the outermost over
    the chains. The outliers are x_1, ..., x_i for the largest i such that

    - the gap x_i - x_{i+1} exceeds 10 times the mean of the next five gaps (fewer where a chain is shorter),
    - it exceeds the residual of x_i, so that a better estimate would not close it, and
    - x_1, ..., x_i hold at most 5 % of the eigenvalues, by the mean weight over the chains.

    A node whose weight says that it stands for six or more equal eigenvalues has gaps of zero behind it. A
    multiple eigenvalue is counted once: chains from single vectors cannot tell.

    Args:
        rules: of the chains.
        dimension: n, the number of eigenvalues.

    Returns:
        The outliers above and below.
    """
    return Outliers(above=-_lowest(rules, dimension, -1.0), below=_lowest(rules, dimension, 1.0))


def _lowest(rules: Sequence[Rule], dimension: int, sign: float) -> Array:
    """Return the outliers at the lower end of sign · spectrum, ascending."""
    shortest = min(len(r.nodes) for r in rules)
    order = [np.argsort(sign * r.nodes)[:shortest] for r in rules]
    nodes = np.array([sign * r.nodes[i] for r, i in zip(rules, order, strict=True)])
    # A Ritz value lies inside the spectrum: the outermost is nearest to its eigenvalue.
    best = nodes.argmin(axis=0)
    x = np.take_along_axis(nodes, best[None], axis=0)[0]
    residual = np.array([rules[b].residual_norms[order[b][j]] for j, b in enumerate(best)])
    weight = np.mean([r.weights[i] for r, i in zip(rules, order, strict=True)], axis=0)
    gaps = np.diff(x)
    for i in reversed(range(len(gaps))):
        if weight[: i + 1].sum() > _MINORITY or gaps[i] <= residual[i]:
            continue
        following = gaps[i + 1 : i + 1 + _NEXT]
        settled = residual[i + 1] <= 1e-3 * gaps[i]
        if settled and weight[i + 1] * dimension > _NEXT:
            following = following[:0]
        if gaps[i] > _GAP * (following.mean() if len(following) else 0.0):
            return np.asarray(x[: i + 1])
    return np.empty(0)
