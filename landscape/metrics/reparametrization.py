"""Measures put to the test of Dinh et al.: does a number survive a change of parameters that changes nothing?

T_α multiplies the tensors that lead into a layer by α and those that lead out of it by 1/α: T_α(θ) = Dθ with a
diagonal D. A rectifier network computes the same function at T_α(θ), for every α. Each measure is taken at
every α; so are the change of the function, and the error of ∇²L(T_α θ) = D⁻¹ ∇²L(θ) D⁻¹, by products.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from landscape import operators, seeds, transforms
from landscape.checks import Need
from landscape.errors import Refused
from landscape.estimators import eigsh
from landscape.metrics import registry
from landscape.metrics.base import Metric, Round, Values, evaluate, graphs_fit, setting
from landscape.problem import Problem
from landscape.results import Record, Variable
from landscape.transforms.transformed import Transformed, moved
from landscape.transforms.verdicts import judge

_BUFFER = "buffer_exponents_"


@dataclass(frozen=True)
class Reparametrization(Metric):
    """Whether measures change under α-scale, which leaves the network's function alone.

    A verdict for each measure: "invariant"; "covariant", proportional to α^p; "broken", neither, so that its value
    alone says nothing about the function; "undefined", not a number or of unknown error. A headline that is a
    logarithm (of a volume) is judged by the number that it is the logarithm of.

    Source: Dinh et al. 2017 (arXiv 1703.04933), definition 5 and theorem 4.
    """

    name: ClassVar[str] = "reparametrization"
    headline: ClassVar[str] = "exponent"
    unit: ClassVar[str] = "alpha"
    block: ClassVar[int] = 1
    citation: ClassVar[str] = "Dinh et al. 2017, arXiv:1703.04933"
    told: ClassVar[tuple[str, ...]] = ("largest_function_change", "largest_hessian_identity_error")
    listed: ClassVar[tuple[str, ...]] = ("verdict", "exponent", "reference", "smallest", "largest", "note")

    measures: tuple[str, ...] = setting(
        ("trace", "spectral_norm", "adaptive_trace"),
        "metrics by name, followed by their headline; their fields after colons: sharpness:definition=ball",
    )
    alpha: tuple[float, ...] = setting((0.01, 0.1, 1.0, 10.0, 100.0), "factors α of T_α")
    layers: str = setting("auto", "auto: the first symmetry in forward order; all; or a layer's name")
    tolerance: float = setting(0.02, "relative change that counts as none, beside a measure's standard error")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.alpha) < 2 or not all(0 < a < math.inf for a in self.alpha):
            raise ValueError(f"alpha is {self.alpha}; allowed are two positive numbers or more")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; allowed is a number between 0 and 1")
        if not self.measures or len(set(self.measures)) < len(self.measures):
            raise ValueError(f"measures is {self.measures}; allowed is one or more, none of them twice")
        for spec in self.measures:
            measure_of(spec)

    def needs(self) -> frozenset[Need]:
        """What the measures need, and products with the Hessian."""
        return frozenset({Need.HESSIAN}).union(*(measure_of(spec).needs() for spec in self.measures))

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Find the symmetry, and take the measures where the network stands."""
        found = transforms.find(problem)
        chosen = found.groups if self.layers == "all" else (found.group(self.layers),)
        exponents, buffers = found.direction([group.index for group in chosen])
        powers = {
            name: _powers(exponents[start:stop]) for name, (start, stop) in problem.space.ranges.items()
        }
        reference, notes = np.full(len(self.measures), np.nan), [""] * len(self.measures)
        blocks = np.full((len(self.measures), len(problem.names)), np.nan)
        for i, spec in enumerate(self.measures):
            try:
                record = evaluate(measure_of(spec), problem, seed)
            except Refused as error:
                notes[i] = " ".join(str(error).split())[:200]
                continue
            reference[i], stderr = headline(spec, record)
            if not math.isfinite(stderr):
                notes[i] = "no standard error can be given"
            if "layer_trace" in record and all(len(p) == 1 for p in powers.values()):
                blocks[i] = record["layer_trace"]
        variables = {
            "measure": Variable(("measure",), np.array(self.measures), "", "measure"),
            "reference": Variable(("measure",), reference, "1", "value at θ"),
            "logarithmic": Variable(
                ("measure",),
                np.array([is_logarithm(m) for m in self.measures]),
                "",
                "whether it is a logarithm",
            ),
            "note": Variable(("measure",), np.array(notes), "", "why a measure is not defined here"),
            "blocks": Variable(("measure", "tensor"), blocks, "1", "trace of each tensor's block at θ"),
            "block_powers": Variable(
                ("tensor",), np.array([p[0] for p in powers.values()]), "1", "p of each tensor, its first"
            ),
            "parameter_exponents": Variable(
                ("parameter",), exponents.numpy(), "1", "p in D = diag(α^p)", sidecar=True
            ),
        }
        for i, power in enumerate(buffers.values()):
            variables[f"{_BUFFER}{i}"] = Variable(
                (f"buffer_{i}_entry",), power.reshape(-1).numpy(), "1", "p of a buffer that moves"
            )
        return Record(variables, {
            "layers_moved": ", ".join(group.name for group in chosen),
            "moved": json.dumps({name: p for name, p in powers.items() if p != [0.0]}),
            "moved_buffers": json.dumps(list(buffers)),
            "moved_exactly": all(group.exact for group in chosen),
            "excluded": json.dumps(dict(found.excluded)),
            "measured_seed": seed,
        })  # fmt: skip

    def units(self, record: Record) -> Round | None:
        """Ask for all α at once."""
        if record.attrs["stop"]:
            return None
        alpha = Variable(("alpha",), np.array(self.alpha), "1", "factor α of the incoming tensors")
        return Round(len(self.alpha), {"alpha": alpha})

    def measure(
        self,
        problem: Problem,
        shared: Record,
        block: range,
        generators: Sequence[torch.Generator],  # noqa: ARG002  (all α of a measure share one stream)
    ) -> Values:
        """Move the network, test that nothing has changed, and take every measure there."""
        seed, shape = shared.attrs["measured_seed"], (len(block), len(self.measures))
        values, errors, predicted = (np.full(shape, np.nan) for _ in range(3))
        changes, identity = np.zeros(len(block)), np.zeros(len(block))
        for row, unit in enumerate(block):
            there = self._moved(problem, shared, self.alpha[unit])
            changes[row] = there.function_change
            identity[row] = self._identity_error(problem, shared, self.alpha[unit], seed)
            for column, spec in enumerate(self.measures):
                if np.isnan(shared["reference"][column]):
                    continue
                with contextlib.suppress(Refused):  # defined at θ, not here: it stays nan
                    record = evaluate(measure_of(spec), there.problem, seed, memory=shared.attrs["memory"])
                    values[row, column], errors[row, column] = headline(spec, record)
                predicted[row, column] = self._predicted(column, problem, there, shared, self.alpha[unit])
        pair = ("alpha", "measure")
        return {
            "value_at": Variable(pair, values, "1", "value of each measure"),
            "stderr_at": Variable(pair, errors, "1", "its standard error, where it has one"),
            "predicted_at": Variable(
                pair, predicted, "1", "what follows from the Hessian at θ, where that is known"
            ),
            "function_change": Variable(("alpha",), changes, "1", "max|f(T θ) - f(θ)| / max|f(θ)|"),
            "hessian_identity_error": Variable(
                ("alpha",), identity, "1", "‖(D H(T θ) D - H(θ)) w‖ / ‖H(θ) w‖ for a random w"
            ),
        }

    def summarize(self, record: Record) -> Values:
        """Judge every measure."""
        values, errors, alpha = record["value_at"].T, record["stderr_at"].T, record["alpha"]
        done = record["done"]
        found = [
            judge(alpha[done], v[done], e[done], self.tolerance, logarithmic=is_logarithm(spec))
            for spec, v, e in zip(self.measures, values, errors, strict=True)
        ]
        named, pair = ("measure",), ("measure", "alpha")
        return {
            "value": Variable(pair, values, "1", "value of each measure at each α"),
            "value_stderr": Variable(pair, errors, "1", "its standard error, where it has one"),
            "predicted": Variable(
                pair, record["predicted_at"].T, "1", "what follows from the Hessian at θ, where that is known"
            ),
            "verdict": Variable(named, np.array([f.verdict for f in found]), "", "verdict"),
            "exponent": Variable(named, np.array([f.exponent for f in found]), "1", "p of value ∝ α^p"),
            "factor": Variable(
                named, np.array([f.factor for f in found]), "1", "largest over smallest value"
            ),
            "smallest": Variable(named, values[:, done].min(axis=1), "1", "smallest value over α"),
            "largest": Variable(named, values[:, done].max(axis=1), "1", "largest value over α"),
            "largest_function_change": Variable((), record["function_change"][done].max(), "1", "over all α"),
            "largest_hessian_identity_error": Variable(
                (), record["hessian_identity_error"][done].max(), "1", "over all α"
            ),
        }

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """An exponent stays."""
        return {self.headline: 0.0}

    def outlook(self, problem: Problem) -> tuple[int, int]:
        """Predict what the measures need, at θ and at every α, and two products for the identity."""
        each = [measure_of(spec).outlook(problem) for spec in self.measures]
        times = len(self.alpha) + 1
        return tuple(times * (sum(found) + 2) for found in zip(*each, strict=True))

    def _moved(self, problem: Problem, shared: Record, alpha: float) -> Transformed:
        held = problem.buffers()
        buffers = {}
        for i, name in enumerate(json.loads(shared.attrs["moved_buffers"])):
            power = torch.from_numpy(np.array(shared[f"{_BUFFER}{i}"])).reshape(held[name].shape)
            buffers[name] = (held[name].double() * (alpha**power).to(held[name].device)).to(held[name].dtype)
        diagonal = alpha ** torch.from_numpy(np.array(shared["parameter_exponents"]))
        exact = bool(shared.attrs["moved_exactly"])
        return moved(problem, diagonal=diagonal, buffers=buffers, exact=exact, name=f"α-scale {alpha:g}")

    def _identity_error(self, problem: Problem, shared: Record, alpha: float, seed: int) -> float:
        """How far H(T θ) is from D⁻¹ H(θ) D⁻¹ along a random direction, in float64 where the model runs in it."""
        wide = problem if problem.dtype == torch.float64 else problem.in_float64() or problem
        there = self._moved(wide, shared, alpha)
        draws = seeds.generator(seed, f"{self.name}/direction", 0)
        w = torch.randn(problem.size, dtype=torch.float64, generator=draws).to(wide.device, wide.dtype)
        here = wide.hvp(w)
        pushed = there.push(there.problem.hvp(there.push(w)))
        size = float(here.double().norm())
        return float((pushed - here).double().norm()) / size if size else float(pushed.double().norm())

    def _predicted(
        self, column: int, problem: Problem, there: Transformed, shared: Record, alpha: float
    ) -> float:
        """The value that D⁻¹ H(θ) D⁻¹ has: of a trace from its blocks at θ, of a spectral norm by products at θ."""
        metric, memory, seed = (
            measure_of(self.measures[column]),
            shared.attrs["memory"],
            shared.attrs["measured_seed"],
        )
        if np.isfinite(shared["blocks"][column]).all():
            return float(shared["blocks"][column] @ alpha ** (-2 * shared["block_powers"]))
        if metric.name == "spectral_norm":
            matrix = operators.named(problem, metric.curvature, layer=metric.layer)  # type: ignore[attr-defined]
            if matrix.shape[0] == problem.size:
                with problem.keeping_graphs() if graphs_fit(problem, memory) else contextlib.nullcontext():
                    pair = eigsh(_Congruent(matrix, there), 1, "both", rtol=metric.rtol, seed=seed)  # type: ignore[attr-defined]
                return float(pair.values.abs().max())
        return math.nan


class _Congruent:
    """D⁻¹ A D⁻¹ of a matrix A at θ."""

    def __init__(self, matrix: operators.Operator, there: Transformed):
        self._matrix, self._there = matrix, there
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    def __matmul__(self, V: Tensor) -> Tensor:
        return self._there.cotangent(self._matrix @ self._there.pull(V))


def _powers(exponents: Tensor) -> list[float]:
    """The different exponents of a tensor."""
    return [float(p) for p in np.unique(exponents.numpy())]


def headline(spec: str, record: Record) -> tuple[float, float]:
    """The first number of a measure's headline, and its standard error, 0 where it has none."""
    name = measure_of(spec).headline
    error = record[f"{name}_stderr"] if f"{name}_stderr" in record else np.zeros(1)
    return float(np.ravel(record[name])[0]), float(np.ravel(error)[0])


def is_logarithm(spec: str) -> bool:
    """Whether a measure's headline is a natural logarithm."""
    return measure_of(spec).headline.startswith("log_")


def measure_of(spec: str) -> Metric:
    """Return the metric that a text names, `name` or `name:field=value:field=value`.

    Raises:
        ValueError: for a field that it does not have, or a value that it does not allow.
        UnknownMetric: for a name that is none.
    """
    name, *settings = spec.split(":")
    metric = registry.load(name)
    if metric is Reparametrization:
        raise ValueError("measures holds 'reparametrization' itself; allowed are the other metrics")
    fields = {field.name: field.default for field in dataclasses.fields(metric)}
    given: dict[str, Any] = {}
    for text in settings:
        key, sign, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or key not in fields:
            raise ValueError(
                f"measure {spec!r}: {text!r} sets no field of {name}; allowed are {', '.join(fields)}, as "
                f"{name}:{next(iter(fields), 'field')}=value"
            )
        given[key] = _parsed(value, fields[key])
    return metric(**given)


def _parsed(text: str, default: Any) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return (value,) if isinstance(default, tuple) and not isinstance(value, tuple) else value
