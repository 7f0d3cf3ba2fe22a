"""The trace of the curvature matrix, as a whole and per parameter tensor.

t = tr A with A the Hessian or the generalized Gauss-Newton matrix. Hutchinson (1990): E vᵀAv = tr A for
random signs v; the part of vᵀ(Av) that stands in one tensor's rows has that tensor's diagonal block's
trace as its mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from landscape import operators
from landscape.checks import Need
from landscape.estimators import hutchpp, xtrace
from landscape.estimators.calibration import block_moments, calibrated_stderr
from landscape.estimators.probes import draw, probe_gram
from landscape.metrics.base import Metric, Round, Values, setting
from landscape.problem import Problem
from landscape.results import Record, Variable

# Vectors per estimate of XTrace and Hutch++, whose units are whole estimates.
_MATVECS_PER_ESTIMATE = 60
# The first round: with fewer probes a standard error says little.
_FIRST_ROUND = 16


@dataclass(frozen=True)
class Trace(Metric):
    """Trace of the Hessian or of the Gauss-Newton matrix, per parameter tensor too, with standard errors.

    Methods: `exact` makes n products with unit vectors, and is chosen where n <= max_probes;
    `hutchinson` averages probes; `hutchpp` and `xtrace` average whole estimates of 60 products, each with
    its own error, and give no traces per tensor.

    Source: Hutchinson 1990 (doi 10.1080/03610919008812866); Meyer et al. 2021 (arXiv 2010.09649);
    Epperly, Tropp & Webber 2024 (arXiv 2301.07825).
    """

    name: ClassVar[str] = "trace"
    headline: ClassVar[str] = "trace"
    unit: ClassVar[str] = "probe"
    citation: ClassVar[str] = "Hutchinson 1990, doi:10.1080/03610919008812866"

    method: Literal["auto", "exact", "hutchinson", "hutchpp", "xtrace"] = setting(
        "auto", "how; auto is exact up to max_probes parameters, else hutchinson"
    )
    curvature: Literal["hessian", "ggn"] = setting("hessian", "of which matrix")
    rtol: float = setting(0.02, "stop when the standard error is below rtol * |trace|", grows=True)
    max_probes: int = setting(1024, "the most products with a vector", grows=True)
    frobenius: bool = setting(False, "estimate the Frobenius norm from the same products")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rtol >= 0:
            raise ValueError(f"rtol is {self.rtol}; allowed is a number >= 0")
        if self.max_probes < 2:
            raise ValueError(f"max_probes is {self.max_probes}; allowed is a number >= 2")
        if self.frobenius and self.method in {"hutchpp", "xtrace"}:
            raise ValueError(f"method={self.method!r} gives no Frobenius norm; use exact or hutchinson")

    def needs(self) -> frozenset[Need]:
        """Products of the chosen matrix."""
        return frozenset({Need.GGN if self.curvature == "ggn" else Need.HESSIAN})

    def prepare(self, problem: Problem, seed: int) -> Record:  # noqa: ARG002
        """Choose the method from shapes, and name the parameter tensors."""
        names = np.array(problem.names)
        sizes = np.array(problem.space.sizes)
        return Record(
            {
                "layer": Variable(("layer",), names, long_name="parameter tensor"),
                "layer_size": Variable(("layer",), sizes, long_name="number of parameters"),
            },
            {"method": self._chosen(problem), "parameters": problem.size},
        )

    def units(self, record: Record) -> Round | None:
        """Double the probes until the standard error is small enough or max_probes are made."""
        done, method = record.attrs["stop"], record.attrs["method"]
        if method == "exact":
            return Round(record.attrs["parameters"]) if done == 0 else None
        each = _products_per_unit(method, record.attrs["parameters"])
        most = max(1, self.max_probes // each)
        fixed = [(_FIRST_ROUND if each == 1 else 1) << i for i in range(most.bit_length())]
        # Only here is the tolerance tested; a smaller max_probes may have ended between two of them.
        if done >= most or (done in fixed and self._converged(*_estimate(record, done))):
            return None
        return Round(min(next(count for count in fixed if count > done), most))

    def measure(
        self, problem: Problem, shared: Record, block: range, generators: Sequence[torch.Generator]
    ) -> Values:
        """Measure a block of probes, of diagonal entries, or of whole estimates."""
        A = operators.ggn(problem) if self.curvature == "ggn" else operators.hessian(problem)
        method = shared.attrs["method"]
        if method == "exact":
            V = torch.zeros(problem.size, len(block), dtype=problem.dtype, device=problem.device)
            V[list(block), range(len(block))] = 1.0
        elif method == "hutchinson":
            columns = [
                draw(g, problem.size, 1, dtype=problem.dtype, device=problem.device) for g in generators
            ]
            V = torch.cat(columns, dim=1)
        else:
            return _whole_estimates(A, method, generators)
        AV = A @ V
        grams = [probe_gram(V[a:b], AV[a:b]) for a, b in problem.space.ranges.values()]
        samples = torch.stack([gram.diagonal() for gram in grams], dim=1).cpu().numpy()
        values = {"samples": Variable(("probe", "layer"), samples, "1", "v·Av within the rows of a tensor")}
        if method == "hutchinson":
            per_layer = np.stack([block_moments(gram.cpu().numpy()) for gram in grams], axis=1)
            whole = block_moments(probe_gram(V, AV).cpu().numpy())
            words = "U-statistics of tr B², tr B³, tr B⁴ for the error of samples"
            values["layer_moments"] = Variable(("probe", "layer", "order"), per_layer, "1", words)
            values["moments"] = Variable(("probe", "order"), whole, "1", words)
        if self.frobenius:
            squares = AV.double().square().sum(0).cpu().numpy()
            values["squared_norm"] = Variable(("probe",), squares, "1", "‖Av‖²")
        return values

    def summarize(self, record: Record) -> Values:
        """Estimate the traces with standard errors from the probes that are done."""
        done = record["done"]
        value, error = _estimate(record, len(done))
        exact = record.attrs["method"] == "exact"
        result = {
            "trace": Variable((), np.asarray(value), "1", "trace"),
            "trace_stderr": Variable((), np.asarray(error), "1", "standard error of the trace"),
            "converged": Variable((), np.asarray(self._finished(record)), "1", "whether rtol was reached"),
        }
        if "samples" in record:
            samples = record["samples"][done]
            combine = np.sum if exact else np.mean
            moments = None if exact else record["layer_moments"][done]
            block = record.attrs["block_size"]
            errors = np.zeros(samples.shape[1]) if exact else calibrated_stderr(samples, moments, block=block)
            result["layer_trace"] = Variable(("layer",), combine(samples, axis=0), "1", "trace of the block")
            result["layer_trace_stderr"] = Variable(("layer",), errors, "1", "standard error of layer_trace")
        if "squared_norm" in record:
            result.update(_frobenius(record["squared_norm"][done], exact))
        if not exact:
            result.update(_running(record))
        return result

    def outlook(self, problem: Problem) -> tuple[int, int]:
        """Predict the products: n for exact, else from the first round to max_probes."""
        method = self._chosen(problem)
        if method == "exact":
            return problem.size, problem.size
        first = _FIRST_ROUND if method == "hutchinson" else _products_per_unit(method, problem.size)
        return min(first, self.max_probes), self.max_probes

    def _chosen(self, problem: Problem) -> str:
        if self.method != "auto":
            return self.method
        return "exact" if problem.size <= self.max_probes else "hutchinson"

    def _converged(self, value: float, error: float) -> bool:
        return bool(error <= self.rtol * abs(value))

    def _finished(self, record: Record) -> bool:
        done = record["done"]
        if record.attrs["method"] == "exact":
            return bool(done.all())
        return self._converged(*_estimate(record, len(done)))


def _products_per_unit(method: str, size: int) -> int:
    return 1 if method == "hutchinson" else min(_MATVECS_PER_ESTIMATE, size)


def _whole_estimates(A: operators.Operator, method: str, generators: Sequence[torch.Generator]) -> Values:
    estimator = hutchpp if method == "hutchpp" else xtrace
    seeds = [int(torch.randint(2**62, (), generator=g)) for g in generators]
    found = [estimator(A, matvecs=min(_MATVECS_PER_ESTIMATE, A.shape[0]), seed=seed) for seed in seeds]
    return {
        "estimates": Variable(("probe",), np.array([f.value for f in found]), "1", "estimate of the trace"),
        "estimates_stderr": Variable(("probe",), np.array([f.stderr for f in found]), "1", "its own error"),
    }


def _estimate(record: Record, count: int) -> tuple[float, float]:
    """Trace and standard error from those of the first `count` units that are done."""
    done = record["done"][:count]
    if not done.any():
        return float("nan"), float("nan")
    if "estimates" in record:
        errors = record["estimates_stderr"][:count][done]
        return float(record["estimates"][:count][done].mean()), float(np.sqrt((errors**2).sum()) / done.sum())
    samples = record["samples"][:count][done].sum(axis=1)
    if record.attrs["method"] == "exact":
        return float(samples.sum()), 0.0
    moments, block = record["moments"][:count][done], record.attrs["block_size"]
    return float(samples.mean()), float(calibrated_stderr(samples, moments, block=block))


def _frobenius(squares: np.ndarray, exact: bool) -> Values:
    """‖A‖_F from E‖Av‖² = ‖A‖_F²; the error by the delta method."""
    square = squares.sum() if exact else squares.mean()
    error = 0.0 if exact else float(calibrated_stderr(squares))
    norm = np.sqrt(square)
    return {
        "frobenius_norm": Variable((), norm, "1", "Frobenius norm"),
        "frobenius_norm_stderr": Variable(
            (), np.asarray(error / (2 * norm) if norm else 0.0), "1", "standard error of the Frobenius norm"
        ),
    }


def _running(record: Record) -> Values:
    """The estimate as it stood after each round."""
    counts, done = [], record["done"]
    count = min(_FIRST_ROUND if "samples" in record else 1, len(done))
    while count < len(done):
        counts.append(count)
        count *= 2
    counts = [c for c in [*counts, len(done)] if done[:c].all()]
    found = np.array([_estimate(record, c) for c in counts]).reshape(-1, 2)
    return {
        "round": Variable(("round",), np.array(counts, dtype=np.int64), "1", "number of units"),
        "running_trace": Variable(("round",), found[:, 0], "1", "trace after that many"),
        "running_trace_stderr": Variable(("round",), found[:, 1], "1", "its standard error"),
    }
