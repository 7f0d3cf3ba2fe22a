"""Curvature products on one micro-batch: the graph is built once and used for all k vectors.

Plain reverse-over-reverse is the engine: of the modes that PyTorch offers it survives the most layers,
and with a reused graph it is the fastest or close to it. Each function takes the vectors as rows (k, n)
split per parameter tensor, and yields one list of tensors per vector.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from landscape.batches import tensors, tree_map
from landscape.convolution import linear_pullbacks

Pieces = Sequence[Tensor]
Optional = Sequence[Tensor | None]
Edges = Sequence[GradientEdge | None]
Places = Sequence[GradientEdge]


def gradient(loss: Tensor, parameters: Pieces) -> Optional:
    """∇L of a scalar with a graph; None for a parameter that the loss does not use."""
    if not loss.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(loss, parameters, allow_unused=True)


class HessianGraph:
    """∇L of a micro-batch with a graph, from which any number of products H v, H = ∇²L, can be made.

    Attributes:
        parameters: with respect to which.
        reruns: whether a product runs parts of the model again; True also where that is not known.
    """

    reruns = True

    def __init__(self, loss: Tensor, parameters: list[Tensor]):
        self.parameters, self._inputs, self._first = parameters, _places(parameters), None
        if loss.requires_grad:
            self._first = _edges(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True))

    def products(self, rows: Sequence[Pieces], *, keep: bool = False) -> Iterator[Optional]:
        """H v for each v of `rows`, by differentiating ⟨∇L, v⟩; the graph is gone after the last unless kept."""
        if self._first is None:
            yield from ([None] * len(self.parameters) for _ in rows)
            return
        yield from _vector_jacobian(self._first, self._inputs, rows, retain=keep)


class JacobianGraph:
    """The graph of a micro-batch from which products J v are made, J = ∂f/∂θ with f the model's outputs.

    J v is the derivative of Jᵀu with respect to u, a reverse pass through the reverse pass; so its graph
    is built once for all vectors.

    Attributes:
        parameters: as of a `HessianGraph`.
        reruns: as of a `HessianGraph`.
    """

    reruns = True

    def __init__(self, outputs: Any, parameters: list[Tensor]):
        self.parameters, self._inputs = parameters, _places(parameters)
        leaves = [t for t in tensors(outputs) if t.requires_grad]
        self._leaves = _places(leaves)
        if not leaves:
            return
        self._dummies = [torch.zeros_like(f, requires_grad=True) for f in leaves]
        self._at = _places(self._dummies)
        with linear_pullbacks():
            self._pulled = _edges(
                torch.autograd.grad(leaves, parameters, self._dummies, create_graph=True, allow_unused=True)
            )

    def pushed(self, row: Pieces) -> Pieces:
        """J v, shaped like the differentiable output tensors; the graph stays."""
        if not self._leaves:
            return []
        used, pieces = _used(self._pulled, row)
        found = torch.autograd.grad(used, self._at, pieces, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(f) if t is None else t for f, t in zip(self._dummies, found, strict=True)]


class GgnGraph(JacobianGraph):
    """The graphs of a micro-batch from which products Jᵀ (∂²ℓ/∂f²) J v are made, built once for all vectors."""

    def __init__(self, outputs: Any, loss: Callable[[Any], Tensor], parameters: list[Tensor]):
        super().__init__(outputs, parameters)
        if self._leaves:
            self._detached, self._slopes = _output_slopes(outputs, loss)

    def products(self, rows: Sequence[Pieces], *, keep: bool = False) -> Iterator[Optional]:  # noqa: ARG002
        """G v for each v of `rows`; the graphs live as long as this object."""
        for row in rows:
            if not self._leaves:
                yield [None] * len(self.parameters)
                continue
            bent = next(_vector_jacobian(self._slopes, self._detached, [self.pushed(row)], retain=True))
            yield _pulled(self._leaves, self._inputs, bent, retain=True)


Graph = HessianGraph | GgnGraph


class Watch(TorchFunctionMode):
    """Tells whether anything was `called` from within passes through a graph: a part of the model, by a checkpoint."""

    called = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called = self.called or torch._C._current_graph_task_id() >= 0
        return func(*args, **(kwargs or {}))


class KeptGraphs:
    """Graphs of the products of one matrix, by micro-batch."""

    def __init__(self) -> None:
        self._key: tuple[str, ...] = ()
        self._where: tuple[object, ...] = ()
        self._graphs: dict[int, Graph] = {}

    def of(self, key: tuple[str, ...], where: tuple[object, ...]) -> dict[int, Graph]:
        """Those of a matrix where it stands; of another they are let go."""
        same = len(where) == len(self._where) and all(map(operator.is_, where, self._where))
        if key != self._key or not same:
            self._key, self._where, self._graphs = key, where, {}
        return self._graphs


def pullback(outputs: Any, loss: Callable[[Any], Tensor], parameters: Pieces, pushed: Pieces) -> Optional:
    """Jᵀ (∂²ℓ/∂f²) u for one u, shaped like the differentiable output tensors."""
    leaves = [t for t in tensors(outputs) if t.requires_grad]
    if not leaves:
        return [None] * len(parameters)
    detached, slopes = _output_slopes(outputs, loss)
    bent = next(_vector_jacobian(slopes, detached, [pushed]))
    return _pulled(_places(leaves), _places(parameters), bent, retain=False)


def _pulled(leaves: Places, parameters: Places, bent: Optional, retain: bool) -> Optional:
    known = [(f, b) for f, b in zip(leaves, bent, strict=True) if b is not None]
    if not known:
        return [None] * len(parameters)
    heads, tails = [f for f, _ in known], [b for _, b in known]
    return torch.autograd.grad(heads, parameters, tails, retain_graph=retain, allow_unused=True)


def _output_slopes(outputs: Any, loss: Callable[[Any], Tensor]) -> tuple[Places, Edges]:
    """Outputs cut off from the parameters, and ∂ℓ/∂f there, both by their place in the graph."""
    detached: list[Tensor] = []

    def cut_off(t: Tensor) -> Tensor:
        if not t.requires_grad:
            return t
        detached.append(t.detach().requires_grad_())
        return detached[-1]

    value = loss(tree_map(cut_off, outputs))
    slopes = torch.autograd.grad(value, detached, create_graph=True, allow_unused=True)
    return _places(detached), _edges(slopes)


def _edges(first: Optional) -> Edges:
    """Where in the graph slopes arise, None for those that are constant.

    Of a slope that is differentiated only its place is needed; without its value a product of a large
    model needs that much less memory.
    """
    return [None if g is None or not g.requires_grad else get_gradient_edge(g) for g in first]


def _places(leaves: Pieces) -> Places:
    """The places in the graph of tensors that require grad.

    A pass from places to places is not a call that a mode of PyTorch sees, so that a mode, such as `Watch`, is
    there for what is called within it.
    """
    return [get_gradient_edge(t) for t in leaves]


def _vector_jacobian(
    first: Edges, parameters: Places, rows: Sequence[Pieces], retain: bool = False
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
