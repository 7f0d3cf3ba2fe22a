"""XTrace: every probe is a test vector for the subspace that the others found."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from landscape.estimators.calibration import xtrace_stderr
from landscape.estimators.probes import Operator, TraceEstimate, draw, exact_trace, inner, order, rounding
from landscape.seeds import generator

Array = NDArray[np.float64]


def xtrace(A: Operator, matvecs: int = 60, seed: int = 0) -> TraceEstimate:
    """Estimate tr A by XTrace with normalised ("improved") probes.

    k = ⌊matvecs/2⌋ probes ω_i of length √n, Y = AΩ. With Q_i an orthonormal basis of Y without column i
    and ν_i = (I - Q_i Q_iᵀ) ω_i, the estimate is the mean of
    t_i = tr(Q_iᵀ A Q_i) + (n - k + 1) ν_iᵀ A ν_i / ‖ν_i‖². All k are formed from one QR decomposition.

    Args:
        A: symmetric operator of shape (n, n).
        matvecs: products to spend, at least 6 (one of an odd number is saved); with n or more the trace is
            formed exactly by n products.
        seed: any integer.

    Returns:
        The estimate.

    Raises:
        ValueError: for an operator that is not square or too few products.

    Source: Epperly, Tropp, Webber (2024), §2.1 and §2.3, arXiv:2301.07825. The standard error is ours: see
    `calibration.xtrace_stderr`; the one of the paper is too small.

    >>> round(xtrace(torch.diag(torch.tensor([5.0, 2.0, -1.0] + 17 * [0.0]).double()), 10).value, 9)
    6.0
    """
    n = order(A)
    if matvecs < 6:
        raise ValueError(f"matvecs = {matvecs}; XTrace needs at least 6 (12 or more are usual)")
    if matvecs >= n:
        return TraceEstimate(exact_trace(A, n), 0.0, n)
    k = matvecs // 2
    normal = draw(generator(seed, "xtrace", 0), n, k, "gaussian", dtype=A.dtype, device=A.device)
    omega = normal * (n**0.5 / torch.linalg.vector_norm(normal, dim=0))
    Y = A @ omega
    floor = rounding(omega, Y)
    if floor == 0.0:
        return TraceEstimate(0.0, 0.0, 2 * k)
    Q64, R = torch.linalg.qr(Y.double())
    Q = Q64.to(A.dtype)
    Z = A @ Q
    floor = max(floor, k**0.5 * rounding(Q, Z))
    leave = _LeaveOut(n, R, inner(Q, Z), inner(Q, omega), inner(omega, omega))
    single = leave.one()
    stderr = xtrace_stderr(single, *leave.two(float(single.mean())))
    return TraceEstimate(float(single.mean()), float(np.hypot(stderr, floor)), 2 * k)


class _LeaveOut:
    """The estimates that leave one or two columns of Y out of the basis, in k × k matrices.

    s_i, column i of R^{-T} normalised, is orthogonal to all columns of R but i: Q_i Q_iᵀ is
    Q(I - s_i s_iᵀ)Qᵀ, and leaving out i and j removes the span of s_i and s_j.
    """

    def __init__(self, n: int, R: Tensor, H: Tensor, W: Tensor, omega_gram: Tensor) -> None:
        """Take Y = QR, H = QᵀAQ, W = QᵀΩ and ΩᵀΩ; all shape (k, k)."""
        R_, H_, W_ = (np.asarray(M.cpu()) for M in (R, H, W))
        self.n, self.k = n, R_.shape[0]
        self.H = (H_ + H_.T) / 2
        S = _dual(R_)
        # With r_i = (I - QQᵀ) ω_i: C holds QᵀA r_i, E holds r_iᵀ A r_j, N holds r_iᵀ r_j.
        self.C = R_ - self.H @ W_
        self.E = -(self.C.T @ W_ + W_.T @ self.C) / 2
        self.N = np.asarray(omega_gram.cpu()) - W_.T @ W_
        self.S_S, self.S_W, self.S_HS, self.S_C = S.T @ S, S.T @ W_, S.T @ self.H @ S, S.T @ self.C

    def one(self) -> Array:
        """Return t_i, shape (k,)."""
        a, s_hs = self.S_W.diagonal(), self.S_HS.diagonal()
        form = self.E.diagonal() + 2 * a * self.S_C.diagonal() + a**2 * s_hs
        norm = self.N.diagonal() + a**2
        return np.asarray(self.H.trace() - s_hs + (self.n - self.k + 1) * form / norm)

    def two(self, trace: float) -> tuple[Array, Array]:
        """Return what xtrace_stderr takes besides t_i.

        Returns:
            t_ij, the estimate of test vector i with j left out too, and the mixed products
            ν_iᵀ(A - βI)ν_j of the two test vectors that share this basis, scaled to length √(n-k+2), with
            β the mean eigenvalue outside of it, to which probes of fixed length are blind. Shape (k, k);
            diagonals mean nothing.
        """
        c = self.S_S - np.diag(self.S_S.diagonal())
        own, other = self.S_W.diagonal()[:, None], self.S_W.T
        inverse = 1 / np.maximum(1 - c**2, 16 * np.finfo(np.float64).eps)
        # ν_i = r_i + Q(a s_i + b s_j); the transposed matrices are those of ν_j.
        a, b = (own - c * other) * inverse, (other - c * own) * inverse
        h_i, h_j = self.S_HS.diagonal()[:, None], self.S_HS.diagonal()[None, :]
        lost = (h_i + h_j - 2 * c * self.S_HS) * inverse
        c_i, c_j = self.S_C.diagonal()[:, None], self.S_C.T
        form = self.E.diagonal()[:, None] + 2 * (a * c_i + b * c_j)
        form = form + a**2 * h_i + 2 * a * b * self.S_HS + b**2 * h_j
        norm = self.N.diagonal()[:, None] + a * own + b * other
        size = self.n - self.k + 2
        rest = self.H.trace() - lost
        double = rest + size * form / norm
        mixed = self.E + a.T * c_j + b.T * c_i + a * c_j.T + b * c_i.T
        mixed = mixed + a * a.T * self.S_HS + a * b.T * h_i + b * a.T * h_j + b * b.T * self.S_HS
        overlap = self.N + (a * a.T + b * b.T) * c + a * b.T + b * a.T
        beta = (trace - rest) / size
        return double, (mixed - beta * overlap) * size / np.sqrt(norm * norm.T)


def _dual(R: Array) -> Array:
    """Return R^{-T} with columns of length 1, for singular R too.

    Where A has low rank, the last diagonal entries of R are rounding errors; raised to the rounding level
    they give a definite basis of directions that Y does not have and in which A is zero.
    """
    diagonal = np.abs(R.diagonal())
    least = 16 * np.finfo(np.float64).eps * diagonal.max()
    lifted = R / diagonal.max()
    sign = np.where(R.diagonal() < 0, -1.0, 1.0)
    np.fill_diagonal(lifted, sign * np.maximum(diagonal, least) / diagonal.max())
    S = np.linalg.inv(lifted).T
    return np.asarray(S / np.linalg.norm(S, axis=0))
