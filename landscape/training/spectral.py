"""Weights divided by the spectral norm of the map that they are: linear layers, and convolutions as applied."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from landscape import seeds

_FIRST = 15  # power iterations before training; one more with each step of it
_CONVOLUTIONS = {nn.Conv1d: (F.conv1d, F.conv_transpose1d), nn.Conv2d: (F.conv2d, F.conv_transpose2d)}


def spectrally_normalized(model: nn.Module, example: Any) -> nn.Module:
    """Divide the weights of all linear layers and convolutions by their spectral norm, in place.

    A convolution's norm is that of the map on inputs of the size that it sees, by power iteration with the
    convolution and its transpose; one iteration with each pass in training mode follows the weights.

    Args:
        model: changed in place; weights become parametrized.
        example: an input with which the model is run once, to learn the sizes.

    Returns:
        The model.

    Raises:
        ValueError: if a convolution pads other than with zeros, or is reached by no input.

    Source: Miyato et al. 2018 (arXiv 1802.05957); Ryu et al. 2019 (arXiv 1905.05406).
    """
    sizes = _input_sizes(model, example)
    chosen = [
        (name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    for index, (name, module) in enumerate(chosen):
        if isinstance(module, nn.Linear):
            parametrizations.spectral_norm(module, n_power_iterations=1)
            continue
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise ValueError(
                f"{name} has padding {module.padding_mode!r}, {module.padding!r}; allowed are zeros and numbers"
            )
        if name not in sizes:
            raise ValueError(
                f"{name} is reached by no input, so that its size is not known; leave it out of the model"
            )
        parametrize.register_parametrization(module, "weight", _ConvolutionNorm(module, sizes[name], index))
    return model


class _ConvolutionNorm(nn.Module):
    """weight -> weight / ‖convolution‖."""

    def __init__(self, layer: Any, size: tuple[int, ...], index: int):
        super().__init__()
        self.forwards, self.backwards = _CONVOLUTIONS[
            nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
        ]
        self.settings = {
            "stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups,
        }  # fmt: skip
        drawn = torch.randn(1, *size, generator=seeds.generator(0, "spectral", index))
        self.register_buffer("v", (drawn / drawn.norm()).to(layer.weight))
        self.v: Tensor
        for _ in range(_FIRST):
            self._iterate(layer.weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Divide by ‖A v‖, v the vector of the power iteration."""
        if self.training:
            self._iterate(weight)
        return weight / self.norm(weight)

    def norm(self, weight: Tensor) -> Tensor:
        """‖A v‖, which differentiates like σ = uᵀ A v."""
        made = self.forwards(self.v.clone(), weight, **self.settings)
        found: Tensor = torch.linalg.vector_norm(made)
        return found

    @torch.no_grad()
    def _iterate(self, weight: Tensor) -> None:
        made = self.forwards(self.v, weight, **self.settings)
        # What the stride leaves over at the end takes no part.
        stretch = [
            full - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
            for full, out, k, s, p, d in zip(
                self.v.shape[2:], made.shape[2:], weight.shape[2:], self.settings["stride"],
                self.settings["padding"], self.settings["dilation"], strict=True,
            )
        ]  # fmt: skip
        back = self.backwards(made, weight, output_padding=stretch, **self.settings)
        self.v.copy_(back / back.norm().clamp(min=torch.finfo(back.dtype).tiny))


def _input_sizes(model: nn.Module, example: Any) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):

            def note(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                sizes[name] = tuple(given[0].shape[1:])

            handles.append(module.register_forward_pre_hook(note))
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return sizes
