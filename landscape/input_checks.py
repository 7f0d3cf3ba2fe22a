"""Whether examples decouple, and whether second derivatives with respect to inputs are right; on a few examples."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landscape import batches as batching
from landscape import seeds, vectors
from landscape.errors import Refused
from landscape.example_hessians import Hessians, differences
from landscape.example_scalars import INPUT, ExampleScalars, Setup
from landscape.problem import Problem

_EXAMPLES = 4
_STEPS = (1e-5, 1e-6, 1e-7)
_STEPS_FLOAT32 = (1e-2, 3e-3, 1e-3)  # where the model cannot run in float64
# Distance from the data, relative to 1 + ‖x‖: kinks of the network lie on no special place there.
_ASIDE = 1e-3
_COUPLED, _COUPLED_FLOAT32 = 1e-7, 1e-2
_WRONG = 1e-3  # a wrong second derivative is off by per cents


@dataclass(frozen=True)
class InputCheck:
    """What was found on a few examples.

    Attributes:
        setup: how products are made from here on.
        size: the number d of inputs of an example.
        coupling_error: relative difference of gradients and products of an example alone and among others.
        product_error: ‖Hv - difference of gradients‖ / ‖Hv‖; NaN if nothing is to be compared.
        symmetry_error: |uᵀHv - vᵀHu| over its scale.
        reason: why products are not made by autodiff; empty if they are.
    """

    setup: Setup
    size: int
    coupling_error: float
    product_error: float
    symmetry_error: float
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {**dataclasses.asdict(self), "setup": dataclasses.asdict(self.setup)}


def examine(problem: Problem, setup: Setup, *, products: bool = True) -> InputCheck:
    """Test examples in a batch against themselves alone, and products against differences of gradients.

    Args:
        problem: on whatever data.
        setup: what is differentiated; `wide` and `products` are chosen here.
        products: whether Hessian products will be made.

    Raises:
        Refused: if examples influence each other, cannot be told apart or run alone, or if the input has
            no floating-point number.
    """
    piece = _few(problem)
    setup = dataclasses.replace(setup, wide=_loss_runs_in_float64(problem, piece, setup))
    scalars = ExampleScalars(problem, piece, setup)
    plain = scalars.gradient()
    wide = dataclasses.replace(scalars.in_float64(), setup=dataclasses.replace(setup, products="autodiff"))
    x = wide.points()
    aside, u, v = (_random(plain.shape, i).to(x) for i in range(3))
    aside = aside * (_ASIDE * (1 + x.norm(dim=1, keepdim=True)) / aside.norm(dim=1, keepdim=True))
    try:
        found = _displaced(wide, aside, u, v, products=products)
    except RuntimeError as failure:
        reason = f"a layer has no second derivative: {str(failure).strip().splitlines()[0]}"
        return _by_differences(problem, setup, wide, reason, aside)
    coupling = _coupling(wide, found, aside, u, v, products=products)
    if not products:
        return InputCheck(setup, plain.shape[1], coupling, math.nan, math.nan, "")
    if problem.products == "difference":
        return _by_differences(problem, setup, wide, "asked for", aside)
    error, symmetry, settled = _agreement(wide, found, x, aside, u, v)
    if max(error, symmetry) > _WRONG and not (symmetry <= _WRONG < settled):
        reason = f"autograd's second derivative is off by {error:.1%} from gradient differences"
        return _by_differences(problem, setup, wide, reason, aside)
    return InputCheck(setup, plain.shape[1], coupling, error, symmetry, "")


def numbers_of_an_example(problem: Problem, place: str = INPUT) -> int:
    """Numbers of the first example, whichever of them are its input; or of a module's output for it."""
    batch = next(iter(problem.batches))
    try:
        count = max(1, batching.examples(batch))
    except ValueError:
        count = 1
    if place != INPUT:
        return ExampleScalars(problem, batching.cut(batch, 0, 1), Setup(place=place)).size
    return max(1, sum(t.numel() for t in batching.tensors(batch)) // count)


def _by_differences(
    problem: Problem, setup: Setup, wide: ExampleScalars, reason: str, aside: Tensor
) -> InputCheck:
    if problem.products == "autodiff" and reason != "asked for":
        raise Refused(f"{reason}. Use products='auto' or 'difference'.")
    chosen = dataclasses.replace(setup, products="difference")
    coupling = _coupling(wide, [wide.gradient(aside)], aside, aside, aside, products=False)
    return InputCheck(chosen, aside.shape[1], coupling, math.nan, math.nan, reason)


def _few(problem: Problem) -> Any:
    piece = next(problem.evaluator.pieces(problem.batches))[0]
    try:
        count = batching.examples(piece)
    except ValueError as error:
        raise Refused(f"curvature of single examples: {error}") from error
    few = batching.cut(piece, 0, min(count, _EXAMPLES))
    return few if problem.evaluator.weigh(few) > 0 else piece


def _loss_runs_in_float64(problem: Problem, piece: Any, setup: Setup) -> bool:
    """Whether the loss takes outputs and targets in float64 (its own tensors may be of another type)."""
    if setup.scalar != "loss" or not problem.evaluator.has_outputs or problem.dtype == torch.float64:
        return False
    try:
        ExampleScalars(problem, piece, dataclasses.replace(setup, wide=True)).gradient()
    except RuntimeError:
        return False
    return True


def _displaced(
    scalars: ExampleScalars, aside: Tensor, u: Tensor, v: Tensor, *, products: bool
) -> list[Tensor]:
    """∇f_i, H_i u_i and H_i v_i a little aside of the data."""
    if not products:
        return [scalars.gradient(aside)]
    with contextlib.ExitStack() as held:
        H = Hessians(scalars, held, aside)
        return [H.gradient, *((H @ w[..., None])[..., 0] for w in (u, v))]


def _coupling(
    scalars: ExampleScalars, found: list[Tensor], aside: Tensor, u: Tensor, v: Tensor, *, products: bool
) -> float:
    """How far the first and the last example differ when they are alone."""
    count, worst = len(aside), 0.0
    if count == 1:
        return worst
    for i in {0, count - 1}:
        one = scalars.take(torch.tensor([i], device=aside.device))
        try:
            alone = _displaced(one, *(t[i : i + 1] for t in (aside, u, v)), products=products)
        except (RuntimeError, ValueError) as failure:
            raise Refused(
                "an example cannot be run alone, so its curvature would depend on the others "
                f"({str(failure).strip().splitlines()[0]}); BatchNorm in training mode? Use mode='eval'"
            ) from failure
        differ = [vectors.relative_difference(a[0], b[i]) for a, b in zip(alone, found, strict=True)]
        worst = max([worst, *(d for d in differ if not math.isnan(d))])
    allowed = _COUPLED if aside.dtype == torch.float64 else _COUPLED_FLOAT32
    if worst > allowed:
        raise Refused(
            f"examples influence each other: alone, an example's derivatives differ by {worst:.2g} (relative, allowed "
            f"{allowed:g}) from those in its batch, so it has no curvature of its own. BatchNorm in training "
            "mode? Use mode='eval'"
        )
    return worst


def _agreement(
    scalars: ExampleScalars, found: list[Tensor], x: Tensor, aside: Tensor, u: Tensor, v: Tensor
) -> tuple[float, float, float]:
    """Error of H v against the nearest difference, asymmetry, and how far neighbouring steps agree."""
    _, Hu, Hv = found
    steps = _STEPS if aside.dtype == torch.float64 else _STEPS_FLOAT32
    references = [differences(scalars, x, v, step, around=aside) for step in steps]
    error = min(vectors.relative_difference(Hv, reference) for reference in references)
    settled = min(vectors.relative_difference(a, b) for a, b in itertools.pairwise(references))
    scale = float((u.norm(dim=1) * Hv.norm(dim=1)).sum() / math.sqrt(u.shape[1]))
    asymmetry = float(((u * Hv).sum() - (v * Hu).sum()).abs())
    return error, asymmetry / scale if scale > 0 else 0.0, settled


def _random(shape: torch.Size, index: int) -> Tensor:
    return torch.randn(shape, generator=seeds.generator(0, "input check", index), dtype=torch.float64)
