"""Curvature products on one micro-batch: the graph is built once and used for all k vectors.

Plain reverse-over-reverse is the engine: of the modes that PyTorch offers it survives the most layers,
and with a reused graph it is the fastest or close to it. Each function takes the vectors as rows (k, n)
split per parameter tensor, and yields one list of tensors per vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from landscape.batches import tensors, tree_map
from landscape.convolution import linear_pullbacks

Pieces = Sequence[Tensor]
Optional = Sequence[Tensor | None]
Edges = Sequence[GradientEdge | None]


def gradient(loss: Tensor, parameters: Pieces) -> Optional:
    """∇L of a scalar with a graph; None for a parameter that the loss does not use."""
    if not loss.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def hessian_products(loss: Tensor, parameters: Pieces, rows: Sequence[Pieces]) -> Iterator[Optional]:
    """H v for each v of `rows`, H = ∇²L, by differentiating ⟨∇L, v⟩."""
    if not loss.requires_grad:
        yield from ([None] * len(parameters) for _ in rows)
        return
    first = _edges(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True))
    yield from _vector_jacobian(first, parameters, rows)


def ggn_products(
    outputs: Any, loss: Callable[[Any], Tensor], parameters: Pieces, rows: Sequence[Pieces]
) -> Iterator[Optional]:
    """Jᵀ (∂²ℓ/∂f²) J v for each v of `rows`, J = ∂f/∂θ, f the model's outputs.

    J v is the derivative of Jᵀu with respect to u, a reverse pass through the reverse pass; so its graph
    too is built once for all vectors.
    """
    leaves = [t for t in tensors(outputs) if t.requires_grad]
    if not leaves:
        yield from ([None] * len(parameters) for _ in rows)
        return
    dummies = [torch.zeros_like(f, requires_grad=True) for f in leaves]
    with linear_pullbacks():
        pulled = _edges(
            torch.autograd.grad(leaves, parameters, dummies, create_graph=True, allow_unused=True)
        )
    detached, slopes = _output_slopes(outputs, loss)
    for row in rows:
        used, pieces = _used(pulled, row)
        pushed = torch.autograd.grad(
            used, dummies, pieces, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        bent = next(_vector_jacobian(slopes, detached, [pushed], retain=True))
        yield _pulled(leaves, parameters, bent, retain=True)


def pullback(outputs: Any, loss: Callable[[Any], Tensor], parameters: Pieces, pushed: Pieces) -> Optional:
    """Jᵀ (∂²ℓ/∂f²) u for one u, shaped like the differentiable output tensors."""
    leaves = [t for t in tensors(outputs) if t.requires_grad]
    if not leaves:
        return [None] * len(parameters)
    detached, slopes = _output_slopes(outputs, loss)
    return _pulled(leaves, parameters, next(_vector_jacobian(slopes, detached, [pushed])), retain=False)


def _pulled(leaves: Pieces, parameters: Pieces, bent: Optional, retain: bool) -> Optional:
    known = [(f, b) for f, b in zip(leaves, bent, strict=True) if b is not None]
    if not known:
        return [None] * len(parameters)
    heads, tails = [f for f, _ in known], [b for _, b in known]
    return torch.autograd.grad(heads, parameters, tails, retain_graph=retain, allow_unused=True)


def _output_slopes(outputs: Any, loss: Callable[[Any], Tensor]) -> tuple[list[Tensor], Edges]:
    """∂ℓ/∂f with a graph, at outputs cut off from the parameters."""
    detached: list[Tensor] = []

    def cut_off(t: Tensor) -> Tensor:
        if not t.requires_grad:
            return t
        detached.append(t.detach().requires_grad_())
        return detached[-1]

    value = loss(tree_map(cut_off, outputs))
    return detached, _edges(torch.autograd.grad(value, detached, create_graph=True, allow_unused=True))


def _edges(first: Optional) -> Edges:
    """Where in the graph slopes arise, None for those that are constant.

    Of a slope that is differentiated only its place is needed; without its value a product of a large
    model needs that much less memory.
    """
    return [None if g is None or not g.requires_grad else get_gradient_edge(g) for g in first]


def _vector_jacobian(
    first: Edges, parameters: Pieces, rows: Sequence[Pieces], retain: bool = False
) -> Iterator[Optional]:
    """Differentiate ⟨first, v⟩ for each v of `rows`, with one graph."""
    for position, row in enumerate(rows):
        used, pieces = _used(first, row)
        if not used:
            yield [None] * len(parameters)
            continue
        keep = retain or position + 1 < len(rows)
        yield torch.autograd.grad(used, parameters, pieces, retain_graph=keep, allow_unused=True)


def _used(first: Edges, row: Pieces) -> tuple[list[GradientEdge], list[Tensor]]:
    """Drop what does not depend on the parameters: its derivative is zero."""
    kept = [(g, v) for g, v in zip(first, row, strict=True) if g is not None]
    return [g for g, _ in kept], [v for _, v in kept]
