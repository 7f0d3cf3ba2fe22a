"""Watching a forward pass: which operations use the measured parameters, and what goes in and comes out.

A parameter is known by identity in the calls of PyTorch's functions, so that modules, functional uses and
models given as functions are all seen. What is not seen, such as a transposed weight or a recurrent
kernel, is found by `Capture.confirmed`: the gradient put together from the captured uses must be
autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from landscape.uses import Lookup, Outer, Pointwise, TransposedConvolution, Use, Window

# Differences of a gradient put together by rules from autograd's, in units of rounding of its terms.
_ROUNDING = 1e3
# Explicit per-example gradients that are held at once.
_NUMBERS = 1 << 22


class Capture:
    """The uses of measured parameters in one forward pass.

    Args:
        parameters: the measured leaves.
        examples: N, the number of examples of the pass.

    Attributes:
        edges: for each captured operation, where its output stands in the graph.
        sizes: number of elements of each captured output.
        uses: for each parameter, its captured uses, in order.
    """

    def __init__(self, parameters: Sequence[Tensor], examples: int):
        self.parameters, self.examples = list(parameters), examples
        self.edges: list[GradientEdge] = []
        self.sizes: list[int] = []
        self.uses: list[list[Use]] = [[] for _ in parameters]
        self._index = {id(p): i for i, p in enumerate(parameters)}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is called inside a `with` block."""
        with _Watch(self):
            yield

    def owns(self, t: Any) -> bool:
        """Whether this is a measured parameter."""
        return id(t) in self._index

    def add(self, out: Tensor, pairs: Sequence[tuple[Any, Callable[[int], Use | None]]]) -> None:
        """Record an operation's output and its uses of parameters; what has no rows per example is left out."""
        if not out.requires_grad or not out.ndim or not out.shape[0] or out.shape[0] % self.examples:
            return
        call = len(self.edges)
        made = [(self._index[id(p)], make(call)) for p, make in pairs if self.owns(p)]
        kept = [(index, use) for index, use in made if use is not None]
        if not kept:
            return
        # Held as a place in the graph: an in-place operation may follow and change what `out` is.
        self.edges.append(get_gradient_edge(out))
        self.sizes.append(out.numel())
        for index, use in kept:
            self.uses[index].append(use)

    def signature(self, index: int) -> tuple[Any, ...]:
        """What must be as in a confirmed pass for a parameter's uses to need no confirmation."""
        return tuple(use.signature() for use in self.uses[index])

    def output_gradients(
        self, calls: Sequence[int], heads: Sequence[Tensor], tails: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        """Gradients of ⟨heads, tails⟩ at captured outputs; those that the heads do not depend on are left out."""
        found = torch.autograd.grad(
            heads, [self.edges[call] for call in calls], tails, retain_graph=True, allow_unused=True
        )
        return {call: g for call, g in zip(calls, found, strict=True) if g is not None}

    def confirmed(self, heads: Sequence[Tensor], tails: Sequence[Tensor], kept: Tensor) -> list[bool]:
        """Whether, for each parameter, the rules give autograd's gradient from the kept examples alone.

        Args:
            heads: outputs.
            tails: random cotangents, zero but for the kept examples, so that rows of other examples, or in
                another order, are found out as well as uses that were not seen.
            kept: the numbers of these examples, ascending.
        """
        calls = sorted({use.call for uses in self.uses for use in uses})
        inputs: list[Any] = [*self.parameters, *(self.edges[call] for call in calls)]
        found = torch.autograd.grad(heads, inputs, tails, retain_graph=True, allow_unused=True)
        truth, rest = found[: len(self.parameters)], found[len(self.parameters) :]
        at = {call: g for call, g in zip(calls, rest, strict=True) if g is not None}
        return [self._agrees(i, t, at, kept) for i, t in enumerate(truth)]

    def _agrees(self, index: int, truth: Tensor | None, at: dict[int, Tensor], kept: Tensor) -> bool:
        uses = [use for use in self.uses[index] if use.call in at]
        if truth is None or not uses:
            return truth is None and not uses
        total, size = torch.zeros(truth.numel()).to(truth), float(truth.norm())
        chosen = torch.zeros(self.examples).to(truth)
        chosen[kept] = 1
        step = max(1, _NUMBERS // truth.numel())
        for use in uses:
            g = at[use.call]
            for lo in range(0, self.examples, step):
                hi = min(lo + step, self.examples)
                total += chosen[lo:hi] @ use.gradients([g], lo, hi).reshape(hi - lo, -1)
            size = max(size, use.natural_size(g))
        total = total.view(truth.shape)
        return float((total - truth).norm()) <= _ROUNDING * torch.finfo(truth.dtype).eps * size


class _Watch(TorchFunctionMode):
    def __init__(self, capture: Capture):
        super().__init__()
        self.capture = capture

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        known = _RULES.get(func)
        if known is not None and isinstance(out, Tensor):
            rule, names = known
            named = dict(zip(names, args, strict=False)) | given
            if any(self.capture.owns(value) for value in named.values()):
                rule(self.capture, out, named)
        return out


# Rules: each is given a call's output and its arguments by name. A pair is a parameter and its use.

_Pair = tuple[Any, Callable[[int], Use | None]]


def _outer(capture: Capture, w: Tensor, x: Tensor, transposed: bool) -> _Pair:
    """The weight of x @ w.T, or of x @ w if transposed; rows are all dimensions of x but the last."""

    def split(t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], 1, -1, t.shape[-1]).transpose(-1, -2)

    def make(call: int) -> Use | None:
        if w.ndim != 2 or x.ndim < 2 or x.shape[0] % capture.examples:
            return None
        shape = tuple(w.shape)
        return Outer(call, capture.examples, shape, x.detach(), split, split, 1, transposed, "matrix product")

    return w, make


def _spread(
    capture: Capture, out: Tensor, w: Any, axis: int | None = None, factor: Callable[[], Tensor] | None = None
) -> _Pair:
    """A factor or a summand that is broadcast to the output: from `axis` on, or to the last dimensions."""

    def make(call: int) -> Use | None:
        before = out.ndim - w.ndim if axis is None else axis
        aligned = (1,) * before + tuple(w.shape)
        aligned += (1,) * (out.ndim - len(aligned))
        if before < 0 or (aligned[0] != 1 and out.shape[0] != 1):
            return None
        return Pointwise(call, capture.examples, tuple(w.shape), aligned, factor, out.shape[0])

    return w, make


def _linear(capture: Capture, out: Tensor, a: dict[str, Any]) -> None:
    pairs = [_outer(capture, a["weight"], a["input"], False), _spread(capture, out, a.get("bias"))]
    capture.add(out, pairs)


def _matmul(capture: Capture, out: Tensor, a: dict[str, Any]) -> None:
    if out.ndim == a["input"].ndim:
        capture.add(out, [_outer(capture, a["weight"], a["input"], True)])


def _addmm(capture: Capture, out: Tensor, a: dict[str, Any]) -> None:
    if not {"alpha", "beta"} & set(a):
        pairs = [_outer(capture, a["weight"], a["input"], True), _spread(capture, out, a["bias"])]
        capture.add(out, pairs)


def _embedding(capture: Capture, out: Tensor, a: dict[str, Any]) -> None:
    index, w, padding = a["input"], a["weight"], a.get("padding_idx")

    def make(call: int) -> Use | None:
        if not index.ndim or index.shape[0] % capture.examples:
            return None
        fixed = None if padding is None else padding % w.shape[0]
        return Lookup(call, capture.examples, tuple(w.shape), index, fixed)

    capture.add(out, [(w, make)])


def _mul(capture: Capture, out: Tensor, a: dict[str, Any]) -> None:
    def factor(x: Any) -> Callable[[], Tensor]:
        return lambda: x.detach() if isinstance(x, Tensor) else torch.as_tensor(x, dtype=out.dtype)

    orders = ((a["input"], a["other"]), (a["other"], a["input"]))
    capture.add(out, [_spread(capture, out, w, None, factor(x)) for w, x in orders])


def _add(capture: Capture, out: Tensor, a: dict[str, Any]) -> None:
    if a.get("alpha", 1) == 1:
        capture.add(out, [_spread(capture, out, w) for w in (a["input"], a["other"])])


def _prelu(capture: Capture, out: Tensor, a: dict[str, Any]) -> None:
    x, w = a["input"].detach(), a["weight"]
    axis = None if w.numel() == 1 else 1
    capture.add(out, [_spread(capture, out, w, axis, lambda: x.clamp(max=0))])


def _normalization(standard: Any, axis: int | None) -> Callable[[Capture, Tensor, dict[str, Any]], None]:
    """The rule of y = w x̂ + b; x̂ is the same function without w and b, which stand from `axis` on."""

    def rule(capture: Capture, out: Tensor, a: dict[str, Any]) -> None:
        if a.get("training"):  # the statistics couple examples
            return
        options = {key: value for key, value in a.items() if key not in {"input", "weight", "bias"}}
        if a.get("use_input_stats"):  # otherwise the running statistics would be updated once more
            options |= {"running_mean": None, "running_var": None}
        x = a["input"].detach()

        def factor() -> Tensor:
            with torch.no_grad():
                made: Tensor = standard(x, **options)
            return made

        pairs = [
            _spread(capture, out, a.get("weight"), axis, factor),
            _spread(capture, out, a.get("bias"), axis),
        ]
        capture.add(out, pairs)

    return rule


def _convolution(capture: Capture, out: Tensor, a: dict[str, Any]) -> None:
    x, w, groups = a["input"], a["weight"], a.get("groups", 1)
    if x.ndim != w.ndim:
        return
    window = Window.of(w, a.get("stride", 1), a.get("padding", 0), a.get("dilation", 1), groups)

    def make(call: int) -> Use:
        def split(g: Tensor) -> Tensor:
            return g.reshape(g.shape[0], groups, g.shape[1] // groups, -1)

        shape = tuple(w.shape)
        return Outer(
            call, capture.examples, shape, x.detach(), window.seen, split, groups, False, "convolution"
        )

    capture.add(out, [(w, make), _spread(capture, out, a.get("bias"), 1)])


def _transposed_convolution(capture: Capture, out: Tensor, a: dict[str, Any]) -> None:
    x, w, groups = a["input"], a["weight"], a.get("groups", 1)
    if x.ndim != w.ndim:
        return
    window = Window.of(w, a.get("stride", 1), a.get("padding", 0), a.get("dilation", 1), groups)
    places = tuple(x.shape[2:])  # an output padding lies behind the last of them

    def make(call: int) -> Use:
        shape = tuple(w.shape)
        return TransposedConvolution(
            call, capture.examples, shape, x.detach(), lambda g: window.seen(g, places), groups
        )

    capture.add(out, [(w, make), _spread(capture, out, a.get("bias"), 1)])


_Rule = tuple[Callable[[Capture, Tensor, dict[str, Any]], None], list[str]]


def _table() -> dict[Any, _Rule]:
    """Functions, their rules, and the names of their arguments in order."""
    functions: list[tuple[tuple[Any, ...], Any, str]] = [
        ((F.linear,), _linear, "input weight bias"),
        ((torch.addmm,), _addmm, "bias input weight"),
        ((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul, "input weight"),
        ((F.embedding,), _embedding, "input weight padding_idx"),
        ((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _mul, "input other"),
        ((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_), _add, "input other"),
        ((F.prelu,), _prelu, "input weight"),
        (
            (F.layer_norm, torch.layer_norm),
            _normalization(F.layer_norm, None),
            "input normalized_shape weight bias eps",
        ),
        ((F.rms_norm, torch.rms_norm), _normalization(F.rms_norm, None), "input normalized_shape weight eps"),
        (
            (F.group_norm, torch.group_norm),
            _normalization(F.group_norm, 1),
            "input num_groups weight bias eps",
        ),
        (
            (F.batch_norm,),
            _normalization(F.batch_norm, 1),
            "input running_mean running_var weight bias training momentum eps",
        ),
        (
            (F.instance_norm,),
            _normalization(F.instance_norm, 1),
            "input running_mean running_var weight bias use_input_stats momentum eps",
        ),
        (
            (F.conv1d, F.conv2d, F.conv3d),
            _convolution,
            "input weight bias stride padding dilation groups",
        ),
        (
            (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
            _transposed_convolution,
            "input weight bias stride padding output_padding groups dilation",
        ),
    ]
    return {function: (rule, names.split()) for some, rule, names in functions for function in some}


_RULES = _table()
