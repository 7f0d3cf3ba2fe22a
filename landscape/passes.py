"""The data of bare forward passes, cut into micro-batches, and what else is made once for all passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from landscape import batches as batching
from landscape import folding, in_place
from landscape.ways import Ways, layers_in

if TYPE_CHECKING:
    from landscape.problem import Problem


@dataclass
class Piece:
    """A micro-batch.

    Attributes:
        batch: its examples.
        scale: the factor that makes its loss the sum of its terms.
        weight: the denominator of its mean.
        shapes: those of its tensors.
        judged: how many of its answers can be right or wrong, once somebody asked.
    """

    batch: Any
    scale: float
    weight: float
    shapes: Any
    judged: int | None = None


@dataclass(frozen=True)
class Prepared:
    """What passes over a problem's data need, whatever the parameters.

    Attributes:
        pieces: the micro-batches; None where the data are read anew, because they are too large to keep.
        layers: those with tensors of their own in place.
        rectifiers: those that may write over their operand, by the shapes of what is passed, as they become known; None
            where none is to.
        batches: the problem's, held so that nobody else has their identity.
    """

    pieces: list[Piece] | None
    layers: list[folding.Layer]
    rectifiers: dict[Any, in_place.Calls] | None
    batches: batching.Batches


def prepared(problem: Problem, ways: Ways) -> Prepared:
    """Prepare passes in these ways; kept for the time of the problem's session."""
    plans, key = problem.evaluator.plans, ("prepared", id(problem.batches), ways)
    if key not in plans:
        large = sum(batching.size(batch) for batch in problem.batches) > batching.CACHE_BYTES
        pieces = None if large else list(_weighed(problem, ways))
        rectifiers: dict[Any, in_place.Calls] | None = {} if ways.in_place else None
        plans[key] = Prepared(pieces, layers_in(problem, ways), rectifiers, problem.batches)
    found: Prepared = plans[key]
    return found


def stream(problem: Problem, ways: Ways) -> Iterator[Piece]:
    """Read the micro-batches anew."""
    return _weighed(problem, ways, merged=False)


# --- micro-batches ----------------------------------------------------------------------------------


def _weighed(problem: Problem, ways: Ways, *, merged: bool = True) -> Iterator[Piece]:
    evaluator, data = problem.evaluator, problem.batches
    cut = data if ways.microbatch is None else _recut(data, ways.microbatch, merged)
    for batch, weight in evaluator.pieces(cut):
        yield Piece(ways.laid_out(batch), evaluator.scale(weight), weight, in_place.shapes(batch))


def _recut(data: Iterable[Any], most: int, merged: bool) -> Iterator[Any]:
    """Cut neighbouring batches of the same kind together into equal parts of at most so many examples."""
    groups = _groups(data) if merged else ([batch] for batch in data)
    for group in groups:
        try:
            count = sum(batching.examples(batch) for batch in group)
        except ValueError:  # examples cannot be told apart
            yield from group
            continue
        whole, parts = _joined(group), max(1, -(-count // most))
        for i in range(parts):
            yield batching.cut(whole, i * count // parts, (i + 1) * count // parts)


def _groups(data: Iterable[Any]) -> Iterator[list[Any]]:
    """Neighbouring batches that can be joined."""
    group: list[Any] = []
    for batch in data:
        if group and not _alike(group[-1], batch):
            yield group
            group = []
        group.append(batch)
    yield group


def _alike(a: Any, b: Any) -> bool:
    try:
        return bool(_kind(a) == _kind(b))
    except (ValueError, RuntimeError):  # what is no tensor may not be compared
        return False


def _kind(batch: Any) -> Any:
    """What batches have in common that can be joined: all but the number of examples."""
    return batching.tree_map(lambda t: (t.dtype, t.shape[1:]), batch)


def _joined(group: list[Any]) -> Any:
    if len(group) == 1:
        return group[0]
    joined = iter([torch.cat(same) for same in zip(*map(batching.tensors, group), strict=True)])
    return batching.tree_map(lambda t: next(joined), group[0])  # noqa: ARG005
