"""The loss's second derivative with respect to the model's outputs, Λ_i = ∂²ℓ_i/∂f_i², cut into columns.

Λ_i = Σ_c σ_ic s_ic s_icᵀ with signs σ = ±1 (+1 for a convex loss). Three forms: cross-entropy in closed form;
losses that act on each output alone, whose Λ is diagonal; any other loss by differentiating it twice, row
by row, and an eigendecomposition. The first two are recognised and then tested against the loss itself.

Outputs of one micro-batch stand as (N, m): N examples with m numbers each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landscape import losses, seeds
from landscape.batches import tensors, tree_map
from landscape.curvature_columns import Columns, CrossEntropy, Dense, Diagonal
from landscape.errors import Refused

# A recognised form must agree with the loss to this many units of rounding.
_ROUNDING = 1e3
# m² numbers per example are held for a loss of unknown form.
_MOST_OUTPUTS = 4096


@dataclass(frozen=True)
class Outputs:
    """The outputs of a micro-batch that depend on the parameters.

    Attributes:
        nest: as the model returned them.
        examples: N.
    """

    nest: Any
    examples: int

    @functools.cached_property
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
    if known is not None and (known.kappa >= 0).all() and (tested or _is_this(known, outputs, ending)):
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
    return _close(expected.to(v.dtype), slope.product(v))


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
