"""Hutchinson's trace estimator: the mean of v·Av over random probes v."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from landscape.estimators.calibration import BLOCK, block_moments, calibrated_stderr
from landscape.estimators.probes import DISTRIBUTIONS, Operator, draw, order, probe_gram, rounding
from landscape.estimators.stopping import stopping_counts
from landscape.seeds import generator

_MAX_PROBES = 1024


@dataclass(frozen=True)
class HutchinsonResult:
    """An estimated trace; `value` ± 1.96 `stderr` covers the truth in 95 % of seeds.

    Attributes:
        value: the estimate, in the unit of A.
        stderr: calibrated standard error over probes, same unit.
        matvecs: products with A that were spent, which is the number of probes.
        converged: whether stderr <= rtol · |value|; None where no rtol was asked for.
    """

    value: float
    stderr: float
    matvecs: int
    converged: bool | None


def hutchinson(
    A: Operator,
    probes: int = 64,
    distribution: str = "rademacher",
    seed: int = 0,
    rtol: float | None = None,
    max_probes: int | None = None,
    block: int = BLOCK,
) -> HutchinsonResult:
    """Estimate tr A as the mean of v·Av over probes v with E[v vᵀ] = I.

    The variance of one probe is 2(‖A‖_F² - Σ a_ii²) for signs and 2‖A‖_F² for Gaussian probes. Each probe
    has its own random stream, so neither the block size nor more probes change one.

    Args:
        A: symmetric operator of shape (n, n).
        probes: number of probes k >= 2; not used with rtol.
        distribution: "rademacher" or "gaussian".
        seed: any integer.
        rtol: grow to 16, 32, 48, 64, 96, ... probes until stderr <= rtol · |value|. It is tested at these
            counts only, and on the standard error: two running means that agree are no error bound.
        max_probes: where growth ends, by default 1024; only with rtol.
        block: probes per product and per Gram matrix of `calibration`.

    Returns:
        The estimate; `matvecs` equals the number of probes.

    Raises:
        ValueError: for an operator that is not square or an argument outside its range.

    Source: Hutchinson (1990), doi:10.1080/03610919008812866; the standard error is `calibration`'s.

    >>> hutchinson(torch.diag(torch.tensor([1.0, 2.0, 4.0])), probes=2).value
    7.0
    """
    n = order(A)
    counts = _counts(probes, rtol, max_probes)
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution {distribution!r} is unknown; allowed are {', '.join(DISTRIBUTIONS)}")
    if block < 1:
        raise ValueError(f"block = {block}; allowed is 1 or more, best at least 8: use the default {BLOCK}")
    samples, moments = np.empty(0), np.empty((0, 3))
    floor = value = stderr = 0.0
    for count in counts:
        for start in range(len(samples), count, block):
            indices = range(start, min(start + block, count))
            streams = (generator(seed, "hutchinson", index) for index in indices)
            columns = [draw(s, n, 1, distribution, dtype=A.dtype, device=A.device) for s in streams]
            V = torch.cat(columns, dim=1)
            AV = A @ V
            gram = probe_gram(V, AV, distribution).cpu().numpy()
            samples = np.concatenate([samples, gram.diagonal()])
            moments = np.concatenate([moments, block_moments(gram)])
            floor = max(floor, rounding(V, AV))
        value = float(samples.mean())
        stderr = float(np.hypot(calibrated_stderr(samples, moments, block=block), floor))
        if rtol is not None and stderr <= rtol * abs(value):
            break
    converged = None if rtol is None else stderr <= rtol * abs(value)
    return HutchinsonResult(value, stderr, len(samples), converged)


def _counts(probes: int, rtol: float | None, max_probes: int | None) -> list[int]:
    """Return the numbers of probes at which the tolerance is tested."""
    if rtol is None:
        if max_probes is not None:
            raise ValueError(f"max_probes = {max_probes} without rtol; give rtol, or probes={max_probes}")
        if probes < 2:
            raise ValueError(
                f"probes = {probes}; at least 2 are needed for a standard error, 8 or more are usual"
            )
        return [probes]
    limit = _MAX_PROBES if max_probes is None else max_probes
    if not rtol > 0:
        raise ValueError(f"rtol = {rtol}; allowed is a number above 0, for example 0.02 for 2 %")
    if limit < 2:
        raise ValueError(f"max_probes = {limit}; at least 2 are needed for a standard error")
    return stopping_counts(16, limit)
