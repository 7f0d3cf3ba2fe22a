"""Deflation: the trace over known directions exactly, probes of the rest.

For orthonormal U (n, k) and P = I − UUᵀ, A = PAP + D with D = UUᵀA + AUUᵀ − U(UᵀAU)Uᵀ. tr D = tr(UᵀAU), and each
tensor's share of it, follow from the k products AU; E vᵀPAPv = tr PAP for random signs v. This holds whatever
U is: eigenvectors that have not converged leave more variance, no bias. It is for one shared matrix: probes
drawn anew for each micro-batch see other matrices, with other top directions.

Source: Girard 1989 (doi 10.1007/BF01395775) for the probes; Gambhir, Stathopoulos & Orginos 2017 (arXiv 1603.05988)
for deflation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from landscape.estimators.eigen import eigsh
from landscape.estimators.probes import Operator, inner
from landscape.vectors import ParameterSpace

Product = Callable[[Tensor], Tensor]

# Directions to a tenth take almost as much variance out as exact ones, for fewer products.
_RTOL = 0.1


@dataclass(frozen=True)
class Deflation:
    """What is known of A along U.

    Attributes:
        vectors: U, orthonormal columns (n, k).
        quotients: u·Au for each, float64 (k,).
        layers: each tensor's share of tr D, float64 (layers,).
    """

    vectors: Tensor
    quotients: Tensor
    layers: Tensor


def top_directions(A: Operator, count: int, seed: int) -> Tensor:
    """Eigenvectors of the `count` largest eigenvalues, roughly, (n, count)."""
    return eigsh(A, k=count, which="largest", rtol=_RTOL, seed=seed).vectors


def deflation(product: Product, vectors: Tensor, space: ParameterSpace) -> Deflation:
    """Split the trace of A along some directions.

    Args:
        product: V -> A V.
        vectors: (n, k), linearly independent; they are orthonormalized.
        space: the parameter tensors.
    """
    # Row-major, as it comes back from a file: products round by the order of memory.
    U = torch.linalg.qr(vectors.double())[0].to(vectors.dtype).contiguous()
    AU = product(U)
    small = inner(U, AU)
    small = (small + small.T) / 2
    # Row i of D's diagonal: 2 Σ_j u_ij (AU)_ij − (U S Uᵀ)_ii with S = UᵀAU.
    rows = (U.double() * (2 * AU.double() - U.double() @ small)).sum(1)
    layers = torch.stack([rows[a:b].sum() for a, b in space.ranges.values()])
    return Deflation(U, small.diagonal().clone(), layers)


def projected(product: Product, U: Tensor, V: Tensor) -> Tensor:
    """P A P V with P = I − UUᵀ, for the columns of V (n, k)."""
    return _off(U, product(_off(U, V)))


def _off(U: Tensor, V: Tensor) -> Tensor:
    # Column by column: a product of all columns would round otherwise in another block.
    return torch.stack([v - U @ (U.T @ v) for v in (V[:, i].clone() for i in range(V.shape[1]))], 1)
