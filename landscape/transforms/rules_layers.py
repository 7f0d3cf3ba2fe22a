"""Rules of layers that multiply by weights, of attention, and of pooling."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from landscape.transforms.fields import Field
from landscape.transforms.rules import Walk, rule


def contracted(walk: Walk, operands: Sequence[tuple[Field, str]], output: str) -> Field:
    """A product of tensors, summed over the labels that the output does not have.

    Each operand comes with one letter for each of its dimensions, as in `torch.einsum`.
    """
    labels = output + "".join(dict.fromkeys(c for _, names in operands for c in names if c not in output))
    sizes: dict[str, int] = {}
    for field, names in operands:
        for size, letter in zip(field.shape, names, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    total = Field(tuple(sizes[c] for c in labels))
    for field, names in operands:
        order = [names.index(c) for c in labels if c in names]
        shape = [field.shape[names.index(c)] if c in names else 1 for c in labels]
        total = total.plus(field.mapped(lambda ids, o=order, s=shape: ids.permute(o).reshape(s), shape))  # type: ignore[misc]
    total = walk.uniform(total, range(len(output), len(labels)))
    outer = total.shape[: len(output)]
    total = total.mapped(lambda ids: ids.reshape(outer), outer)
    return Field(outer, ((1, walk.fields.joined(total)),)) if total.terms else total


def _biased(walk: Walk, y: Field, bias: Field | None) -> Field:
    return y if bias is None else walk.equal(y, bias)


@rule("linear")
def linear(walk: Walk, x: Field, weight: Field, bias: Field | None = None) -> Field:
    """Rows follow the output, columns undo the input."""
    outer = "abcdefgh"[: len(x.shape) - 1]
    rows = "o" * (len(weight.shape) - 1)
    y = contracted(walk, [(x, outer + "k"), (weight, rows + "k")], outer + rows)
    return _biased(walk, y, bias)


@rule("matmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm")
def matmul(walk: Walk, *arguments: Any, **named: Any) -> Any:
    """Summed over the inner dimension."""
    bias = arguments[0] if walk.name in {"addmm", "baddbmm"} else None
    a, b = arguments[1:3] if bias is not None else arguments[:2]
    if walk.name == "addbmm" or (bias is not None and set(named.values()) - {1}):
        return NotImplemented
    batch = "abcdefgh"
    inner = [f"{batch[-(len(a.shape) - 2) :] if len(a.shape) > 2 else ''}{'m' if len(a.shape) > 1 else ''}k"]
    inner += [f"{batch[-(len(b.shape) - 2) :] if len(b.shape) > 2 else ''}k{'n' if len(b.shape) > 1 else ''}"]
    outer = max((s[:-2] for s in inner), key=len) if max(len(a.shape), len(b.shape)) > 2 else ""
    output = outer + ("m" if len(a.shape) > 1 else "") + ("n" if len(b.shape) > 1 else "")
    return _biased(walk, contracted(walk, list(zip((a, b), inner, strict=True)), output), bias)


@rule("einsum")
def einsum(walk: Walk, equation: str, operands: Sequence[Field], **_: Any) -> Any:
    """Any contraction without an ellipsis or a diagonal."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if not arrow or "." in equation or any(len(set(n)) < len(n) for n in names):
        return NotImplemented
    return contracted(walk, list(zip(operands, names, strict=True)), output)


@rule("bilinear")
def bilinear(walk: Walk, x: Field, z: Field, weight: Field, bias: Field | None = None) -> Field:
    """A form x W z for each output."""
    outer = "abcdefgh"[: len(x.shape) - 1]
    y = contracted(walk, [(x, outer + "i"), (weight, "oij"), (z, outer + "j")], outer + "o")
    return _biased(walk, y, bias)


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def convolution(
    walk: Walk, x: Field, weight: Field, bias: Field | None = None, *rest: Any, groups: int = 1, **named: Any
) -> Any:
    """Rows follow the output channels, columns undo the input channels of their group."""
    transposed = "transpose" in walk.name
    if walk.name == "convolution":  # stride, padding, dilation, transposed, output_padding, groups
        transposed, groups = rest[3], rest[5]
    elif len(rest) > 3:  # stride, padding, dilation, groups; transposed: output_padding before groups
        groups = rest[3]
    spatial = len(weight.shape) - 2
    batched = len(x.shape) == spatial + 2
    if not batched:
        x = x.mapped(lambda ids: ids.unsqueeze(0), (1, *x.shape))
    x = walk.uniform(x, range(2, spatial + 2))
    weight = walk.uniform(weight, range(2, spatial + 2))
    n, channels = x.shape[:2]
    inputs = (n, groups, channels // groups)
    first, second = weight.shape[0] // groups, weight.shape[1]
    y = contracted(
        walk,
        [
            (x.mapped(lambda ids: ids.reshape(inputs), inputs), "ngk"),
            (
                weight.mapped(lambda ids: ids.reshape(groups, first, second), (groups, first, second)),
                "gko" if transposed else "gok",
            ),
        ],
        "ngo",
    )
    outputs = groups * y.shape[2]
    y = y.mapped(lambda ids: ids.reshape(n, outputs), (n, outputs))
    y = _biased(walk, y, bias)
    shape = (n if batched else 1, outputs, *([1] * spatial))
    y = y.mapped(lambda ids: ids.reshape(shape), shape)
    if not batched:
        y = y.mapped(lambda ids: ids[0], shape[1:])
    return y.expanded(walk.shape)


@rule("scaled_dot_product_attention")
def attention(
    walk: Walk,
    q: Field,
    k: Field,
    v: Field,
    mask: Field | None = None,
    *_: Any,
    enable_gqa: bool = False,
    **__: Any,
) -> Field:
    """Queries undo keys, feature by feature; values pass."""
    if mask is not None:
        walk.pin(mask)
    if enable_gqa:
        times = q.shape[-3] // k.shape[-3]
        k, v = (
            f.mapped(
                lambda ids: ids.repeat_interleave(times, -3), (*f.shape[:-3], q.shape[-3], *f.shape[-2:])
            )
            for f in (k, v)
        )
    q, k, v = (walk.uniform(f, [-2]) for f in (q, k, v))
    walk.pin(q.plus(k), "needs queries and keys that undo each other")
    return v.expanded(walk.shape)


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_bilinear2d", "upsample_linear1d", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "_upsample_bilinear2d_aa", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d",
)  # fmt: skip
def pooled(walk: Walk, x: Field, *_: Any, **__: Any) -> Any:
    """Over space, along which all change alike."""
    found = re.search(r"(\d)d", walk.name)
    spatial = int(found.group(1)) if found else 2
    kept = walk.uniform(x, range(len(x.shape) - spatial, len(x.shape))).expanded(walk.shape)
    val = walk.node.meta["val"]
    return (kept, *(Field(tuple(t.shape)) for t in val[1:])) if isinstance(val, tuple | list) else kept
