"""Rules of operations that move, drop, repeat or gather entries, and of sums over dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from landscape.transforms.fields import Field, compact
from landscape.transforms.rules import Walk, constants, rule


@rule(
    "permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "flatten", "unflatten", "slice", "select",
    "narrow", "movedim", "flip", "roll", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "repeat",
    "repeat_interleave", "tile", "diagonal", "unfold", "swapaxes", "view", "_unsafe_view", "reshape", "rot90",
    "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_split", "unsafe_chunk",
)  # fmt: skip
def moved(walk: Walk, x: Any, *rest: Any, **named: Any) -> Any:
    """The operation itself, run on the unknowns."""
    if not isinstance(x, Field) or any(isinstance(v, Field | torch.dtype) for v in (*rest, *named.values())):
        return NotImplemented

    def run(ids: Tensor) -> Any:
        if walk.name in {"view", "_unsafe_view", "reshape"}:
            return ids.reshape(walk.shape)
        return walk.node.target(ids, *rest, **named)  # type: ignore[operator]

    val = walk.node.meta["val"]
    if not isinstance(val, tuple | list):
        return x.mapped(run, val.shape)
    return tuple(x.mapped(lambda ids, i=i: run(ids)[i], part.shape) for i, part in enumerate(val))  # type: ignore[misc]


@rule("cat", "stack", "concat")
def joined(walk: Walk, parts: Sequence[Field], dim: int = 0) -> Field:
    """Side by side."""
    parts = [part for part in parts if walk.name == "stack" or part.shape != (0,)]
    operation = torch.stack if walk.name == "stack" else torch.cat
    if walk.name == "stack" and any(
        part.terms for part in parts
    ):  # zeros go with whatever stands beside them
        first = next(part for part in parts if part.terms)
        parts = [first if part.zero else part for part in parts]
    ids = [
        walk.fields.fresh(part.shape, dim % len(part.shape))
        if part.zero and not part.terms and walk.name != "stack"
        else walk.fields.joined(part)
        for part in parts
    ]
    return _of(operation(ids, dim))


@rule("slice_scatter", "select_scatter")
def scattered(walk: Walk, x: Field, part: Field, *rest: Any, **named: Any) -> Field:
    """One tensor written into another."""
    inner, outer = walk.fields.joined(part), walk.fields.joined(x)
    return _of(walk.node.target(outer, inner, *rest, **named))  # type: ignore[operator]


@rule("copy")
def copied(walk: Walk, x: Field, source: Field, *_: Any) -> Field:
    """One tensor written over another."""
    return source.expanded(walk.shape)


@rule("constant_pad_nd", "pad")
def padded(walk: Walk, x: Field, pads: Sequence[int], *rest: Any, **named: Any) -> Any:
    """Zeros around; any other border is made of the entries, which must change alike."""
    mode = rest[0] if walk.name == "pad" and rest else named.get("mode", "constant")
    values = rest[1:] if walk.name == "pad" else rest
    value = (values[0] if values else named.get("value", 0)) or 0
    dims = [len(x.shape) - 1 - i for i in range(len(pads) // 2)]
    if mode != "constant":
        return walk.uniform(x, dims).expanded(walk.shape)
    if value not in {0, float("inf"), float("-inf")}:
        walk.pin(x, f"pads with {value}")
        return Field(walk.shape)
    if not x.terms:
        return Field(walk.shape, zero=x.zero)
    x = _of(walk.fields.joined(x))
    pairs = zip(pads[::2], pads[1::2], strict=True)
    for dim, (low, high) in zip(dims, pairs, strict=True):
        x = _padded_along(walk, x, dim, low, high)
    return x


def _padded_along(walk: Walk, x: Field, dim: int, low: int, high: int) -> Field:
    ids = x.terms[0][1]
    for side, length in enumerate((low, high)):
        if length < 0:
            ids = ids.narrow(dim, -length * (1 - side), ids.shape[dim] + length)
        elif length > 0 and ids.stride(dim) == 0:
            ids = ids.expand(*ids.shape[:dim], ids.shape[dim] + length, *ids.shape[dim + 1 :])
        elif length > 0:
            border = walk.fields.fresh((*ids.shape[:dim], length, *ids.shape[dim + 1 :]), dim)
            ids = torch.cat([border, ids] if side == 0 else [ids, border], dim)
    return _of(ids)


@rule(
    "sum", "mean", "amax", "amin", "max", "min", "median", "nansum", "any", "all", "cumsum", "sort", "topk",
)  # fmt: skip
def summed(walk: Walk, x: Field, *rest: Any, **named: Any) -> Any:
    """Over dimensions along which all change alike."""
    if rest and isinstance(rest[0], Field):
        return walk.equal(x, rest[0])
    place = 1 if walk.name == "topk" else 0
    dims = named.get(
        "dim", rest[place] if len(rest) > place else (-1 if walk.name in {"sort", "topk"} else None)
    )
    return _over(walk, x, dims)


@rule("linalg_vector_norm", "norm")
def norm(walk: Walk, x: Field, order: Any = 2, dim: Any = None, *_: Any, **named: Any) -> Any:
    """Of degree one, but for the count of what is not zero."""
    if order == 0:
        return Field(walk.shape)
    return _over(walk, x, named.get("dim", dim))


@rule("var", "var_mean", "std")
def variance(walk: Walk, x: Field, dim: Any = None, *_: Any, **named: Any) -> Any:
    """Of degree two."""
    over = _over(walk, x, named.get("dim", dim))
    if walk.name == "var_mean":
        return over[0].times(2), over[0]
    return over.times(2) if walk.name == "var" else over


@rule("embedding")
def embedded(walk: Walk, table: Field, index: Field, *_: Any) -> Field:
    """Rows of a table: which ones is up to the data."""
    row = walk.uniform(table, [0])
    return row.mapped(lambda ids: ids.reshape(ids.shape[1:]), row.shape[1:]).expanded(walk.shape)


@rule("embedding_bag", "_embedding_bag")
def bag(walk: Walk, table: Field, *rest: Any, **named: Any) -> Any:
    """Sums or means of rows of a table."""
    if any(isinstance(v, Field) for v in (*rest[2:], *named.values())):  # weights of the rows
        return NotImplemented
    row = walk.uniform(table, [0]).expanded(walk.shape)
    return (row, *constants(walk.node.meta["val"][1:]))


@rule("index_select")
def selected(walk: Walk, x: Field, dim: int, *_: Any) -> Field:
    """Entries along one dimension that the data choose."""
    return walk.uniform(x, [dim]).expanded(walk.shape)


@rule("index", "gather", "take_along_dim")
def indexed(walk: Walk, x: Field, index: Any, *_: Any, **__: Any) -> Field:
    """Entries that the data choose."""
    along = [i for i, v in enumerate(index) if v is not None] if isinstance(index, tuple | list) else []
    if len(along) == 1 and len(index[along[0]].shape) == 1:
        return walk.uniform(x, along).expanded(walk.shape)
    return _over(walk, x, None)  # type: ignore[no-any-return]


def _of(ids: Tensor) -> Field:
    return Field(tuple(ids.shape), ((1, compact(ids)),))


def _over(walk: Walk, x: Field, dims: Any) -> Any:
    over = (
        range(len(x.shape))
        if dims is None or dims == [] or isinstance(dims, bool)
        else [dims]
        if isinstance(dims, int)
        else dims
    )
    kept = walk.uniform(x, list(over))
    val = walk.node.meta["val"]
    first = val[0] if isinstance(val, tuple | list) else val
    if first.ndim < len(x.shape):
        left = [d for d in range(len(x.shape)) if d not in {o % len(x.shape) for o in over}]
        shape = [kept.shape[d] for d in left] if first.ndim else []
        kept = kept.mapped(lambda ids: ids.reshape(shape), shape)
    kept = kept.expanded(first.shape)
    if isinstance(val, tuple | list):
        return (kept, *(Field(tuple(v.shape)) for v in val[1:]))
    return kept
