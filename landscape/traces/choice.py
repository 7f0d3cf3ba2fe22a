"""Which way leads to a trace: from what was asked for, shapes, the network's graph, and a pilot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from landscape import ggn_trace, structure
from landscape.errors import Refused
from landscape.problem import Problem
from landscape.record import Variable
from landscape.traces import pilot, values
from landscape.traces.plan import EXAMPLES_PER_PROBE, Plan


class Settings(Protocol):
    """What of the metric's fields decides; see `landscape.metrics.Trace`."""

    @property
    def method(self) -> str:
        """How."""

    @property
    def curvature(self) -> Literal["hessian", "ggn"]:
        """Of which matrix."""

    @property
    def max_probes(self) -> int:
        """The most passes."""

    @property
    def frobenius(self) -> bool:
        """Whether ‖A‖_F is wanted too."""

    @property
    def per_layer(self) -> bool:
        """Whether traces per tensor are wanted."""

    @property
    def deflate(self) -> int:
        """Number of eigenvectors that are taken out."""

    @property
    def probe_dtype(self) -> str:
        """Precision of probes."""


@dataclass(frozen=True)
class Asked:
    """Settings of a trace that has few of them; see `Settings`.

    Attributes:
        method: how.
        curvature: of which matrix.
        max_probes: the most passes.
    """

    method: str
    curvature: Literal["hessian", "ggn"]
    max_probes: int
    frobenius: bool = False
    per_layer: bool = True
    deflate: int = 0
    probe_dtype: str = "working"


@dataclass(frozen=True)
class Way:
    """How a trace is made.

    Attributes:
        name: of the way.
        reason: why this one, in words.
        columns: passes of the exact way.
        plan: of its probes, where they are drawn anew for each micro-batch.
        piloted: whether a pilot has yet to say which plan.
    """

    name: str
    reason: str
    columns: int = 0
    plan: Plan | None = None
    piloted: bool = False


def choose(asked: Settings, problem: Problem, seed: int | None, *, order: int | None = None) -> Way:
    """Choose the way.

    Args:
        asked: settings.
        problem: of whose matrix.
        seed: without one, networks are recognised but not verified.
        order: number of unit vectors that give the whole trace, if not the number of parameters.
    """
    if asked.method in {"hutchpp", "xtrace"}:
        return Way("estimates", "asked for")
    if asked.deflate:
        return Way("deflated", "asked for")
    if asked.method in {"residual", "differences"}:
        return Way(asked.method, "asked for", piloted=True)
    columns, obstacle = (0, "asked for") if asked.method == "hutchinson" else _columns(asked, problem, seed)
    equal = not obstacle  # tr A = tr G, which output-space probes reach at one backward pass each
    if equal and columns <= asked.max_probes:
        return Way("layers", "per-example gradient norms give the trace exactly", columns)
    if equal:
        obstacle = f"it would take {columns} passes, more than max_probes = {asked.max_probes}"
    if asked.method == "exact" or (asked.method == "auto" and (order or problem.size) <= asked.max_probes):
        return Way("unit_vectors", obstacle)
    if asked.frobenius or not problem.apart:
        return Way("shared_probes", obstacle)
    if (equal or asked.curvature == "ggn") and asked.probe_dtype == "working" and _sampled_works(problem):
        plan = Plan("ggn", outputs=1, output_examples=EXAMPLES_PER_PROBE)
        return Way("output_probes", obstacle, plan=plan)
    return Way(
        "probes",
        obstacle,
        plan=_in_its_precision(asked, problem, Plan(asked.curvature)),
        piloted=asked.method == "auto" and asked.curvature == "hessian" and _can_pilot(problem),
    )


def piloted(asked: Settings, problem: Problem, seed: int, way: Way) -> tuple[Way, values.Values]:
    """Let a pilot choose the plan; return also what it measured.

    Raises:
        Refused: if the residual is asked for, and cannot be had.
    """
    if asked.method == "residual":
        problem.require_outputs("the residual H - G")
    if not _can_pilot(problem):
        raise Refused(
            f"method={asked.method!r} takes examples apart and needs products by autodiff; this problem has "
            f"mode={problem.mode!r} and products={problem.products!r}. Use method='hutchinson'."
        )
    measured = pilot.run(problem, seed)
    both = asked.method == "auto" and not asked.per_layer and asked.probe_dtype == "working"
    forms = ["differences"] if asked.method == "differences" else ["products"]
    chosen, words = pilot.choose(
        measured,
        matrices=["residual"] if asked.method == "residual" else ["hessian", "residual"],
        forms=["products", "differences"] if both else forms,
    )
    plan = _in_its_precision(asked, problem, chosen.plan)
    found = values.of_pilot(measured)
    if chosen.exact_ggn:
        blocks = ggn_trace.averaged(problem)
        found["exact_layer_part"] = Variable(("layer",), blocks, "1", "trace of the block of G, exact")
    name = "differences" if plan.form == "differences" else _NAMES[plan.matrix]
    return replace(way, name=name, reason=f"{way.reason}; {words}", plan=plan), found


_NAMES = {"hessian": "probes", "residual": "residual", "ggn": "output_probes"}


def _columns(asked: Settings, problem: Problem, seed: int | None) -> tuple[int, str]:
    """Passes that per-example gradient norms take, and what stands against them; empty if nothing does."""
    if asked.frobenius:
        return 0, "the Frobenius norm needs products"
    if not problem.apart:
        return 0, "other processes hold a part of the model"
    if not problem.evaluator.has_outputs:
        return 0, "forward= hides the outputs"
    try:
        columns = ggn_trace.columns(problem)
    except Refused as refusal:
        return 0, str(refusal)
    if asked.curvature == "ggn":
        return columns, ""
    verdict = structure.multilinear(problem)
    if not verdict.recognized:
        return columns, f"tr H is not tr G: {verdict.reason}"
    if seed is None or (found := structure.verify(problem, seed=seed)).passed:
        return columns, ""
    off = f"vᵀRv/vᵀGv up to {found.worst:.1e}, {found.failed[0]}"
    return columns, f"tr H = tr G was recognised but not confirmed: {off}"


def _sampled_works(problem: Problem) -> bool:
    try:
        return ggn_trace.columns(problem) > 0
    except Refused:
        return False


def _can_pilot(problem: Problem) -> bool:
    """Whether examples may be taken one by one, and the tangent of the loss stays where it is."""
    return problem.mode == "eval" and problem.products != "difference"


def _in_its_precision(asked: Settings, problem: Problem, plan: Plan) -> Plan:
    if asked.probe_dtype == "working":
        return plan
    if problem.dtype != torch.float32:
        raise Refused(
            f"probe_dtype='bfloat16' makes products of float32 problems cheaper, this one has {problem.dtype}; "
            "use Problem(..., dtype=torch.float32), or leave probe_dtype alone"
        )
    return replace(plan, bfloat16=True, pair_examples=plan.examples)
