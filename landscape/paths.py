"""The sum over all paths through a rectifier network of Π|w|^p, by one forward pass with other arithmetic.

A network of linear operations and rectifiers is a sum over paths, each from an input or a bias to an output,
of the product of the weights along it. With |w|^p in place of every weight w and inputs of one, all values are
≥ 0, rectifiers do nothing, and the outputs add up to Σ_paths Π|w|^p. Weights are all constants that values
which depend on the input meet: parameters or what is computed from them (weight norm), buffers (BatchNorm in
evaluation mode is one factor and one summand), the 1/k of an average. A maximum over a window has a path from
each place of it.

Source: Neyshabur et al. 2015 (arXiv 1503.00036); biases, pooling and BatchNorm as in Gonon et al. 2024 (arXiv
2310.01225).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from landscape import batches as batching
from landscape.errors import Refused

if TYPE_CHECKING:
    from landscape.problem import Problem


def path_sum(problem: Problem, p: float) -> float:
    """Return Σ over all paths of Π|w|^p, in float64 where the model runs in it.

    Args:
        problem: with outputs; of its data only the shape of the first example is used.
        p: exponent, > 0.

    Raises:
        Refused: naming the operation that is neither linear nor a rectifier; with `forward=`; in training
            mode; for inputs that are not real numbers; or if the sum overflows.
    """
    problem.require_outputs("the path norm")
    if problem.mode != "eval":
        raise Refused(
            f"the path norm is that of the network in evaluation mode, got {problem.mode!r}: use mode='eval'"
        )
    wide = problem.in_float64() or problem
    with wide.session(), torch.no_grad(), wide.filled(wide.leaves()):
        example = _example(wide)
        walk = _Walk(p)
        ones = batching.tree_map(lambda t: torch.ones_like(t) if t.is_floating_point() else t, example)
        walk.follow(ones)
        with walk:
            outputs = wide.evaluator.outputs(ones)
        ends = [t for t in batching.tensors(outputs) if t.is_floating_point()]
        total = math.fsum(float(t.double().sum()) for t in ends if walk.follows(t))
    if not math.isfinite(total):
        raise Refused(f"the sum over paths is {total}: it overflows; measure fewer layers, or a smaller p")
    return total


def _example(problem: Problem) -> Any:
    """The first example, as a batch of one."""
    piece = next(iter(problem.evaluator.pieces(problem.batches)))[0]
    try:
        example = batching.cut(piece, 0, 1)
    except ValueError as error:
        raise Refused(f"the path norm needs an example to know its shape, but {error}") from error
    inputs = example[0] if isinstance(example, tuple | list) else example
    if not any(t.is_floating_point() for t in batching.tensors(inputs)):
        raise Refused(
            "the path norm is a sum over paths from real inputs, and this model takes whole numbers (tokens); "
            "it is defined for networks of linear operations and rectifiers on real inputs"
        )
    return example


class _Walk(TorchDispatchMode):
    """Runs each operation on values that depend on the input by its rule, all others as they are."""

    def __init__(self, p: float):
        super().__init__()  # type: ignore[no-untyped-call]
        self.p = p
        self._followed: dict[int, Tensor] = {}  # held, so that no other tensor gets the same id

    def follow(self, tree: Any) -> None:
        """Take note of values that depend on the input."""
        real = (t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point())
        self._followed.update((id(t), t) for t in real)

    def follows(self, t: Any) -> bool:
        """Whether a tensor depends on the input."""
        return id(t) in self._followed

    def weight(self, value: Any) -> Any:
        """|w|^p of a constant; what depends on the input as it is."""
        if isinstance(value, Tensor):
            return value if self.follows(value) or not value.is_floating_point() else value.abs() ** self.p
        return abs(value) ** self.p

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if not any(map(self.follows, tree_leaves((args, given)))):
            return func(*args, **given)
        name = func.overloadpacket.__name__
        if name in _SHAPES:
            return func(*args, **given)
        rule = _RULES.get(name.rstrip("_") if name.endswith("_") else name)
        made = None if rule is None else rule(_Call(self, func, args, given))
        within = name.endswith("_")
        if made is None or (within and not self.follows(args[0])):
            raise Refused(
                f"the path norm is defined for networks of linear operations and rectifiers; {func} of values that "
                "depend on the input is neither, or not known to be"
            )
        if within and made is not args[0]:
            made = args[0].copy_(made)
        self.follow(made)
        return made


# Rules: each gives what its operation returns, or None where it does not hold.


@dataclass(frozen=True)
class _Call:
    """An operation of values that depend on the input, and its arguments."""

    walk: _Walk
    func: Any
    args: tuple[Any, ...]
    given: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the operation."""
        return str(self.func.overloadpacket.__name__)

    def plain(self) -> Any:
        """What it returns as it is."""
        return self.func(*self.args, **self.given)


_Rule = Callable[[_Call], Any]


def _plain(call: _Call) -> Any:
    """Moves values, or adds up those of one tensor."""
    args = tree_map(lambda v: call.walk.weight(v) if isinstance(v, Tensor) else v, call.args)
    return call.func(*args, **call.given)


def _unchanged(call: _Call) -> Any:
    """A rectifier, or a sign."""
    return call.args[0].clone()


def _clamp(call: _Call) -> Any:
    """A rectifier where it cuts at 0 from below, and there only."""
    bounds = [*call.args[1:], *call.given.values()]
    rectifies = bounds == [0, 0] if call.name.startswith("threshold") else bounds in ([0], [0, None])
    return call.args[0].clone() if rectifies else None


def _padded(call: _Call) -> Any:
    return None if any(call.args[2:]) else call.func(*call.args)


def _sum(call: _Call) -> Any:
    first, second = map(call.walk.weight, call.args[:2])
    alpha = abs(call.given.get("alpha", call.args[2] if len(call.args) > 2 else 1)) ** call.walk.p
    turned = call.name == "rsub"
    return second + first * alpha if turned else first + second * alpha


def _product(places: tuple[int, int]) -> _Rule:
    """Of two factors, of which one may depend on the input; a summand may stand before them."""

    def rule(call: _Call) -> Any:
        if call.given or all(call.walk.follows(call.args[place]) for place in places):
            return None
        tensors = [call.walk.weight(v) if isinstance(v, Tensor) else v for v in call.args]
        return call.func(*tensors)

    return rule


def _multiple(call: _Call) -> Any:
    both = all(call.walk.follows(factor) for factor in call.args[:2])
    return None if both else call.walk.weight(call.args[0]) * call.walk.weight(call.args[1])


def _quotient(call: _Call) -> Any:
    first, second = call.args[:2]
    return None if call.given or call.walk.follows(second) else first / call.walk.weight(second)


def _mean(call: _Call) -> Any:
    made = call.plain()
    return made * (call.args[0].numel() / made.numel()) ** (1 - call.walk.p)


def _largest(call: _Call) -> Any:
    """A path from each place: of a tensor, along dimensions, or of two tensors."""
    if len(call.args) > 1 and isinstance(call.args[1], Tensor):
        return call.walk.weight(call.args[0]) + call.walk.weight(call.args[1])
    if len(call.args) < 2 or call.args[1] == []:
        return call.args[0].sum()
    summed = call.args[0].sum(call.args[1], *call.args[2:3])
    return (summed, call.plain()[1]) if call.name == "max" else summed


def _normalized(call: _Call) -> Any:
    """BatchNorm by stored statistics: one factor and one summand per channel."""
    x, weight, bias, mean, variance = call.args[:5]
    fixed = call.name == "_native_batch_norm_legit_no_training" or not call.args[5]
    if not fixed or any(call.walk.follows(t) for t in call.args[1:5]):
        return None
    factor = (variance + call.args[-1]).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * factor
    shape = (1, -1) + (1,) * (x.ndim - 2)
    made = x * call.walk.weight(factor).view(shape) + call.walk.weight(shift).view(shape)
    return made, *call.plain()[1:]


def _max_pool(call: _Call) -> Any:
    """A path from each place of a window: a convolution with ones."""
    found, indices = call.plain()
    dims = 3 if "3d" in call.name else 2
    settings = [*call.args[1:5], *[[]] * (5 - len(call.args[:5]))]
    kernel, stride, padding, dilation = (list(v) * (dims if len(v) == 1 else 1) for v in settings)
    stride, padding, dilation = stride or kernel, padding or [0] * dims, dilation or [1] * dims
    edges: list[int] = []
    for i in reversed(range(dims)):
        reach = (found.shape[i - dims] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        edges += [padding[i], max(0, reach - padding[i] - call.args[0].shape[i - dims])]
    padded = F.pad(call.args[0], edges)
    planes = padded.reshape(-1, 1, *padded.shape[-dims:])
    ones = planes.new_ones(1, 1, *kernel)
    return _CONVOLUTIONS[dims](planes, ones, stride=stride, dilation=dilation).reshape(found.shape), indices


def _average_pool(call: _Call) -> Any:
    """Sums of windows, times the p-th power of what an average weighs its places with."""
    x, *settings = call.args
    kernel, stride, padding, ceil = [*settings, *[[]] * 4][:4]
    sums = (kernel, stride or kernel, padding or 0, bool(ceil), True, 1)
    unit = torch.ones_like(x)
    weights = call.func(unit, *settings, **call.given) / call.func(unit, *sums)
    return call.func(x, *sums) * weights**call.walk.p


def _adaptive_average(call: _Call) -> Any:
    made = call.plain()
    dims = len(call.args[1])
    count = made.new_ones(())
    for i in range(dims):
        size, places = call.args[0].shape[i - dims], made.shape[i - dims]
        widths = [-(-(j + 1) * size // places) - j * size // places for j in range(places)]
        count = count[..., None] * made.new_tensor(widths)
    return made * count ** (1 - call.walk.p)


def _adaptive_max(call: _Call) -> Any:
    """As many times the average as the window has places."""
    found, indices = call.plain()
    sums = _adaptive_average(replace(call, walk=_Walk(0.0), func=_AVERAGES[len(call.args[1])]))
    return sums.reshape(found.shape), indices


_AVERAGES = {2: torch.ops.aten._adaptive_avg_pool2d, 3: torch.ops.aten._adaptive_avg_pool3d}
_CONVOLUTIONS = {2: F.conv2d, 3: F.conv3d}
# Of new tensors only the shape, and not the content, comes from an input.
_SHAPES = frozenset(
    ["zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"]
)


def _table() -> dict[str, _Rule]:
    """PyTorch's operations by name, and their rules."""
    rules: list[tuple[str, _Rule]] = [
        (
            "view _unsafe_view reshape alias clone detach contiguous _to_copy t transpose permute expand squeeze "
            "unsqueeze select slice split split_with_sizes unbind repeat cat stack flip roll index_select unfold "
            "im2col pixel_shuffle pixel_unshuffle channel_shuffle upsample_nearest1d upsample_nearest2d "
            "upsample_nearest3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
            "replication_pad2d replication_pad3d sum",
            _plain,
        ),
        ("relu leaky_relu _prelu_kernel abs neg", _unchanged),
        ("clamp clamp_min threshold", _clamp),
        ("constant_pad_nd", _padded),
        ("add sub rsub", _sum),
        ("mm bmm mv dot linear convolution", _product((0, 1))),
        ("addmm addmv baddbmm", _product((1, 2))),
        ("mul", _multiple),
        ("div", _quotient),
        ("mean", _mean),
        ("amax max maximum", _largest),
        ("native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm", _normalized),
        ("max_pool2d_with_indices max_pool3d_with_indices", _max_pool),
        ("avg_pool2d avg_pool3d", _average_pool),
        ("_adaptive_avg_pool2d _adaptive_avg_pool3d", _adaptive_average),
        ("adaptive_max_pool2d adaptive_max_pool3d", _adaptive_max),
    ]
    return {name: rule for names, rule in rules for name in names.split()}


_RULES = _table()
