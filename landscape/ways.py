"""Ways in which bare forward passes are made, and how they are chosen without changing what comes out.

What is chosen follows from shapes and from a trial of exactness on a few examples, never from a clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from landscape import batches as batching
from landscape import folding, in_place, matmul, seeds
from landscape.plain_passes import Autocast

if TYPE_CHECKING:
    from landscape.problem import Problem

# Bytes of the largest intermediate result up to which more examples at once are faster: what the caches of a
# core hold, or what keeps a GPU busy. Twice as many where rectifiers write over their operand.
_ROOM, _ROOM_ON_GPU = 2 << 20, 256 << 20
_FEWEST = 8  # examples at once, also where each of them is large
_TRIED = 4  # examples on which ways are tried
_ASIDE = 0.05  # relative displacement of the point where they are tried
_EXACT = 1e3  # units in the last place, relative to the norm of the outputs
_NOT_THIS_WAY = (RuntimeError, ValueError, TypeError, IndexError)


@dataclass(frozen=True)
class Ways:
    """How the passes are made.

    Attributes:
        exact: whether all is as the user has it, batches and layers, bit for bit.
        microbatch: examples in one pass, across the borders of batches; None leaves the batches as they come.
        folded: whether BatchNorms in evaluation mode are part of the layers before them.
        channels_last: whether images lie in memory as (batch, height, width, channels).
        inference: whether autograd is off altogether; not so for models that use it themselves.
        in_place: whether rectifiers write over what nobody reads after them.
        bfloat16: whether layers compute in bfloat16; that is not exact to rounding.
        faster_matmul: whether matrices are multiplied by the faster kernel, on processors where it is exact and
            unless the user has set a precision.
    """

    exact: bool = True
    microbatch: int | None = None
    folded: bool = False
    channels_last: bool = False
    inference: bool = True
    in_place: bool = False
    bfloat16: bool = False
    faster_matmul: bool = False

    def as_dict(self) -> dict[str, bool | int | None]:
        """The ways as plain values."""
        return dataclasses.asdict(self)

    @contextmanager
    def without_grad(self) -> Iterator[None]:
        """Make no records for derivatives, and multiply matrices in this way."""
        # Asked anew: ways are stored, and taken up on another processor.
        faster = matmul.faster(self.faster_matmul and matmul.is_faster())
        with faster, torch.inference_mode() if self.inference else torch.no_grad():
            yield

    @contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """Let layers compute in the chosen precision."""
        if self.bfloat16:  # nothing cached: the parameters change in place
            with Autocast(device.type, torch.bfloat16, cache_enabled=False):
                yield
        else:
            yield

    def laid_out(self, batch: Any) -> Any:
        """Bring images into the memory order of these ways."""
        if not self.channels_last:
            return batch
        return batching.tree_map(
            lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t, batch
        )


def choose(problem: Problem, *, exact: bool = False, bfloat16: bool = False) -> Ways:
    """Choose how passes are made.

    Args:
        problem: inside its session; what is found out lasts as long.
        exact: keep the user's batches and layers.
        bfloat16: let layers compute in bfloat16.
    """
    plans, key = problem.evaluator.plans, ("ways", id(problem.batches), exact, bfloat16)
    if key not in plans:
        plans[key] = problem.batches, _chosen(problem, exact, bfloat16)
    ways: Ways = plans[key][1]
    return ways


def _chosen(problem: Problem, exact: bool, bfloat16: bool) -> Ways:
    few = _few(problem)
    ways = Ways(bfloat16=bfloat16)
    with contextlib.suppress(*_NOT_THIS_WAY):  # what is wrong with the model itself shows in its first pass
        ways = dataclasses.replace(ways, inference=_works(problem, few, ways))
    if exact or problem.mode == "train":  # examples of a batch may see each other
        return dataclasses.replace(ways, exact=exact)
    each, room = _largest(problem, few), _ROOM if problem.device.type == "cpu" else _ROOM_ON_GPU
    ways = dataclasses.replace(ways, exact=False, microbatch=_microbatch(problem, each, room))
    images = problem.device.type == "cpu" and (problem.dtype == torch.float32 or bfloat16)
    plain = _answers(problem, few, dataclasses.replace(ways, bfloat16=False))

    def is_exact(tried: Ways, rectifiers: in_place.Calls = in_place.NONE) -> bool:
        with contextlib.suppress(*_NOT_THIS_WAY):
            found = _answers(problem, few, dataclasses.replace(tried, bfloat16=False), rectifiers)
            return _agree(found, plain, problem.dtype)
        return False

    faster = dataclasses.replace(ways, faster_matmul=True)
    if not bfloat16 and _multiplies(problem, few) and is_exact(faster):
        ways = faster
    for folded, last in ((True, images), (True, False), (False, images)):
        tried = dataclasses.replace(ways, folded=folded, channels_last=last)
        if layers_in(problem, tried) and is_exact(tried):
            ways = tried
            break
    over = dataclasses.replace(ways, in_place=True)
    with contextlib.suppress(*_NOT_THIS_WAY):
        rectifiers = _rectifiers(problem, few, ways)
        written = max((call.numbers for call in rectifiers if call.references), default=0)
        if written and is_exact(over, rectifiers):
            # Where the largest results are written over, half as much memory is gone through.
            if each is not None and written * problem.dtype.itemsize >= each * batching.examples(few):
                room *= 2
            return dataclasses.replace(over, microbatch=_microbatch(problem, each, room))
    return ways


def _multiplies(problem: Problem, few: Any) -> bool:
    """Whether the faster matrix product is to be had here, and nothing is made slower by it.

    PyTorch's fused attention is, several times.
    """
    wanted = problem.device.type == "cpu" and problem.dtype == torch.float32
    if not (wanted and matmul.is_faster()):
        return False
    try:
        names = {name for name, _ in _calls(problem, few)}
    except _NOT_THIS_WAY:  # its tensors are of a kind that cannot be watched
        return False
    return not any(fused in name for name in names for fused in ("attention", "encoder_layer"))


def _works(problem: Problem, few: Any, ways: Ways) -> bool:
    """Whether the model runs without any of autograd's records."""
    try:
        _answers(problem, few, ways)
    except RuntimeError as failure:
        if "nference" in str(failure) or "does not require grad" in str(failure):
            return False
        raise
    return True


def _microbatch(problem: Problem, each: float | None, room: int) -> int | None:
    """The power of two of examples whose largest intermediate result fits; None where batches cannot be cut."""
    if each is None:
        return problem.microbatch
    count = max(_FEWEST, 1 << int(math.log2(max(1.0, room / max(1.0, each)))))
    return min(count, problem.microbatch or count)


def _largest(problem: Problem, few: Any) -> float | None:
    """Bytes of an example's part of the largest intermediate result; None where batches cannot be cut."""
    try:
        if batching.examples(few) < 2:
            return None
        calls = [_calls(problem, batching.cut(few, 0, count)) for count in (1, 2)]
    except _NOT_THIS_WAY:  # examples cannot be told apart, or do not run alone
        return None
    sizes = [[size for _, size in found] for found in calls]
    same = len(sizes[0]) == len(sizes[1])
    return max((b - a for a, b in zip(*sizes, strict=True)), default=0) if same else max(sizes[1]) / 2


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation by name, with the bytes of each of its results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found += [(str(func), batching.size(t)) for t in batching.tensors(result)]
        return result


def _calls(problem: Problem, piece: Any) -> list[tuple[str, int]]:
    seen = _Calls()
    with torch.no_grad(), problem.filled(problem.leaves()), seen:
        problem.evaluator.loss_of(piece)
    return seen.found


# --- what passes in chosen ways need ------------------------------------------------------------------


def layers_in(problem: Problem, ways: Ways) -> list[folding.Layer]:
    """The layers that these ways give tensors of their own."""
    if not (ways.folded or ways.channels_last):
        return []
    few = _few(problem)
    with problem.filled(problem.leaves()):
        found = folding.layers(
            problem.evaluator.model, lambda: problem.evaluator.loss_of(few), fold=ways.folded
        )
    return [layer for layer in found if layer.norm is not None or ways.channels_last]


def _rectifiers(problem: Problem, few: Any, ways: Ways) -> in_place.Calls:
    """The rectifiers of a pass over a few examples, where any may write over its operand."""
    watched = dataclasses.replace(ways, inference=False)
    with _trial(problem, watched) as answer, ways.precision(problem.device):
        return in_place.seen(problem.evaluator.model, answer, ways.laid_out(few))


def _answers(problem: Problem, few: Any, ways: Ways, rectifiers: in_place.Calls = in_place.NONE) -> Tensor:
    """The model's outputs on a few examples, flat; its loss where outputs are not known."""
    passes = in_place.InPlace(problem.evaluator.model, {(): rectifiers} if ways.in_place else None)
    with _trial(problem, ways) as answer:
        piece = ways.laid_out(few)
        with ways.precision(problem.device), passes.active():
            found = passes(answer, piece, ())
        flat = [t.double().reshape(-1) for t in batching.tensors(found) if t.is_floating_point()]
        return torch.cat(flat) if flat else problem.evaluator.loss_of(piece).double().reshape(-1)


@contextmanager
def _trial(problem: Problem, ways: Ways) -> Iterator[Callable[[Any], Any]]:
    """Yield what maps examples to outputs, or to the loss where outputs are not known, a little aside of θ.

    Aside, because there no scale is one and no shift zero.
    """
    leaves = [_aside(leaf.detach(), i) for i, leaf in enumerate(problem.leaves())]
    evaluator, folded = problem.evaluator, layers_in(problem, ways)
    with ExitStack() as stack:
        stack.enter_context(problem.filled(leaves))
        parts = folding.Folded(folded, channels_last=ways.channels_last)
        stack.enter_context(ways.without_grad())
        stack.enter_context(parts.active())
        parts.refresh()
        yield evaluator.outputs if evaluator.has_outputs else evaluator.loss_of


def _aside(t: Tensor, index: int) -> nn.Parameter:
    draws = torch.randn(t.shape, generator=seeds.generator(0, "ways", index), dtype=torch.float64)
    size = float(t.double().square().mean().sqrt()) or 1.0
    return nn.Parameter(t + (_ASIDE * size * draws).to(t), requires_grad=False)


def _agree(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return bool((a - b).norm() <= _EXACT * torch.finfo(dtype).eps * b.norm())


def _few(problem: Problem) -> Any:
    """A few examples of the first micro-batch with weight; all of it where these have none or cannot be cut out."""
    piece = next(iter(problem.evaluator.pieces(problem.batches)))[0]
    try:
        few = batching.cut(piece, 0, min(_TRIED, batching.examples(piece)))
    except ValueError:
        return piece
    return few if problem.evaluator.weigh(few) > 0 else piece
