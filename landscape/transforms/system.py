"""Homogeneous linear equations with rational coefficients, solved exactly as they come."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

Number = int | Fraction
Row = dict[int, Number]

ZERO = 0  # the unknown that is zero from the start


class System:
    """Equations Σ_u c_u s_u = 0 in unknowns numbered 1, 2, ...; number 0 is the constant zero.

    Each equation is reduced by those before it, then solved for one of its unknowns: for a *bound* one where
    there is one, else for the youngest. What remains unsolved are the free unknowns, so that with parameters
    bound and activations not, each null vector belongs to one channel of one activation, and reaches only
    the parameters next to it.
    """

    def __init__(self) -> None:
        self._solved: dict[int, Row] = {ZERO: {}}
        self._bound: set[int] = set()
        self._reasons: dict[int, str] = {}
        self._count = 1

    def unknowns(self, count: int, *, bound: bool) -> range:
        """Return new unknowns; bound ones are solved for before others."""
        made = range(self._count, self._count + count)
        self._count += count
        if bound:
            self._bound.update(made)
        return made

    @property
    def count(self) -> int:
        """How many unknowns there are, the constant among them."""
        return self._count

    @property
    def solved(self) -> int:
        """How many unknowns have been solved for."""
        return len(self._solved)

    def is_bound(self, unknown: int) -> bool:
        """Whether it is solved for before others."""
        return unknown in self._bound

    def require(self, row: Mapping[int, Number], reason: str, *, keep: int | None = None) -> bool:
        """Add the equation Σ_u row[u] s_u = 0; tell whether it said anything new.

        Args:
            row: unknown -> coefficient.
            reason: why the last unknown of the equation is zero, where it then is.
            keep: an unknown that it is not solved for, if there is another.
        """
        reduced = self.reduce(row)
        if not reduced:
            return False
        pivot = max(reduced, key=lambda u: (u != keep, u in self._bound, u))
        coefficient = reduced.pop(pivot)
        self._solved[pivot] = {u: _divided(-c, coefficient) for u, c in reduced.items()}
        if not reduced:
            self._reasons[pivot] = self._reason_of_zeros(row, but=pivot) or reason
        return True

    def reduce(self, row: Mapping[int, Number]) -> Row:
        """Express Σ_u row[u] s_u in free unknowns."""
        total: Row = {}
        for unknown, coefficient in row.items():
            for free, share in self.resolve(unknown).items():
                total[free] = total.get(free, 0) + coefficient * share
        return {u: c for u, c in total.items() if c}

    def resolve(self, unknown: int) -> Row:
        """Express one unknown in free unknowns."""
        held = self._solved.get(unknown)
        if held is None:
            return {unknown: 1}
        if any(u in self._solved for u in held):
            known = self.reduce(held)
            if not known:
                self._reasons.setdefault(unknown, self._reason_of_zeros(held, but=unknown))
            self._solved[unknown] = held = known
        return held

    def reason(self, unknown: int) -> str:
        """Why an unknown is zero; empty where it is not."""
        return "" if self.resolve(unknown) else self._reasons.get(unknown, "")

    def _reason_of_zeros(self, row: Mapping[int, Number], but: int) -> str:
        return next((self._reasons[u] for u in row if u != but and self._reasons.get(u)), "")


def _divided(a: Number, b: Number) -> Number:
    if b in {1, -1}:
        return a * b
    quotient = Fraction(a) / Fraction(b)
    return quotient.numerator if quotient.denominator == 1 else quotient
