"""Known eigenpairs taken out of an operator, so that sampling is left with the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from landscape.estimators.probes import Operator, inner, order

Pairs = tuple[Tensor | np.ndarray, Tensor]
# Eigenvectors from an iterative solver are orthogonal to about √eps of their type.
_ORTHOGONAL = 10.0


@dataclass(frozen=True)
class Deflated:
    """P A on the orthogonal complement of r eigenvectors U, P = I - U Uᵀ.

    Attributes:
        operator: A.
        values: the known eigenvalues, shape (r,), float64; empty where nothing is deflated.
        vectors: U, shape (n, r), type and device of A.
    """

    operator: Operator
    values: np.ndarray
    vectors: Tensor
    shape: tuple[int, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        for name in ("shape", "dtype", "device"):
            object.__setattr__(self, name, getattr(self.operator, name))

    @property
    def dimension(self) -> int:
        """Of the complement, n - r."""
        return int(self.shape[0] - len(self.values))

    def project(self, V: Tensor) -> Tensor:
        """Return P V."""
        if not len(self.values):
            return V
        return V - self.vectors @ (self.vectors.T @ V)

    def __matmul__(self, V: Tensor) -> Tensor:
        return self.project(self.operator @ V)


def deflated(A: Operator, pairs: Pairs | None) -> Deflated:
    """Return A on the complement of known eigenvectors.

    Args:
        A: symmetric operator of shape (n, n).
        pairs: eigenvalues, shape (r,), and orthonormal eigenvectors, shape (n, r), r < n; or None.

    Returns:
        An operator; start vectors must be projected, products stay in the complement.

    Raises:
        ValueError: for shapes that do not fit, or vectors that are not orthonormal.
    """
    n = order(A)
    if pairs is None:
        return Deflated(A, np.empty(0), torch.empty(n, 0, dtype=A.dtype, device=A.device))
    values = torch.as_tensor(pairs[0]).double().cpu().numpy()
    vectors = torch.as_tensor(pairs[1]).to(A.device, A.dtype)
    if values.ndim != 1 or tuple(vectors.shape) != (n, len(values)) or len(values) >= n:
        raise ValueError(
            f"deflate has eigenvalues of shape {values.shape} and eigenvectors of shape "
            f"{tuple(vectors.shape)}; needed are (r,) and ({n}, r) with r < {n}"
        )
    defect = float((inner(vectors, vectors).cpu() - torch.eye(len(values))).abs().max()) if len(values) else 0
    allowed = _ORTHOGONAL * torch.finfo(A.dtype).eps ** 0.5
    if not defect <= allowed:
        raise ValueError(
            f"the eigenvectors of deflate are off orthonormal by {defect:.1e}, allowed is {allowed:.1e}: "
            "orthonormalise them (torch.linalg.qr)"
        )
    return Deflated(A, values, vectors)
