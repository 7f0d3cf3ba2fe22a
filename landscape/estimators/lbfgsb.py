"""A large value of a function on a box by scipy's L-BFGS-B, as Keskar et al. searched it."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape.estimators.regions import Region
from landscape.estimators.search import Function, Maximum


def lbfgsb(function: Function, region: Region, start: Tensor, iterations: int = 10) -> Maximum:
    """Search with L-BFGS-B, 10 corrections kept, and return the best point that was evaluated.

    The line search of an iteration may take several evaluations. A value that is not finite ends the search:
    the line search knows no way around it.

    Args:
        function: δ (d,) -> value and gradient (d,).
        region: a box.
        start: δ at first, (d,). Where the gradient is 0, nothing moves.
        iterations: the most.

    Raises:
        ValueError: if the region is no box.

    Source: Byrd, Lu, Nocedal & Zhu 1995 (doi 10.1137/0916069).
    """
    if region.norm != "inf":
        raise ValueError(f"L-BFGS-B searches boxes; the region has norm {region.norm!r}, allowed is 'inf'")
    from scipy.optimize import minimize

    radii = region.radii
    best: dict[str, Any] = {
        "value": -math.inf,
        "lowest": math.inf,
        "point": region.project(start),
        "slope": torch.zeros_like(start),
    }
    counts = {"evaluations": 0, "nonfinite": 0}

    def negative(y: np.ndarray) -> tuple[float, np.ndarray]:
        # From float64 to float32 a point at the edge may be rounded to one beyond it.
        point = region.project(torch.from_numpy(y).to(radii))
        value, slope = function(point)
        number = float(value)
        counts["evaluations"] += 1
        if not (math.isfinite(number) and bool(slope.isfinite().all())):
            counts["nonfinite"] += 1
            raise _NotFiniteError
        best["lowest"] = min(number, best["lowest"])
        if number > best["value"]:
            best.update(value=number, point=point, slope=slope)
        return -number, -slope.double().cpu().numpy()

    widths = radii.double().cpu().numpy()
    first = best["point"].double().cpu().numpy()
    options = {"maxiter": iterations, "maxfun": 10**9, "ftol": 0.0, "gtol": 0.0}
    with contextlib.suppress(_NotFiniteError):
        minimize(
            negative,
            first,
            jac=True,
            method="L-BFGS-B",
            bounds=np.stack([-widths, widths], 1),
            options=options,
        )
    found = math.isfinite(best["value"])
    gap = region.rise(best["slope"]) - float((best["slope"].double() * best["point"].double()).sum())
    return Maximum(
        point=best["point"],
        value=best["value"] if found else math.nan,
        gap=max(gap, 0.0) if found else math.nan,
        lowest=best["lowest"] if found else math.nan,
        **counts,
    )


class _NotFiniteError(Exception):
    """Ends scipy's loop."""
