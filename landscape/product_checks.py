"""Whether products by autodiff are right, and how they are made where not.

Some layers have no second derivative and some a wrong one: the first product of a problem is compared with
differences of gradients, and what was found decides for all that follow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from landscape import averages, seeds, vectors
from landscape import batches as batching
from landscape.errors import Refused

if TYPE_CHECKING:
    from landscape.problem import Problem

Matrix = Literal["hessian", "ggn"]

# ‖h v‖ / (1 + ‖θ‖) of the reference differences. Steps over 1e-5 cross ReLU kinks; several steps tell a
# kink (differences that do not settle) from a wrong product (differences that agree with each other).
_STEPS = (1e-6, 1e-7, 1e-8)
_STEPS_FLOAT32 = (1e-2, 3e-3, 1e-3)  # where the model cannot run in float64
# A wrong second derivative is off by per cents (4 % for the mildest case known); differences in float64
# are good to 1e-6.
_PRODUCT_TOLERANCE = 1e-3
_EXAMPLES = 8
# Parameters beyond which one example in their own precision has to do, one vector at a time: the float64
# copies would take more memory than the products that are checked.
LARGE = 2**25
# Distance from θ, relative to 1 + ‖θ‖, at which products are checked: far beyond the steps above.
_ASIDE = 1e-3


@dataclasses.dataclass(frozen=True)
class ProductCheck:
    """How products with one matrix are made, and what checking them gave.

    Attributes:
        products: "autodiff" or "difference".
        error: ‖Av − difference of gradients‖ / ‖Av‖; of differences, how far neighbouring steps agree.
        symmetry: |uᵀAv − vᵀAu| relative to its scale; NaN for differences.
        reason: why not by autodiff, or what could not be decided; empty if all is well.
    """

    products: str
    error: float
    symmetry: float
    reason: str


def summary(found: Mapping[str, ProductCheck]) -> dict[str, Any]:
    """Sum up the checks of one or two matrices in plain values: the worst errors, and each check."""
    made = {matrix: check.products for matrix, check in sorted(found.items())}
    told = made if len(set(made.values())) > 1 else {}
    reasons = [check.reason for _, check in sorted(found.items()) if check.reason]
    return {
        "product_error": _worst(check.error for check in found.values()),
        "symmetry_error": _worst(check.symmetry for check in found.values()),
        "products": ", ".join(f"{m} by {way}" for m, way in told.items())
        or next(iter(made.values()), "not needed"),
        "reason": "; ".join(dict.fromkeys(reasons)),
        "product_checks": {matrix: dataclasses.asdict(check) for matrix, check in sorted(found.items())},
    }


def stored(check: Mapping[str, Any]) -> dict[str, ProductCheck]:
    """Return the checks that `summary` told of."""
    return {matrix: ProductCheck(**values) for matrix, values in check.get("product_checks", {}).items()}


def _worst(errors: Iterable[float]) -> float:
    return max((error for error in errors if not math.isnan(error)), default=math.nan)


def run(problem: Problem, matrix: Matrix) -> ProductCheck:
    """Compare products by autodiff with differences of gradients, and with themselves by symmetry.

    On up to 8 examples, in float64 where the model can run in it and is not large, a little aside of θ.

    Args:
        problem: with `products=` "auto", which chooses; or with what is to be tried.
        matrix: "hessian" or "ggn".

    Raises:
        Refused: if products are asked for by autodiff and autodiff is wrong here, or has no way.
    """
    small, u, v = _small(problem)
    if problem.products == "difference":
        return ProductCheck("difference", _against(v, small, matrix)[1], math.nan, "asked for")
    autodiff = small.replace(products="autodiff")
    try:
        Av, symmetry = _products(autodiff, matrix, u, v)
    except RuntimeError as failure:
        reason = f"a layer has no second derivative: {str(failure).strip().splitlines()[0]}"
        if problem.products == "autodiff":
            raise Refused(f"{reason}. Use products='auto' or 'difference'.") from failure
        return ProductCheck("difference", _against(v, small, matrix)[1], math.nan, reason)
    del u
    error, settled = _against(v, small, matrix, Av, steps=1)
    if error > _PRODUCT_TOLERANCE:
        error, settled = _against(v, small, matrix, Av)
    return _verdict(problem, error, symmetry, settled)


def _verdict(problem: Problem, error: float, symmetry: float, settled: float) -> ProductCheck:
    if error <= _PRODUCT_TOLERANCE and symmetry <= _PRODUCT_TOLERANCE:
        return ProductCheck("autodiff", error, symmetry, "")
    if symmetry <= _PRODUCT_TOLERANCE < settled < math.inf:
        reason = (
            "gradient differences do not settle as the step shrinks (a kink at these parameters); "
            "products are those of the smooth pieces"
        )
        return ProductCheck("autodiff", error, symmetry, reason)
    reason = (
        f"autograd's second derivative is wrong here: off by {error:.1%} from gradient differences, "
        f"asymmetric by {symmetry:.1%} (PyTorch's weight_norm is a known case)"
    )
    if problem.products == "autodiff":
        raise Refused(f"{reason}. Use products='auto' or 'difference'.")
    return ProductCheck("difference", error, symmetry, reason)


def _small(problem: Problem) -> tuple[Problem, Tensor, Tensor]:
    """A few examples of the problem, aside of θ, and two random vectors."""
    piece = next(iter(problem.evaluator.pieces(problem.batches)))[0]
    large = problem.size > LARGE
    # In float64 an example takes twice the memory for which a micro-batch was chosen.
    most = 1 if large else min(_EXAMPLES, max(1, (problem.microbatch or 2 * _EXAMPLES) // 2))
    try:
        few = batching.cut(piece, 0, min(batching.examples(piece), most))
        if problem.evaluator.weigh(few) > 0:
            piece = few
    except ValueError:
        pass
    small = problem.replace(data=[piece], microbatch=None)
    small.cost = type(problem.cost)()  # what checking takes is no part of a measurement
    small = _off_kinks(small if large else small.in_float64() or small)
    u, v = (_normal(small, i) for i in range(2))
    for start, stop in _padding(small):
        u[start:stop] = v[start:stop] = 0.0
    return small, u, v


def _normal(small: Problem, index: int) -> Tensor:
    draws = seeds.generator(0, "check", index)
    return torch.randn(small.size, generator=draws, dtype=torch.float64).to(small.device, small.dtype)


def _padding(problem: Problem) -> list[tuple[int, int]]:
    """Where the padding vectors of embeddings stand in θ.

    They are constants by definition: their gradient is zero although the loss depends on them.
    """
    found, names = [], {id(t): name for name, t in problem.evaluator.slots.tensors.items()}
    for module in problem.evaluator.model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            name = names[id(module.weight)].removeprefix("model.")
            if name in problem.space.ranges:
                start = problem.space.ranges[name][0] + module.padding_idx * module.embedding_dim
                found.append((start, start + module.embedding_dim))
    return found


def _off_kinks(small: Problem) -> Problem:
    """Step aside from points where the gradient jumps.

    Dead units, zero biases and ties of max-pooling put θ exactly on a kink, where differences and
    derivatives differ and neither is wrong. Whether a layer's second derivative is right does not depend
    on the point.
    """
    theta, d = small.parameters_vector(), _normal(small, 2)
    return small.at(d.mul_(_ASIDE * (1 + theta.norm()) / d.norm()).add_(theta))


def _against(
    v: Tensor, small: Problem, matrix: Matrix, Av: Tensor | None = None, steps: int | None = None
) -> tuple[float, float]:
    """Compare with differences of gradients along v, whose steps shrink; two of them are held at once.

    Returns:
        How far Av is from the nearest; and how far neighbouring steps agree, infinite where there are none: small
        for a smooth gradient, large at a kink. Both relative.
    """
    product = averages.ggn_by_differences if matrix == "ggn" else averages.hessian_by_differences
    error = settled = math.inf
    before: Tensor | None = None
    for step in (_STEPS if small.dtype == torch.float64 else _STEPS_FLOAT32)[:steps]:
        reference = product(small, v, step)
        if Av is not None:
            error = min(error, vectors.relative_difference(Av, reference))
        if before is not None:
            settled = min(settled, vectors.relative_difference(before, reference))
        before = reference
        del reference
    return error, settled


def _products(problem: Problem, matrix: Matrix, u: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """Av, and |uᵀAv − vᵀAu| relative to its scale."""
    product = problem.ggn_vp if matrix == "ggn" else problem.hvp
    if problem.size > LARGE:
        vAu, length = _read(v, Au := product(u))
        del Au
        Av = product(v)
    else:
        Au, Av = product(torch.stack([u, v], dim=1)).T
        vAu, length = _read(v, Au)
    uAv, other = _read(u, Av)
    # uᵀAv of random u is about ‖u‖‖Av‖/√n; that is the scale on which a defect shows.
    scale = max(float(u.norm()) * other, float(v.norm()) * length) / math.sqrt(u.numel())
    return Av, abs(uAv - vAu) / scale if scale > 0 else 0.0


def _read(w: Tensor, product: Tensor) -> tuple[float, float]:
    return float(w @ product), float(product.norm())
