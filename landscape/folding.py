"""BatchNorm in evaluation mode as part of the layer before it: s (w ⋆ x + c − m) + b = (s w) ⋆ x + (s (c − m) + b)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from landscape import batches as batching

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_LAYER_CALLS = (torch.conv1d, torch.conv2d, torch.conv3d, functional.linear)
# |running mean − bias| in standard deviations up to which a norm is folded: the sum of two numbers that are so
# many times larger than their result loses as many units in the last place.
_FOLDED_UP_TO = 16.0


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, and the BatchNorm that alone reads its output; None where there is none."""

    module: nn.Module
    norm: Norm | None


def layers(model: nn.Module, forward: Callable[[], Any], *, fold: bool = True) -> list[Layer]:
    """Find the convolutions of a model, and the layers whose only reader is a BatchNorm.

    Args:
        model: in evaluation mode, with the tensors that it computes with in place.
        forward: runs it once; every call of PyTorch that it makes is looked at.
        fold: False leaves the norms alone.

    Returns:
        Layers that run once and share their weight with no other.
    """
    modules = {id(m._parameters.get("weight")): m for m in model.modules() if _is_plain(m)}
    norms = {id(m.running_mean): m for m in _foldable(model)} if fold else {}
    with torch.no_grad(), _Calls() as seen:
        forward()
    found = {}
    for function, read, made in seen.calls:
        module = modules.get(id(read[1])) if function in _LAYER_CALLS and len(read) > 1 else None
        if module is None or seen.readers(read[1]) != 1:
            continue
        norm = _reader(seen, norms, made)
        if norm is not None and not (_is_centred(module, norm) and _fits(module, made)):
            norm = None
        if norm is not None or isinstance(module, nn.Conv2d):
            found[id(module)] = Layer(module, norm)
    return list(found.values())


class Folded:
    """Tensors with which layers compute in place of their own, for parameters that change in place.

    Args:
        of: what `layers` found, with the tensors in place that `refresh` reads.
        channels_last: whether images lie in memory as (batch, height, width, channels).
    """

    def __init__(self, of: Sequence[Layer], *, channels_last: bool):
        self._parts = [_Part(layer, channels_last) for layer in of if layer.norm or channels_last]

    def refresh(self) -> None:
        """Follow a change of the parameters."""
        for part in self._parts:
            part.refresh()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the layers compute with these tensors, and the norms do nothing."""
        kept = [(m, m._parameters["weight"], m._parameters["bias"]) for m in (p.module for p in self._parts)]
        norms = [p.norm for p in self._parts if p.norm is not None]
        try:
            for part in self._parts:
                part.module._parameters.update(weight=part.weight, bias=part.bias)
            for norm in norms:
                vars(norm)["forward"] = _unchanged
            yield
        finally:
            for norm in norms:
                vars(norm).pop("forward", None)
            for module, weight, bias in kept:
                module._parameters.update(weight=weight, bias=bias)


class _Part:
    """One layer: the tensors that it has, and those that stand for it and its norm."""

    def __init__(self, layer: Layer, channels_last: bool):
        self.module, self.norm = layer.module, layer.norm
        own, constant = layer.module._parameters["weight"], layer.module._parameters["bias"]
        assert own is not None
        self._own, self._constant = own, constant
        images = channels_last and own.ndim == 4
        order = torch.channels_last if images else torch.contiguous_format
        self.weight = nn.Parameter(torch.empty_like(own, memory_format=order), requires_grad=False)
        self.bias = constant
        if self.norm is not None:
            self.bias = nn.Parameter(own.new_empty(own.shape[0]), requires_grad=False)
            self._inverse, self._mean = _statistics(self.norm)

    def refresh(self) -> None:
        """Compute both from what is in place now."""
        if self.norm is None:
            self.weight.copy_(self._own)
            return
        assert self.bias is not None
        scale = self._inverse if self.norm.weight is None else self._inverse * self.norm.weight
        torch.mul(self._own, scale.view(-1, *[1] * (self._own.ndim - 1)), out=self.weight)
        # Subtracted first, a large mean costs no accuracy.
        away = -self._mean if self._constant is None else self._constant - self._mean
        if self.norm.bias is None:
            torch.mul(away, scale, out=self.bias)
        else:
            torch.addcmul(self.norm.bias, away, scale, out=self.bias)


class _Calls(TorchFunctionMode):
    """Notes every call of PyTorch that makes a tensor, with the tensors that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Tensor], Any]] = []  # holds the tensors, so that no id comes twice
        self._readers: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if batching.tensors(result):
            read = batching.tensors([list(args), dict(kwargs or {})])
            self.calls.append((func, read, result))
            for i in {id(t) for t in read}:
                self._readers[i] = self._readers.get(i, 0) + 1
        return result

    def readers(self, t: Tensor) -> int:
        """How many calls read a tensor."""
        return self._readers.get(id(t), 0)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _reader(seen: _Calls, norms: dict[int, Norm], made: Any) -> Norm | None:
    """The norm that alone reads this output, and runs once."""
    if not isinstance(made, Tensor) or seen.readers(made) != 1:
        return None
    for function, read, _ in seen.calls:
        if function is functional.batch_norm and len(read) > 2 and read[0] is made:
            norm = norms.get(id(read[1]))
            return norm if norm is not None and seen.readers(read[1]) == 1 else None
    return None


def _is_plain(module: nn.Module) -> bool:
    return type(module) in {*_CONVOLUTIONS, nn.Linear} and not _has_hooks(module)


def _foldable(model: nn.Module) -> Iterator[Norm]:
    for module in model.modules():
        if not isinstance(module, Norm) or type(module) not in Norm.__args__ or _has_hooks(module):
            continue
        if not module.training and module.running_mean is not None:
            yield module


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _fits(module: nn.Module, made: Tensor) -> bool:
    """Whether the layer's outputs are the norm's channels."""
    weight = module._parameters["weight"]
    return weight is not None and made.ndim == weight.ndim  # of images with a dimension for examples


def _is_centred(module: nn.Module, norm: Norm) -> bool:
    inverse, mean = _statistics(norm)
    with torch.no_grad():
        constant = module._parameters["bias"]
        away = mean if constant is None else mean - constant
        return bool((away.abs() * inverse).max() <= _FOLDED_UP_TO)


def _statistics(norm: Norm) -> tuple[Tensor, Tensor]:
    """One over the standard deviation, and the mean."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    return torch.rsqrt(norm.running_var + norm.eps), norm.running_mean
