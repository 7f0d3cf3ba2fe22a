"""What a measurement needs of memory, predicted from shapes, and how it is cut to stay within what is stated.

Nothing here asks how much memory is free: a choice must come out the same wherever a run is resumed.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from landscape import batches as batching
from landscape.errors import Refused
from landscape.product_checks import LARGE

if TYPE_CHECKING:
    from landscape.problem import Problem

# Peak memory of a product per byte that autograd saves for it. Measured as the growth of the peak resident
# memory per example: H 2.1 (a GPT) to 5.5 (MLPs, whose few tensors pass through the allocator's hands), G 1.2
# to 5.9 (a GPT with 8000 classes). benchmarks/footprint.py measures it.
_PEAK_PER_SAVED = 6
# Tensors of the parameters' size that a product holds beside its vectors: 1.6 at 124 M parameters.
_PARAMETERS_HELD = 2
# The same of the check of products, in the parameters' precision: float64 copies, vectors and results.
_CHECK_HELD, _LARGE_CHECK_HELD = 18, 8


# What a model may raise when it is run on a single example, as batch normalization in training mode does; and a
# problem whose model no process can run alone.
_NOT_ALONE = (RuntimeError, ValueError, TypeError, IndexError, Refused)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a measurement stays within its memory.

    Attributes:
        microbatch: the most examples in one pass; None leaves the batches as they come.
        block: the most vectors at once.
        needed: the bytes predicted for all, beside the model and its data; None where examples cannot be
            run alone, so that nothing is predicted.
    """

    microbatch: int | None
    block: int
    needed: int | None


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What autograd saves, in bytes: for a pass, and for each of at most `count` examples."""

    fixed: int
    each: int
    count: int
    divisible: bool


def plan(problem: Problem, memory: int, *, vector: int, block: int, products: bool, check: bool) -> Plan:
    """Choose micro-batch and block so that one product stays within the memory.

    Batches stay whole where they fit. Else the micro-batch gives way before the block of vectors does; a
    micro-batch that the problem was given stands.

    Args:
        problem: what is to be measured.
        memory: bytes that may be used beside the model and its data.
        vector: bytes that one vector of a block takes.
        block: the vectors wanted at once.
        products: whether curvature products are made.
        check: whether they are checked first.

    Raises:
        Refused: if one example with one vector does not fit, or if it does but this machine has less.
    """
    try:
        saved = _saved(problem, memory, products)
    except _NOT_ALONE:
        return Plan(problem.microbatch, block, None)
    size = problem.size * problem.dtype.itemsize
    held = _PARAMETERS_HELD * size + _PEAK_PER_SAVED * saved.fixed
    least = (_CHECK_HELD if problem.size <= LARGE else _LARGE_CHECK_HELD) * size if check and products else 0
    each = max(1, _PEAK_PER_SAVED * saved.each)
    fewest = min(saved.count, problem.microbatch or 1)
    while True:
        parameters = max(held + block * vector, least)
        room = (memory - parameters) // each
        if room >= fewest or block == 1:
            break
        block //= 2
    if room < fewest:
        raise Refused(_refusal(problem, memory, parameters, each * fewest, saved))
    examples = min(room, saved.count) if problem.microbatch is None else fewest
    needed = parameters + each * examples
    if needed > (there := machine_memory(problem.device)):
        raise Refused(
            f"this would take about {in_words(needed)} of the {in_words(memory)} that memory allows, and this "
            f"machine has {in_words(there)} in all. State less: memory=, --memory."
        )
    cut = problem.microbatch is None and examples < saved.count
    return Plan(examples if cut else problem.microbatch, block, needed)


def graphs(problem: Problem, memory: int) -> int | None:
    """The bytes that autograd saves for the products' graphs of all micro-batches.

    Args:
        problem: on what.
        memory: bytes beyond which nobody asks how many.

    Returns:
        The bytes; None where examples cannot be run alone, so that nothing is predicted.
    """
    try:
        saved = _saved(problem, memory * _PEAK_PER_SAVED, products=True)
    except _NOT_ALONE:
        return None
    if not saved.divisible:
        return saved.each * sum(1 for _ in problem.batches)
    counts = [batching.examples(piece) for piece in problem.evaluator.cut(problem.batches)]
    return saved.fixed * len(counts) + saved.each * sum(counts)


def saved_per_example(problem: Problem) -> int:
    """The bytes that autograd saves per example for a product."""
    return _saved(problem, 1 << 62, products=True).each


def machine_memory(device: torch.device) -> int:
    """Bytes of memory that the machine, its container or the device has, whether free or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # a system that does not tell
        return 1 << 62
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        text = limit.read_text().strip()
    except OSError:
        return whole
    return min(whole, int(text)) if text.isdigit() else whole


def in_words(count: float) -> str:
    """Return a number of bytes as text."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _refusal(problem: Problem, memory: int, parameters: int, graph: int, saved: _Saved) -> str:
    given = problem.microbatch if saved.divisible and saved.count > 1 else None
    what, smaller = (
        ("a batch", "smaller batches (these cannot be cut)") if not saved.divisible
        else (f"{given} examples", "a smaller microbatch") if given and given > 1
        else ("one example", "differences of gradients, by products='difference' with check=False")
    )  # fmt: skip
    return (
        f"the memory for {what} at once is about {in_words(parameters + graph)} ({in_words(parameters)} for "
        f"{problem.size} parameters and a vector, {in_words(graph)} for the graph), allowed is "
        f"{in_words(memory)}. Allow more (memory=, --memory), measure fewer parameters (parameters=), or take "
        f"{smaller}."
    )


# --- what autograd saves ----------------------------------------------------------------------------


class _TooMuchError(Exception):
    """The graph of one or two examples is larger than what is allowed."""


def _saved(problem: Problem, memory: int, products: bool) -> _Saved:
    """Measure what autograd saves for two examples and for one, those of the largest tensors."""
    batch, count, divisible = _heaviest(problem)
    most = memory // _PEAK_PER_SAVED
    if not divisible:
        return _Saved(0, _graph(problem, batch, products, most), 1, divisible=False)
    one = _graph(problem, batching.cut(batch, 0, 1), products, most)
    if batching.examples(batch) == 1 or one > most:
        return _Saved(0, one, count, divisible=True)
    each = max(0, _graph(problem, batching.cut(batch, 0, 2), products, 2 * most) - one)
    return _Saved(max(0, one - each), each, count, divisible=True)


def _heaviest(problem: Problem) -> tuple[Any, int, bool]:
    """The batch whose examples have the largest tensors, the most examples of any batch, and if they can be cut."""
    heaviest, most, longest, divisible = None, -1.0, 1, True
    for batch in problem.batches:
        size = sum(t.numel() * t.element_size() for t in batching.tensors(batch))
        try:
            count = batching.examples(batch)
        except ValueError:
            count, divisible = 1, False
        longest = max(longest, count)
        if size / max(1, count) > most:
            heaviest, most = batch, size / max(1, count)
    return heaviest, longest, divisible


def _graph(problem: Problem, piece: Any, products: bool, most: int) -> int:
    """Bytes that autograd saves for a gradient of a micro-batch, or for a product.

    A gradient with a graph of its own saves what a product needs, but for the product's own passing values.
    """
    leaves = problem.leaves()
    own = {t.untyped_storage().data_ptr() for t in (*leaves, *batching.tensors(piece))}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        if sum(found.values()) > most:
            raise _TooMuchError
        return t

    with problem.session(), problem.evaluator.twice_differentiable():
        try:
            with problem.filled(leaves), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss = problem.evaluator.loss_of(piece)
                if loss.requires_grad:
                    torch.autograd.grad(loss, leaves, create_graph=products, allow_unused=True)
        except _TooMuchError:
            return max(most + 1, sum(found.values()))
    return sum(found.values())
