"""Squared norms of per-example gradients from all uses of a parameter tensor, by the cheapest way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from landscape.uses import Lookup, Outer, Use, outer_products, squared_norms


def single(uses: Sequence[Use]) -> Tensor | None:
    """Numbers b (N,) with ‖gradient‖² = ‖g‖² b, if there is one use with one row per example; else None."""
    return uses[0].single() if len(uses) == 1 else None


def squares(uses: Sequence[Use], g: Sequence[Sequence[Tensor]], memory: int) -> Tensor:
    """Squared norms of per-example gradients of one parameter tensor, (N, K).

    Args:
        uses: all its uses.
        g: for each use, the K output gradients.
        memory: bytes that explicit gradients may take.
    """
    count, K = uses[0].examples, len(g[0])
    outer = [use for use in uses if isinstance(use, Outer)]
    if len(outer) == len(uses) and len({(use.groups, use.transposed) for use in outer}) == 1:
        return _over_examples(count, _outer_bytes(outer, K), memory, lambda lo, hi: _outer(outer, g, lo, hi))
    if len(uses) == 1 and isinstance(uses[0], Lookup):
        lookup = uses[0]
        number = lookup.index.numel() // count
        if number * number <= lookup.shape[0]:
            size = g[0][0].element_size() * number * (number + lookup.shape[1])
            return _over_examples(count, size, memory, lambda lo, hi: _lookup(lookup, g[0], lo, hi))

    def explicit(lo: int, hi: int) -> Tensor:
        total = uses[0].gradients(g[0], lo, hi)
        for use, one in zip(uses[1:], g[1:], strict=True):
            total += use.gradients(one, lo, hi)
        return squared_norms(total.reshape(hi - lo, K, -1))

    size = K * math.prod(uses[0].shape) * g[0][0].element_size()
    return _over_examples(count, size, memory, explicit)


def _over_examples(count: int, size: int, memory: int, part: Callable[[int, int], Tensor]) -> Tensor:
    step = max(1, memory // max(1, size))
    return torch.cat([part(lo, min(lo + step, count)) for lo in range(0, count, step)])


def _outer_bytes(uses: Sequence[Outer], K: int) -> int:
    """What explicit gradients, or windows and Gram matrices, of one example take."""
    weight = math.prod(uses[0].shape)
    right = sum(use.right(0, 1).numel() for use in uses)
    return uses[0].input.element_size() * (K * weight + right)


def _outer(uses: Sequence[Outer], g: Sequence[Sequence[Tensor]], lo: int, hi: int) -> Tensor:
    """By Gram matrices over the rows or by explicit gradients, whichever needs fewer multiplications."""
    right = _cat([use.right(lo, hi) for use in uses])
    K = len(g[0])
    left = [_cat([use.left(one[k], lo, hi) for use, one in zip(uses, g, strict=True)]) for k in range(K)]
    inner, rows, outer = right.shape[2], right.shape[3], left[0].shape[2]
    if rows * (inner + K * outer + K) < K * inner * outer:
        A = right.transpose(-1, -2) @ right
        return torch.stack([(A * (one.transpose(-1, -2) @ one)).sum((1, 2, 3)) for one in left], 1)
    return squared_norms(outer_products(right, left).flatten(3)).sum(1)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _lookup(use: Lookup, g: Sequence[Tensor], lo: int, hi: int) -> Tensor:
    """Rows that were looked up several times are summed: a Gram matrix masked by equal row numbers."""
    index = use.looked_up(lo, hi)
    same = index[:, :, None] == index[:, None, :]
    found = []
    for one in g:
        rows = use.left(one, lo, hi)
        found.append(((rows @ rows.transpose(1, 2)) * same).sum((1, 2)))
    return torch.stack(found, 1)
