"""Random test vectors, and what is read off a block of them.

Probes are drawn on the CPU and then moved, so that every device sees the same ones.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch
from torch import Tensor

DISTRIBUTIONS: Final = ("rademacher", "gaussian")
_CHUNK: Final = 1 << 20  # elements of a float64 working copy: 8 MiB


class Operator(Protocol):
    """A symmetric linear map that is known by its products; a square dense tensor is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the vectors that it takes."""

    @property
    def device(self) -> torch.device:
        """Where these vectors live."""

    def __matmul__(self, other: Tensor, /) -> Tensor:
        """Return A v, shape (n,), or A V, shape (n, k)."""


def draw(
    generator: torch.Generator,
    size: int,
    count: int,
    distribution: str = "rademacher",
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw `count` probes v with E[v vᵀ] = I.

    Args:
        generator: a CPU generator; the only source of randomness.
        size: length n of a probe.
        count: number of probes k.
        distribution: "rademacher" (independent signs) or "gaussian" (independent N(0, 1)).
        dtype: type of the result. The same numbers are drawn for each, then rounded.
        device: where the result goes.

    Returns:
        The probes as columns, shape (size, count).

    Raises:
        ValueError: if the distribution is not one of these.

    >>> draw(torch.Generator().manual_seed(0), 3, 2).abs().unique().tolist()
    [1.0]
    """
    if distribution == "rademacher":
        signs = torch.randint(0, 2, (count, size), generator=generator, dtype=torch.int8)
        return signs.T.to(device=device, dtype=dtype).contiguous().mul_(2).sub_(1)
    if distribution == "gaussian":
        normal = torch.randn((count, size), generator=generator, dtype=torch.float64)
        return normal.T.to(device=device, dtype=dtype).contiguous()
    raise ValueError(f"distribution {distribution!r} is unknown; allowed are {', '.join(DISTRIBUTIONS)}")


def inner(U: Tensor, V: Tensor) -> Tensor:
    """Return Uᵀ V, summed in float64 in pieces of bounded size.

    Args:
        U: shape (n, a).
        V: shape (n, b).

    Returns:
        Shape (a, b), float64, on the device of U.
    """
    if U.dtype == torch.float64 and V.dtype == torch.float64:
        return U.T @ V
    total = torch.zeros(U.shape[1], V.shape[1], dtype=torch.float64, device=U.device)
    rows = max(1, _CHUNK // max(1, U.shape[1] + V.shape[1]))
    for start in range(0, U.shape[0], rows):
        part = slice(start, start + rows)
        total += U[part].double().T @ V[part].double()
    return total


def probe_gram(V: Tensor, AV: Tensor, distribution: str = "rademacher") -> Tensor:
    """Return what the probes of a block say together: their samples and their mixed products.

    The diagonal holds the samples v_i·Av_i. Off the diagonal stands v_i·B v_j, where B is A for
    Gaussian probes. For signs B is A without its diagonal, which does not enter their samples: the
    diagonal is estimated as d = mean over the block of v ⊙ Av and taken out. The terms l = i and l = j
    of that mean are multiples of v_i·Av_j itself, so b/(b-2) leaves the estimate from the other b-2
    probes; its noise raises the mean square by 1 + 1/(b-2), which is divided out.

    Args:
        V: the probes as columns, shape (n, b); a slice of rows for the samples of that slice.
        AV: the products, same rows, shape (n, b).
        distribution: what the probes were drawn from.

    Returns:
        Symmetric, shape (b, b), float64; off-diagonal entries are NaN for fewer than 3 signs.
    """
    product = inner(V, AV)
    gram = (product + product.T) / 2
    if distribution == "gaussian":
        return gram
    b = V.shape[1]
    samples = gram.diagonal().clone()
    if b < 3:
        gram = torch.full_like(gram, torch.nan)
    else:
        diagonal = (V * AV).mean(dim=1, keepdim=True)
        gram = (gram - inner(V, V * diagonal)) * (b / ((b - 2) * (b - 1)) ** 0.5)
    gram.diagonal().copy_(samples)
    return gram
