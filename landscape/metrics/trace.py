"""The trace of the curvature matrix, as a whole and per parameter tensor.

t = tr A with A the Hessian H or the generalized Gauss-Newton matrix G, and tr A_ll of each parameter tensor's
diagonal block. Without sampling where that can be: tr G from per-example gradient norms, and tr H = tr G for
networks that are piecewise linear in each tensor. Else by probes: E vᵀAv = tr A for random signs v
(Hutchinson), drawn anew for each micro-batch; the part of vᵀ(Av) in one tensor's rows has the mean tr A_ll.
The ways are made in `landscape.traces` and `landscape.ggn_trace`; here one is chosen, stored and summed up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from landscape import ggn_trace, operators
from landscape.checks import Need
from landscape.metrics.base import Metric, Round, Values, growing, setting
from landscape.problem import Problem
from landscape.results import Record, Variable
from landscape.traces import choice, deflation, estimate, probing, values
from landscape.traces.plan import Plan

# Vectors per estimate of XTrace and Hutch++, whose units are whole estimates.
_MATVECS_PER_ESTIMATE = 60
# The first round: with fewer probes a standard error says little.
_FIRST_ROUND = 16


@dataclass(frozen=True)
class Trace(Metric):
    """Trace of the Hessian or of the Gauss-Newton matrix, per parameter tensor too, with standard errors.

    Methods: `exact` takes per-example gradient norms where they give the trace (attribute `way` = "layers":
    the Gauss-Newton matrix, and the Hessian of networks that are piecewise linear in each parameter tensor,
    which is recognised from the graph and verified), else n products ("unit_vectors"). `hutchinson`
    averages probes, independent ones for each micro-batch ("probes"); for the Gauss-Newton matrix they are
    drawn in output space at one backward pass each ("output_probes"); for the Frobenius norm one probe
    serves all data ("shared_probes"). `residual` probes R = H − G and adds tr G, from output space or exact.
    `differences` takes vᵀHv or vᵀRv from two forward passes, and what that misses from a few comparisons
    with products; it gives no traces per tensor. `hutchpp` and `xtrace` average whole estimates of 60
    products, each with its own error, and give no traces per tensor. `auto` is exact where that costs at
    most max_probes passes; else a pilot chooses among "probes", "residual" and, with per_layer=False,
    "differences" by predicted work. `deflate=k` takes the top k eigenvectors out of one shared matrix
    ("deflated").

    Source: Hutchinson 1990 (doi 10.1080/03610919008812866); Meyer et al. 2021 (arXiv 2010.09649);
    Epperly, Tropp & Webber 2024 (arXiv 2301.07825).
    """

    name: ClassVar[str] = "trace"
    headline: ClassVar[str] = "trace"
    unit: ClassVar[str] = "probe"
    citation: ClassVar[str] = "Hutchinson 1990, doi:10.1080/03610919008812866"

    method: Literal["auto", "exact", "hutchinson", "residual", "differences", "hutchpp", "xtrace"] = setting(
        "auto", "how; auto is exact where that takes at most max_probes passes, else what a pilot chooses"
    )
    curvature: Literal["hessian", "ggn"] = setting("hessian", "of which matrix")
    rtol: float = setting(0.02, "stop when the standard error is below rtol * |trace|", grows=True)
    max_probes: int = setting(1024, "the most products with a vector", grows=True)
    frobenius: bool = setting(False, "estimate the Frobenius norm from the same products")
    per_layer: bool = setting(True, "ask for traces per tensor; without, auto may use cheaper probes")
    deflate: int = setting(0, "top eigenvectors to take out of the probed matrix first")
    probe_dtype: Literal["working", "bfloat16"] = setting(
        "working", "precision of products with probes; what bfloat16 misses is measured and corrected"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rtol >= 0:
            raise ValueError(f"rtol is {self.rtol}; allowed is a number >= 0")
        if self.max_probes < 2:
            raise ValueError(f"max_probes is {self.max_probes}; allowed is a number >= 2")
        if self.deflate < 0:
            raise ValueError(f"deflate is {self.deflate}; allowed is a number of eigenvectors >= 0")
        if self.frobenius and self.method not in {"auto", "exact", "hutchinson"}:
            raise ValueError(f"method={self.method!r} gives no Frobenius norm; use exact or hutchinson")
        if self.method in {"residual", "differences"} and self.curvature == "ggn":
            raise ValueError(f"method={self.method!r} is for curvature='hessian'; use hutchinson")
        if self.deflate and (self.method not in {"auto", "hutchinson"} or self.frobenius):
            raise ValueError(
                f"deflate={self.deflate} goes with method='hutchinson' or 'auto' and without frobenius; "
                f"got method={self.method!r}, frobenius={self.frobenius}"
            )
        if self.probe_dtype == "bfloat16" and (
            self.method not in {"auto", "hutchinson", "residual"} or self.frobenius or self.deflate
        ):
            raise ValueError(
                "probe_dtype='bfloat16' goes with the probes of method='hutchinson', 'residual' or 'auto', "
                f"without frobenius and deflate; got method={self.method!r}"
            )

    def needs(self) -> frozenset[Need]:
        """Products of the chosen matrix."""
        return frozenset({Need.GGN if self.curvature == "ggn" else Need.HESSIAN})

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Choose the way from shapes, the network's graph and a pilot; name the parameter tensors."""
        way = choice.choose(self, problem, seed)
        found: Values = {}
        if way.piloted:
            way, found = choice.piloted(self, problem, seed, way)
        if way.name == "deflated":
            found = self._deflated(problem, seed)
        names, sizes = np.array(problem.names), np.array(problem.space.sizes)
        labels = {
            "layer": Variable(("layer",), names, long_name="parameter tensor"),
            "layer_size": Variable(("layer",), sizes, long_name="number of parameters"),
        }
        return Record(
            {**labels, **found},
            {
                "method": _METHODS.get(way.name, self.method),
                "way": way.name,
                "reason": way.reason,
                "plan": None if way.plan is None else way.plan.as_dict(),
                "parameters": problem.size,
                "counted": _COUNTED.get(way.name, "probes"),
                "batches": sum(1 for _ in problem.batches) if way.name == "layers" else None,
                "columns": way.columns if way.name == "layers" else None,
            },
        )

    def units(self, record: Record) -> Round | None:
        """Add probes until the standard error is small enough or max_probes are made."""
        done, way = record.attrs["stop"], record.attrs["way"]
        if record.attrs["method"] == "exact":
            count = record.attrs["batches"] if way == "layers" else record.attrs["parameters"]
            return Round(count) if done == 0 else None
        each = _products_per_unit(way, record.attrs["parameters"])
        most = max(1, self.max_probes // each)
        first = _FIRST_ROUND if each == 1 else 1
        return growing(done, first, most, lambda: self._converged(*estimate.total(record, done)))

    def measure(
        self, problem: Problem, shared: Record, block: range, generators: Sequence[torch.Generator]
    ) -> Values:
        """Measure a block of probes, of batches, of diagonal entries, or of whole estimates."""
        way = shared.attrs["way"]
        if way == "layers":
            batches = itertools.islice(problem.batches, block.start, block.stop)
            sums, weights = ggn_trace.by_batch(problem, batches)
            return {
                "samples": Variable(("probe", "layer"), sums, "1", "sum over a batch's terms"),
                "weight": Variable(("probe",), weights, "1", "weight of the batch"),
            }
        if shared.attrs["plan"] is not None:
            return values.planned(problem, Plan.of(shared.attrs["plan"]), block, generators)
        A = self._matrix(problem)
        if way == "estimates":
            return values.whole_estimates(A, self.method, _products_per_unit(way, problem.size), generators)
        if way == "deflated":
            V, U = probing.drawn(problem, generators), torch.from_numpy(shared["deflation_vectors"])
            AV = deflation.projected(A.product, U.to(problem.device, problem.dtype), V)
            return values.with_moments(probing.grams(problem, V, AV))
        return self._shared(problem, A, way, block, generators)

    def _shared(
        self,
        problem: Problem,
        A: operators.Operator,
        way: str,
        block: range,
        generators: Sequence[torch.Generator],
    ) -> Values:
        """Products of the whole data's matrix, with unit vectors or probes."""
        if way == "unit_vectors":
            V = torch.zeros(problem.size, len(block), dtype=problem.dtype, device=problem.device)
            V[list(block), range(len(block))] = 1.0
            AV = A @ V
            found = values.samples(probing.layer_samples(problem, V, AV))
        else:
            V = probing.drawn(problem, generators)
            AV = A @ V
            found = values.with_moments(probing.grams(problem, V, AV))
        if self.frobenius:
            squares = AV.double().square().sum(0).cpu().numpy()
            found["squared_norm"] = Variable(("probe",), squares, "1", "‖Av‖²")
        return found

    def _matrix(self, problem: Problem) -> operators.Operator:
        return operators.ggn(problem) if self.curvature == "ggn" else operators.hessian(problem)

    def summarize(self, record: Record) -> Values:
        """Estimate the traces with standard errors from the probes that are done."""
        done = record["done"]
        value, error = estimate.total(record, len(done))
        exact = record.attrs["method"] == "exact"
        result = {
            "trace": Variable((), np.asarray(value), "1", "trace"),
            "trace_stderr": Variable((), np.asarray(error), "1", "standard error of the trace"),
            "converged": Variable((), np.asarray(self._finished(record)), "1", "whether rtol was reached"),
        }
        if (layers := estimate.layers(record)) is not None:
            result["layer_trace"] = Variable(("layer",), layers[0], "1", "trace of the block")
            result["layer_trace_stderr"] = Variable(
                ("layer",), layers[1], "1", "standard error of layer_trace"
            )
        if record.attrs["way"] == "layers":
            words = "backward passes over all data, to the layers' outputs"
            result["backward_passes"] = Variable((), np.asarray(record.attrs["columns"]), "1", words)
        if "squared_norm" in record:
            result.update(estimate.frobenius(record["squared_norm"][done], exact))
        if not exact:
            result.update(estimate.running(record, 1 if "estimates" in record else _FIRST_ROUND))
        return result

    def outlook(self, problem: Problem) -> tuple[int, int]:
        """Predict the passes: columns or n for exact, else from the first round to max_probes."""
        way = choice.choose(self, problem, None)
        if way.name in {"layers", "unit_vectors"}:
            count = way.columns if way.name == "layers" else problem.size
            return count, count
        first = _FIRST_ROUND if way.name != "estimates" else _products_per_unit(way.name, problem.size)
        return min(first, self.max_probes), self.max_probes

    def _deflated(self, problem: Problem, seed: int) -> Values:
        """The top eigenvectors, and what of the trace lies along them."""
        A = self._matrix(problem)
        vectors = deflation.top_directions(A, min(self.deflate, problem.size), seed)
        known = deflation.deflation(A.product, vectors, problem.space)
        U, quotients = known.vectors.cpu().numpy(), known.quotients.cpu().numpy()
        return {
            "deflation_vectors": Variable(("parameter", "deflated"), U, "1", "directions", sidecar=True),
            "deflation_quotients": Variable(("deflated",), quotients, "1", "u·Au along each"),
            "exact_layer_part": Variable(("layer",), known.layers.cpu().numpy(), "1", "trace along them"),
        }

    def _converged(self, value: float, error: float) -> bool:
        return bool(error <= self.rtol * abs(value))

    def _finished(self, record: Record) -> bool:
        done = record["done"]
        if record.attrs["method"] == "exact":
            return bool(done.all())
        return self._converged(*estimate.total(record, len(done)))


_METHODS = {"layers": "exact", "unit_vectors": "exact"} | dict.fromkeys(
    ("probes", "shared_probes", "output_probes", "residual", "differences", "deflated"), "hutchinson"
)
_COUNTED = {"layers": "batches", "unit_vectors": "unit vectors", "estimates": "estimates"}


def _products_per_unit(way: str, size: int) -> int:
    return min(_MATVECS_PER_ESTIMATE, size) if way == "estimates" else 1
