"""Random test vectors, and what is read off a block of them.

Probes are drawn on the CPU and then moved, so that every device sees the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

DISTRIBUTIONS: Final = ("rademacher", "gaussian")
_CHUNK: Final = 1 << 20  # elements of a float64 working copy: 8 MiB


@dataclass(frozen=True)
class TraceEstimate:
    """An estimated trace; `value` ± 1.96 `stderr` covers the truth in 95 % of seeds.

    Attributes:
        value: the estimate, in the unit of A.
        stderr: calibrated standard error, same unit; 0 where the trace was formed exactly.
        matvecs: products with A that were spent.
    """

    value: float
    stderr: float
    matvecs: int


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


def order(A: Operator) -> int:
    """Return n of an operator of shape (n, n).

    Raises:
        ValueError: if it is not square, is empty, or is not of a real floating-point type.
    """
    shape = tuple(A.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"the operator has shape {shape}; a trace needs (n, n) with n >= 1")
    if not A.dtype.is_floating_point:
        raise ValueError(
            f"the operator has dtype {A.dtype}; allowed are real floating-point types: convert it"
        )
    return int(shape[0])


def exact_trace(A: Operator, n: int, block: int = 16) -> float:
    """Return tr A by n products with unit vectors, `block` of them at a time, summed in float64."""
    total = 0.0
    for start in range(0, n, block):
        units = torch.zeros(n, min(block, n - start), dtype=A.dtype, device=A.device)
        units[start : start + block].fill_diagonal_(1.0)
        total += float((A @ units)[start : start + block].diagonal().double().sum())
    return total


def rounding(V: Tensor, AV: Tensor) -> float:
    """Return the size of the rounding error of v·Av, the largest of the block.

    4 eps ‖v‖ ‖Av‖, eps of the type of the products: it scales with A, and keeps value ± 1.96 stderr true
    where an estimator is exact (signs on a diagonal matrix, low rank) and the samples agree to the last bit.
    """
    norms = torch.linalg.vector_norm(V, dim=0) * torch.linalg.vector_norm(AV, dim=0)
    return 4.0 * torch.finfo(V.dtype).eps * float(norms.max())


def inner(U: Tensor, V: Tensor) -> Tensor:
    """Return Uᵀ V, summed in float64 in pieces of bounded size.

    Args:
        U: shape (n, a).
        V: shape (n, b).

    Returns:
        Shape (a, b), float64, on the device of U.
    """
    total = torch.zeros(U.shape[1], V.shape[1], dtype=torch.float64, device=U.device)
    for rows in _pieces(U.shape[0], U.shape[1] + V.shape[1]):
        total += U[rows].double().T @ V[rows].double()
    return total


def probe_gram(V: Tensor, AV: Tensor, distribution: str = "rademacher") -> Tensor:
    """Return what the probes of a block say together: their samples and their mixed products.

    The diagonal holds the samples v_i·Av_i. Off the diagonal stands v_i·B v_j, where B is A for
    Gaussian probes. For signs B is A without its diagonal, which does not enter the variance of their
    samples: see `_without_diagonal`.

    Args:
        V: the probes as columns, shape (n, b); or the rows of a slice, for the samples of that slice.
        AV: the products, same rows, shape (n, b).
        distribution: what the probes were drawn from.

    Returns:
        Symmetric, shape (b, b), float64, for `calibration.block_moments`; off the diagonal NaN for
        fewer than 3 signs.
    """
    b = V.shape[1]
    if distribution == "gaussian":
        product = inner(V, AV)
        return (product + product.T) / 2
    product = torch.zeros(b, b, dtype=torch.float64, device=V.device)
    through_diagonal = torch.zeros_like(product)
    square, squares = torch.zeros(2, dtype=torch.float64, device=V.device)
    for rows in _pieces(V.shape[0], 3 * b):
        part, image = V[rows].double(), AV[rows].double()
        product += part.T @ image
        values = part * image
        mean = values.mean(dim=1, keepdim=True)
        through_diagonal += part.T @ (part * mean)
        square += mean.square().sum()
        squares += values.square().sum()
    return _without_diagonal((product + product.T) / 2, through_diagonal, square, squares)


def _without_diagonal(gram: Tensor, through_diagonal: Tensor, square: Tensor, squares: Tensor) -> Tensor:
    """Take the diagonal of A out of the off-diagonal entries of the Gram matrix of signs.

    d = mean over the block of v ⊙ Av estimates diag A, and is shrunk by t = 1 - noise / ‖d‖² towards 0:
    where A has hardly a diagonal, taking out an estimate of it would only add noise. The terms i and j of
    that mean contribute the multiple 2/b of v_i·Av_j itself, so the factor b/(b-2t) leaves the estimate
    made from the other b-2 probes; its error adds the fraction t/(b-2) to the mean square of the
    entries, which is divided out.
    """
    b = gram.shape[0]
    samples = gram.diagonal().clone()
    if b < 3:
        result = torch.full_like(gram, torch.nan)
    else:
        noise = (squares - b * square) / (b * (b - 1))
        t = torch.where(square > 0, (1 - noise / square), 0.0).clamp(0.0, 1.0)
        result = (gram - t * through_diagonal) * (b / (b - 2 * t)) / (1 + t / (b - 2)).sqrt()
    result.diagonal().copy_(samples)
    return result


def _pieces(size: int, width: int) -> Iterator[slice]:
    """Cut `size` rows of `width` numbers into pieces whose float64 copies stay small."""
    rows = max(1, _CHUNK // max(1, width))
    return (slice(start, start + rows) for start in range(0, size, rows))
