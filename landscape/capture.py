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

from landscape.uses import Lookup, Outer, Pointwise, TransposedConvolution, Use, windows

# Differences of a gradient put together by rules from autograd's, in units of rounding of its terms.
_ROUNDING = 1e3


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
        inputs = [*self.parameters, *(self.edges[call] for call in calls)]
        found = torch.autograd.grad(heads, inputs, tails, retain_graph=True, allow_unused=True)
        truth, rest = found[: len(self.parameters)], found[len(self.parameters) :]
        at = {call: g for call, g in zip(calls, rest, strict=True) if g is not None}
        return [self._agrees(i, t, at, kept) for i, t in enumerate(truth)]

    def _agrees(self, index: int, truth: Tensor | None, at: dict[int, Tensor], kept: Tensor) -> bool:
        uses = [use for use in self.uses[index] if use.call in at]
        if truth is None or not uses:
            return truth is None and not uses
        total, size = torch.zeros_like(truth), float(truth.norm())
        for use in uses:
            g = at[use.call]
            for i in kept.tolist():
                total += use.gradients([g], i, i + 1)[0, 0]
            size = max(size, use.natural_size(g))
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
        rule = _RULES.get(func)
        if rule is not None and isinstance(out, Tensor):
            values = (*args, *given.values())
            if any(self.capture.owns(value) for value in values):
                rule(self.capture, out, *args, **given)
        return out


# Rules, each with the signature of the function it watches.


def _outer(capture: Capture, w: Tensor, x: Tensor, transposed: bool) -> Callable[[int], Use | None]:
    """The rule of x @ w.T, or of x @ w if transposed; rows are all dimensions of x but the last."""

    def split(t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], 1, -1, t.shape[-1]).transpose(-1, -2)

    def make(call: int) -> Use | None:
        if w.ndim != 2 or x.ndim < 2 or x.shape[0] % capture.examples:
            return None
        return Outer(
            call, capture.examples, tuple(w.shape), x.detach(), split, split, 1, transposed, "matrix product"
        )

    return make


def _spread(
    capture: Capture, out: Tensor, w: Any, axis: int | None, factor: Callable[[], Tensor] | None, name: str
) -> tuple[Any, Callable[[int], Use | None]]:
    """The rule of a parameter that is broadcast to the output: from `axis` on, or to the last dimensions."""

    def make(call: int) -> Use | None:
        before = out.ndim - w.ndim if axis is None else axis
        aligned = (1,) * before + tuple(w.shape)
        aligned += (1,) * (out.ndim - len(aligned))
        if before < 0 or (aligned[0] != 1 and out.shape[0] != 1):
            return None
        return Pointwise(call, capture.examples, tuple(w.shape), aligned, factor, name)

    return w, make


def _linear(capture: Capture, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:  # noqa: A002
    pairs = [(weight, _outer(capture, weight, input, False)), _spread(capture, out, bias, None, None, "bias")]
    capture.add(out, pairs)


def _matmul(capture: Capture, out: Tensor, input: Tensor, other: Tensor, **_: Any) -> None:  # noqa: A002
    if out.ndim == input.ndim:
        capture.add(out, [(other, _outer(capture, other, input, True))])


def _addmm(capture: Capture, out: Tensor, bias: Tensor, x: Tensor, w: Tensor, **scales: Any) -> None:
    if not scales:
        pairs = [(w, _outer(capture, w, x, True)), _spread(capture, out, bias, None, None, "bias")]
        capture.add(out, pairs)


def _embedding(
    capture: Capture,
    out: Tensor,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    **_: Any,
) -> None:
    def make(call: int) -> Use | None:
        if not input.ndim or input.shape[0] % capture.examples:
            return None
        padding = None if padding_idx is None else padding_idx % weight.shape[0]
        return Lookup(call, capture.examples, tuple(weight.shape), input, padding)

    capture.add(out, [(weight, make)])


def _mul(capture: Capture, out: Tensor, a: Any, b: Any, **_: Any) -> None:
    def factor(x: Any) -> Callable[[], Tensor]:
        return lambda: x.detach() if isinstance(x, Tensor) else torch.as_tensor(x, dtype=out.dtype)

    pairs = [_spread(capture, out, w, None, factor(x), "product") for w, x in ((a, b), (b, a))]
    capture.add(out, pairs)


def _add(capture: Capture, out: Tensor, a: Any, b: Any, *, alpha: Any = 1, **_: Any) -> None:
    if alpha == 1:
        capture.add(out, [_spread(capture, out, w, None, None, "bias") for w in (a, b)])


def _prelu(capture: Capture, out: Tensor, input: Tensor, weight: Tensor) -> None:  # noqa: A002
    x = input.detach()
    axis = None if weight.numel() == 1 else 1
    capture.add(out, [_spread(capture, out, weight, axis, lambda: x.clamp(max=0), "prelu")])


def _normalized(
    capture: Capture,
    out: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axis: int | None,
    standard: Callable[[], Tensor],
) -> None:
    def factor() -> Tensor:
        with torch.no_grad():
            return standard()

    name = "normalization"
    pairs = [_spread(capture, out, weight, axis, factor, name), _spread(capture, out, bias, axis, None, name)]
    capture.add(out, pairs)


def _layer_norm(
    capture: Capture,
    out: Tensor,
    input: Tensor,  # noqa: A002
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **_: Any,
) -> None:
    x = input.detach()
    _normalized(capture, out, weight, bias, None, lambda: F.layer_norm(x, normalized_shape, eps=eps))


def _rms_norm(
    capture: Capture,
    out: Tensor,
    input: Tensor,  # noqa: A002
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> None:
    x = input.detach()
    _normalized(capture, out, weight, None, None, lambda: F.rms_norm(x, normalized_shape, eps=eps))


def _group_norm(
    capture: Capture,
    out: Tensor,
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **_: Any,
) -> None:
    x = input.detach()
    _normalized(capture, out, weight, bias, 1, lambda: F.group_norm(x, num_groups, eps=eps))


def _batch_norm(
    capture: Capture,
    out: Tensor,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> None:
    x = input.detach()
    if not training:
        standard = lambda: F.batch_norm(x, running_mean, running_var, eps=eps)  # noqa: E731
        _normalized(capture, out, weight, bias, 1, standard)


def _instance_norm(
    capture: Capture,
    out: Tensor,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> None:
    x = input.detach()
    # With the input's own statistics the running ones would only be updated once more.
    mean, var = (None, None) if use_input_stats else (running_mean, running_var)
    standard = lambda: F.instance_norm(x, mean, var, use_input_stats=use_input_stats, eps=eps)  # noqa: E731
    _normalized(capture, out, weight, bias, 1, standard)


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value) * (dimensions // len(value))


def _convolution(
    capture: Capture,
    out: Tensor,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> None:
    if input.ndim != weight.ndim:
        return
    kernel = tuple(weight.shape[2:])
    strides, dilations = (_each(value, len(kernel)) for value in (stride, dilation))
    if padding == "same":
        reach = [d * (size - 1) for size, d in zip(kernel, dilations, strict=True)]
        zeros = [(r // 2, r - r // 2) for r in reach]
    else:
        zeros = [(p, p) for p in _each(0 if padding == "valid" else padding, len(kernel))]

    def make(call: int) -> Use:
        return Outer(
            call,
            capture.examples,
            tuple(weight.shape),
            input.detach(),
            lambda x: windows(x, kernel, strides, zeros, dilations, groups),
            lambda g: g.reshape(g.shape[0], groups, g.shape[1] // groups, -1),
            groups,
            False,
            "convolution",
        )

    capture.add(out, [(weight, make), _spread(capture, out, bias, 1, None, "bias")])


def _transposed_convolution(
    capture: Capture,
    out: Tensor,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,  # noqa: ARG001  (where it stops is told by the input's size)
    groups: int = 1,
    dilation: Any = 1,
) -> None:
    if input.ndim != weight.ndim:
        return
    kernel, places = tuple(weight.shape[2:]), tuple(input.shape[2:])
    strides, dilations, pads = (_each(value, len(kernel)) for value in (stride, dilation, padding))
    zeros = [(p, p) for p in pads]

    def make(call: int) -> Use:
        return TransposedConvolution(
            call,
            capture.examples,
            tuple(weight.shape),
            input.detach(),
            lambda g: windows(g, kernel, strides, zeros, dilations, groups, places),
            groups,
        )

    capture.add(out, [(weight, make), _spread(capture, out, bias, 1, None, "bias")])


_RULES: dict[Any, Callable[..., None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.prelu: _prelu,
    torch.addmm: _addmm,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed_convolution),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _mul),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_), _add),
}
