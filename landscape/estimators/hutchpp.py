"""Hutch++: the trace on a sketched subspace exactly, the rest by Hutchinson."""

from __future__ import annotations

import math

import torch

from landscape.estimators.calibration import block_moments, calibrated_stderr
from landscape.estimators.probes import (
    Operator,
    TraceEstimate,
    draw,
    exact_trace,
    inner,
    order,
    probe_gram,
    rounding,
)
from landscape.seeds import generator

_LEAST_PROBES = 6


def hutchpp(A: Operator, matvecs: int = 60, seed: int = 0) -> TraceEstimate:
    """Estimate tr A by Hutch++: tr(QᵀAQ) + mean of gᵀPAPg, with Q = orth(AS), P = I - QQᵀ, signs S and g.

    ⌊matvecs/3⌋ products make the sketch AS and as many AQ; all others go to the probes g, so that any
    number can be spent. Below 18 products the sketch gives way, so that 6 probes remain where they can:
    fewer cannot show their own error. Given Q, the error is that of Hutchinson's estimator on PAP, and so
    is its calibrated standard error.

    Args:
        A: symmetric operator of shape (n, n).
        matvecs: products to spend, at least 4; with n or more the trace is formed exactly by n products.
        seed: any integer.

    Returns:
        The estimate.

    Raises:
        ValueError: for an operator that is not square or too few products.

    Source: Meyer, Musco, Musco, Woodruff (2021), Algorithm 1, arXiv:2010.09649.

    >>> round(hutchpp(torch.diag(torch.tensor([5.0, 2.0, -1.0] + 17 * [0.0]).double()), 12).value, 9)
    6.0
    """
    n = order(A)
    if matvecs < 4:
        raise ValueError(f"matvecs = {matvecs}; Hutch++ needs at least 4 (12 or more are usual)")
    if matvecs >= n:
        return TraceEstimate(exact_trace(A, n), 0.0, n)
    sketch = max(1, min(matvecs // 3, (matvecs - _LEAST_PROBES) // 2))
    stream = generator(seed, "hutchpp", 0)
    S = draw(stream, n, sketch, dtype=A.dtype, device=A.device)
    G = draw(stream, n, matvecs - 2 * sketch, dtype=A.dtype, device=A.device)
    Y = (A @ S).double()
    Q = torch.linalg.qr(Y).Q.to(A.dtype)
    AQ = A @ Q
    PG = G - Q @ (Q.T @ G)
    APG = A @ PG
    PAPG = APG - Q @ (Q.T @ APG)
    gram = probe_gram(G, PAPG).cpu().numpy()
    samples = gram.diagonal()
    stderr = float(calibrated_stderr(samples, block_moments(gram), block=len(samples)))
    captured = float(inner(Q, AQ).trace())
    floor = max(math.sqrt(sketch) * rounding(Q, AQ), rounding(PG, APG))
    return TraceEstimate(captured + float(samples.mean()), math.hypot(stderr, floor), matvecs)
