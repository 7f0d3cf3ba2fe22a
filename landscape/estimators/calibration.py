"""Standard errors whose interval, value ± 1.96 stderr, covers the truth in 95 % of runs.

A plain standard error s/√k covers too seldom when the probes are few (s is itself uncertain) or skewed (one
eigenvalue dominates: a small mean comes with a small s). Both are corrected:

1. *Spread.* A block of b probes has b(b-1)/2 mixed products G_ij = v_i·Bv_j besides its b samples, and
   E G_ij² = tr B² where the variance of a sample is 2 tr B². The two estimates of the variance are pooled,
   with a Student-t factor for the degrees of freedom that the pool has where many eigenvalues contribute.
   Where few do (a large kurtosis, 12 tr B⁴/(tr B²)²), the G_ij² depend on each other and get no weight.
2. *Skewness.* For a sample, γ = 8 tr B³ / (2 tr B²)^(3/2), at most √8 (one eigenvalue), and cycles
   G_ij G_jk G_ki give tr B³. A sum of χ² variables is close to Pearson type III; the estimated width
   follows the error E of the mean as 1 + γE/2σ (Cov(s², mean) = γσ³/k; exact for one eigenvalue). The
   half-width A that covers 95 % then solves P(-A/(1+Ac) ≤ Z ≤ A/(1-Ac)) = 0.95 for a standardized
   Pearson III variable Z of skewness g = γ/√k and c = g/2: `_SKEWNESS` and `_WIDENING` tabulate A/1.96.
   Few probes underestimate γ: it is multiplied by 1 + 8/k (by k/3 below 7 probes, where it is mostly
   noise). Samples of one sign say that γ ≥ 2σ/mean (Cauchy-Schwarz on tr B, tr B², tr B³ of a
   semidefinite B). Without mixed products, the skewness of the samples stands in.

The second-order expansion behind it is P. Hall, The Bootstrap and Edgeworth Expansion (1992), ch. 2. The
weights (1/4, the kurtosis at which it ends, 8/k, the bound 0.6 below) were chosen by simulation.

Measured coverage in percent, n = 120, 2000 seeds a cell (standard error 0.5; 1000 at k = 64): Gaussian
probes/signs on Haar eigenvectors; in brackets the Student-t interval of the samples, Gaussian probes:

============================ ============ ============ ============ ============ ============
spectrum                     k = 8        12           16           20           64
============================ ============ ============ ============ ============ ============
linspace(1, 3)               96/96 (95)   96/96 (96)   96/95 (95)   95/95 (94)   95/95 (95)
i^-2                         96/96 (87)   95/96 (88)   95/96 (89)   93/96 (88)   95/94 (93)
0.9^i                        96/96 (93)   96/95 (94)   96/95 (95)   95/95 (94)   94/96 (93)
0.7^i                        97/96 (91)   96/96 (92)   96/96 (93)   95/96 (92)   94/94 (94)
step: 5 % ones, rest 1e-3    97/97 (92)   97/97 (93)   96/96 (94)   95/95 (93)   94/94 (94)
one eigenvalue               95/95 (84)   95/96 (86)   95/95 (88)   94/96 (87)   95/94 (93)
5, 2, -1                     95/94 (88)   95/96 (90)   95/95 (90)   94/96 (90)   95/94 (94)
one of 19, rest 1            94/93 (92)   94/95 (92)   94/95 (92)   93/96 (91)   94/94 (93)
Wishart                      96/96 (95)   96/95 (96)   96/94 (95)   95/95 (94)   94/94 (94)
+1 and -1, half each         96/96 (96)   95/96 (95)   96/96 (96)   95/95 (95)   95/94 (95)
1, -1, rest 0                100/100 (97) 100/100 (96) 100/100 (96) 99/99 (96)   95/95 (95)
GOE                          96/97 (94)   96/95 (96)   95/95 (94)   94/95 (94)   95/95 (95)
10 outliers, 4 below 0, bulk 97/96 (92)   96/96 (93)   96/96 (94)   95/95 (93)   94/95 (94)
============================ ============ ============ ============ ============ ============

Without mixed products 90-97 in the same cells, 88 at worst. Hutch++ (n = 200, 8-64 products, the same spectra):
93-99. XTrace (n = 150-400, 8-200 products): 93-99, but 88 where k equals the number of equal dominant
eigenvalues, and 85-92 on the identity plus one eigenvalue of 10-30 with at most 12 products.

Limits. Two opposite eigenvalues and nothing else are covered in 98-100 % up to 20 probes: such a sample
looks like one eigenvalue. The same holds for *signs* on a Householder-rotated diagonal matrix, whose part
off the diagonal has exactly this spectrum. Signs on the identity plus one eigenvalue cover 87 % at 4 probes.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BLOCK: Final = 16  # probes whose mixed products are taken
_NORMAL: Final = 1.959963984540054  # 97.5 % quantile of N(0, 1)
_MAX_SKEWNESS: Final = 8**0.5  # of a χ² variable with one degree of freedom
_PAIR_WEIGHT: Final = 0.25  # of a mixed product beside a sample: a compromise over spectra, see the table
# Solutions of the equation of point 2 for g = 0, 0.1, ..., 2; a test solves it again.
_SKEWNESS: Final = np.linspace(0.0, 2.0, 21)
_WIDENING: Final = np.hstack(
    [
        (1.0, 1.0056, 1.0239, 1.06, 1.1223, 1.2129, 1.3216, 1.4473, 1.5936, 1.7648, 1.9669),
        (2.2074, 2.4959, 2.8449, 3.2713, 3.7971, 4.4522, 5.2768, 6.3263, 7.6773, 9.4368),
    ]
)
# The equation holds for a width from tr B²; a share from the samples' spread needs this times g² more
# (Hall's second-order term: 0.98 g² against 0.68 g² for Pearson III).
_SAMPLE_WIDENING, _POOLED_WIDENING = 0.3, 0.2


def block_moments(gram: Any) -> Array:
    """Return, per probe of a block, unbiased estimates of tr B², tr B³ and tr B⁴.

    For probe i they are the means of G_ij², G_ij G_jk G_ki and G_ij G_jk G_kl G_li over all other, distinct
    probes of the block; their mean over the block is the U-statistic.

    Args:
        gram: the symmetric matrices G_ij = v_i·Bv_j of `probes.probe_gram`, shape (..., b, b), where the
            leading axes may be parameter tensors. Their diagonals are not used.

    Returns:
        Shape (b, ..., 3): one row for each probe; NaN where the block is too small (b < 2, 3, 4).

    >>> block_moments([[9.0, 2.0, 1.0], [2.0, 9.0, 3.0], [1.0, 3.0, 9.0]])[0].tolist()
    [2.5, 6.0, nan]
    """
    G = np.array(gram, dtype=np.float64)
    b = G.shape[-1]
    diagonal = np.arange(b)
    G[..., diagonal, diagonal] = 0.0
    result = np.full((*G.shape[:-1], 3), np.nan)
    squared = G * G
    degree = squared.sum(axis=-1)
    two_steps = G @ G
    if b >= 2:
        result[..., 0] = degree / (b - 1)
    if b >= 3:
        result[..., 1] = (two_steps * G).sum(axis=-1) / ((b - 1) * (b - 2))
    if b >= 4:
        closed = (two_steps * two_steps).sum(axis=-1)
        repeated = degree**2 + (squared @ degree[..., None])[..., 0] - (squared * squared).sum(axis=-1)
        result[..., 2] = (closed - repeated) / ((b - 1) * (b - 2) * (b - 3))
    return np.moveaxis(result, -2, 0)


def calibrated_stderr(samples: Any, moments: Any = None, *, block: int = BLOCK) -> Array:
    """Return the standard error of the mean of samples, such that mean ± 1.96 stderr covers 95 %.

    Args:
        samples: one value per probe, independent, all finite; shape (k, ...). The trailing axes, for
            example parameter tensors, are treated one by one.
        moments: the rows of `block_moments` for the same probes, shape (k, ..., 3); None where there are
            no mixed products (squared norms ‖Av‖², for example): then the samples' own skewness is used.
        block: probes of a block: probe i belongs to block i // block.

    Returns:
        Shape (...), in the unit of the samples. Infinite for k = 1: one sample says nothing of its error.

    Raises:
        ValueError: if there is no sample, or moments do not fit the samples.

    >>> round(float(calibrated_stderr([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])), 2)
    1.21
    """
    x = np.asarray(samples, dtype=np.float64)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"samples have shape {x.shape}; needed is (k, ...) with k >= 1 probes")
    rows = None if moments is None else np.asarray(moments, dtype=np.float64)
    if rows is not None and rows.shape != (*x.shape, 3):
        raise ValueError(f"moments have shape {rows.shape}; needed is {(*x.shape, 3)}: a row for each sample")
    if x.shape[0] == 1:
        return np.full(x.shape[1:], np.inf)
    # Products of three moments must not underflow or overflow, whatever the loss is scaled by.
    scale = np.abs(x).max(axis=0)
    scale = np.where(scale > 0.0, scale, 1.0)
    x = x / scale
    if rows is None:
        return np.asarray(scale * _from_samples(x))
    powers = scale[..., None] ** np.array([2.0, 3.0, 4.0])
    return np.asarray(scale * _from_products(x, rows / powers, block))


def _from_samples(x: Array) -> Array:
    """Use the spread and the skewness of the samples alone."""
    k = x.shape[0]
    centred = x - x.mean(axis=0)
    skewness = _ratio(np.abs((centred**3).mean(axis=0)), (centred**2).mean(axis=0) ** 1.5)
    variance = x.var(axis=0, ddof=1)
    return _half_width(x, variance, k - 1.0, skewness, _SAMPLE_WIDENING)


def _from_products(x: Array, moments: Array, block: int) -> Array:
    """Pool the spread of the samples with the mean square of the mixed products; see the module."""
    k = x.shape[0]
    second, pairs = _pool(moments[..., 0], block, 1)
    third, _ = _pool(moments[..., 1], block, 2)
    fourth, _ = _pool(moments[..., 2], block, 3)
    if pairs == 0.0:
        return _from_samples(x)
    kurtosis = np.clip(12 * _ratio(fourth, second**2), 0.0, 12.0)
    share = _PAIR_WEIGHT / (1 + kurtosis**3)
    weight = share * pairs / 2
    variance = (weight * 2 * second + (k - 1) * x.var(axis=0, ddof=1)) / (weight + k - 1)
    # Satterthwaite: where many eigenvalues contribute, each G_ij² and each sample is one degree of freedom.
    freedom = (weight + k - 1) ** 2 / (share * weight + k - 1)
    # (tr B³)² / (tr B² tr B⁴) is at most 1, near it for one sign, and 0 for a symmetric spectrum.
    sided = np.where(fourth > 0.0, np.minimum(_ratio(third**2, second * np.abs(fourth)) / 0.6, 1.0), 1.0)
    skewness = _ratio(8 * np.abs(third), (2 * second) ** 1.5) * sided**4
    return _half_width(x, variance, freedom, skewness, _POOLED_WIDENING)


def _pool(rows: Array, block: int, others: int) -> tuple[Array, float]:
    """Average rows, each weighted by its number of tuples of `others` distinct partners; and that number."""
    k = rows.shape[0]
    starts = np.arange(k) // block * block
    size = np.minimum(starts + block, k) - starts
    weight = np.prod([np.maximum(size - i, 0) for i in range(1, others + 1)], axis=0).astype(np.float64)
    weight[np.isnan(rows).reshape(k, -1).any(axis=1)] = 0.0
    total = float(weight.sum())
    return np.tensordot(weight / max(total, 1.0), np.nan_to_num(rows), axes=1), total


def _half_width(x: Array, variance: Array, freedom: float | Array, skewness: Array, widening: float) -> Array:
    """Return the half-width of the 95 % interval of the mean, over 1.96."""
    k = x.shape[0]
    one_sign = np.abs(np.sign(x).sum(axis=0)) == k
    # Fewer than 6 samples often have one sign by chance.
    lower = np.where(one_sign, _ratio(2 * np.sqrt(variance), np.abs(x.mean(axis=0))), 0.0) * min(1.0, k / 6)
    skewness = np.minimum(np.maximum(skewness * min(1 + 8 / k, k / 3), lower), _MAX_SKEWNESS)
    g = skewness / np.sqrt(k)
    factor = np.interp(g, _SKEWNESS, _WIDENING) + widening * g**2
    student = _student(freedom) / _NORMAL
    return np.asarray(np.sqrt(variance / k) * factor * student)


def _ratio(above: Array, below: Array) -> Array:
    """Divide, with 0 where both are 0 (samples without spread have no skewness)."""
    return np.divide(above, below, out=np.zeros_like(np.asarray(above)), where=np.asarray(below) > 0.0)


def xtrace_stderr(single: Any, double: Any, mixed: Any) -> float:
    """Return the standard error of the mean of XTrace's k leave-one-out estimates t_i.

    The t_i share test vectors, so std(t_i)/√k misses their covariance. With t_ij the estimate of test
    vector i whose basis leaves out i and j: given that basis, t_ij and t_ji are independent, and t_i is
    unbiased given t_ji; so Cov(t_i, t_j) = E (t_i - t_ij)(t_j - t_ji) holds exactly, and
    Var(mean) = E s²/k + E mean_{i≠j} (t_i - t_ij)(t_j - t_ji). This is corrected for small k by three
    measured amounts (see the table): the spread is pooled with that of two vectors left out, which is
    larger where the eigenvalues fall fast; and positive cycles of mixed products, in the direction in
    which the t_i are skewed, show one eigenvalue above a bulk, which is widened like a χ² variable.

    Args:
        single: t_i, shape (k,), k >= 3.
        double: t_ij, shape (k, k); the diagonal is not used.
        mixed: symmetric, shape (k, k), of mean square half the variance of t_ij; the diagonal is not used.

    Returns:
        The standard error, in the unit of t.
    """
    t = np.asarray(single, dtype=np.float64)
    k = len(t)
    scale = float(np.abs(t).max()) or 1.0
    t = t / scale
    off = ~np.eye(k, dtype=bool)
    gap = np.where(off, t[:, None] - np.asarray(double, dtype=np.float64) / scale, 0.0)
    u = np.where(off, np.asarray(mixed, dtype=np.float64) / scale, 0.0)
    covariance = max(float((gap * gap.T).sum()) / (k * (k - 1)), 0.0)
    spread = float(t.var(ddof=1))
    wider = min(2 * float((u * u).sum()) / (k * (k - 1)), 4 * spread)
    fade = min(1.0, 10 / k)
    share = 0.5 * fade
    pooled = (share * wider + spread) / (1 + share)
    fall = max(0.0, 1 - spread / wider) if wider > 0 else 0.0
    variance = pooled * (1 + 0.2 * fade * fall) ** 2 / k + covariance
    sign = np.sign(u)
    cycles = float(((sign @ sign) * sign).sum()) / (k * (k - 1) * (k - 2))
    cycles *= float(np.sign(((t - t.mean()) ** 3).sum()))
    g = _MAX_SKEWNESS * min(1.0, 3 * max(cycles, 0.0)) / np.sqrt(k)
    factor = np.interp(g, _SKEWNESS, _WIDENING) + _SAMPLE_WIDENING * g**2
    freedom = (1 + share) ** 2 * (k - 1) / (1 + share**2 * 2 / k)
    student = float(_student(freedom)) / _NORMAL
    return float(scale * np.sqrt(variance) * factor * student)


def _student(freedom: float | Array) -> Any:
    """The 97.5 % quantile of Student's distribution."""
    from scipy.stats import t  # loading SciPy takes longer than many a measurement

    return t.ppf(0.975, freedom)
