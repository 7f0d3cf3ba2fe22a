"""How one operation's use of a parameter tensor turns output gradients into per-example gradients.

An operation y = op(x, w) is known by its input and by the gradients g = ∂(s·f)/∂y of K cotangents s. From
these follow, for each example i and each cotangent, the gradient with respect to w and its squared norm,
in most cases without forming the gradient: ‖Σ_t g_t a_tᵀ‖² = Σ_tt' (g_t·g_t')(a_t·a_t').

Rows: a tensor whose first dimension is N·k holds k rows of each of the N examples, one example after the
other. That this is so is never assumed: `landscape.capture` tests it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this width the K output gradients of a layer are multiplied as one matrix: GEMMs of 16 rows run at
# half speed.
_NARROW = 64


@dataclass(frozen=True, eq=False)
class Use(ABC):
    """One use of one parameter tensor by a captured operation.

    Attributes:
        call: number of the operation, to find its output gradients.
        examples: N.
        shape: of the parameter.
    """

    call: int
    examples: int
    shape: tuple[int, ...]

    @property
    @abstractmethod
    def kind(self) -> str:
        """The rule's name."""

    @abstractmethod
    def signature(self) -> tuple[Any, ...]:
        """What must stay the same from one micro-batch to another for the rule to stay right."""

    @abstractmethod
    def gradients(self, g: Sequence[Tensor], lo: int, hi: int) -> Tensor:
        """Per-example gradients (hi - lo, K, *shape) of examples lo to hi, for K output gradients."""

    @abstractmethod
    def natural_size(self, g: Tensor) -> float:
        """The root of the sum of the squared terms that make the gradient: the scale of its rounding."""

    def rows(self, t: Tensor, lo: int, hi: int) -> Tensor:
        """The rows of examples lo to hi, shape (hi - lo, k, ...)."""
        k = t.shape[0] // self.examples
        return t[lo * k : hi * k].unflatten(0, (hi - lo, k))


@dataclass(frozen=True, eq=False)
class Outer(Use):
    """A matrix product or a convolution: the gradient is a sum over rows of outer products, Σ_t g_t a_tᵀ.

    Attributes:
        input: x, detached.
        patches: x of some examples, (n·k, ...) -> (n·k, groups, I, R), R rows of I numbers.
        split: output gradient (n·k, ...) -> (n·k, groups, O, R).
        groups: of a convolution.
        transposed: whether the parameter stands as (I, O).
        name: the rule's name.
    """

    input: Tensor
    patches: Callable[[Tensor], Tensor]
    split: Callable[[Tensor], Tensor]
    groups: int
    transposed: bool
    name: str

    @property
    def kind(self) -> str:
        """The rule's name."""
        return self.name

    def signature(self) -> tuple[Any, ...]:
        """Shape of the input of an example."""
        return self.name, self.input.shape[0] // self.examples, tuple(self.input.shape[1:])

    def right(self, lo: int, hi: int) -> Tensor:
        """The inputs a as (n, groups, I, rows)."""
        return self._joined(self.patches(self.rows(self.input, lo, hi).flatten(0, 1)), hi - lo)

    def left(self, g: Tensor, lo: int, hi: int) -> Tensor:
        """One output gradient as (n, groups, O, rows)."""
        return self._joined(self.split(self.rows(g, lo, hi).flatten(0, 1)), hi - lo)

    def gradients(self, g: Sequence[Tensor], lo: int, hi: int) -> Tensor:
        """Per-example gradients, explicitly."""
        made = outer_products(self.right(lo, hi), [self.left(one, lo, hi) for one in g])  # n, groups, K, O, I
        shaped = made.transpose(-1, -2) if self.transposed else made
        return shaped.transpose(1, 2).reshape(hi - lo, len(g), *self.shape)

    def natural_size(self, g: Tensor) -> float:
        """√(Σ_t ‖g_t‖² ‖a_t‖²)."""
        a, b = self.right(0, self.examples), self.left(g, 0, self.examples)
        return math.sqrt(float((a.square().sum(2) * b.square().sum(2)).sum()))

    def _joined(self, t: Tensor, n: int) -> Tensor:
        """(n·k, groups, F, R) -> (n, groups, F, k·R)."""
        if t.shape[0] == n:
            return t
        return t.unflatten(0, (n, -1)).permute(0, 2, 3, 1, 4).flatten(3)


def outer_products(right: Tensor, left: Sequence[Tensor]) -> Tensor:
    """Σ_t g_t a_tᵀ for each of K output gradients: (n, groups, K, O, I)."""
    inputs = right.transpose(-1, -2)
    if left[0].shape[2] >= _NARROW or len(left) == 1:
        return torch.stack([one @ inputs for one in left], 2)
    stacked = torch.stack(list(left), 2)  # n, groups, K, O, R
    return (stacked.flatten(2, 3) @ inputs).unflatten(2, stacked.shape[2:4])


@dataclass(frozen=True, eq=False)
class Lookup(Use):
    """An embedding: the gradient has the output gradients g_t in the rows that were looked up.

    Attributes:
        index: row numbers, (N·k, ...).
        padding: the row that is fixed, or None.
    """

    index: Tensor
    padding: int | None

    @property
    def kind(self) -> str:
        """The rule's name."""
        return "embedding"

    def signature(self) -> tuple[Any, ...]:
        """Number of look-ups of an example."""
        return "embedding", self.index.shape[0] // self.examples, tuple(self.index.shape[1:])

    def looked_up(self, lo: int, hi: int) -> Tensor:
        """Row numbers (n, R)."""
        return self.rows(self.index, lo, hi).flatten(1)

    def left(self, g: Tensor, lo: int, hi: int) -> Tensor:
        """One output gradient as (n, R, D), zero at padding."""
        rows = self.rows(g, lo, hi).flatten(1, -2)
        if self.padding is None:
            return rows
        return rows * (self.looked_up(lo, hi) != self.padding)[..., None]

    def gradients(self, g: Sequence[Tensor], lo: int, hi: int) -> Tensor:
        """Per-example gradients, explicitly."""
        count, width = self.shape
        n = hi - lo
        first = torch.arange(n, device=self.index.device)[:, None] * count
        places = (self.looked_up(lo, hi) + first).flatten()
        made = [
            one.new_zeros(n * count, width).index_add_(0, places, self.left(one, lo, hi).flatten(0, 1))
            for one in g
        ]
        return torch.stack([one.view(n, count, width) for one in made], 1)

    def natural_size(self, g: Tensor) -> float:
        """‖g‖."""
        return float(g.norm())


@dataclass(frozen=True, eq=False)
class Pointwise(Use):
    """A factor or a summand, broadcast: the gradient is the sum of g·x̂, or of g, over what it is spread over.

    Attributes:
        aligned: the parameter's shape with ones where it is spread, as many as the output has dimensions.
        factor: x̂, what the parameter is multiplied with; None for a summand.
        name: the rule's name.
    """

    aligned: tuple[int, ...]
    factor: Callable[[], Tensor] | None
    name: str

    @property
    def kind(self) -> str:
        """The rule's name."""
        return self.name

    def signature(self) -> tuple[Any, ...]:
        """How it is spread."""
        return self.name, self.aligned

    def gradients(self, g: Sequence[Tensor], lo: int, hi: int) -> Tensor:
        """Per-example gradients: small, so always explicit."""
        axes = [1, *(axis + 1 for axis, size in enumerate(self.aligned) if axis and size == 1)]
        if self.factor is None:
            summed = [self.rows(one, lo, hi).sum(axes) for one in g]
        else:
            x = self.rows(self.factor().expand(g[0].shape), lo, hi)
            summed = [(self.rows(one, lo, hi) * x).sum(axes) for one in g]
        return torch.stack(summed, 1).reshape(hi - lo, len(g), *self.shape)

    def natural_size(self, g: Tensor) -> float:
        """‖g ⊙ x̂‖."""
        return float((g if self.factor is None else g * self.factor()).norm())


@dataclass(frozen=True, eq=False)
class TransposedConvolution(Use):
    """A transposed convolution: a convolution whose input is the output gradient.

    Attributes:
        input: x, (N·k, I, ...), detached.
        patches: output gradient (n·k, ...) -> (n·k, groups, O·kernel, R).
        groups: of the convolution.
    """

    input: Tensor
    patches: Callable[[Tensor], Tensor]
    groups: int

    @property
    def kind(self) -> str:
        """The rule's name."""
        return "transposed convolution"

    def signature(self) -> tuple[Any, ...]:
        """Shape of the input of an example."""
        return self.kind, self.input.shape[0] // self.examples, tuple(self.input.shape[1:])

    def gradients(self, g: Sequence[Tensor], lo: int, hi: int) -> Tensor:
        """Per-example gradients, explicitly."""
        x = self.rows(self.input, lo, hi).flatten(3).unflatten(2, (self.groups, -1))  # n, k, groups, I, R
        made = []
        for one in g:
            seen = self.patches(self.rows(one, lo, hi).flatten(0, 1)).unflatten(0, x.shape[:2])
            made.append((x @ seen.transpose(-1, -2)).sum(1))
        return torch.stack(made, 1).reshape(hi - lo, len(g), *self.shape)

    def natural_size(self, g: Tensor) -> float:
        """‖g‖ times the root mean square of x."""
        return float(g.norm() * self.input.norm()) / math.sqrt(self.input[:, 0].numel())


def windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    places: Sequence[int] | None = None,
) -> Tensor:
    """The window that each place of a convolution sees: (n, C, ...) -> (n, groups, C / groups · |kernel|, R).

    Args:
        x: input.
        kernel: sizes of the window.
        stride: per dimension.
        padding: zeros before and after, per dimension.
        dilation: per dimension.
        groups: of channels.
        places: number of places per dimension; default as many as fit.
    """
    if any(before or after for before, after in padding):
        x = F.pad(x, [zeros for pair in reversed(padding) for zeros in pair])
    x = x.contiguous()
    n, channels, *sizes = x.shape
    if places is None:
        places = [
            (size - d * (width - 1) - 1) // s + 1
            for size, width, s, d in zip(sizes, kernel, stride, dilation, strict=True)
        ]
    own = x.stride()[2:]
    steps = [
        *x.stride()[:2],
        *(a * d for a, d in zip(own, dilation, strict=True)),
        *(a * s for a, s in zip(own, stride, strict=True)),
    ]
    seen = x.as_strided((n, channels, *kernel, *places), steps)
    return seen.reshape(n, groups, channels // groups * math.prod(kernel), math.prod(places))


def squares(uses: Sequence[Use], g: Sequence[Sequence[Tensor]], memory: int) -> Tensor:
    """Squared norms of per-example gradients, (N, K).

    Args:
        uses: all uses of one parameter tensor.
        g: for each use, the K output gradients.
        memory: bytes that explicit gradients may take.
    """
    count, K = uses[0].examples, len(g[0])
    if all(isinstance(use, Outer) for use in uses) and len({(u.groups, u.transposed) for u in uses}) == 1:  # type: ignore[attr-defined]
        if (short := _by_norms(uses[0], g[0])) is not None and len(uses) == 1:
            return short
        return _over_examples(count, _outer_bytes(uses, K), memory, lambda lo, hi: _outer(uses, g, lo, hi))
    if len(uses) == 1 and isinstance(uses[0], Lookup):
        lookup = uses[0]
        number = lookup.index[0].numel() * (lookup.index.shape[0] // count)
        if number * number <= lookup.shape[0]:
            size = g[0][0].element_size() * number * (number + lookup.shape[1])
            return _over_examples(count, size, memory, lambda lo, hi: _lookup(lookup, g[0], lo, hi))

    def explicit(lo: int, hi: int) -> Tensor:
        total = sum(use.gradients(one, lo, hi) for use, one in zip(uses, g, strict=True))
        assert isinstance(total, Tensor)
        return _norms(total.reshape(hi - lo, K, -1))

    size = K * math.prod(uses[0].shape) * g[0][0].element_size()
    return _over_examples(count, size, memory, explicit)


def _over_examples(count: int, size: int, memory: int, part: Callable[[int, int], Tensor]) -> Tensor:
    step = max(1, memory // max(1, size))
    return torch.cat([part(lo, min(lo + step, count)) for lo in range(0, count, step)])


def _norms(t: Tensor) -> Tensor:
    """Squared norms over the last dimension."""
    return torch.linalg.vector_norm(t, dim=-1).square()


def _by_norms(use: Use, g: Sequence[Tensor]) -> Tensor | None:
    """‖g‖²‖a‖² where an example has one row only."""
    assert isinstance(use, Outer)
    if use.groups != 1 or math.prod(use.input.shape[:-1]) != use.examples or use.name == "convolution":
        return None
    a = _norms(use.input.reshape(use.examples, -1))
    return torch.stack([_norms(one.reshape(use.examples, -1)) * a for one in g], 1)


def _outer_bytes(uses: Sequence[Use], K: int) -> int:
    """What explicit gradients, or windows and Gram matrices, of one example take."""
    weight = math.prod(uses[0].shape)
    assert isinstance(uses[0], Outer)
    right = sum(u.right(0, 1).numel() for u in uses if isinstance(u, Outer))
    return uses[0].input.element_size() * (K * weight + right)


def _outer(uses: Sequence[Use], g: Sequence[Sequence[Tensor]], lo: int, hi: int) -> Tensor:
    """By Gram matrices over the rows or by explicit gradients, whichever needs fewer multiplications."""
    known = [use for use in uses if isinstance(use, Outer)]
    right = _cat([use.right(lo, hi) for use in known])
    K = len(g[0])
    left = [_cat([use.left(one[k], lo, hi) for use, one in zip(known, g, strict=True)]) for k in range(K)]
    inner, rows, outer = right.shape[2], right.shape[3], left[0].shape[2]
    if rows * (inner + K * outer + K) < K * inner * outer:
        A = right.transpose(-1, -2) @ right
        return torch.stack([(A * (one.transpose(-1, -2) @ one)).sum((1, 2, 3)) for one in left], 1)
    return _norms(outer_products(right, left).flatten(3)).sum(1)


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
