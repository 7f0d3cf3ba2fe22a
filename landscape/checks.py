"""Whether a problem can be measured: deterministic, additive, and with right second derivatives.

Every test compares the problem with itself in a way that a wrong adapter cannot pass; what was found is
stored with the result.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from landscape import batches as batching
from landscape import guard, product_checks
from landscape.errors import Refused

if TYPE_CHECKING:
    from landscape.problem import Problem

# Examples on which a model is looked at for parameters used past their modules.
_EXAMPLES = 8
# Examples of a batch that are cut in two, to see whether losses add up.
_ADDED = 256
# Examples that are taken one by one where terms of both signs may cancel.
_SINGLES = 32


class Need(enum.Enum):
    """What a metric asks of a problem."""

    VALUE = "value"
    GRADIENT = "gradient"
    HESSIAN = "hessian"
    GGN = "ggn"
    OUTPUTS = "outputs"
    LABELS = "labels"
    INPUTS = "inputs"


@dataclasses.dataclass(frozen=True)
class Report:
    """What `Problem.check` found.

    Attributes:
        loss: L(θ).
        repeat_difference: |L − L'| / |L| of two passes that start from different random states.
        additivity_error: relative difference between a batch's sum and that of its two parts (NaN where
            no batch could be cut).
        product_error: ‖Av − difference of gradients‖ / ‖Av‖ on one micro-batch (NaN if not checked), the
            worse one where both H and G were checked.
        symmetry_error: |uᵀAv − vᵀAu| relative to its scale (NaN if not checked).
        products: how products are made from here on, "autodiff" or "difference"; "not needed" if not checked.
        reason: why not by autodiff, or what the check could not decide; empty if all is well.
        product_checks: the last four for each matrix, "hessian" or "ggn", as plain values.
        data_fingerprint: of the batches as yielded.
    """

    loss: float
    repeat_difference: float
    additivity_error: float
    product_error: float
    symmetry_error: float
    products: str
    reason: str
    product_checks: dict[str, dict[str, Any]]
    data_fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)


def run(problem: Problem, needs: frozenset[Need], *, products: bool = True) -> Report:
    """Check determinism on all data, additivity on the first batches, and products on one micro-batch.

    Args:
        problem: what is to be measured.
        needs: what of it will be used; products are checked only if asked for.
        products: False leaves products to be checked when the first one is made.

    Raises:
        Refused: with the cause, if a measurement would return a wrong number.
    """
    if needs & {Need.GGN, Need.OUTPUTS, Need.LABELS}:
        problem.require_outputs("this measurement")
    with problem.session():
        loss, repeat, data = _determinism(problem)
        _require_no_bypass(problem)
        additivity = _additivity(problem)
        asked = [need for need in (Need.HESSIAN, Need.GGN) if products and need in needs]
        found = {need.value: problem.check_products(need.value) for need in asked}
    return Report(loss, repeat, additivity, data_fingerprint=data, **product_checks.summary(found))


def _determinism(problem: Problem) -> tuple[float, float, str]:
    # The first pass keeps the batches for all that follows, or takes those that were kept before.
    first, data = _losses_and_fingerprint(problem, problem.batches)
    with guard.other_random_state():
        second, data_again = _losses_and_fingerprint(problem, problem.batches.fresh())
    if data != data_again:
        raise Refused(
            "the data changed between two passes: a loader that shuffles (shuffle=True) or augments at random "
            "yields another loss at every pass. Use shuffle=False and no random augmentation, or a fixed list "
            "of batches."
        )
    if not math.isfinite(first):
        _name_the_bad_batch(problem)
    difference = abs(first - second) / abs(first) if first else abs(second)
    # On a CPU two passes agree to the bit; GPU kernels may add in another order, unless they are told not to.
    exact = problem.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    allowed = 0.0 if exact else 1e3 * torch.finfo(problem.dtype).eps
    if difference > allowed:
        raise Refused(
            f"the loss changed between two passes over the same data, {first!r} then {second!r}: the model is "
            "random" + (" (dropout in training mode? use mode='eval')" if problem.mode == "train" else "")
            + ". A measurement needs a deterministic loss."
        )  # fmt: skip
    return first, difference, data


def _losses_and_fingerprint(problem: Problem, data: Iterable[Any]) -> tuple[float, str]:
    seen = batching.new_digest("")
    total, weights = problem.sums(batching.hashed(data, seen))
    return total / weights, seen.hexdigest()


def _name_the_bad_batch(problem: Problem) -> None:
    for index, batch in enumerate(problem.batches):
        for piece in problem.evaluator.cut([batch]):
            if problem.evaluator.weigh(piece) > 0 and not math.isfinite(problem.sums([piece])[0]):
                bad = [
                    name
                    for name, p in zip(problem.names, problem.leaves(), strict=True)
                    if not p.isfinite().all()
                ]
                inputs = all(t.isfinite().all() for t in batching.tensors(piece) if t.is_floating_point())
                cause = (
                    f"parameters {', '.join(bad[:3])} are not finite" if bad
                    else "the data hold values that are not finite" if not inputs
                    else "parameters and data are finite, so it arises in the model or the loss"
                )  # fmt: skip
                raise Refused(f"the loss is not finite (nan or inf) from batch {index} on: {cause}.")


def _require_no_bypass(problem: Problem) -> None:
    """Refuse a model that reaches a parameter past its modules, where our substitutes do not stand."""
    loss, originals = problem.loss_with_substitutes(_few(problem))
    if not loss.requires_grad or not originals:
        return
    slopes = torch.autograd.grad(loss, list(originals.values()), allow_unused=True)
    past = [name for name, slope in zip(originals, slopes, strict=True) if slope is not None]
    if past:
        raise Refused(
            f"the model uses {', '.join(past[:3])} through a reference of its own (a list, a closure), so that "
            "measured values cannot stand in its place. Use it through the module that registers it."
        )


def _additivity(problem: Problem) -> float:
    """Cut batches in two: the sums of the parts must add up to the sum of the whole."""
    worst, allowed = math.nan, 1e3 * torch.finfo(problem.dtype).eps
    for whole, _ in itertools.islice(problem.evaluator.pieces(problem.batches), 3):
        piece = _first(problem, whole, _ADDED)
        try:
            count = batching.examples(piece)
        except ValueError:
            continue
        if count < 2:
            continue
        middle = (count + 2) // 3
        error = _part_error(problem, piece, [(0, middle), (middle, count)], allowed)
        worst = error if math.isnan(worst) else max(worst, error)
    if worst > allowed:
        raise Refused(
            f"the loss of a batch is not the sum of its parts (relative difference {worst:.2g}, allowed "
            f"{allowed:.0e}), so it cannot be averaged over batches. Either the mean is over something else than "
            "examples (valid tokens, pixels): say so with weight=lambda batch: ...; or the loss is a sum: "
            "reduction='sum'; or examples influence each other (BatchNorm in training mode)."
        )
    return worst


def _part_error(problem: Problem, piece: Any, cuts: list[tuple[int, int]], allowed: float) -> float:
    """|sum of the whole − Σ sums of parts|, relative to Σ |sums of parts|.

    Terms of both signs can cancel in a part. So where the parts seem not to add up, the size of the terms
    is taken from single examples, provided that they add up themselves.
    """
    count, parts = cuts[-1][1], _part_sums(problem, piece, cuts)
    gap, scale = abs(problem.sums([piece])[0] - sum(parts)), sum(map(abs, parts))
    if gap <= allowed * scale or len(cuts) == count:
        return gap / max(scale, torch.finfo(torch.float64).tiny)
    few = min(count, _SINGLES)
    singles = [(i, i + 1) for i in range(few)]
    try:
        alone = _part_error(problem, batching.cut(piece, 0, few), singles, allowed)
        size = sum(map(abs, _part_sums(problem, piece, singles))) * count / few
    except (RuntimeError, ValueError):  # BatchNorm in training mode refuses a single example
        return gap / scale if scale else math.inf
    if not (alone <= allowed and math.isfinite(size)):
        return gap / scale if scale else math.inf
    return max(alone, gap / max(scale, size))


def _part_sums(problem: Problem, piece: Any, cuts: list[tuple[int, int]]) -> list[float]:
    parts = [batching.cut(piece, start, stop) for start, stop in cuts]
    return [problem.sums([part])[0] for part in parts if problem.evaluator.weigh(part) > 0]


def _few(problem: Problem) -> Any:
    """The first examples of the first micro-batch."""
    return _first(problem, next(iter(problem.evaluator.pieces(problem.batches)))[0], _EXAMPLES)


def _first(problem: Problem, piece: Any, count: int) -> Any:
    """That many examples, or the whole micro-batch where these have no weight or cannot be cut out."""
    try:
        few = batching.cut(piece, 0, min(batching.examples(piece), count))
    except ValueError:
        return piece
    return few if problem.evaluator.weigh(few) > 0 else piece
