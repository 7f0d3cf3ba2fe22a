"""The pilot: the estimators in miniature on a few examples, from which the way to a smooth trace is chosen.

What is compared is work × variance. Work is counted in operations, from shapes; so is how many examples share
a probe. Independent probes of small groups never scatter more than shared ones, but each group's probe must
be drawn and read off: groups are as small as keeps that below half of the passes. The variance of probes of H,
of R = H − G and of output-space probes of G is measured on a few examples with those groups. Nothing of the
pilot enters the estimate, whose probes are drawn afresh, so that the choice cannot bias it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from landscape import batches as batching
from landscape import ggn_trace, seeds
from landscape.errors import Refused
from landscape.estimators.stopping import stopping_counts
from landscape.problem import Problem
from landscape.second_differences import parts, quadratics
from landscape.traces.plan import EXAMPLES_PER_PROBE, PAIRS, Plan
from landscape.traces.probing import averaged, drawn

Array = np.ndarray

# A spread from 12 draws is known to a fifth, the work to reach a tolerance to two fifths: enough to choose by.
_PROBES = 12
# At most so many examples, and at most this share of the data.
_EXAMPLES, _SHARE = 8, 8
_COMPARED = 2
# The standard error, as a share of the trace, for which work is predicted. Not the metric's own rtol: a run
# that is asked for more must go on as it began.
_NOMINAL = 0.01
_FEWEST = 16  # probes, below which an error says little
# Operations per parameter that a probe of a group costs beside its passes: signs are drawn and moved, the result
# is summed and read off. Measured on a GPT at the speed of its forward pass, groups of 2 against 8 and 32.
_DRAWN = {"products": 1600, "differences": 800}
_READ = 130  # of output-space probes, which draw few signs
_OVERHEAD = 0.5  # of the passes, that this may cost at most
# Columns of G up to which it is computed and not probed; more passes belong into units of their own.
_MOST_COLUMNS = 64
# Passes in units of the forward pass's operations F: a reverse pass takes 2 F, a product on its graph 6 F.
_FORWARD, _REVERSE, _PRODUCT = 1, 2, 6
_DIFFERENCE = 2 * _FORWARD
_BLOCK = 16  # probes that share a graph
# Share of a probe's spread up to which second differences are products but for a small correction. At kinks
# (ReLU) they are not, and say nothing of the spread of products either.
_FAITHFUL = 0.3


@dataclass(frozen=True)
class Pilot:
    """What the pilot measured, on the first examples of the data.

    Attributes:
        residual: v·Rv by second differences, one value per probe; for `forward=` v·Hv.
        ggn: v·Gv along the same probes; for `forward=` 0.
        output: output-space probes of G; None where G has no columns.
        products: v·Hv by products, of the first probes on the first group.
        differences: the same by second differences.
        measured: number of examples that were measured.
        size: number n of parameters.
        examples: number of examples in the data, or of batches where examples cannot be told apart.
        largest: examples of the first micro-batch; groups do not reach beyond one.
        operations: of a forward pass of one example.
        columns: backward passes that exact G takes; None where it cannot be had.
    """

    residual: Array
    ggn: Array
    output: Array | None
    products: Array
    differences: Array
    measured: int
    size: int
    examples: int
    largest: int
    operations: float
    columns: int | None

    @property
    def off(self) -> float:
        """What second differences miss of one probe of the first group."""
        return float(np.sqrt(np.mean((self.products - self.differences) ** 2)))


@dataclass(frozen=True)
class Candidate:
    """A plan, and what it is predicted to cost.

    Attributes:
        plan: what the probes are.
        variance: of a unit, relative to the trace squared.
        work: of a unit, in operations.
        fixed: work that is paid once.
        exact_ggn: whether tr G is computed and not probed.
        missed: error that is left of what second differences miss, relative to the trace.
    """

    plan: Plan
    variance: float
    work: float
    fixed: float = 0.0
    exact_ggn: bool = False
    missed: float = 0.0

    @property
    def units(self) -> int:
        """Units for the nominal tolerance, which is tested at some counts only."""
        wanted = max(_FEWEST, math.ceil(self.variance / _NOMINAL**2))
        return next(count for count in stopping_counts(_FEWEST, 2 * wanted) if count >= wanted)

    @property
    def total(self) -> float:
        """Work for the nominal tolerance, in operations."""
        return self.fixed + self.units * self.work


def run(problem: Problem, seed: int) -> Pilot:
    """Measure what `choose` needs, on a few examples of the first micro-batch."""
    count = problem.examples()
    if count is None:
        count = sum(1 for _ in problem.evaluator.cut(problem.batches))
    first, _ = next(problem.split(max(1, min(_EXAMPLES, count // _SHARE))))
    largest, measured = (
        _examples(next(iter(problem.evaluator.cut(problem.batches)))),
        _examples(next(iter(first.batches))),
    )
    streams = [seeds.generator(seed, "trace pilot", i) for i in range(2 * _PROBES)]
    with problem.session():
        operations = _operations(first) / measured
        group = _group(_PRODUCT, _DRAWN["products"], problem.size / operations, largest)
        both = averaged(
            first, group, lambda part: drawn(part, streams[:_PROBES]), parts,
            torch.zeros(_PROBES, 2, dtype=torch.float64),
        )  # fmt: skip
        residual, ggn = both.T.numpy()
        products, differences = _compared(first, group, seed)
        group = _group(_REVERSE, _READ, problem.size / operations, largest)
        output, columns = _outputs(first, group, streams[_PROBES:])
    return Pilot(
        residual,
        ggn,
        output,
        products,
        differences,
        measured,
        problem.size,
        count,
        largest,
        operations,
        columns,
    )


def choose(pilot: Pilot, *, matrices: Sequence[str], forms: Sequence[str]) -> tuple[Candidate, str]:
    """Return the candidate of least predicted work, and why it is, in words.

    Args:
        pilot: what was measured.
        matrices: that may be probed, of "hessian" and "residual".
        forms: of probes that may be used, of "products" and "differences".

    Raises:
        Refused: if only the residual may be probed, and tr G cannot be had.
    """
    hessian = pilot.residual + pilot.ggn
    spread = float(hessian.std(ddof=1))
    if pilot.off > _FAITHFUL * spread and "hessian" in matrices and "products" in forms:
        words = f"second differences are off by {pilot.off:.1e} where probes spread by {spread:.1e}: kinks"
        return Candidate(Plan("hessian"), math.nan, math.nan), words
    found = sorted(_candidates(pilot, matrices, forms), key=lambda c: c.total)
    if not found:
        raise Refused(
            "the trace of G, which the residual H - G leaves out, cannot be had for this loss and these outputs; "
            "use method='hutchinson'"
        )
    best = found[0]
    other = next((c for c in found if c.plan.matrix != best.plan.matrix), None)
    words = f"least predicted work for {_NOMINAL:.0%}: {_words(best, pilot)}"
    return best, words + (f"; {_words(other, pilot)}" if other else "")


def _words(candidate: Candidate, pilot: Pilot) -> str:
    gradient = (_FORWARD + _REVERSE) * pilot.operations * pilot.examples
    plan = candidate.plan
    what = f"{plan.matrix} by {plan.form}, groups of {plan.examples}"
    if plan.outputs:
        what += f", {plan.outputs} output-space probes of G, groups of {plan.output_examples}"
    if candidate.exact_ggn:
        what += ", exact G"
    return f"{what}: {candidate.total / gradient:.0f} gradients"


def _candidates(pilot: Pilot, matrices: Sequence[str], forms: Sequence[str]) -> Iterator[Candidate]:
    scale = abs(float((pilot.residual + pilot.ggn).mean())) or 1.0
    for form, matrix in itertools.product(forms, matrices):
        probed = _probed(pilot, matrix, form, scale)
        # The correction must not be what decides; where nothing else is allowed, its error is stated.
        if "products" in forms and probed.missed > _FAITHFUL * _NOMINAL:
            continue
        if matrix == "hessian":
            yield probed
        else:
            yield from _with_ggn(pilot, probed, scale)


def _with_ggn(pilot: Pilot, residual: Candidate, scale: float) -> Iterator[Candidate]:
    """Probes of R together with the ways to tr G."""
    passes = _REVERSE * pilot.operations * pilot.examples
    if pilot.columns is not None and pilot.columns <= _MOST_COLUMNS:
        yield replace(residual, fixed=residual.fixed + pilot.columns * passes, exact_ggn=True)
    if pilot.output is None:
        return
    h = _group(_REVERSE, _READ, pilot.size / pilot.operations, pilot.largest)
    variance = _over_all(pilot, pilot.output, h) / scale**2
    work = passes * (1 + _FORWARD / _BLOCK / _REVERSE) + _READ * pilot.size * _groups(pilot, h)
    for count in (1, 2, 4, 8):
        yield replace(
            residual,
            plan=replace(residual.plan, outputs=count, output_examples=h),
            variance=residual.variance + variance / count,
            work=residual.work + count * work,
        )


def _probed(pilot: Pilot, matrix: str, form: str, scale: float) -> Candidate:
    """Probes of H or of R."""
    passes = pilot.operations * pilot.examples
    each = _PRODUCT if form == "products" else _DIFFERENCE
    shared = (_FORWARD + _REVERSE if form == "products" else _FORWARD) / _BLOCK
    g = _group(each, _DRAWN[form], pilot.size / pilot.operations, pilot.largest)
    values = pilot.residual if matrix == "residual" else pilot.residual + pilot.ggn
    variance = _over_all(pilot, values, g) / scale**2
    work = (each + shared) * passes + _DRAWN[form] * pilot.size * _groups(pilot, g)
    if form == "products":
        return Candidate(Plan(matrix, "products", g), variance, work)  # type: ignore[arg-type]
    pair = max(1, min(g, round(pilot.examples / PAIRS)))
    plan = Plan(matrix, "differences", g, pair_examples=pair)  # type: ignore[arg-type]
    compared = (
        pair * pilot.operations * (_PRODUCT + _REVERSE + 2 * _DIFFERENCE) + sum(_DRAWN.values()) * pilot.size
    )
    return Candidate(plan, variance, work, PAIRS * compared, missed=pilot.off / scale / PAIRS**0.5)


def _group(passes: float, overhead: float, ratio: float, largest: int) -> int:
    """Examples that share a probe: as few as keep its overhead below a share of the passes, a power of 2.

    Args:
        passes: of an example, in forward passes.
        overhead: operations per parameter.
        ratio: parameters over operations of a forward pass of an example.
        largest: that a group may have.
    """
    wanted = overhead * ratio / (passes * _OVERHEAD)
    return min(int(2 ** max(0, math.ceil(math.log2(wanted)))), EXAMPLES_PER_PROBE, largest)


def _groups(pilot: Pilot, g: int) -> float:
    return max(1.0, pilot.examples / g)


def _over_all(pilot: Pilot, values: Array, g: int) -> float:
    """The variance over all data from that on a few: groups are independent; within one, examples agree."""
    return float(values.var(ddof=1)) * min(1.0, max(g, pilot.measured) / pilot.examples)


def _compared(first: Problem, group: int, seed: int) -> tuple[Array, Array]:
    """v·Hv by products and by second differences, on the first group."""
    part, _ = next(first.split(group))
    V = drawn(part, [seeds.generator(seed, "trace pilot comparison", i) for i in range(_COMPARED)])
    exact = (V.double() * part.hvp(V).double()).sum(0)
    return exact.cpu().numpy(), quadratics(part, V).numpy()


def _outputs(
    first: Problem, group: int, streams: Sequence[torch.Generator]
) -> tuple[Array | None, int | None]:
    """Output-space probes of G, and its columns."""
    try:
        columns = ggn_trace.columns(first)
        parts = [(ggn_trace.sampled(part, streams).sum(axis=1), w) for part, w in first.split(group)]
    except Refused:
        return None, None
    return np.average([found for found, _ in parts], axis=0, weights=[w for _, w in parts]), columns


def _operations(problem: Problem) -> float:
    """Operations of a forward pass, multiplications and additions; at least two per parameter."""
    piece = next(iter(problem.batches))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), problem.filled(problem.leaves()), counter:
        if problem.evaluator.has_outputs:
            problem.evaluator.outputs(piece)
        else:
            problem.evaluator.loss_of(piece)
    return float(max(counter.get_total_flops(), 2 * problem.size))


def _examples(piece: Any) -> int:
    """The number of examples; 1 where they cannot be told apart."""
    try:
        return batching.examples(piece)
    except ValueError:
        return 1
