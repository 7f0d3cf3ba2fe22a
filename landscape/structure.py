"""Whether tr H = tr G: the outputs are piecewise linear in each parameter tensor separately.

H = G + R with R = Σ_i Σ_j (∂ℓ_i/∂f_ij) ∂²f_ij/∂θ². Where f is piecewise linear in each parameter tensor while the
others stand still, R has no diagonal blocks, so that the traces of H and of G agree, tensor by tensor.
That holds for ReLU networks that use each weight once, not for smooth activations, nor for weights that are
tied or shared over depth.

`multilinear` recognises it from the graph of a forward pass, `verify` tests it with numbers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from landscape import batches as batching
from landscape import products, seeds

if TYPE_CHECKING:
    from landscape.problem import Problem

# Nodes of the graph whose output is piecewise linear in all their inputs together.
_LINEAR = frozenset({
    "Alias", "AsStrided", "Clone", "ToCopy", "Contiguous", "Expand", "Repeat", "View", "UnsafeView",
    "ReshapeAlias", "T", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Select", "Slice", "Split",
    "SplitWithSizes", "UnsafeSplit", "Unbind", "Diagonal", "Cat", "Stack", "Index", "IndexSelect",
    "Gather", "Flip", "Roll", "Unfold", "Im2Col", "Col2Im", "Movedim", "ConstantPadNd",
    "ReflectionPad1D", "ReflectionPad2D", "ReplicationPad1D", "ReplicationPad2D", "PixelShuffle",
    "PixelUnshuffle", "Embedding", "MaskedFill", "Tril", "Triu", "Add", "Sub", "Rsub", "Neg", "Sum",
    "Mean", "Cumsum", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D",
    "UpsampleNearest1D", "UpsampleNearest2D", "UpsampleBilinear2D", "Relu", "LeakyRelu", "Threshold",
    "Hardtanh", "Abs", "Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum", "Where",
    "Max", "Min", "Amax", "Amin", "Sort", "Topk", "MaxPool2DWithIndices", "MaxPool3DWithIndices",
    "AdaptiveMaxPool2D", "AdaptiveMaxPool3D",
})  # fmt: skip
# Nodes that are bilinear in two of their inputs, by their places among all inputs, and linear in a third.
_BILINEAR = {
    "Mm": (0, 1), "Bmm": (0, 1), "Mv": (0, 1), "Dot": (0, 1), "Mul": (0, 1), "Addmm": (1, 2), "Baddbmm": (1, 2),
    "Addmv": (1, 2), "Linear": (0, 1), "Convolution": (0, 1), "PreluKernel": (0, 1), "NativeBatchNorm": (0, 1),
    "CudnnBatchNorm": (0, 1),
}  # fmt: skip
# vᵀRv over vᵀGv: rounding in float64 is 1e-12 at worst, the mildest smooth activation tried gives 1e-2.
_TOLERANCE = {torch.float64: 1e-8}
_TOLERANCE_OTHERWISE = 1e-3
# Parts of the trace under this fraction of the largest are measured against that instead of themselves.
_NEGLIGIBLE = 1e-6
# Examples from which those of the test are chosen. A smooth activation shows only where a unit is near its
# bend: of networks with five sharp units, one example overlooked 1 in 6, 32 none of 60. Large networks have
# units enough in one example, and cost more: parameters times examples stay below this.
_CANDIDATES = 32
_AT_MOST = 1 << 18
_DRAWN = 2  # examples on which the graph is drawn: one could look like a dimension to spread along


@dataclass(frozen=True)
class Verdict:
    """What the graph says.

    Attributes:
        recognized: whether the outputs are piecewise linear in each parameter tensor.
        reason: why, in a sentence; names the operation and the tensors that stand against it.
    """

    recognized: bool
    reason: str


@dataclass(frozen=True)
class Verification:
    """What numbers say.

    Attributes:
        ratios: |vᵀRv| / vᵀGv for a random v supported on each parameter tensor.
        worst: the largest of them.
        failed: names of the tensors where it is not rounding.
        tolerance: the most that counts as rounding.
        examples: how many were used.
    """

    ratios: np.ndarray
    worst: float
    failed: list[str]
    tolerance: float
    examples: int

    @property
    def passed(self) -> bool:
        """Whether all diagonal blocks of R vanish."""
        return not self.failed


def multilinear(problem: Problem) -> Verdict:
    """Recognise outputs that are piecewise linear in each parameter tensor, from the graph of a forward pass.

    Every operation must be linear or piecewise linear; a product of two operands is allowed if no measured
    parameter tensor stands in both.

    Args:
        problem: with outputs.

    Raises:
        Refused: on a problem with `forward=`.
    """
    problem.require_outputs("the structure of the network")
    with problem.session(), problem.evaluator.twice_differentiable():
        piece = next(iter(problem.evaluator.pieces(problem.batches)))[0]
        leaves = problem.leaves()
        with problem.filled(leaves):
            outputs = problem.evaluator.outputs(_first(piece, _DRAWN))
        heads = [t.grad_fn for t in batching.tensors(outputs) if t.grad_fn is not None]
        return _walk(heads, {id(leaf): i for i, leaf in enumerate(leaves)}, problem.names)


def verify(problem: Problem, *, seed: int = 0) -> Verification:
    """Test that the diagonal blocks of the residual R vanish, one parameter tensor at a time.

    For a random v supported on one tensor, vᵀRv must be rounding next to vᵀGv. It is measured on those of
    the first 32 examples whose loss has the steepest slope in the outputs, since R is weighted by that slope:
    one of them for a large network, all for a small one; in float64 where the model runs in it. Every
    tensor fails, with nan, if a layer has no second derivative.

    Args:
        problem: with outputs.
        seed: of the vectors v.

    Raises:
        Refused: on a problem with `forward=`.
    """
    problem.require_outputs("the residual of the Gauss-Newton matrix")
    with problem.session():
        chosen = _steepest(problem, next(iter(problem.evaluator.pieces(problem.batches)))[0])
        residual, curvature, dtype = _measured(problem.on([chosen]), seed)
    scale = np.maximum(curvature, _NEGLIGIBLE * curvature.max())
    # Where G vanishes altogether, a ratio says nothing but whether R does as well.
    ratios = np.divide(abs(residual), scale, out=np.where(residual == 0, 0.0, np.inf), where=scale != 0)
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE_OTHERWISE)
    failed = [name for name, ratio in zip(problem.names, ratios, strict=True) if not ratio <= tolerance]
    return Verification(ratios, float(ratios.max()), failed, tolerance, _count(chosen))


def _walk(heads: list[Any], leaves: dict[int, int], names: list[str]) -> Verdict:
    """Find, for every node, the parameter tensors it depends on (as bits), inputs before outputs."""
    depends: dict[Any, int] = {}
    for node in _inputs_first(heads):
        inputs = [0 if source is None else depends[source] for source, _ in node.next_functions]
        union = 0
        for bits in inputs:
            union |= bits
        if hasattr(node, "variable"):
            depends[node] = 1 << leaves[id(node.variable)] if id(node.variable) in leaves else 0
            continue
        depends[node] = union
        if union and (objection := _objection(node, inputs, names)):
            return Verdict(False, objection)
    return Verdict(
        True, "every operation is piecewise linear, and no product has a parameter tensor in both factors"
    )


def _inputs_first(heads: list[Any]) -> Iterator[Any]:
    done: set[Any] = set()
    stack = [(head, False) for head in heads]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack.extend((source, False) for source, _ in node.next_functions if source is not None)


def _objection(node: Any, inputs: list[int], names: list[str]) -> str:
    """What speaks against a node, or nothing."""
    # Functions of the user's own have no number behind "Backward", whatever they are called.
    match = re.fullmatch(r"(\w+)Backward\d+", node.name())
    kind = match[1] if match else node.name()
    if match and kind in _LINEAR:
        return ""
    if match and kind == "Div":
        return _shared("Div", inputs[1] if len(inputs) > 1 else 0, -1, names)
    if match and kind in _BILINEAR:
        if getattr(node, "_saved_training", False):
            return f"{kind} in training mode is not linear in its input"
        first, second = (inputs[i] if i < len(inputs) else 0 for i in _BILINEAR[kind])
        return _shared(kind, first, second, names)
    return f"{kind} is not known to be piecewise linear"


def _shared(kind: str, first: int, second: int, names: list[str]) -> str:
    both = first & second
    if not both:
        return ""
    found = [name for i, name in enumerate(names) if both >> i & 1]
    more = f" and {len(found) - 2} more" if len(found) > 2 else ""
    if kind == "Div":
        return f"Div has {', '.join(found[:2])}{more} in its denominator"
    return f"{kind} has {', '.join(found[:2])}{more} in both factors"


def _first(piece: Any, count: int) -> Any:
    try:
        return batching.cut(piece, 0, min(count, batching.examples(piece)))
    except ValueError:
        return piece


def _count(piece: Any) -> int:
    try:
        return batching.examples(piece)
    except ValueError:
        return 1


def _steepest(problem: Problem, piece: Any) -> Any:
    """Those of the first examples whose loss has the largest slopes in their outputs, as many as are needed."""
    few = _first(piece, _CANDIDATES)
    few = few if problem.evaluator.weigh(few) > 0 else piece
    count, wanted = _count(few), max(1, _AT_MOST // problem.size)
    if count <= wanted:
        return few
    with problem.evaluator.twice_differentiable():
        with torch.no_grad(), problem.filled(problem.leaves()):
            outputs = problem.evaluator.outputs(few)
        detached, slopes = _slopes(problem, outputs, few)
    known = [s.detach() for s in slopes if s is not None]
    if not known or any(not t.ndim or t.shape[0] % count for t in detached):
        return few
    order = torch.cat([s.reshape(count, -1) for s in known], 1).norm(dim=1).argsort(descending=True)
    chosen = order[:wanted].sort().values
    steepest = batching.tree_map(lambda t: t[chosen.to(t.device)], few)
    return steepest if problem.evaluator.weigh(steepest) > 0 else few


def _slopes(problem: Problem, outputs: Any, piece: Any) -> tuple[list[Tensor], products.Optional]:
    """The outputs, cut off, and ∂ℓ/∂f with a graph."""
    detached: list[Tensor] = []

    def cut_off(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        detached.append(t.detach().requires_grad_())
        return detached[-1]

    loss = problem.evaluator.loss_from(
        batching.tree_map(cut_off, outputs), problem.evaluator.target_of(piece)
    )
    return detached, torch.autograd.grad(loss, detached, create_graph=True, allow_unused=True)


def _measured(small: Problem, seed: int) -> tuple[np.ndarray, np.ndarray, torch.dtype]:
    """vᵀRv and vᵀGv, and in which precision; nan where a layer has no second derivative."""
    for dtype in dict.fromkeys((torch.float64, small.dtype)):
        problem = small if dtype == small.dtype else small.replace(dtype=dtype)
        with contextlib.suppress(RuntimeError):
            return *_forms(problem, next(iter(problem.batches)), seed), dtype
    nothing = np.full(len(small.names), np.nan)
    return nothing, nothing, small.dtype


def _forms(small: Problem, piece: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """vᵀRv and vᵀGv for each parameter tensor, from one graph: derivatives of Jᵀu with respect to θ and to u.

    Where all vᵀRv are zero to the bit, vᵀGv is not asked for, and stays zero.
    """
    count = len(small.names)
    residual, curvature = np.zeros(count), np.zeros(count)
    leaves = small.leaves()
    # Not around the passes backward too: each of their calls would go through what watches the functions.
    with small.filled(leaves), small.evaluator.twice_differentiable():
        outputs = small.evaluator.outputs(piece)
        detached, slopes = _slopes(small, outputs, piece)
    floating = [t for t in batching.tensors(outputs) if t.is_floating_point()]
    known = [
        (f, z, s)
        for f, z, s in zip(floating, detached, slopes, strict=True)
        if f.requires_grad and s is not None
    ]
    if not known:
        return residual, curvature
    heads = [f for f, _, _ in known]
    u = [s.detach().requires_grad_() for _, _, s in known]
    pulled = torch.autograd.grad(heads, leaves, u, create_graph=True, allow_unused=True)
    drawn: dict[int, tuple[Tensor, Tensor]] = {}
    for i, (leaf, g) in enumerate(zip(leaves, pulled, strict=True)):
        if g is None or not g.requires_grad:
            continue
        stream = seeds.generator(seed, "structure", i)
        v = torch.randn(leaf.shape, generator=stream, dtype=torch.float32).to(leaf)
        (Rv,) = torch.autograd.grad(g, leaf, v, retain_graph=True, allow_unused=True)
        residual[i] = 0.0 if Rv is None else float((Rv * v).sum())
        drawn[i] = g, v
    if not residual.any():  # nothing to compare: zero is below every scale
        return residual, curvature
    bent = [(z, s) for _, z, s in known]
    for i, (g, v) in drawn.items():
        Jv = torch.autograd.grad(g, u, v, retain_graph=True, allow_unused=True, materialize_grads=True)
        curvature[i] = _curvature(bent, Jv)
    return residual, curvature


def _curvature(bent: list[tuple[Tensor, Tensor]], Jv: Sequence[Tensor]) -> float:
    """(J v)ᵀ Λ (J v)."""
    curved = [(s, w) for (_, s), w in zip(bent, Jv, strict=True) if s.requires_grad]
    if not curved:
        return 0.0
    found = torch.autograd.grad(
        [s for s, _ in curved],
        [z for z, _ in bent],
        [w for _, w in curved],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return float(sum((a * w).sum() for a, w in zip(found, Jv, strict=True)))
