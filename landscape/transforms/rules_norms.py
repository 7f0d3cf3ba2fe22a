"""Rules of normalisation: what goes in is free up to ε, what comes out has the norm's own scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from landscape.transforms.fields import Field
from landscape.transforms.rules import Walk, constants, rule


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit_functional", "cudnn_batch_norm",
      "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "instance_norm")  # fmt: skip
def batch_norm(walk: Walk, x: Field, weight: Field | None, bias: Field | None, *rest: Any, **_: Any) -> Any:
    """By the batch's statistics, or by running ones.

    With running statistics (x − m) γ / √(v + ε) + β is exact if m goes with x and γ against it while v stays;
    v cannot go with x, because of its ε.
    """
    mean = rest[0] if rest and isinstance(rest[0], Field) else None
    evaluated = walk.name == "_native_batch_norm_legit_no_training" or (
        mean is not None and not _by_batch(walk, rest)
    )
    spatial = range(2, len(x.shape))
    # By the batch: also over the examples, but each image has its own statistics in instance norm.
    channel = walk.uniform(x, spatial if walk.name == "instance_norm" else [0, *spatial])
    if evaluated and mean is not None:
        y = walk.equal(channel, _beside(mean, len(x.shape)))
    else:
        walk.floor(channel)
        y = Field(channel.shape)
    y = _affine(walk, y, _along(weight, len(x.shape)), _along(bias, len(x.shape))).expanded(x.shape)
    val = walk.node.meta["val"]
    return (y, *constants(val[1:])) if isinstance(val, tuple | list) else y


def _by_batch(walk: Walk, rest: Sequence[Any]) -> bool:
    """Whether the flag after running mean and variance says so."""
    return bool(rest[2]) if len(rest) > 2 else True


@rule("layer_norm", "native_layer_norm")
def layer_norm(
    walk: Walk,
    x: Field,
    shape: Sequence[int],
    weight: Field | None = None,
    bias: Field | None = None,
    *_: Any,
) -> Any:
    """Over the last dimensions."""
    return _normalized(walk, x, range(-len(shape), 0), weight, bias)


@rule("rms_norm", "_fused_rms_norm")
def rms_norm(walk: Walk, x: Field, shape: Sequence[int], weight: Field | None = None, *_: Any) -> Any:
    """Over the last dimensions, without a mean."""
    return _normalized(walk, x, range(-len(shape), 0), weight, None)


@rule("group_norm")
def group_norm(
    walk: Walk, x: Field, groups: int, weight: Field | None = None, bias: Field | None = None, *_: Any
) -> Any:
    """Over space and the channels of a group."""
    n, channels = x.shape[:2]
    apart = (n, groups, channels // groups, *x.shape[2:])
    inner = x.mapped(lambda ids: ids.reshape(apart), apart)
    walk.floor(walk.uniform(inner, range(2, len(apart))))
    weight, bias = _along(weight, len(x.shape)), _along(bias, len(x.shape))
    return _affine(walk, Field(x.shape), weight, bias)


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(walk: Walk, direction: Field, size: Field, dim: int = 0) -> Any:
    """Rows of the direction are free."""
    walk.uniform(direction, [d for d in range(len(direction.shape)) if d != dim % len(direction.shape)])
    weight = size.expanded(direction.shape)
    val = walk.node.meta["val"]
    return (weight, *constants(val[1:])) if isinstance(val, tuple | list) else weight


def _normalized(walk: Walk, x: Field, dims: range, weight: Field | None, bias: Field | None) -> Any:
    walk.floor(walk.uniform(x, dims))
    y = _affine(walk, Field(x.shape), weight, bias)
    val = walk.node.meta["val"]
    return (y, *constants(val[1:])) if isinstance(val, tuple | list) else y


def _affine(walk: Walk, y: Field, weight: Field | None, bias: Field | None) -> Field:
    if weight is not None:
        y = y.plus(weight)
        y = Field(y.shape, ((1, walk.fields.joined(y)),)) if y.terms else y
    return y if bias is None else walk.equal(y, bias)


def _along(vector: Field | None, ndim: int) -> Field | None:
    return None if vector is None else _beside(vector, ndim)


def _beside(vector: Field, ndim: int) -> Field:
    """A vector over channels, beside the other dimensions."""
    shape = (1, vector.shape[0], *([1] * (ndim - 2)))
    return vector.mapped(lambda ids: ids.reshape(shape), shape)
