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

    def single(self) -> Tensor | None:
        """Squared numbers b (N,) with ‖gradient‖² = ‖g‖² b, where an example has one row; else None."""
        return None

    def rows(self, t: Tensor, lo: int, hi: int) -> Tensor:
        """The rows of examples lo to hi, shape (hi - lo, k, ...)."""
        k = t.shape[0] // self.examples
        return t[lo * k : hi * k].reshape(hi - lo, k, *t.shape[1:])


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

    def single(self) -> Tensor | None:
        """‖a‖²."""
        if self.name == "convolution" or math.prod(self.input.shape[:-1]) != self.examples:
            return None
        return squared_norms(self.input.reshape(self.examples, -1))

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
        joined: Tensor = t.reshape(n, -1, *t.shape[1:]).permute(0, 2, 3, 1, 4).flatten(3)
        return joined


def squared_norms(t: Tensor) -> Tensor:
    """Squared norms over the last dimension."""
    norms: Tensor = torch.linalg.vector_norm(t, dim=-1)
    return norms.square()


def outer_products(right: Tensor, left: Sequence[Tensor]) -> Tensor:
    """Σ_t g_t a_tᵀ for each of K output gradients: (n, groups, K, O, I)."""
    inputs = right.transpose(-1, -2)
    if len(left) == 1:
        return (left[0] @ inputs)[:, :, None]
    if left[0].shape[2] >= _NARROW:
        return torch.stack([one @ inputs for one in left], 2)
    stacked = torch.stack(list(left), 2)  # n, groups, K, O, R
    return (stacked.flatten(2, 3) @ inputs).reshape(*stacked.shape[:4], -1)


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

    def single(self) -> Tensor | None:
        """1, and 0 at padding."""
        if self.index.numel() != self.examples:
            return None
        flat = self.index.reshape(-1)
        return torch.ones_like(flat) if self.padding is None else (flat != self.padding).long()

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
        length: first dimension of the output, N·k.
    """

    aligned: tuple[int, ...]
    factor: Callable[[], Tensor] | None
    length: int

    @property
    def kind(self) -> str:
        """The rule's name."""
        return "sum" if self.factor is None else "product"

    def signature(self) -> tuple[Any, ...]:
        """How it is spread."""
        return self.kind, self.aligned, self.length // self.examples

    def single(self) -> Tensor | None:
        """1, for a summand that is spread over examples only."""
        if self.factor is not None or self._spread or self.length != self.examples:
            return None
        return torch.ones(self.examples)

    def gradients(self, g: Sequence[Tensor], lo: int, hi: int) -> Tensor:
        """Per-example gradients: small, so always explicit."""
        axes = [1, *(axis + 1 for axis in self._spread)]
        if self.factor is None:
            summed = [self.rows(one, lo, hi).sum(axes) for one in g]
        else:
            x = self.rows(self.factor().expand(g[0].shape), lo, hi)
            summed = [(self.rows(one, lo, hi) * x).sum(axes) for one in g]
        return torch.stack(summed, 1).reshape(hi - lo, len(g), *self.shape)

    @property
    def _spread(self) -> list[int]:
        return [axis for axis, size in enumerate(self.aligned) if axis and size == 1]

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
        x = self.rows(self.input, lo, hi)
        x = x.reshape(*x.shape[:2], self.groups, x.shape[2] // self.groups, -1)  # n, k, groups, I, R
        made = []
        for one in g:
            seen = self.patches(self.rows(one, lo, hi).flatten(0, 1))
            seen = seen.reshape(*x.shape[:2], *seen.shape[1:])
            made.append((x @ seen.transpose(-1, -2)).sum(1))
        return torch.stack(made, 1).reshape(hi - lo, len(g), *self.shape)

    def natural_size(self, g: Tensor) -> float:
        """‖g‖ times the root mean square of x."""
        return float(g.norm() * self.input.norm()) / math.sqrt(self.input[:, 0].numel())


@dataclass(frozen=True)
class Window:
    """What each place of a convolution sees of its input.

    Attributes:
        kernel: sizes of the window.
        stride: per dimension.
        padding: zeros before and after, per dimension.
        dilation: per dimension.
        groups: of channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Window:
        """From the arguments of a convolution, numbers or tuples, `padding` also "same" or "valid"."""
        kernel = tuple(weight.shape[2:])
        strides, dilations = (_each(value, len(kernel)) for value in (stride, dilation))
        if padding == "same":
            reach = [d * (size - 1) for size, d in zip(kernel, dilations, strict=True)]
            zeros = tuple((r // 2, r - r // 2) for r in reach)
        else:
            zeros = tuple((p, p) for p in _each(0 if padding == "valid" else padding, len(kernel)))
        return cls(kernel, strides, zeros, dilations, groups)

    def seen(self, x: Tensor, places: Sequence[int] | None = None) -> Tensor:
        """The windows (n, groups, C / groups · |kernel|, R) of x (n, C, ...), R places.

        Args:
            x: input.
            places: number of places per dimension; default as many as fit.
        """
        if any(before or after for before, after in self.padding):
            x = F.pad(x, [zeros for pair in reversed(self.padding) for zeros in pair])
        x = x.contiguous()
        n, channels, *sizes = x.shape
        if places is None:
            places = [
                (size - d * (width - 1) - 1) // s + 1
                for size, width, s, d in zip(sizes, self.kernel, self.stride, self.dilation, strict=True)
            ]
        own = x.stride()[2:]
        inside = (a * d for a, d in zip(own, self.dilation, strict=True))
        between = (a * s for a, s in zip(own, self.stride, strict=True))
        view = x.as_strided((n, channels, *self.kernel, *places), (*x.stride()[:2], *inside, *between))
        inner = channels // self.groups * math.prod(self.kernel)
        return view.reshape(n, self.groups, inner, math.prod(places))


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value) * (dimensions // len(value))
