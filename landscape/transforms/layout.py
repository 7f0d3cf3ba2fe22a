"""Log-scales of parameters and buffers: the unknowns behind each entry, and factors from their values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from landscape.transforms.fields import Field
from landscape.transforms.system import Number, Row, System

# The most entries of a tensor that get an unknown each: a second's worth of equations.
_WHOLE = 1 << 16


@dataclass
class Layout:
    """Which unknowns make up the log-scale of each tensor.

    The log-scale of a tensor is a sum of one term for each dimension, s[i, j, ...] = R[i] + C[j] + ...; from the
    second on a term starts at 0, so that nothing can be moved between them. A grouped convolution has columns
    of its own for each group.

    Attributes:
        shapes: tensor -> shape.
        terms: tensor -> terms, tensors of unknowns that broadcast to the tensor's shape.
    """

    system: System
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    terms: dict[str, list[Tensor]] = field(default_factory=dict)
    _blocks: dict[str, list[tuple[list[int], list[list[int]]]]] = field(default_factory=dict)

    def add(self, name: str, shape: Iterable[int], groups: int = 1, *, whole: bool = False) -> Field:
        """Give a tensor its unknowns.

        Args:
            name: of the tensor.
            shape: of the tensor.
            groups: of the convolution whose weight it is.
            whole: whether to give each entry an unknown of its own, where there are not too many.
        """
        self.shapes[name] = shape = tuple(shape)
        size = math.prod(shape)
        if size == 1 or (whole and size <= _WHOLE):
            # A lone gain stays free: then what it multiplies follows it, channel by channel.
            self.terms[name] = [self._unknowns(size, bound=size > 1).reshape(shape)]
            return self.field(name)
        rows = self._unknowns(shape[0])
        terms = [rows.reshape(-1, *[1] * (len(shape) - 1))]
        columns: list[list[Tensor]] = []  # for each further dimension, those of each group
        for dim, size in enumerate(shape[1:], start=1):
            if size > 1:
                columns.append([self._columns(size) for _ in range(groups if dim == 1 else 1)])
                every = torch.stack(columns[-1])
                every = every.repeat_interleave(shape[0] // len(every) if len(every) > 1 else 1, 0)
                terms.append(every.reshape(len(every), *[1] * (dim - 1), size, *[1] * (len(shape) - dim - 1)))
        self.terms[name] = terms
        self._blocks[name] = [
            (part.tolist(), [each[g if len(each) > 1 else 0].tolist() for each in columns])
            for g, part in enumerate(rows.chunk(groups))
        ]
        return self.field(name)

    def field(self, name: str) -> Field:
        """The field of a tensor."""
        shape = self.shapes[name]
        return Field(shape, tuple((1, ids.expand(shape)) for ids in self.terms[name]))

    def log_scale(self, name: str, values: Tensor) -> Tensor:
        """The log-scale of a tensor, broadcastable to its shape, from the values of all unknowns."""
        total = values[self.terms[name][0]]
        for ids in self.terms[name][1:]:
            total = total + values[ids]
        return total

    def unknowns(self, names: Iterable[str]) -> Mapping[str, list[int]]:
        """The unknowns of each tensor."""
        return {
            name: sorted({u for ids in self.terms[name] for u in ids.flatten().tolist()}) for name in names
        }

    def localized(self, name: str, row: Row) -> Row:
        """The same change of a tensor with as few unknowns as can be.

        That columns start at 0 makes a change of the first column one of all the others and of all rows.
        """
        row = dict(row)
        for rows, columns in self._blocks.get(name, []):
            for each in columns:
                if 2 * len(_within(row, each)) >= len(each):
                    shift = min({row.get(u, 0) for u in each}, key=lambda m, e=each: _left(row, rows, e, m))  # type: ignore[misc]
                    _shift(row, rows, shift)
                    _shift(row, each, -shift)
        return row

    def exponents(self, name: str, row: Row) -> set[Number]:
        """The log-scales other than 0 that occur in a tensor."""
        if name not in self._blocks:
            return set(row.values())
        found: set[Number] = set()
        for rows, columns in self._blocks[name]:
            sums: set[Number] = {0}
            for each in (rows, *columns):
                there = _within(row, each)
                values = {*there, *([0] if len(there) < len(each) else [])}
                sums = {a + b for a in sums for b in values}
            found |= sums
        return found - {0}

    def _unknowns(self, count: int, *, bound: bool = True) -> Tensor:
        made = self.system.unknowns(count, bound=bound)
        return torch.arange(made.start, made.stop)

    def _columns(self, size: int) -> Tensor:
        columns = self._unknowns(size)
        self.system.require({int(columns[0]): 1}, "")
        return columns


def _within(row: Row, unknowns: list[int]) -> list[Number]:
    """What a change does to unknowns, which follow one another; without zeros."""
    return [c for u, c in row.items() if unknowns[0] <= u <= unknowns[-1]]


def _shift(row: Row, unknowns: Iterable[int], by: Number) -> None:
    for u in unknowns:
        row[u] = row.get(u, 0) + by
        if not row[u]:
            del row[u]


def _left(row: Row, rows: list[int], columns: list[int], shift: Number) -> int:
    """How many unknowns change after a shift from columns to rows."""
    return sum(row.get(u, 0) != shift for u in columns) + sum(row.get(u, 0) != -shift for u in rows)
