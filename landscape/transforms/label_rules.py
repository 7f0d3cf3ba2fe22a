"""What each operation demands of the labels of its inputs; an operation without a rule freezes them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from landscape.transforms.graph import Graph, Node
from landscape.transforms.labels import Dims, Labels, of, rigid
from landscape.transforms.rules import operation

_Rule = Callable[..., Any]
_RULES: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(function: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


class LabelWalk:
    """One pass through a graph.

    Attributes:
        values: node -> labels of its tensor, or of its tensors.
    """

    def __init__(self, graph: Graph, given: dict[Node, Dims], labels: Labels):
        self.labels, self.values = labels, dict[Node, Any](given)
        for node in graph.nodes:
            if node not in self.values:
                self.values[node] = self._value(node)
        for output in graph.outputs:
            _freeze(labels, self.values[output])

    def _value(self, node: Node) -> Any:
        if node.op in {"get_attr", "placeholder"}:
            return of(node.meta.get("val"))
        args, kwargs = cast(
            tuple[Any, Any], torch.fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        )
        if node.target is operator.getitem:
            return args[0][args[1]]
        name = operation(node)
        made = NotImplemented
        if name in _RULES:
            self.node, self.name = node, name
            made = _RULES[name](self, *args, **kwargs)
        if made is NotImplemented:
            _freeze(self.labels, (args, kwargs))
            return of(node.meta.get("val"))
        return made

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the operation's (first) output."""
        val = self.node.meta["val"]
        return tuple((val[0] if isinstance(val, tuple | list) else val).shape)

    def with_others(self, first: Dims) -> Any:
        """The labels of the first output, and rigid ones for the others."""
        val = self.node.meta["val"]
        return (first, *of(val[1:])) if isinstance(val, tuple | list) else first


def _freeze(labels: Labels, tree: Any) -> None:
    for dims in _all(tree):
        labels.freeze_all(dims)


def _all(tree: Any) -> list[Dims]:
    if _are(tree):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [d for item in tree for d in _all(item)] if isinstance(tree, tuple | list) else []


def _are(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, Tensor) for v in value)


@_rule(
    "relu", "leaky_relu", "abs", "neg", "clone", "detach", "alias", "contiguous", "to", "_to_copy", "positive",
    "dropout", "native_dropout", "gelu", "silu", "tanh", "sigmoid", "softplus", "elu", "selu", "celu", "mish", "exp",
    "log", "log1p", "expm1", "sin", "cos", "erf", "hardswish", "hardsigmoid", "hardtanh", "relu6", "logsigmoid",
    "softsign", "atan", "clamp", "clamp_min", "clamp_max", "threshold", "add", "sub", "rsub", "mul", "div", "pow",
    "square", "sqrt", "rsqrt", "reciprocal", "maximum", "minimum", "where", "gt", "ge", "lt", "le", "eq", "ne",
    "sign", "logical_not", "logical_and", "logical_or", "zeros_like", "ones_like", "masked_fill", "softmax",
    "_softmax", "log_softmax", "_log_softmax", "_weight_norm",
)  # fmt: skip
def _elementwise(walk: LabelWalk, *inputs: Any, **named: Any) -> Any:
    tensors = _all(list(inputs)) + _all(named)
    return walk.with_others(walk.labels.broadcast(*tensors))


@_rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
def _constant(walk: LabelWalk, *_: Any, **__: Any) -> Any:
    return [walk.labels.fresh(size) for size in walk.shape]  # all entries are equal


@_rule("prelu")
def _prelu(walk: LabelWalk, x: Dims, slope: Dims) -> Dims:
    if len(slope[0]) > 1:
        walk.labels.tie(x[1], slope[0])
    else:
        walk.labels.freeze_all(slope)
    return x


@_rule("linear")
def _linear(walk: LabelWalk, x: Dims, weight: Dims, bias: Dims | None = None) -> Dims:
    walk.labels.tie(weight[1], x[-1])
    if bias is not None:
        walk.labels.tie(weight[0], bias[0])
    return [*x[:-1], weight[0]]


@_rule("addmm")
def _addmm(walk: LabelWalk, bias: Dims, a: Dims, b: Dims, **_: Any) -> Dims:
    return walk.labels.broadcast(_matmul(walk, a, b), bias)


@_rule("matmul", "mm", "bmm")
def _matmul(walk: LabelWalk, a: Dims, b: Dims) -> Any:
    if len(a) < 2 or len(b) < 2:
        return NotImplemented
    letters = "abcdefgh"
    names = [letters[-(len(d) - 2) :] if len(d) > 2 else "" for d in (a, b)]
    outer = max(names, key=len)
    return walk.labels.contracted([(a, names[0] + "mk"), (b, names[1] + "kn")], outer + "mn")


@_rule("einsum")
def _einsum(walk: LabelWalk, equation: str, operands: list[Dims], **_: Any) -> Any:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation or any(len(set(n)) < len(n) for n in inputs.split(",")):
        return NotImplemented
    return walk.labels.contracted(list(zip(operands, inputs.split(","), strict=True)), output)


@_rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(
    walk: LabelWalk, x: Dims, weight: Dims, bias: Dims | None = None, *rest: Any, groups: int = 1, **_: Any
) -> Any:
    groups = rest[3] if len(rest) > 3 else groups
    spatial = len(weight) - 2
    depthwise = groups == len(weight[0]) == len(x[-spatial - 1]) and len(weight[1]) == 1
    if groups > 1 and not depthwise:
        return NotImplemented
    inner, outer = (weight[0], weight[1]) if "transpose" in walk.name else (weight[1], weight[0])
    if depthwise:
        inner = outer = weight[0]
    walk.labels.tie(inner, x[-spatial - 1])
    walk.labels.freeze_all([*weight[2:], *x[-spatial:]])
    if bias is not None:
        walk.labels.tie(outer, bias[0])
    return [*x[: -spatial - 1], outer, *rigid(walk.shape[-spatial:])]


@_rule("_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional", "_native_batch_norm_legit",
       "batch_norm", "native_batch_norm", "instance_norm")  # fmt: skip
def _batch_norm(walk: LabelWalk, x: Dims, *vectors: Any) -> Any:
    walk.labels.tie(x[1], *[v[0] for v in vectors if _are(v)])
    return walk.with_others(x)


@_rule("layer_norm", "native_layer_norm", "rms_norm")
def _layer_norm(walk: LabelWalk, x: Dims, _: Any, *vectors: Any) -> Any:
    return walk.with_others(walk.labels.broadcast(x, *[v for v in vectors if _are(v)]))


@_rule("embedding")
def _embedding(walk: LabelWalk, table: Dims, index: Dims, *_: Any) -> Dims:
    walk.labels.freeze_all([table[0], *index])
    return [*rigid([len(d) for d in index]), table[1]]


@_rule("scaled_dot_product_attention")
def _attention(
    walk: LabelWalk, q: Dims, k: Dims, v: Dims, mask: Any = None, *_: Any, enable_gqa: bool = False, **__: Any
) -> Any:
    if mask is not None or enable_gqa or len(q) != len(k):
        return NotImplemented
    walk.labels.tie(q[-1], k[-1])
    walk.labels.freeze_all([q[-2], k[-2], v[-2]])
    outer = walk.labels.broadcast(q[:-2], k[:-2], v[:-2])
    return [*outer, q[-2], v[-1]]


@_rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_linear1d",
)  # fmt: skip
def _pooled(walk: LabelWalk, x: Dims, *_: Any, **__: Any) -> Any:
    found = re.search(r"(\d)d", walk.name)
    spatial = int(found.group(1)) if found else 2
    walk.labels.freeze_all(x[-spatial:])
    return walk.with_others([*x[:-spatial], *rigid(walk.shape[-spatial:])])


@_rule("sum", "mean", "amax", "amin", "var", "std", "linalg_vector_norm", "logsumexp")
def _reduced(walk: LabelWalk, x: Dims, *rest: Any, **named: Any) -> Any:
    place = 1 if walk.name == "linalg_vector_norm" else 0
    dims = named.get("dim", rest[place] if len(rest) > place else None)
    if dims is None or isinstance(dims, bool) or dims == []:
        dims = range(len(x))
    over = {d % len(x) for d in ([dims] if isinstance(dims, int) else dims)}
    if len(walk.shape) == len(x):
        return [torch.zeros(1, dtype=torch.int64) if d in over else x[d] for d in range(len(x))]
    return [x[d] for d in range(len(x)) if d not in over]


@_rule("permute", "transpose", "t", "movedim", "swapaxes")
def _permuted(walk: LabelWalk, x: Dims, *rest: Any) -> Dims:
    numbers = walk.node.target(torch.zeros(range_shape(len(x))), *rest).shape  # type: ignore[operator]
    return [x[size - 2] for size in numbers]


def range_shape(ndim: int) -> tuple[int, ...]:
    """A shape that tells its dimensions apart."""
    return tuple(range(2, ndim + 2))


@_rule("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshaped(walk: LabelWalk, x: Dims, *_: Any) -> Dims:
    return walk.labels.reshaped(x, walk.shape)


@_rule("expand")
def _expanded(walk: LabelWalk, x: Dims, *_: Any, **__: Any) -> Dims:
    wide = rigid(walk.shape)
    for place in range(-len(x), 0):
        if len(x[place]) == len(wide[place]):
            wide[place] = x[place]
    return wide


@_rule("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "flip")
def _cut(walk: LabelWalk, x: Dims, *rest: Any, **named: Any) -> Any:
    val = walk.node.meta["val"]
    several = isinstance(val, tuple | list)
    pieces: list[Dims] = [[] for _ in (val if several else [val])]
    for dim, labels in enumerate(x):
        along = [1] * len(x)
        along[dim] = -1
        made = walk.node.target(labels.reshape(along).expand([len(d) for d in x]), *rest, **named)  # type: ignore[operator]
        dropped = walk.name in {"select", "unbind"} and _dim(rest, named, len(x)) == dim
        if dropped:
            walk.labels.freeze(labels)
            continue
        for piece, cut in zip(pieces, made if several else [made], strict=True):
            place = len(piece)
            first = [0] * cut.ndim
            index = tuple(slice(None) if d == place else first[d] for d in range(cut.ndim))
            piece.append(cut[index].clone())
    return tuple(pieces) if several else pieces[0]


def _dim(rest: Any, named: Any, ndim: int) -> int:
    return int(named.get("dim", rest[0] if rest else 0)) % ndim


@_rule("cat")
def _joined(walk: LabelWalk, parts: list[Dims], dim: int = 0) -> Dims:
    dim %= len(parts[0])
    others = [part[:dim] + part[dim + 1 :] for part in parts]
    tied = [walk.labels.tie(*each) for each in zip(*others, strict=True)]
    return [*tied[:dim], torch.cat([part[dim] for part in parts]), *tied[dim:]]
