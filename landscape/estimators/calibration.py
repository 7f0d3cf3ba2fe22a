"""Standard errors whose interval, value ± 1.96 stderr, covers the truth in 95 % of runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]


def block_moments(gram: Any) -> Array:
    """Return per probe the U-statistics of tr B², tr B³ and tr B⁴ of a block's Gram matrix."""
    G = np.array(gram, dtype=np.float64)
    b = G.shape[-1]
    diagonal = np.arange(b)
    G[..., diagonal, diagonal] = 0.0
    out = np.full((*G.shape[:-1], 3), np.nan)
    S = G * G
    degree = S.sum(-1)
    square = G @ G
    if b >= 2:
        out[..., 0] = degree / (b - 1)
    if b >= 3:
        out[..., 1] = (square * G).sum(-1) / ((b - 1) * (b - 2))
    if b >= 4:
        closed = (square * square).sum(-1)
        repeated = degree**2 + np.einsum("...ij,...j->...i", S, degree) - (S * S).sum(-1)
        out[..., 2] = (closed - repeated) / ((b - 1) * (b - 2) * (b - 3))
    return np.moveaxis(out, -2, 0)


def calibrated_stderr(samples: Any, moments: Any = None, *, block: int = 16) -> Array:
    """Return the calibrated standard error of the mean of the samples."""
    x = np.asarray(samples, dtype=np.float64)
    k = x.shape[0]
    if k < 2:
        return np.full(x.shape[1:], np.nan)
    factor = stats.t.ppf(0.975, k - 1) / stats.norm.ppf(0.975)
    return np.asarray(x.std(axis=0, ddof=1) / np.sqrt(k) * factor)
