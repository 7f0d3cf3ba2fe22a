"""How far the loss rises on average over random displacements."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from landscape.sharpness.function import Around

Noise = Literal["gaussian", "uniform"]


def rises(
    function: Around,
    scale: Tensor,
    epsilon: tuple[float, ...],
    noise: Noise,
    base: float,
    generator: torch.Generator,
) -> np.ndarray:
    """Return ½(L(θ + δ) + L(θ − δ)) − L(θ) for δ = ε c ⊙ ξ with one ξ for all ε, (len(epsilon),).

    Both signs of a draw, so that odd terms of the loss, its slope above all, cancel before they are averaged.
    A value that is not finite stays what it is.

    Args:
        function: the loss around θ.
        scale: c, (n,).
        epsilon: the lengths.
        noise: ξ from N(0, 1), or uniform on [−1, 1].
        base: L(θ).
        generator: source of ξ.
    """
    size = len(scale)
    if noise == "gaussian":
        xi = torch.randn(size, generator=generator, dtype=torch.float64)
    else:
        xi = 2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1
    direction = scale * xi.to(scale)
    pairs = ((function.value(e * direction), function.value(-e * direction)) for e in epsilon)
    return np.array([(up + down) / 2 - base for up, down in pairs])
