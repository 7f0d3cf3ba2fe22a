"""What the eigenvectors at the top are made of: parts of G, classes, pairs of a class and an output."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from landscape.class_structure.spectra import basis
from landscape.class_structure.vectors import Source

LEVELS = ("G0", "G1", "G2", "G3", "H")
PAIRS = 5  # that are told of each eigenvector


def composition(source: Source, values: np.ndarray, vectors: Tensor) -> dict[str, np.ndarray]:
    """Split the eigenvalues uᵀ Hess u of some eigenvectors.

    uᵀ G u = Σ_cc' q_cc' with q_cc' from the examples of class c and the output c', exactly; of this, G0, G1 and G2
    follow from the means v_cc', G3 is the rest of G, and H the rest of the eigenvalue.

    Args:
        source: of the means.
        values: eigenvalues, (k,).
        vectors: eigenvectors as rows, (k, n).

    Returns:
        `levels` (k, 5), the contribution of each of `LEVELS`; `label_share` (k, S), each class's share of uᵀ G u;
        and of the largest pairs `pair_label`, `pair_output` (indices) and `pair_share`, (k, pairs).
    """
    S, C = source.layout.classes, source.layout.outputs
    along, pairs = np.zeros((2, len(values), S, C))
    for c, count in enumerate(source.layout.counts):
        share = source.factor / (S * int(count))
        for p, a, s in source.pushed(c, vectors):
            along[:, c] += torch.einsum("mj,kmj->kj", a, s).cpu().numpy()
            pairs[:, c] += share * torch.einsum("mj,kmj->kj", p, s.square()).cpu().numpy()
    weights = source.weights
    own = along[:, np.arange(S), weights.own]
    means = np.einsum("kcj,cj->kc", along, weights.means)
    first = own**2 @ weights.every[np.arange(S), weights.own]
    second = means**2 @ weights.totals
    parts = np.einsum("kcj,cj->k", along**2, weights.every)
    whole = pairs.sum(axis=(1, 2))
    # The residual of the eigenvector may leave uᵀHu a little off the eigenvalue; H takes that up.
    levels = np.stack([first, second, parts - first - second, whole - parts, values - whole], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (pairs / whole[:, None, None]).reshape(len(values), -1)
        labels = pairs.sum(axis=2) / whole[:, None]
    order = np.argsort(-np.nan_to_num(shares), axis=1, kind="stable")[:, : min(PAIRS, S * C)]
    return {
        "levels": levels,
        "label_share": labels,
        "pair_label": (order // C).astype(float),
        "pair_output": (order % C).astype(float),
        "pair_share": np.take_along_axis(shares, order, axis=1),
    }


def overlaps(first: Tensor, second: Tensor) -> np.ndarray:
    """‖U_r V_rᵀ‖² / r of the leading r rows of two orthonormal sets, r = 1, 2, ...; 1 for equal spans.

    Args:
        first: U, rows of length n.
        second: V, as many.
    """
    squares = (first.double() @ second.double().T).square().cpu().numpy()
    leading = squares.cumsum(axis=0).cumsum(axis=1).diagonal()
    return np.asarray(leading / np.arange(1, len(leading) + 1))


def leading(F: Tensor, dtype: torch.dtype) -> Tensor:
    """The eigenvectors of F Fᵀ with eigenvalues that are not zero, as rows, the largest first.

    Args:
        F: its transpose, (columns, n), float64.
        dtype: in which F was computed.
    """
    Q = basis(F, dtype)
    U, _, _ = torch.linalg.svd(Q @ F.T, full_matrices=False)
    rows: Tensor = U.T @ Q
    return rows
