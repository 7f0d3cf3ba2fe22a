"""A convolution whose double backward takes four convolutions.

A convolution y = w ⋆ x is bilinear, so that every derivative of it is made of three maps: w ⋆ x itself and
its two transposes, gx(g, w) and gw(g, x). PyTorch's own double backward makes them of more, and slower ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

_linear = ContextVar("linear", default=False)


class Settings(NamedTuple):
    """What convolves how, one number per dimension of the image."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def aten(self) -> tuple[Any, ...]:
        """The arguments of `aten::convolution` after its tensors."""
        none = [0] * len(self.stride)
        return (list(self.stride), list(self.padding), list(self.dilation), False, none, self.groups)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, value: Tensor | None = None
) -> Tensor:
    """Return w ⋆ x + b, twice differentiable.

    Args:
        x: (batch, channels, *image).
        weight: (outputs, channels / groups, *kernel).
        bias: (outputs,) or None.
        settings: stride, padding, dilation, groups.
        value: the result, where it is known already; only derivatives are then made here.
    """
    made: Tensor = _Convolution.apply(x, weight, bias, settings, value)  # type: ignore[no-untyped-call]
    return made


@contextmanager
def linear_pullbacks() -> Iterator[None]:
    """Make backward passes that are to be differentiated by their incoming slope alone.

    An autograd function in Python cannot see that nothing else is asked of it, and would make two
    convolutions in vain.
    """
    token = _linear.set(True)
    try:
        yield
    finally:
        _linear.reset(token)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, value: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.outputs = settings, None if bias is None else list(bias.shape)
        if value is not None:
            return value
        made: Tensor = torch.ops.aten.convolution.default(x, weight, bias, *settings.aten)
        return made

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> Any:
        slope = slopes[0]
        if slope is None:
            return (None,) * 5
        x, weight = ctx.saved_tensors
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            # Once here, instead of in each of the products that will be made of it.
            slope = slope.contiguous(memory_format=torch.channels_last)
        if _linear.get():
            x, weight = x.detach(), weight.detach()
        wanted = list(ctx.needs_input_grad[:3])
        found = _Slopes.apply(slope, x, weight, ctx.outputs, ctx.settings, wanted)  # type: ignore[no-untyped-call]
        return (*found, None, None)


class _Slopes(torch.autograd.Function):
    """(g, x, w) -> gx(g, w), gw(g, x) and the sums of g over all but its channels.

    Its backward consists of PyTorch's own operations, so that third derivatives are PyTorch's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        slope: Tensor,
        x: Tensor,
        weight: Tensor,
        outputs: list[int] | None,
        settings: Settings,
        wanted: list[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        ctx.save_for_backward(slope, x, weight)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = (
            torch.ops.aten.convolution_backward.default(slope, x, weight, outputs, *settings.aten, wanted)
        )
        return found

    @staticmethod
    def backward(ctx: Any, *bent: Tensor | None) -> Any:
        on_x, on_weight, on_bias = bent
        slope, x, weight = ctx.saved_tensors
        wants_slope, wants_x, wants_weight = ctx.needs_input_grad[:3]
        of_slope = _of_slope(ctx, slope, on_x, on_weight, on_bias) if wants_slope else None
        wanted = [wants_x and on_weight is not None, wants_weight and on_x is not None, False]
        of_x = of_weight = None
        if any(wanted):
            of_x, of_weight, _ = torch.ops.aten.convolution_backward.default(
                slope,
                x if on_x is None else on_x,
                weight if on_weight is None else on_weight,
                None,
                *ctx.settings.aten,
                wanted,
            )
        return of_slope, of_x, of_weight, None, None, None


def _of_slope(
    ctx: Any, slope: Tensor, on_x: Tensor | None, on_weight: Tensor | None, on_bias: Tensor | None
) -> Tensor | None:
    _, x, weight = ctx.saved_tensors
    convolution, settings = torch.ops.aten.convolution.default, ctx.settings.aten
    total: Tensor | None = None
    if on_weight is not None:
        total = convolution(x, on_weight, on_bias, *settings)
    elif on_bias is not None:
        total = on_bias.reshape(-1, *[1] * (slope.ndim - 2)).expand_as(slope)
    if on_x is None:
        return total
    other: Tensor = convolution(on_x, weight, None, *settings)
    return other if total is None else other.add_(total)
