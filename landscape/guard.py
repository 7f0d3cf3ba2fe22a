"""What a measurement touches, and puts back: tensors, modes, randomness, kernels.

The model's own parameters and buffers are never written: for the time of a call their places in the
modules hold our tensors (other values, dtype or device), then the originals stand there again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class Slots:
    """Every place in a model that holds a parameter or a buffer; a tied tensor has several.

    `torch.func.functional_call` would do, but it leaves the flat weight list of `nn.LSTM`, `nn.GRU` and
    `nn.RNN` pointing at the substituted tensors: the model is broken afterwards.
    """

    def __init__(self, model: nn.Module):
        self.tensors: dict[str, Tensor] = dict(model.named_parameters())
        self.buffers: dict[str, Tensor] = dict(model.named_buffers())
        names = {id(t): name for name, t in (*self.tensors.items(), *self.buffers.items())}
        self._places: list[tuple[dict[str, Any], str, str]] = []
        self._recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
        for module in model.modules():
            for holder in (module._parameters, module._buffers):
                self._places += [(holder, key, names[id(t)]) for key, t in holder.items() if t is not None]
        self._buffer_places = [place for place in self._places if place[2] in self.buffers]

    @property
    def recurrent(self) -> bool:
        """Whether the model has recurrent layers (whose cuDNN kernels differentiate only once)."""
        return bool(self._recurrent)

    @contextmanager
    def filled(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the model use these tensors, by name, in place of its own."""
        kept = [(holder, key, holder[key]) for holder, key, name in self._places if name in tensors]
        flat = [(module, module._flat_weights) for module in self._recurrent]
        try:
            for holder, key, name in self._places:
                if name in tensors:
                    holder[key] = tensors[name]
            for module, _ in flat:
                module._flat_weights = [getattr(module, n, None) for n in module._flat_weights_names]
            yield
        finally:
            for holder, key, tensor in kept:
                holder[key] = tensor
            for module, weights in flat:
                module._flat_weights = weights

    def refill(self, tensors: Mapping[str, Tensor]) -> None:
        """Inside `filled`: put these tensors back where a model has assigned others."""
        for holder, key, name in self._buffer_places:
            if name in tensors and holder[key] is not tensors[name]:
                holder[key] = tensors[name]


@contextmanager
def restored(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model into training or evaluation mode; afterwards put back all that a pass can change.

    Covers each module's mode, tensors that a forward pass stores as plain attributes (legacy
    `weight_norm` does), and the random states of torch, CUDA, numpy and Python.
    """
    modes = [(module, module.training) for module in model.modules()]
    plain = [(module, _plain_tensors(module)) for module in model.modules()]
    with _random_states_restored():
        try:
            model.train(training)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, before in plain:
                _put_back(module, before)


@contextmanager
def unfused(recurrent_on_gpu: bool) -> Iterator[None]:
    """Use no fused layer that lacks a second derivative.

    Fused attention lacks it (also PyTorch's own for the CPU), so do cuDNN's recurrent layers and the fused
    path of `nn.TransformerEncoderLayer`.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent_on_gpu:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


class PlainBinaryCrossEntropy(TorchFunctionMode):
    """Answers binary cross-entropy of probabilities by its formula.

    PyTorch's own second derivative adds 1e-12 to p(1 - p), which shows in float64.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _binary_cross_entropy if func is F.binary_cross_entropy else func
        return answer(*args, **(kwargs or {}))


def _binary_cross_entropy(
    input: Tensor,  # noqa: A002  (PyTorch's name)
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    ends = bool(((input <= 0) | (input >= 1)).any())  # where the formula has no derivative
    if ends or size_average is not None or reduce is not None or input.shape != target.shape:
        return F.binary_cross_entropy(input, target, weight, size_average, reduce, reduction)
    terms = -(target * input.log().clamp(min=-100) + (1 - target) * (-input).log1p().clamp(min=-100))
    terms = terms if weight is None else terms * weight
    return {"mean": terms.mean, "sum": terms.sum}.get(reduction, lambda: terms)()


@contextmanager
def other_random_state() -> Iterator[None]:
    """Run with random states that differ from the current ones, to expose what depends on them."""
    with _random_states_restored():
        # Not `torch.manual_seed`: it leaves a seed behind for devices that are not in use yet.
        torch.default_generator.manual_seed(0x5EED)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(0x5EED)
        np.random.seed(0x5EED)  # noqa: NPY002  (the user's augmentation may draw from it)
        random.seed(0x5EED)
        yield


@contextmanager
def _random_states_restored() -> Iterator[None]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _plain_tensors(module: nn.Module) -> dict[str, tuple[Tensor, int, Tensor]]:
    return {
        key: (value, value._version, value.detach().clone())
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def _put_back(module: nn.Module, before: dict[str, tuple[Tensor, int, Tensor]]) -> None:
    for key in [k for k, v in vars(module).items() if isinstance(v, Tensor) and k not in before]:
        del vars(module)[key]
    for key, (tensor, version, content) in before.items():
        if tensor._version != version:
            with torch.no_grad():
                tensor.copy_(content)
        vars(module)[key] = tensor
