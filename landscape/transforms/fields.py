"""How a tensor changes when parameters are rescaled: a log-scale for each of its entries.

A field is a signed sum of tensors of unknowns, each of the tensor's own shape and expanded (stride 0) along the
dimensions over which it is constant: shape operations of the network are run on them as they are, and an
equation is written once for each distinct combination of unknowns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from landscape.transforms.system import ZERO, Number, Row, System

Term = tuple[Number, Tensor]


@dataclass(frozen=True)
class Field:
    """The log-scale of each entry of a tensor.

    Attributes:
        shape: of the tensor.
        terms: coefficients, and unknowns expanded to that shape; none where the tensor does not change.
        zero: whether all entries are 0, so that any log-scale is true of them.
    """

    shape: tuple[int, ...]
    terms: tuple[Term, ...] = ()
    zero: bool = False

    def mapped(self, operation: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Field:
        """Run an operation that only moves entries; `shape` is that of its result."""
        terms = tuple((c, compact(operation(ids))) for c, ids in self.terms)
        return Field(tuple(shape), terms, self.zero)

    def times(self, factor: Number) -> Field:
        """The field of a power."""
        return Field(self.shape, tuple((c * factor, ids) for c, ids in self.terms) if factor else ())

    def plus(self, other: Field, sign: int = 1) -> Field:
        """The field of a product, or with sign -1 of a quotient, of two tensors that broadcast."""
        shape = broadcast_shape(self.shape, other.shape)
        terms = [(c, ids.expand(shape)) for c, ids in self.terms]
        terms += [(sign * c, ids.expand(shape)) for c, ids in other.terms]
        zero = self.zero or (other.zero and sign == 1)
        return Field(shape, () if zero else tuple(terms), zero)

    def expanded(self, shape: Sequence[int]) -> Field:
        """The field of a tensor that is broadcast to a shape."""
        return Field(tuple(shape), tuple((c, ids.expand(tuple(shape))) for c, ids in self.terms), self.zero)


class Fields:
    """What can be said about fields; each statement becomes equations.

    Args:
        system: that receives the equations.
    """

    def __init__(self, system: System):
        self.system = system

    def uniform(self, field: Field, dims: Iterable[int], reason: str) -> Field:
        """Require a field to be constant along dimensions; they have length 1 in the result."""
        for dim in (d % len(field.shape) for d in dims):
            varying = [(c, ids) for c, ids in field.terms if not _constant(ids, dim)]
            if varying:
                first = [(-c, ids.narrow(dim, 0, 1).expand(field.shape)) for c, ids in varying]
                self._vanishes([*varying, *first], reason)
            shape = (*field.shape[:dim], 1, *field.shape[dim + 1 :])
            field = Field(
                shape, tuple((c, ids.narrow(dim, 0, min(1, ids.shape[dim]))) for c, ids in field.terms), field.zero
            )  # fmt: skip
        return field

    def pin(self, field: Field, reason: str) -> bool:
        """Require a tensor not to change; tell whether that said anything new."""
        if field.zero or not field.terms or 0 in field.shape:
            return False
        # Along one dimension after the other: a sum of terms that each vary along one costs their lengths'
        # sum in equations, not the product.
        before = self.system.solved
        origin = self.uniform(field, range(len(field.shape)), reason)
        self._vanishes(list(origin.terms), reason)
        return self.system.solved > before

    def equal(self, a: Field, b: Field, reason: str) -> Field:
        """Require two tensors that broadcast to change alike; return the field of their sum."""
        shape = broadcast_shape(a.shape, b.shape)
        if a.zero or b.zero:
            return (b if a.zero else a).expanded(shape)
        self.pin(a.plus(b, -1), reason)
        return (a if a.terms else b).expanded(shape) if a.terms and b.terms else Field(shape)

    def joined(self, field: Field) -> Tensor:
        """One unknown for each entry, in place of a sum of terms; a tensor of the field's shape."""
        if not field.terms:
            return torch.zeros((), dtype=torch.int64).expand(field.shape)
        if len(field.terms) == 1 and field.terms[0][0] == 1:
            return field.terms[0][1]
        tuples, inverse = _distinct([ids for _, ids in field.terms])
        coefficients = [c for c, _ in field.terms]
        known = torch.tensor([self._named(_row(coefficients, t)) for t in tuples.tolist()], dtype=torch.int64)
        return known[inverse].expand(field.shape)

    def fresh(self, shape: Sequence[int], dim: int) -> Tensor:
        """New unknowns of a tensor of zeros, one for each index of a dimension."""
        made = self.system.unknowns(shape[dim], bound=False)
        along = [1] * len(shape)
        along[dim] = -1
        return torch.tensor(list(made), dtype=torch.int64).reshape(along).expand(tuple(shape))

    def forms(self, field: Field) -> list[Row]:
        """The distinct log-scales that occur in a field, as they stand."""
        if not field.terms:
            return []
        tuples, _ = _distinct([ids for _, ids in field.terms])
        return [_row([c for c, _ in field.terms], t) for t in tuples.tolist()]

    def _named(self, row: Row) -> int:
        """An unknown that equals a sum: an old one where that is an activation's, else a new one."""
        known = self.system.reduce(row)
        if not known:
            return ZERO
        if len(known) == 1:
            ((unknown, coefficient),) = known.items()
            if coefficient == 1 and not self.system.is_bound(unknown):
                return unknown
        made = self.system.unknowns(1, bound=False)[0]
        self.system.require({**{u: -c for u, c in row.items()}, made: 1}, "")
        return made

    def _vanishes(self, terms: list[Term], reason: str) -> None:
        if terms:
            tuples, _ = _distinct([ids for _, ids in terms])
            coefficients = [c for c, _ in terms]
            for t in tuples.tolist():
                self.system.require(_row(coefficients, t), reason)


def broadcast_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to which shapes broadcast."""
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def compact(ids: Tensor) -> Tensor:
    """Expand a tensor of unknowns along the dimensions over which it is constant."""
    for dim in range(ids.ndim):
        if not _constant(ids, dim) and bool((ids == ids.narrow(dim, 0, 1)).all()):
            ids = ids.narrow(dim, 0, 1).expand(ids.shape)
    return ids


def _constant(ids: Tensor, dim: int) -> bool:
    return ids.shape[dim] <= 1 or ids.stride(dim) == 0


def _row(coefficients: Sequence[Number], unknowns: Sequence[int]) -> Row:
    row: Row = {}
    for coefficient, unknown in zip(coefficients, unknowns, strict=True):
        row[unknown] = row.get(unknown, 0) + coefficient
    return row


def _distinct(columns: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The distinct tuples of entries (tuples, columns), and which one stands where (broadcast shape)."""
    narrow = _broadcast([_narrowed(ids) for ids in columns])
    flat = [ids.reshape(-1) for ids in narrow]
    _, code = torch.unique(flat[0], return_inverse=True)
    for ids in flat[1:]:
        values, inverse = torch.unique(ids, return_inverse=True)
        _, code = torch.unique(code * len(values) + inverse, return_inverse=True)
    count = int(code.max()) + 1 if len(code) else 0
    place = torch.empty(count, dtype=torch.int64).scatter_(0, code, torch.arange(len(code)))
    return torch.stack([ids[place] for ids in flat], 1), code.reshape(narrow[0].shape)


def _broadcast(columns: list[Tensor]) -> list[Tensor]:
    shape = broadcast_shape(*[tuple(ids.shape) for ids in columns])
    return [ids.expand(shape) for ids in columns]


def _narrowed(ids: Tensor) -> Tensor:
    for dim in range(ids.ndim):
        if _constant(ids, dim):
            ids = ids.narrow(dim, 0, min(1, ids.shape[dim]))
    return ids
