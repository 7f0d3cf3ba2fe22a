"""Weights of the class means, and spectra of the parts of G from inner products; numpy only.

With vectors v_cc' (S classes, C outputs) and weights ω_cc', and the mean of a class over c' ≠ c,
m_c = Σ ω_cc' v_cc' / ω_c, ω_c = Σ ω_cc':

    G0 = Σ_c ω_cc v_cc v_ccᵀ,  G1 = Σ_c ω_c m_c m_cᵀ,  G2 = Σ_c Σ_c'≠c ω_cc' (v_cc' - m_c)(v_cc' - m_c)ᵀ,
    G012 = G0 + G1 + G2 = Σ ω_cc' v_cc' v_cc'ᵀ, the sum over all.

Each is F Fᵀ with the nonzero eigenvalues of the small FᵀF.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PARTS = ("G0", "G1", "G2", "G012")


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of the vectors.

    Attributes:
        every: ω, (S, C).
        own: the column of each class, (S,).
        means: coefficients of v_cc' in m_c, 0 for c' = c; (S, C).
    """

    every: Array
    own: NDArray[np.intp]
    means: Array

    @classmethod
    def of(
        cls, weighting: str, probabilities: Array, labels: NDArray[np.intp], factor: float = 1.0
    ) -> Weights:
        """Weights of 2019: ω = κ/S for all. Of 2020: the mean probability of c' in class c, times κ/S.

        Args:
            weighting: "2019" or "2020".
            probabilities: mean of p over the examples of each class, (S, C).
            labels: of the classes, (S,).
            factor: κ, for a loss that is κ times cross-entropy.
        """
        size = len(probabilities)
        share = factor / size
        every = np.full(probabilities.shape, share) if weighting == "2019" else share * probabilities
        others = every.copy()
        others[np.arange(size), labels] = 0.0
        totals = others.sum(axis=1, keepdims=True)
        # A class that is sure of itself beyond all precision has no other outputs to speak of.
        means = np.divide(others, totals, out=np.zeros_like(others), where=totals > 0)
        return cls(every, labels, means)

    @property
    def totals(self) -> Array:
        """ω_c, (S,)."""
        return np.asarray(self.every.sum(axis=1) - self.every[np.arange(len(self.own)), self.own])

    def coefficients(self, part: str, c: int) -> Array:
        """The columns of F for one class as combinations of its vectors, (columns, C)."""
        C = self.every.shape[1]
        unit, own = np.eye(C), int(self.own[c])
        if part == "G0":
            return np.asarray(np.sqrt(self.every[c, own]) * unit[own : own + 1])
        if part == "G1":
            return np.asarray(np.sqrt(self.totals[c]) * self.means[c : c + 1])
        roots = np.sqrt(self.every[c])[:, None]
        if part == "G012":
            return np.asarray(roots * unit)
        return np.asarray(np.delete(roots * (unit - self.means[c]), own, axis=0))

    def columns(self, part: str) -> int:
        """How many columns F has."""
        S, C = self.every.shape
        return int({"G0": S, "G1": S, "G2": S * (C - 1), "G012": S * C}[part])


def eigenvalues(part: str, weights: Weights, rows: Array | None = None, gram: Array | None = None) -> Array:
    """Eigenvalues of a part, descending; as many as F has columns, or as vectors have entries.

    Args:
        part: one of `PARTS`.
        weights: of the vectors.
        rows: the vectors or a sketch of them, (S, C, d).
        gram: or their inner products, (S C, S C).
    """
    if gram is not None:
        small = _congruent(part, weights, gram)
    else:
        assert rows is not None
        F = np.concatenate([weights.coefficients(part, c) @ rows[c] for c in range(len(rows))])
        small = F.T @ F if F.shape[1] < len(F) else F @ F.T
    return np.asarray(np.maximum(np.linalg.eigvalsh(small)[::-1], 0.0))


def _congruent(part: str, weights: Weights, gram: Array) -> Array:
    """FᵀF = T K Tᵀ, T block diagonal over classes."""
    S, C = weights.every.shape
    blocks = [weights.coefficients(part, c) for c in range(S)]
    K = gram.reshape(S, C, S * C)
    left = np.concatenate([T @ K[c] for c, T in enumerate(blocks)])
    right = left.reshape(-1, S, C)
    return np.concatenate([right[:, c] @ T.T for c, T in enumerate(blocks)], axis=1)


def mirrored(rows: Array) -> Array:
    """A symmetric matrix from its block upper triangle: of class c, columns from class c on.

    Args:
        rows: (S, C, S C), NaN below.
    """
    S, C = rows.shape[:2]
    upper = rows.reshape(S * C, S * C)
    lower = np.arange(S * C)[:, None] // C > np.arange(S * C)[None] // C
    whole = np.where(lower, upper.T, upper)
    return np.asarray((whole + whole.T) / 2)


def with_means(weights: Weights, gram: Array) -> Array:
    """Inner products of the class means m_c and all v_cc', (S + S C, S + S C), the means first."""
    S, C = weights.every.shape
    K = gram.reshape(S, C, S * C)
    mixed = np.einsum("cj,cjv->cv", weights.means, K)
    means = np.einsum("cdj,dj->cd", mixed.reshape(S, S, C), weights.means)
    return np.block([[means, mixed], [mixed.T, gram]])


def cosines(gram: Array) -> Array:
    """Cosines of the angles between vectors, NaN for a zero vector."""
    lengths = np.sqrt(np.diag(gram))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = gram / lengths[:, None] / lengths[None]
    return np.asarray(np.clip(found, -1.0, 1.0))


def distances(gram: Array) -> Array:
    """Euclidean distances between vectors."""
    squares = np.diag(gram)
    found = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * gram, 0.0))
    np.fill_diagonal(found, 0.0)
    return np.asarray(found)
