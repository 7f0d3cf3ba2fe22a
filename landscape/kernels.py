"""Kernels that make curvature products cheaper, in force only while products are made.

The user's model is not changed: calls that it makes are answered by equivalents whose second derivative
costs less, and every setting is put back. Each switch is exact to rounding. Which are on follows from the
device, the dtype and a probe of the processor's rounding, never from a clock: a product is the same
number whenever it is made.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from landscape import matmul
from landscape.convolution import Settings, convolve

# |running mean − bias| in standard deviations up to which a BatchNorm is folded. The slope of its weight is
# then a difference of two numbers that many times larger, and loses as many units in the last place.
_FOLDED_UP_TO = 16.0


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Which switches are on.

    Attributes:
        convolution: convolutions whose double backward takes four convolutions.
        norm: BatchNorm with running statistics as part of the convolution before it, or as an affine map.
        channels_last: convolutions of images in the memory order (batch, height, width, channels).
        matmul: "bf16" where that name selects the faster matrix product, exact on this processor;
            "default" leaves it alone.
        kinks: rectifiers on the side of zero on which float64 has them, while graphs are kept.
    """

    convolution: bool = False
    norm: bool = False
    channels_last: bool = False
    matmul: str = "default"
    kinks: bool = False

    def as_dict(self) -> dict[str, bool | str]:
        """The switches as plain values."""
        return dataclasses.asdict(self)


NONE = Kernels()


def choose(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the switches that are exact and worth having on this device, in this precision.

    A precision of matrix products that the user has set stands.
    """
    if device.type != "cpu":
        return NONE
    faster = dtype == torch.float32 and matmul.is_faster()
    return Kernels(
        convolution=True,
        norm=True,
        channels_last=dtype == torch.float32,
        matmul="bf16" if faster else "default",
        kinks=dtype == torch.float32,
    )


@contextmanager
def active(kernels: Kernels) -> Iterator[None]:
    """Make products with these switches; afterwards, also after an exception, all is as before."""
    with multiplying(kernels), _Routing(kernels) if kernels != NONE else nullcontext():
        yield


def multiplying(kernels: Kernels) -> AbstractContextManager[None]:
    """Set only the switch of the matrix product: all that counts where a graph is run through."""
    return matmul.faster(kernels.matmul == "bf16")


def milder(kernels: Kernels, failure: RuntimeError) -> Kernels | None:
    """The switches for a model that fails with these ones; None where they are not the cause.

    Some views of images exist only in the ordinary memory order. And what an activation checkpoint runs again
    takes its usual way, so that what was answered otherwise does not come out alike.
    """
    if kernels.channels_last and "view size is not compatible" in str(failure):
        return dataclasses.replace(kernels, channels_last=False)
    if (kernels.convolution or kernels.norm or kernels.kinks) and isinstance(failure, CheckpointError):
        return dataclasses.replace(kernels, convolution=False, norm=False, channels_last=False, kinks=False)
    return None


# --- calls of the model that are answered otherwise ------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Made:
    """A convolution just made, and what it was made of, with the versions of its tensors."""

    output: Tensor
    parts: tuple[Tensor, Tensor, Tensor | None]
    settings: Settings
    versions: tuple[int, ...]

    @classmethod
    def of(cls, output: Tensor, parts: tuple[Tensor, Tensor, Tensor | None], settings: Settings) -> _Made:
        return cls(output, parts, settings, _versions(output, *parts))

    def is_still(self, x: Tensor) -> bool:
        """Whether x is that output, and nothing was written in place since."""
        return x is self.output and self.versions == _versions(self.output, *self.parts)


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if t is not None)


class _Routing(TorchFunctionMode):
    """Answers convolutions, BatchNorms and attention of the model; everything else takes its usual way."""

    def __init__(self, kernels: Kernels):
        super().__init__()
        self._kernels = kernels
        self._last: _Made | None = None
        self._handlers: dict[Any, Any] = {}
        if kernels.convolution:
            for dimensions, function in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), start=1):
                self._handlers[function] = functools.partial(self._convolution, function, dimensions)
        if kernels.norm:
            self._handlers[functional.batch_norm] = self._norm
        if kernels.matmul != "default":
            self._handlers[functional.scaled_dot_product_attention] = _attention

    def __exit__(self, *exception: Any) -> None:
        self._last = None
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._handlers.get(func, func)(*args, **(kwargs or {}))

    def _convolution(
        self,
        function: Any,
        dimensions: int,
        input: Tensor,  # noqa: A002  (PyTorch's keyword)
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        plain = _plain(input, weight, bias) and weight.ndim == input.ndim == dimensions + 2
        if not plain or (padding == "same" and _tuple(stride, dimensions) != (1,) * dimensions):
            made: Tensor = function(input, weight, bias, stride, padding, dilation, groups)
            return made
        dilations = _tuple(dilation, dimensions)
        padded, paddings = _padded(input, weight, padding, dilations)
        if dimensions == 2 and self._kernels.channels_last:
            padded = padded.contiguous(memory_format=torch.channels_last)
        settings = Settings(_tuple(stride, dimensions), paddings, dilations, groups)
        output = convolve(padded, weight, bias, settings)
        self._last = _Made.of(output, (padded, weight, bias), settings)
        return output

    def _norm(
        self,
        input: Tensor,  # noqa: A002
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        plain = _plain(input, running_mean, running_var, weight, bias)
        if training or running_mean is None or running_var is None or not plain:
            return functional.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
        inverse = torch.rsqrt(running_var + eps)
        scale = inverse if weight is None else weight * inverse
        made, self._last = self._last, None
        if made is not None and made.is_still(input) and _centred(running_mean, inverse, made.parts[2]):
            return _folded(made, running_mean, scale, bias)
        return _affine(input, running_mean, scale, bias)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """Attention; the fused kernel, which is for passes without gradients, gets five times slower by the switch."""
    if torch.is_grad_enabled():
        return functional.scaled_dot_product_attention(*args, **kwargs)
    with matmul.precision_set("none"):
        return functional.scaled_dot_product_attention(*args, **kwargs)


def _folded(made: _Made, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return s (w ⋆ x + c − m) + b as one convolution, (s w) ⋆ x + (s (c − m) + b).

    Its value is had from the convolution that was made; only its derivatives are those of the new one, so
    that no pass over the images is left to the BatchNorm.
    """
    x, weight, constant = made.parts
    shift = scale * (-mean if constant is None else constant - mean)
    shift = shift if bias is None else shift + bias
    with torch.no_grad():
        value = _affine(made.output.detach(), mean, scale, bias)
    stretched = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return convolve(x, stretched, shift, made.settings, value)


def _affine(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return (x − m) s + b; subtracting first keeps the slope of s accurate where the mean is large."""
    along = (-1, *[1] * (x.ndim - 2))
    centred = x - mean.reshape(along)
    if bias is None:
        return centred * scale.reshape(along)
    return torch.addcmul(bias.reshape(along), centred, scale.reshape(along))


def _centred(mean: Tensor, inverse: Tensor, constant: Tensor | None) -> bool:
    with torch.no_grad():
        away = mean if constant is None else mean - constant
        return bool((away.abs() * inverse).max() <= _FOLDED_UP_TO)


def _plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary real tensors of one dtype, outside of autocast, vmap and forward mode."""
    given = [t for t in tensors if t is not None]
    first = given[0]
    return (
        all(type(t) in {Tensor, torch.nn.Parameter} and t.layout == torch.strided for t in given)
        and all(t.dtype == first.dtype and t.device == first.device for t in given)
        and first.is_floating_point()
        and first.numel() > 0
        and not torch.is_autocast_enabled(first.device.type)
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def _tuple(value: Any, dimensions: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


def _padded(
    x: Tensor, weight: Tensor, padding: Any, dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Resolve "valid" and "same"; an odd total of "same" has its extra zero at the end, written out."""
    if not isinstance(padding, str):
        return x, _tuple(padding, len(dilation))
    if padding == "valid":
        return x, (0,) * len(dilation)
    totals = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        ends = [side for total in reversed(totals) for side in (0, total % 2)]
        x = functional.pad(x, ends)
    return x, tuple(math.floor(total / 2) for total in totals)
