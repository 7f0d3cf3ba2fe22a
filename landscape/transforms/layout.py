"""Log-scales of parameters and buffers: the unknowns behind each entry, and factors from their values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from landscape.transforms.fields import Field
from landscape.transforms.system import ZERO, System

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
        terms = [self._unknowns(shape[0]).reshape(-1, *[1] * (len(shape) - 1))]
        for dim, size in enumerate(shape[1:], start=1):
            count = groups if dim == 1 else 1
            if size > 1:
                columns = torch.cat([self._columns(size) for _ in range(count)])
                rows = columns.repeat_interleave(shape[0] // count if count > 1 else 1, 0)
                terms.append(rows.reshape(len(rows), *[1] * (dim - 1), size, *[1] * (len(shape) - dim - 1)))
        self.terms[name] = terms
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

    def factors(self, name: str, values: Tensor) -> Tensor:
        """The exponential of a tensor's log-scale, of its full shape."""
        return self.log_scale(name, values).exp().expand(self.shapes[name])

    def unknowns(self, names: Iterable[str]) -> Mapping[str, list[int]]:
        """The unknowns of each tensor, without the constant."""
        return {
            name: sorted({u for ids in self.terms[name] for u in ids.flatten().tolist()} - {ZERO})
            for name in names
        }

    def _unknowns(self, count: int, *, bound: bool = True) -> Tensor:
        made = self.system.unknowns(count, bound=bound)
        return torch.arange(made.start, made.stop)

    def _columns(self, size: int) -> Tensor:
        return torch.cat([torch.tensor([ZERO]), self._unknowns(size - 1)])[None]
