"""Directions that the loss itself has: its gradient, and eigenvectors of its Hessian."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from landscape import foreign, operators, results
from landscape.directions.base import Directions, made, require_same
from landscape.errors import Refused
from landscape.estimators.eigen import eigsh

if TYPE_CHECKING:
    from landscape.problem import Problem
    from landscape.results import Record


def gradient(problem: Problem) -> Directions:
    """Return the gradient ∇L(θ), as long as it is."""
    return made(problem, [problem.gradient()], ["gradient"], kind="gradient")


def eigenvectors(
    problem: Problem,
    ends: Sequence[Literal["largest", "smallest"]] = ("largest", "smallest"),
    *,
    source: Record | Path | str | None = None,
    rtol: float = 1e-3,
    seed: int = 0,
) -> Directions:
    """Return eigenvectors of the Hessian, of norm 1.

    Args:
        problem: at its parameters.
        ends: of the spectrum; ("largest", "largest") are those of the two largest eigenvalues.
        source: a measurement of the metric `eigenvalues` with vectors=True; they are computed without one.
        rtol: residual asked for, where they are computed.
        seed: of the solver.

    Returns:
        The directions, with "eigenvalues" and "residual_norms" in their origin; each with its largest entry
        positive.

    Raises:
        Refused: if the source is of other weights, or does not hold these pairs.
    """
    most = max(ends.count("largest"), ends.count("smallest"))
    if source is None:
        which = "both" if len(set(ends)) > 1 else ends[0]
        found = eigsh(operators.hessian(problem), most, which=which, rtol=rtol, seed=seed)
        values, residuals, rows = found.values, found.residual_norms, found.vectors.T
        held, extra = which, {"converged": bool(found.converged.all())}
    else:
        values, residuals, rows, held, extra = _stored_pairs(source, problem)
    places = _places(ends, held, len(values), source)
    picked = [rows[i] * (1.0 if float(rows[i][rows[i].abs().argmax()]) > 0 else -1.0) for i in places]
    numbers = {
        "eigenvalues": [float(values[i]) for i in places],
        "residual_norms": [float(residuals[i]) for i in places],
    }
    labels = [
        f"eigenvector of {end} eigenvalue {value:.4g}"
        for end, value in zip(ends, numbers["eigenvalues"], strict=True)
    ]
    return made(problem, picked, labels, kind="hessian", ends=list(ends), **numbers, **extra)


def _places(ends: Sequence[str], held: str, count: int, source: Any) -> list[int]:
    """Where the pairs that are asked for stand among those that are there, which descend."""
    half = count // 2 if held == "both" else count
    found, taken = [], {"largest": 0, "smallest": 0}
    for end in ends:
        if end not in taken:
            raise ValueError(f"ends has {end!r}; allowed is 'largest' or 'smallest'")
        if held not in {end, "both"} or taken[end] >= half:
            raise Refused(
                f"{source} does not hold eigenvector {taken[end] + 1} from the {end}; measure eigenvalues with "
                "vectors=True, which='both' and a larger k (--vectors --which both --k 2)"
            )
        found.append(taken[end] if end == "largest" else count - 1 - taken[end])
        taken[end] += 1
    return found


def _stored_pairs(source: Record | Path | str, problem: Problem) -> Any:
    """Values, residuals, vectors, which end they are of, and where they come from."""
    path = Path("the given record") if isinstance(source, results.Record) else Path(source)
    record = source if isinstance(source, results.Record) else results.read(path)
    with foreign.understood(path):
        return _pairs_in(record, path, problem)


def _pairs_in(record: Record, path: Path, problem: Problem) -> Any:
    fields = json.loads(str(record.attrs.get("configuration") or "{}"))
    if "eigenvectors" not in record or fields.get("curvature") != "hessian":
        raise Refused(
            f"{path} holds no eigenvectors of the Hessian; landscape measure --metric eigenvalues --vectors --which "
            "both stores them"
        )
    ranges = record.attrs["eigenvector_ranges"]
    require_same(path, ranges, str(record.attrs.get("parameters_fingerprint")), problem)
    rows = torch.from_numpy(record["eigenvectors"].copy())
    if rows.shape != (len(record["eigenvalues"]), problem.size) or len(record["residual_norm"]) != len(rows):
        raise ValueError(f"eigenvectors of shape {tuple(rows.shape)}")
    extra = {"file": path.name, "converged": bool(record["pair_converged"].all())}
    return record["eigenvalues"], record["residual_norm"], rows, fields.get("which", "largest"), extra
