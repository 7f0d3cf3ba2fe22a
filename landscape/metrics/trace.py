"""The trace of the curvature matrix, as a whole and per parameter tensor.

t = tr A with A the Hessian H or the generalized Gauss-Newton matrix G, and tr A_ll of each parameter tensor's
diagonal block. Without sampling where that can be: tr G from per-example gradient norms, and tr H = tr G for
networks that are piecewise linear in each tensor. Else by probes: E vᵀAv = tr A for random signs v
(Hutchinson), drawn anew for each micro-batch; the part of vᵀ(Av) in one tensor's rows has the mean tr A_ll.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from landscape import ggn_trace, operators, structure
from landscape.checks import Need
from landscape.errors import Refused
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
# Examples that share a probe. Independent probes average over micro-batches whose top directions agree:
# on an MLP, 64 examples per probe left a twentieth of the variance at thrice the cost.
_EXAMPLES_PER_PROBE = 64


@dataclass(frozen=True)
class _Way:
    """How a trace is made, why so, and how many passes it takes where that is known beforehand."""

    way: str
    reason: str
    columns: int = 0


@dataclass(frozen=True)
class Trace(Metric):
    """Trace of the Hessian or of the Gauss-Newton matrix, per parameter tensor too, with standard errors.

    Methods: `exact` takes per-example gradient norms where they give the trace (attribute `way` = "layers":
    the Gauss-Newton matrix, and the Hessian of networks that are piecewise linear in each parameter tensor,
    which is recognised from the graph and verified), else n products ("unit_vectors"). `hutchinson`
    averages probes, independent ones for each micro-batch ("probes"); for the Gauss-Newton matrix they are
    drawn in output space at one backward pass each ("output_probes"); for the Frobenius norm one probe
    serves all data ("shared_probes"). `hutchpp` and `xtrace` average whole estimates of 60 products, each
    with its own error, and give no traces per tensor. `auto` is exact where that costs at most max_probes
    passes, else hutchinson.

    Source: Hutchinson 1990 (doi 10.1080/03610919008812866); Meyer et al. 2021 (arXiv 2010.09649);
    Epperly, Tropp & Webber 2024 (arXiv 2301.07825).
    """

    name: ClassVar[str] = "trace"
    headline: ClassVar[str] = "trace"
    unit: ClassVar[str] = "probe"
    citation: ClassVar[str] = "Hutchinson 1990, doi:10.1080/03610919008812866"

    method: Literal["auto", "exact", "hutchinson", "hutchpp", "xtrace"] = setting(
        "auto", "how; auto is exact where that takes at most max_probes passes, else hutchinson"
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

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Choose the way from shapes and the network's graph, and name the parameter tensors."""
        names = np.array(problem.names)
        sizes = np.array(problem.space.sizes)
        chosen = self._way(problem, seed)
        way = chosen.way
        return Record(
            {
                "layer": Variable(("layer",), names, long_name="parameter tensor"),
                "layer_size": Variable(("layer",), sizes, long_name="number of parameters"),
            },
            {
                "method": _METHODS.get(way, self.method),
                "way": way,
                "reason": chosen.reason,
                "parameters": problem.size,
                "counted": _COUNTED.get(way, "probes"),
                "batches": sum(1 for _ in problem.batches) if way == "layers" else None,
                "columns": chosen.columns if way == "layers" else None,
            },
        )

    def units(self, record: Record) -> Round | None:
        """Double the probes until the standard error is small enough or max_probes are made."""
        done, way = record.attrs["stop"], record.attrs["way"]
        if record.attrs["method"] == "exact":
            count = record.attrs["batches"] if way == "layers" else record.attrs["parameters"]
            return Round(count) if done == 0 else None
        each = _products_per_unit(way, record.attrs["parameters"])
        most = max(1, self.max_probes // each)
        fixed = [(_FIRST_ROUND if each == 1 else 1) << i for i in range(most.bit_length())]
        # Only here is the tolerance tested; a smaller max_probes may have ended between two of them.
        if done >= most or (done in fixed and self._converged(*_estimate(record, done))):
            return None
        return Round(min(next(count for count in fixed if count > done), most))

    def measure(
        self, problem: Problem, shared: Record, block: range, generators: Sequence[torch.Generator]
    ) -> Values:
        """Measure a block of probes, of batches, of diagonal entries, or of whole estimates."""
        way = shared.attrs["way"]
        if way == "layers":
            sums, weights = ggn_trace.by_batch(
                problem, itertools.islice(problem.batches, block.start, block.stop)
            )
            return {
                "samples": Variable(("probe", "layer"), sums, "1", "sum over a batch's terms"),
                "weight": Variable(("probe",), weights, "1", "weight of the batch"),
            }
        if way == "output_probes":
            return _samples(ggn_trace.sampled(problem, generators))
        if way == "probes":
            return self._independent(problem, generators)
        A = self._matrix(problem)
        if way == "estimates":
            return _whole_estimates(A, self.method, generators)
        if way == "unit_vectors":
            V = torch.zeros(problem.size, len(block), dtype=problem.dtype, device=problem.device)
            V[list(block), range(len(block))] = 1.0
        else:
            V = _drawn(problem, generators)
        AV = A @ V
        values = _samples(
            torch.stack([(v * av).double().sum(0) for v, av in _rows(problem, V, AV)], 1).cpu().numpy()
        )
        if way == "shared_probes":
            values = _with_moments(_grams(problem, V, AV))
        if self.frobenius:
            squares = AV.double().square().sum(0).cpu().numpy()
            values["squared_norm"] = Variable(("probe",), squares, "1", "‖Av‖²")
        return values

    def _independent(self, problem: Problem, generators: Sequence[torch.Generator]) -> Values:
        """Probes of the block-diagonal matrix of the micro-batches' matrices, which has the same trace."""
        layers, weights = torch.zeros((), device=problem.device), 0.0
        for part, weight in problem.split(_EXAMPLES_PER_PROBE):
            V = _drawn(part, generators)
            layers = layers + weight * _grams(part, V, self._matrix(part) @ V)
            weights += weight
        problem.cost.matvecs += len(generators)
        return _with_moments(layers / weights)

    def _matrix(self, problem: Problem) -> operators.Operator:
        return operators.ggn(problem) if self.curvature == "ggn" else operators.hessian(problem)

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
            moments = record["layer_moments"][done] if "layer_moments" in record else None
            values = _exact(record, done) if exact else samples.mean(axis=0)
            block = record.attrs["block_size"]
            errors = np.zeros(samples.shape[1]) if exact else calibrated_stderr(samples, moments, block=block)
            result["layer_trace"] = Variable(("layer",), values, "1", "trace of the block")
            result["layer_trace_stderr"] = Variable(("layer",), errors, "1", "standard error of layer_trace")
        if record.attrs["way"] == "layers":
            words = "backward passes over all data, to the layers' outputs"
            result["backward_passes"] = Variable((), np.asarray(record.attrs["columns"]), "1", words)
        if "squared_norm" in record:
            result.update(_frobenius(record["squared_norm"][done], exact))
        if not exact:
            result.update(_running(record))
        return result

    def outlook(self, problem: Problem) -> tuple[int, int]:
        """Predict the passes: columns or n for exact, else from the first round to max_probes."""
        chosen = self._way(problem, None)
        if chosen.way in {"layers", "unit_vectors"}:
            count = chosen.columns if chosen.way == "layers" else problem.size
            return count, count
        first = _FIRST_ROUND if chosen.way != "estimates" else _products_per_unit(chosen.way, problem.size)
        return min(first, self.max_probes), self.max_probes

    def _way(self, problem: Problem, seed: int | None) -> _Way:
        """Choose the way to the trace; without a seed, networks are recognised but not verified."""
        if self.method in {"hutchpp", "xtrace"}:
            return _Way("estimates", "asked for")
        columns, obstacle = (0, "asked for") if self.method == "hutchinson" else self._columns(problem, seed)
        if not obstacle:
            return _Way("layers", "per-example gradient norms give the trace exactly", columns)
        if self.method == "exact" or (self.method == "auto" and problem.size <= self.max_probes):
            return _Way("unit_vectors", obstacle)
        if self.frobenius:
            return _Way("shared_probes", obstacle)
        if self.curvature == "ggn" and _sampled_works(problem):
            return _Way("output_probes", obstacle)
        return _Way("probes", obstacle)

    def _columns(self, problem: Problem, seed: int | None) -> tuple[int, str]:
        """Passes that per-example gradient norms take, and what stands against them; empty if nothing does."""
        if self.frobenius:
            return 0, "the Frobenius norm needs products"
        if not problem.evaluator.has_outputs:
            return 0, "forward= hides the outputs"
        try:
            columns = ggn_trace.columns(problem)
        except Refused as refusal:
            return 0, str(refusal)
        if columns > self.max_probes:
            return columns, f"it would take {columns} passes, more than max_probes = {self.max_probes}"
        if self.curvature == "ggn":
            return columns, ""
        verdict = structure.multilinear(problem)
        if not verdict.recognized:
            return columns, f"tr H is not tr G: {verdict.reason}"
        if seed is None or (found := structure.verify(problem, seed=seed)).passed:
            return columns, ""
        off = f"vᵀRv/vᵀGv up to {found.worst:.1e}, {found.failed[0]}"
        return columns, f"tr H = tr G was recognised but not confirmed: {off}"

    def _converged(self, value: float, error: float) -> bool:
        return bool(error <= self.rtol * abs(value))

    def _finished(self, record: Record) -> bool:
        done = record["done"]
        if record.attrs["method"] == "exact":
            return bool(done.all())
        return self._converged(*_estimate(record, len(done)))


_METHODS = {
    "layers": "exact",
    "unit_vectors": "exact",
    "probes": "hutchinson",
    "shared_probes": "hutchinson",
    "output_probes": "hutchinson",
}


_COUNTED = {"layers": "batches", "unit_vectors": "unit vectors", "estimates": "estimates"}


def _products_per_unit(way: str, size: int) -> int:
    return min(_MATVECS_PER_ESTIMATE, size) if way == "estimates" else 1


def _sampled_works(problem: Problem) -> bool:
    try:
        return ggn_trace.columns(problem) > 0
    except Refused:
        return False


def _drawn(problem: Problem, generators: Sequence[torch.Generator]) -> Tensor:
    columns = [draw(g, problem.size, 1, dtype=problem.dtype, device=problem.device) for g in generators]
    return torch.cat(columns, dim=1)


def _rows(problem: Problem, V: Tensor, AV: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(V[a:b], AV[a:b]) for a, b in problem.space.ranges.values()]


def _grams(problem: Problem, V: Tensor, AV: Tensor) -> Tensor:
    """Gram matrices of a block of probes for each tensor's rows, (layers, b, b)."""
    return torch.stack([probe_gram(v, av) for v, av in _rows(problem, V, AV)])


def _samples(samples: np.ndarray) -> Values:
    return {"samples": Variable(("probe", "layer"), samples, "1", "v·Av within the rows of a tensor")}


def _with_moments(layers: Tensor) -> Values:
    """Samples, and the U-statistics from which their errors are made."""
    words = "U-statistics of tr B², tr B³, tr B⁴ for the error of samples"
    grams = layers.cpu().numpy()
    per_layer = block_moments(grams)
    return {
        **_samples(np.diagonal(grams, axis1=1, axis2=2).T.copy()),
        "layer_moments": Variable(("probe", "layer", "order"), per_layer, "1", words),
        "moments": Variable(("probe", "order"), block_moments(grams.sum(axis=0)), "1", words),
    }


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
    if record.attrs["method"] == "exact":
        return float(_exact(record, done).sum()), 0.0
    samples, block = record["samples"][:count][done].sum(axis=1), record.attrs["block_size"]
    moments = record["moments"][:count][done] if "moments" in record else None
    return float(samples.mean()), float(calibrated_stderr(samples, moments, block=block))


def _exact(record: Record, done: np.ndarray) -> np.ndarray:
    """The traces of the blocks: Σ over batches / Σ weights, or Σ of diagonal entries."""
    sums = record["samples"][: len(done)][done].sum(axis=0)
    if "weight" in record:
        sums = sums / record["weight"][: len(done)][done].sum()
    return np.asarray(sums)


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
