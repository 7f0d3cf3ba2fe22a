"""The trace of Lᵀ A L for a linear map L into parameter space: what the metrics of such a trace share.

Without sampling where that can be: the trace of LᵀGL is a sum of squared norms of the images Lᵀ∇ of per-example
gradients, and where a network is piecewise linear in each parameter tensor, the diagonal blocks of H and of G
agree, and with them these traces. Else by probes z with E zzᵀ = I: E (Lz)ᵀA(Lz) = tr LᵀAL, of R = H - G beside the
part of G where examples can be told apart.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from landscape import ggn_trace
from landscape.checks import Need
from landscape.errors import Refused
from landscape.linear_maps import Maps
from landscape.metrics.base import Metric, Round, Values, doubling, setting
from landscape.problem import Problem
from landscape.results import Record, Variable
from landscape.traces import choice, estimate, mapped, values
from landscape.traces.plan import EXAMPLES_PER_PROBE, Plan

# The first round: with fewer probes a standard error says little.
_FIRST_ROUND = 16
# Columns of G up to which its part is computed beside probes of R = H - G. On trained smooth networks probes of R
# scattered 3 to 11 times less than those of H, which is worth more passes than these; before training as much.
_MOST_COLUMNS = 64
# Beyond, output-space probes of G in each unit, at a third of the cost of a product.
_OUTPUT_PROBES = 4
_COUNTED = {"layers": "batches", "unit_vectors": "unit vectors"}


@dataclass(frozen=True)
class MappedTrace(Metric):
    """The trace of Lᵀ A L, as a whole and per parameter tensor, with standard errors.

    A metric says which L, and calls the trace by its own name, which is its headline.
    """

    unit: ClassVar[str] = "probe"

    method: Literal["auto", "exact", "hutchinson"] = setting(
        "auto",
        "how; auto is exact where that takes at most max_probes passes, else by probes (of H - G beside G)",
    )
    curvature: Literal["hessian", "ggn"] = setting("hessian", "of which matrix")
    rtol: float = setting(0.02, "stop when the standard error is below rtol * |value|", grows=True)
    max_probes: int = setting(1024, "the most products with a vector", grows=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rtol >= 0:
            raise ValueError(f"rtol is {self.rtol}; allowed is a number >= 0")
        if self.max_probes < 2:
            raise ValueError(f"max_probes is {self.max_probes}; allowed is a number >= 2")

    @abc.abstractmethod
    def measured(self, problem: Problem) -> Problem:
        """The problem with those parameter tensors that L leads to."""

    @abc.abstractmethod
    def maps(self, part: Problem) -> Maps:
        """L, for what `measured` returns."""

    def needs(self) -> frozenset[Need]:
        """Products of the chosen matrix."""
        return frozenset({Need.GGN if self.curvature == "ggn" else Need.HESSIAN})

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Choose the way from shapes and the network's graph; name the parameter tensors."""
        part = self.measured(problem)
        order = self.maps(part).size
        way = self._way(part, order, seed)
        names, sizes = np.array(part.names), np.array(part.space.sizes)
        found = {
            "layer": Variable(("layer",), names, long_name="parameter tensor"),
            "layer_size": Variable(("layer",), sizes, long_name="number of parameters"),
        }
        if way.name == "residual" and way.plan is not None and not way.plan.outputs:
            parts = ggn_trace.averaged(part, self.maps(part).each)
            found["exact_layer_part"] = Variable(("layer",), parts, "1", "the part that is of G, exact")
        return Record(
            found,
            {
                "method": "exact" if way.name in _COUNTED else "hutchinson",
                "way": way.name,
                "reason": way.reason,
                "plan": None if way.plan is None else way.plan.as_dict(),
                "parameters": part.size,
                "order": order,
                "counted": _COUNTED.get(way.name, "probes"),
                "batches": sum(1 for _ in problem.batches) if way.name == "layers" else None,
                "columns": way.columns if way.name == "layers" else None,
            },
        )

    def units(self, record: Record) -> Round | None:
        """Double the probes until the standard error is small enough or max_probes are made."""
        done = record.attrs["stop"]
        if record.attrs["method"] == "exact":
            count = record.attrs["batches" if record.attrs["way"] == "layers" else "order"]
            return Round(count) if done == 0 else None
        return doubling(
            done, _FIRST_ROUND, self.max_probes, lambda: self._converged(*estimate.total(record, done))
        )

    def measure(
        self, problem: Problem, shared: Record, block: range, generators: Sequence[torch.Generator]
    ) -> Values:
        """Measure a block of probes, of batches, or of diagonal entries."""
        part = self.measured(problem)
        maps, way = self.maps(part), shared.attrs["way"]
        if way == "layers":
            batches = itertools.islice(part.batches, block.start, block.stop)
            sums, weights = ggn_trace.mapped_by_batch(part, batches, maps.each)
            return {
                "samples": Variable(("probe", "layer"), sums, "1", "sum over a batch's terms"),
                "weight": Variable(("probe",), weights, "1", "weight of the batch"),
            }
        if way == "unit_vectors":
            return values.samples(mapped.diagonal(part, maps, Plan(self.curvature), block))
        plan = Plan.of(shared.attrs["plan"])
        if plan.matrix == "ggn" and plan.outputs:
            return values.samples(mapped.output_samples(part, maps, plan, generators))
        found = values.with_moments(mapped.independent(part, maps, plan, generators))
        if plan.outputs:
            rows = mapped.output_samples(part, maps, plan, generators)
            found["output_samples"] = Variable(
                ("probe", "layer"), rows, "1", "output-space probes of G's part"
            )
        return found

    def summarize(self, record: Record) -> Values:
        """Estimate the trace with its standard error from the units that are done."""
        value, error = estimate.total(record, len(record["done"]))
        name = self.headline
        found = {
            name: Variable((), np.asarray(value), "1", name.replace("_", " ")),
            f"{name}_stderr": Variable((), np.asarray(error), "1", f"standard error of {name}"),
            "converged": Variable((), np.asarray(self._finished(record)), "1", "whether rtol was reached"),
        }
        if (layers := estimate.layers(record)) is not None:
            words = "part of the parameter tensor"
            found[f"layer_{name}"] = Variable(("layer",), layers[0], "1", words)
            found[f"layer_{name}_stderr"] = Variable(("layer",), layers[1], "1", "standard error of it")
        if record.attrs["way"] == "layers":
            words = "backward passes over all data, to the layers' outputs"
            found["backward_passes"] = Variable((), np.asarray(record.attrs["columns"]), "1", words)
        return found

    def outlook(self, problem: Problem) -> tuple[int, int]:
        """Predict the passes: those of the exact way, else from the first round to max_probes."""
        part = self.measured(problem)
        order = self.maps(part).size
        way = self._way(part, order, None)
        if way.name in _COUNTED:
            count = way.columns if way.name == "layers" else order
            return count, count
        return min(_FIRST_ROUND, self.max_probes), self.max_probes

    def _way(self, part: Problem, order: int, seed: int | None) -> choice.Way:
        """Choose as for the trace, without its pilot: where it would run, the residual is probed."""
        asked = choice.Asked(self.method, self.curvature, self.max_probes)
        way = choice.choose(asked, part, seed, order=order)
        if not way.piloted:
            return way
        try:
            columns = ggn_trace.columns(part)
        except Refused:
            return way
        plan = Plan("residual")
        if columns > _MOST_COLUMNS:
            plan = replace(plan, outputs=_OUTPUT_PROBES, output_examples=EXAMPLES_PER_PROBE)
        return replace(way, name="residual", plan=plan, reason=f"{way.reason}; what is not of G is probed")

    def _converged(self, value: float, error: float) -> bool:
        return bool(error <= self.rtol * abs(value))

    def _finished(self, record: Record) -> bool:
        done = record["done"]
        if record.attrs["method"] == "exact":
            return bool(done.all())
        return self._converged(*estimate.total(record, len(done)))
