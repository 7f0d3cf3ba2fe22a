"""The loss's second derivative with respect to the model's outputs, Λ_i = ∂²ℓ_i/∂f_i², cut into columns.

Λ_i = Σ_c σ_ic s_ic s_icᵀ with signs σ = ±1 (+1 for a convex loss). Three forms: cross-entropy in closed form;
losses that act on each output alone, whose Λ is diagonal; any other loss by differentiating it twice, row
by row, and an eigendecomposition. The first two are recognised and then tested against the loss itself.

Outputs of one micro-batch stand as (N, m): N examples with m numbers each.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landscape import losses, seeds
from landscape.batches import tensors, tree_map
from landscape.errors import Refused

# A recognised form must agree with the loss to this many units of rounding.
_ROUNDING = 1e3
# m² numbers per example are held for a loss of unknown form.
_MOST_OUTPUTS = 4096
# Stands in for a sum of probabilities that has underflowed; its terms are then zero too.
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Outputs:
    """The outputs of a micro-batch that depend on the parameters.

    Attributes:
        nest: as the model returned them.
        examples: N.
    """

    nest: Any
    examples: int

    @property
    def heads(self) -> list[Tensor]:
        """The tensors that require grad."""
        return [t for t in tensors(self.nest) if t.requires_grad]

    @property
    def size(self) -> int:
        """The number m of outputs of one example."""
        return sum(t.numel() for t in self.heads) // self.examples

    def flat(self) -> Tensor:
        """The outputs as (N, m), detached."""
        return torch.cat([t.detach().reshape(self.examples, -1) for t in self.heads], 1)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cut (N, m) into the shapes of the tensors."""
        heads = self.heads
        pieces = torch.split(flat, [t.numel() // self.examples for t in heads], 1)
        return [p.reshape(t.shape) for p, t in zip(pieces, heads, strict=True)]

    def tails(self, flat: Tensor) -> list[Tensor]:
        """Cotangents of the tensors from (N, m)."""
        return [p.to(t) for p, t in zip(self.split(flat), self.heads, strict=True)]

    def replaced(self, flat: Tensor) -> Any:
        """The nest with these numbers (N, m), of their own dtype, in place of the model's."""
        pieces = iter(self.split(flat))
        return tree_map(lambda t: next(pieces) if t.requires_grad else t, self.nest)


class Columns(ABC):
    """Λ of a micro-batch, as a product of columns."""

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of columns of an example."""

    @property
    @abstractmethod
    def present(self) -> list[bool]:
        """For each column, whether it is not zero in every example."""

    @abstractmethod
    def column(self, c: int) -> tuple[Tensor, Tensor | None]:
        """Column c of every example, (N, m), and its signs (N,), None where all are +1."""

    @abstractmethod
    def drawn(self, stream: torch.Generator) -> list[tuple[Tensor, int]]:
        """Pairs (Σ_c r_c s_c over the columns of one sign, that sign), r random signs; each part (N, m)."""


@dataclass(frozen=True)
class CrossEntropy(Columns):
    """Λ = κ (diag p − p pᵀ) at each position, p = softmax(f).

    With q_c = Σ_{j ≥ c} p_j, column c of C − 1 is √(κ p_c q_{c+1} / q_c) (e_c − Σ_{j > c} (p_j / q_{c+1}) e_j): the
    Cholesky factor of the covariance of a multinomial (Tanabe & Sagae 1992, doi
    10.1111/j.2517-6161.1992.tb01875.x). No difference of nearly equal numbers occurs, however sure the model is.

    Attributes:
        p: probabilities (N, k, C, D), k·D positions per example, float64.
        kappa: (N, k, D), float64.
        dtype: of the columns.
    """

    p: Tensor
    kappa: Tensor
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """C − 1 per position."""
        return self.kappa[0].numel() * (self.p.shape[2] - 1)

    @functools.cached_property
    def present(self) -> list[bool]:
        """Whether a class at a position has weight in any example."""
        some = (self._lengths[0] > 0).any(0)  # k, C - 1, D
        return [bool(b) for b in some.transpose(1, 2).flatten()]

    @functools.cached_property
    def _lengths(self) -> tuple[Tensor, Tensor]:
        """√(κ p_c q_{c+1} / q_c), the head of a column, and the same divided by q_{c+1}, (N, k, C − 1, D)."""
        tails = self.p.flip(2).cumsum(2).flip(2)  # q
        share = self.p[:, :, :-1] / tails[:, :, :-1].clamp(min=_TINY)
        heads = (self.kappa[:, :, None] * share * tails[:, :, 1:]).sqrt()
        return heads, heads / tails[:, :, 1:].clamp(min=_TINY)

    def column(self, c: int) -> tuple[Tensor, Tensor | None]:
        """One class at one position."""
        _, _, classes, places = self.p.shape
        position, label = divmod(c, classes - 1)
        row, place = divmod(position, places)
        heads, below = (t[:, row, label, place] for t in self._lengths)
        made = torch.zeros(self.p.shape, dtype=self.dtype, device=self.p.device)
        made[:, row, label, place] = heads
        made[:, row, label + 1 :, place] = self.p[:, row, label + 1 :, place] * -below[:, None]
        return made.flatten(1), None

    def drawn(self, stream: torch.Generator) -> list[tuple[Tensor, int]]:
        """A random sign per position and class but the last."""
        heads, below = self._lengths
        r = _signs(stream, heads, heads)
        made = torch.zeros_like(self.p)
        made[:, :, :-1] = heads * r
        made[:, :, 1:] -= self.p[:, :, 1:] * (below * r).cumsum(2)
        return [(made.flatten(1).to(self.dtype), 1)]


@dataclass(frozen=True)
class Diagonal(Columns):
    """Λ = diag(d): the loss is a sum over outputs.

    Attributes:
        d: (N, m).
    """

    d: Tensor

    @property
    def count(self) -> int:
        """One per output."""
        return self.d.shape[1]

    @property
    def present(self) -> list[bool]:
        """Whether an output is bent in any example."""
        return [bool(b) for b in (self.d != 0).any(0)]

    def column(self, c: int) -> tuple[Tensor, Tensor | None]:
        """One output."""
        made = torch.zeros_like(self.d)
        made[:, c] = self.d[:, c].abs().sqrt()
        return made, _sign_or_none(self.d[:, c])

    def drawn(self, stream: torch.Generator) -> list[tuple[Tensor, int]]:
        """A random sign per output."""
        r = _signs(stream, self.d, self.d)
        parts = [((self.d * sign).clamp(min=0).sqrt() * r, sign) for sign in (1, -1)]
        return [(part, sign) for part, sign in parts if part.any()]


@dataclass(frozen=True)
class Dense(Columns):
    """Λ = Σ_c λ_c u_c u_cᵀ by eigendecomposition.

    Attributes:
        eigenvalues: (N, r), largest magnitude first.
        vectors: u √|λ|, (N, m, r).
    """

    eigenvalues: Tensor
    vectors: Tensor

    @property
    def count(self) -> int:
        """The rank."""
        return self.eigenvalues.shape[1]

    @property
    def present(self) -> list[bool]:
        """All: they were counted so."""
        return [True] * self.count

    def column(self, c: int) -> tuple[Tensor, Tensor | None]:
        """One eigenvector."""
        return self.vectors[:, :, c].contiguous(), _sign_or_none(self.eigenvalues[:, c])

    def drawn(self, stream: torch.Generator) -> list[tuple[Tensor, int]]:
        """A random sign per eigenvector."""
        r = _signs(stream, self.eigenvalues, self.vectors)
        found = []
        for sign in (1, -1):
            chosen = r * (self.eigenvalues * sign > 0)
            if chosen.any():
                found.append(((self.vectors @ chosen[..., None])[..., 0], sign))
        return found


@dataclass(frozen=True)
class Ending:
    """What follows on the outputs of a micro-batch: the sum of its loss's terms.

    Attributes:
        function: the loss as a function of the nest of outputs and the target.
        loss: the same as the user gave it, to recognise it.
        target: of the micro-batch.
        scale: what the loss must be multiplied with to be the sum of its terms.
    """

    function: Callable[[Any, Any], Tensor]
    loss: Any
    target: Any
    scale: float


def columns(outputs: Outputs, ending: Ending, tested: bool = False) -> Columns:
    """Cut Λ of the loss's sum over a micro-batch into columns.

    Args:
        outputs: of the micro-batch.
        ending: the loss.
        tested: whether the closed form of cross-entropy has been found right on another micro-batch.

    Raises:
        Refused: if a loss of unknown form couples examples, or more than 4096 outputs of one.
    """
    known = _cross_entropy(outputs, ending)
    if known is not None and (tested or _is_this(known, outputs, ending)):
        return known
    slope = _slope(outputs, ending, outputs.flat())
    d = slope.product(torch.ones_like(slope.point))
    r = _normal_like(slope.point)
    bent = slope.product(r)
    if _close(d * r, bent):
        return Diagonal(d)
    return _dense(slope, r, bent)


class _Slope:
    """∂(scale·loss)/∂f at a point (N, m), kept with its graph."""

    def __init__(self, value: Callable[[Tensor], Tensor], point: Tensor):
        self.point = point.detach().requires_grad_()
        loss = value(self.point)
        slope = None
        if loss.requires_grad:
            slope = torch.autograd.grad(loss, self.point, create_graph=True, allow_unused=True)[0]
        self._slope = slope if slope is not None and slope.requires_grad else None

    def product(self, v: Tensor) -> Tensor:
        """Λ v, (N, m)."""
        if self._slope is None:
            return torch.zeros_like(v)
        found = torch.autograd.grad(self._slope, self.point, v, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(v) if found is None else found


def _slope(outputs: Outputs, ending: Ending, point: Tensor) -> _Slope:
    """In float64 if the loss can be computed in it: where predictions are sure, Λ is a small difference."""
    try:
        exact = tree_map(lambda t: t.double() if t.is_floating_point() else t, ending.target)
        found = _Slope(lambda f: ending.scale * ending.function(outputs.replaced(f), exact), point.double())
        found.product(torch.ones_like(found.point))
    except RuntimeError:
        return _Slope(lambda f: ending.scale * ending.function(outputs.replaced(f), ending.target), point)
    return found


def _cross_entropy(outputs: Outputs, ending: Ending, at: Tensor | None = None) -> CrossEntropy | None:
    """The closed form, if the loss is PyTorch's cross-entropy of one tensor; `at` other outputs, if given."""
    name, options = losses.describe(ending.loss)
    nest, target = outputs.nest, ending.target
    if name != "cross_entropy" or not isinstance(nest, Tensor) or not isinstance(target, Tensor):
        return None
    if nest.ndim < 2 or not nest.requires_grad or nest.shape[1] < 2:
        return None
    f = (nest.detach() if at is None else at.reshape(nest.shape)).double()
    divisor = 1.0
    if options.get("reduction", "mean") == "mean":
        derived = losses.derived_weight(ending.loss, "mean")
        assert derived is not None
        divisor = derived(target)
    factor = ending.scale / divisor if divisor else math.nan
    kappa = _kappa(target, f.shape[1], options).reshape(f.shape[0], -1) * factor
    p = torch.softmax(f, 1).reshape(*f.shape[:2], -1)
    n = outputs.examples
    return CrossEntropy(p.reshape(n, -1, *p.shape[1:]), kappa.reshape(n, -1, kappa.shape[1]), nest.dtype)


def _kappa(target: Tensor, classes: int, options: dict[str, Any]) -> Tensor:
    """The weight of each position's term: of its class, of its probabilities, 0 where it is ignored."""
    smoothing, weight = float(options.get("label_smoothing", 0.0)), options.get("weight")
    if weight is None:
        w = torch.ones(classes, dtype=torch.float64, device=target.device)
    else:
        w = weight.detach().to(target.device, torch.float64)
    if target.is_floating_point():
        smooth = (1 - smoothing) * target.double() + smoothing / classes
        return (smooth.movedim(1, -1) * w).sum(-1)
    valid = target != options.get("ignore_index", -100)
    kappa: Tensor = ((1 - smoothing) * w[target.where(valid, 0)] + smoothing * w.mean()) * valid
    return kappa


def _is_this(known: CrossEntropy, outputs: Outputs, ending: Ending) -> bool:
    """Test the closed form against the loss, away from the model's outputs: sure predictions tell little."""
    point = _normal_like(outputs.flat())
    there = _cross_entropy(outputs, ending, point)
    assert there is not None
    slope = _slope(outputs, ending, point)
    v = _normal_like(slope.point, 1)
    seen = v.double().reshape(known.p.shape)
    inner = (there.p * seen).sum(2, keepdim=True)
    expected = (there.kappa[:, :, None] * there.p * (seen - inner)).flatten(1)
    return bool((known.kappa >= 0).all()) and _close(expected.to(v.dtype), slope.product(v))


def _dense(slope: _Slope, r: Tensor, bent: Tensor) -> Columns:
    """Differentiate the loss row by row: the same output of every example at once."""
    count, m = slope.point.shape
    if m > _MOST_OUTPUTS:
        raise Refused(
            f"an example has {m} outputs, and the loss is neither cross-entropy nor a sum over outputs; its second "
            f"derivative is formed for at most {_MOST_OUTPUTS}. Use products with the Gauss-Newton matrix "
            "(method='hutchinson'), or one of PyTorch's losses."
        )
    found = []
    for j in range(m):
        unit = torch.zeros_like(slope.point)
        unit[:, j] = 1
        found.append(slope.product(unit).double())
    curvature = torch.stack(found, 1)
    applied = (curvature @ r.double()[..., None])[..., 0]
    if not _close(applied.to(r.dtype), bent):
        raise Refused(
            "the loss of one example depends on the outputs of others, so that examples cannot be told apart. "
            "A loss must be a sum over examples."
        )
    values, vectors = torch.linalg.eigh((curvature + curvature.transpose(1, 2)) / 2)
    order = values.abs().argsort(1, descending=True)
    values = values.gather(1, order)
    vectors = vectors.gather(2, order[:, None].expand(count, m, m))
    smallest = m * torch.finfo(r.dtype).eps * float(values.abs().max())
    rank = int((values.abs().amax(0) > smallest).sum())
    values = values[:, :rank]
    return Dense(values, vectors[:, :, :rank] * values.abs().sqrt()[:, None])


def _close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) <= _ROUNDING * torch.finfo(a.dtype).eps * float(a.norm())


def _normal_like(t: Tensor, index: int = 0) -> Tensor:
    stream = seeds.generator(0, "output_curvature", index)
    return torch.randn(t.shape, generator=stream, dtype=torch.float64).to(t)


def _signs(stream: torch.Generator, shape: Tensor, like: Tensor) -> Tensor:
    bits = torch.randint(0, 2, shape.shape, generator=stream, dtype=torch.int8)
    return (2 * bits - 1).to(like)


def _sign_or_none(values: Tensor) -> Tensor | None:
    return None if (values >= 0).all() else values.sign()
