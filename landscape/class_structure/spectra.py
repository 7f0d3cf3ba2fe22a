"""Matrices by name: the Hessian, G, and what is left of them when a part of G is knocked out.

`hessian`, `G`, `A-B` (subtraction) and `A/B` (projection, (I - P) A (I - P) with P onto the range of B), for A
one of the first two and B one of G0, G1, G2, G012; and `hessian-G`. Papyan 2020 (JMLR 21, 252), definitions 3.1-3.3.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from landscape import operators, residual
from landscape.class_structure.grams import PARTS
from landscape.class_structure.vectors import Source
from landscape.operators import Operator

_NAME = re.compile(rf"(hessian|G)(?:([-/])({'|'.join(PARTS)}))?|hessian-G")
_ROUNDING = 10.0  # singular values below this many roundings, times √columns, are none


def require(name: str) -> None:
    """Refuse what names no matrix.

    Raises:
        ValueError: saying what does.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"spectra names {name!r}; allowed are hessian, G, hessian-G, and with B one of {', '.join(PARTS)}: "
            "hessian-B and G-B (B subtracted), hessian/B and G/B (its range projected out)"
        )


def part_of(name: str) -> str | None:
    """The part of G whose vectors the matrix needs, None for one that needs none."""
    found = _NAME.fullmatch(name)
    return found[3] if found else None


def operator(name: str, source: Source, F: Tensor | None) -> Operator:
    """The matrix of that name.

    Args:
        name: of the matrix.
        source: of the problem whose loss is the mean over classes.
        F: the part's factor as rows (columns, n), G_part = F Fᵀ; None where the name has no part.
    """
    problem = source.problem
    base = operators.ggn(problem) if name.startswith("G") else operators.hessian(problem)
    if name == "hessian-G" and problem.products == "difference":
        return base - operators.ggn(problem)
    if name == "hessian-G":
        return Operator(base.shape, base.dtype, base.device, lambda V: residual.product(problem, V))
    if F is None:
        return base
    rows = F if "-" in name else basis(F, base.dtype)

    def inside(V: Tensor) -> Tensor:
        return (rows.T @ (rows @ V.to(rows.dtype))).to(V.dtype)

    if "-" in name:
        return Operator(base.shape, base.dtype, base.device, lambda V: base @ V - inside(V))

    def projected(V: Tensor) -> Tensor:
        W = base @ (V - inside(V))
        return W - inside(W)

    return Operator(base.shape, base.dtype, base.device, projected)


def basis(F: Tensor, dtype: torch.dtype) -> Tensor:
    """An orthonormal basis of the span of the rows of F (r, n), as rows, float64.

    Args:
        F: float64.
        dtype: in which F was computed; directions in its rounding are left out.
    """
    Q, R = torch.linalg.qr(F.T)
    U, sizes, _ = torch.linalg.svd(R)
    least = _ROUNDING * torch.finfo(dtype).eps * len(F) ** 0.5 * float(sizes.max())
    rows: Tensor = (Q @ U[:, : len(sizes)][:, sizes > least]).T
    return rows
