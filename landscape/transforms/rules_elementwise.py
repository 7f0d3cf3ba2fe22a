"""Rules of operations that treat each entry alone, and of what they are made of."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch

from landscape.transforms.fields import Field
from landscape.transforms.rules import Walk, constants, operation, rule

# A positive number of at most this size under a root, or as the least value of a norm, is there against
# division by zero.
_EPSILON = 1e-3


@rule(
    "relu", "leaky_relu", "abs", "neg", "clone", "detach", "alias", "contiguous", "to", "_to_copy", "positive",
    "lift_fresh_copy", "dropout", "feature_dropout", "type_as", "rrelu", "tril", "triu",
)  # fmt: skip
def same(walk: Walk, x: Field, *_: Any, **__: Any) -> Field:
    """Positively homogeneous of degree one, unless rounded to whole numbers."""
    dtype = walk.node.meta["val"].dtype
    if dtype == torch.bool:  # whether something is zero
        return Field(walk.shape)
    if not dtype.is_floating_point and not dtype.is_complex:
        walk.pin(x, "rounds to whole numbers")
        return Field(walk.shape)
    return x.expanded(walk.shape) if x.terms else Field(walk.shape, zero=x.zero)


@rule("native_dropout")
def dropped(walk: Walk, x: Field, *_: Any) -> tuple[Field, Field]:
    """Dropout with its mask."""
    return x, Field(x.shape)


@rule("prelu", "_prelu_kernel")
def prelu(walk: Walk, x: Field, slope: Field) -> Field:
    """Homogeneous in its input; the slope must stay."""
    walk.pin(slope, "needs its slope as it is")
    return x


@rule("threshold")
def threshold(walk: Walk, x: Field, at: float, value: float) -> Any:
    """A ReLU where both are 0."""
    return x if at == value == 0 else smooth(walk, x)


@rule("clamp", "clamp_min", "clamp_max")
def clamp(walk: Walk, x: Field, *limits: Any, **named: Any) -> Any:
    """A ReLU where the only limit is 0; a floor against division by zero leaves a norm as it is."""
    given = [v for v in (*limits, *named.values()) if v is not None]
    if all(v == 0 for v in given if not isinstance(v, Field)) and not any(
        isinstance(v, Field) for v in given
    ):
        return x
    lowest = walk.name == "clamp_min" or (walk.name == "clamp" and len(given) == 1 and "max" not in named)
    if lowest and not isinstance(given[0], Field) and 0 < given[0] <= _EPSILON and len(limits) < 2:
        walk.floor(x)
        return Field(x.shape, x.terms)
    for v in given:
        if isinstance(v, Field):
            walk.pin(v)
    return smooth(walk, x)


@rule(
    "gelu", "silu", "tanh", "sigmoid", "softplus", "elu", "selu", "celu", "mish", "exp", "log", "log1p", "expm1",
    "sin", "cos", "erf", "hardswish", "hardsigmoid", "hardtanh", "hardshrink", "softshrink", "relu6", "softmax",
    "_softmax", "log_softmax", "_log_softmax", "log_sigmoid", "log_sigmoid_forward", "logsumexp", "softsign", "atan",
    "round", "floor", "ceil", "cross_entropy_loss", "nll_loss_nd", "nll_loss", "nll_loss_forward", "mse_loss",
    "l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "smooth_l1_loss", "huber_loss", "kl_div",
)  # fmt: skip
def smooth(walk: Walk, *inputs: Any, **named: Any) -> Any:
    """Not positively homogeneous: nothing of it may change."""
    for x in (*inputs, *named.values()):
        if isinstance(x, Field):
            walk.pin(x)
    return constants(walk.node.meta["val"])


@rule("sign", "isnan", "isinf", "isfinite", "logical_not", "bitwise_not", "logical_and", "logical_or")
def unchanged(walk: Walk, *_: Any) -> Field:
    """What does not see a positive factor."""
    return Field(walk.shape)


@rule("gt", "ge", "lt", "le", "eq", "ne")
def compared(walk: Walk, x: Field, other: Any) -> Field:
    """A comparison with zero, or of two tensors that change alike."""
    if isinstance(other, Field):
        walk.equal(x, other)
    elif other != 0:
        walk.pin(x, f"compares with {other}")
    return Field(walk.shape)


@rule("where")
def chosen(walk: Walk, _condition: Field, a: Any = 0, b: Any = 0) -> Field:
    """Entries of either tensor."""
    a, b = (_constant(walk, v) for v in (a, b))
    return walk.equal(a, b).expanded(walk.shape)


@rule("masked_fill")
def masked(walk: Walk, x: Field, mask: Field, value: Any) -> Field:
    """Entries, or a constant that is no number's multiple."""
    if isinstance(value, Field):
        return walk.equal(x, value).expanded(walk.shape)
    if value != 0 and not math.isinf(value):
        walk.pin(x, f"fills in {value}")
    return x.expanded(walk.shape)


@rule("add", "sub", "rsub", "maximum", "minimum")
def added(walk: Walk, x: Any, other: Any, *_: Any, alpha: float = 1) -> Any:
    """Summands change alike; a number stays what it is."""
    x, other = (_constant(walk, v) for v in (x, other))
    if walk.name == "add" and not (other.terms or other.zero or x.zero) and _is_floor(walk):
        walk.floor(x)
        return x.expanded(walk.shape)
    return walk.equal(x, other)


@rule("mul")
def multiplied(walk: Walk, x: Any, other: Any) -> Field:
    """Factors' log-scales add."""
    return _constant(walk, x).plus(_constant(walk, other))


@rule("div")
def divided(walk: Walk, x: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """The denominator's log-scale is subtracted."""
    return NotImplemented if rounding_mode else _constant(walk, x).plus(_constant(walk, other), -1)


@rule("square")
def square(walk: Walk, x: Field) -> Field:
    """Degree 2."""
    return x.times(2)


@rule("sqrt")
def root(walk: Walk, x: Field) -> Field:
    """Degree 1/2."""
    return x.times(Fraction(1, 2))


@rule("rsqrt")
def inverse_root(walk: Walk, x: Field) -> Field:
    """Degree -1/2."""
    return x.times(Fraction(-1, 2))


@rule("reciprocal")
def reciprocal(walk: Walk, x: Field) -> Field:
    """Degree -1."""
    return x.times(-1)


@rule("pow")
def power(walk: Walk, x: Any, exponent: Any) -> Any:
    """The degree is the exponent, if that is a number."""
    if isinstance(x, Field) and isinstance(exponent, int | float):
        return x.times(exponent if isinstance(exponent, int) else Fraction(exponent))
    return smooth(walk, x, exponent)


@rule("glu")
def glu(walk: Walk, x: Field, dim: int = -1) -> Field:
    """One half times the sigmoid of the other."""
    half = x.shape[dim] // 2
    value, gate = (x.mapped(lambda t, a=a: t.narrow(dim, a, half), walk.shape) for a in (0, half))  # type: ignore[misc]
    walk.pin(gate, "has a sigmoid on its gate")
    return value


@rule(
    "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange",
    "empty", "empty_like", "new_empty", "scalar_tensor", "eye", "linspace", "rand", "randn", "rand_like", "randn_like",
    "argmax", "argmin", "fill",
)  # fmt: skip
def constant(walk: Walk, x: Any = None, *rest: Any, **__: Any) -> Any:
    """New tensors."""
    if rest and isinstance(rest[0], Field):  # filled with a tensor's value
        return rest[0].expanded(walk.shape)
    if walk.name in {"argmax", "argmin"}:
        walk.uniform(x, range(len(x.shape)) if not rest or rest[0] is None else [rest[0]])
    filled = {"full": 0, "full_like": 0, "new_full": 1, "fill": 0}
    zero = walk.name in {"zeros", "zeros_like", "new_zeros"} or (
        walk.name in filled and rest[filled[walk.name]] == 0
    )
    return Field(walk.shape, zero=zero)


def _constant(walk: Walk, value: Any) -> Field:
    return value if isinstance(value, Field) else Field((), zero=value == 0)


def _is_floor(walk: Walk) -> bool:
    """Whether a small number is added to what a root is taken of next, or what is divided by."""
    node = walk.node
    number = [v for v in node.args if isinstance(v, int | float)]
    return (
        len(number) == 1
        and 0 < number[0] <= _EPSILON
        and all(
            operation(user) in {"sqrt", "rsqrt", "reciprocal"}
            or (operation(user) == "pow" and user.args[1] in {0.5, -0.5, -1})
            or (operation(user) == "div" and user.args[1] is node is not user.args[0])
            for user in node.users
        )
    )
