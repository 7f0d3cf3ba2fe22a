"""The loss at displaced parameters, L(θ + Σ cᵢ dᵢ), at the cost of the bare forward passes.

The parameters are views of one flat buffer, which each point writes anew from θ, so that nothing drifts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from landscape import batches as batching
from landscape import passes
from landscape.accuracy import Judge
from landscape.evaluator import Own, require_weight
from landscape.folding import Folded
from landscape.in_place import InPlace
from landscape.passes import Piece
from landscape.ways import Ways

if TYPE_CHECKING:
    from landscape.problem import Problem
    from landscape.sharded import Shard
    from landscape.vectors import ParameterSpace

_ALIGNMENT = 64  # bytes on which PyTorch's own tensors start; some kernels round otherwise on other addresses

Quantity = Callable[[Any, Any], Tensor]


class Displaced:
    """L(θ + Σ cᵢ dᵢ) and other quantities; made by `Problem.displaced`.

    Attributes:
        ways: how the passes are made.
        names: of the quantities: "loss", then "accuracy" and the others that were asked for.
    """

    def __init__(
        self,
        problem: Problem,
        directions: Sequence[Tensor],
        *,
        ways: Ways,
        accuracy: bool = False,
        also: Mapping[str, Quantity] | None = None,
    ):
        self._problem, self._evaluator, self.ways = problem, problem.evaluator, ways
        self._also = dict(also or {})
        if accuracy or self._also:
            problem.require_outputs("accuracy, or another quantity of outputs,")
        self._judge = Judge(self._evaluator.loss, self._evaluator.ignored()) if accuracy else None
        self.names = ["loss", *(["accuracy"] if accuracy else []), *self._also]
        self._layout = _Layout(problem.space)
        theta = problem.parameters_vector()
        self._theta = self._layout.spread(theta)
        self._rows = [self._layout.spread(d.to(theta)) for d in directions]
        self._buffer, self._scratch = self._theta.clone(), torch.empty_like(self._theta)
        self._held: tuple[float, ...] = ()  # coefficients of what is in the scratch
        views = [nn.Parameter(view, requires_grad=False) for view in self._layout.views(self._buffer)]
        self._tensors = problem.substitutes(views)
        buffers = {k: t for k, t in self._tensors.items() if k in self._evaluator.slots.buffers}
        self._originals = [(t, t.clone()) for t in buffers.values()]
        self._buffers = buffers
        self._versions = [t._version for t in buffers.values()]
        self._prepared = passes.prepared(problem, ways)
        with self._evaluator.slots.filled(self._tensors):
            self._folded = Folded(self._prepared.layers, channels_last=ways.channels_last)
        self._in_place = InPlace(self._evaluator.model, self._prepared.rectifiers)

    def __call__(self, *coefficients: float) -> float:
        """L(θ + Σ cᵢ dᵢ); directions without a coefficient are left out."""
        return self.values([coefficients])[0][0]

    def values(self, points: Sequence[Sequence[float]]) -> list[list[float]]:
        """All quantities, in the order of `names`, at θ + Σ cᵢ dᵢ for each point c."""
        return self._measured([lambda c=point: self._write(c) for point in points])  # type: ignore[misc]

    def moved(self, displacement: Tensor) -> float:
        """L(θ + displacement) for any vector (n,).

        Raises:
            ValueError: if it does not have n entries.
        """
        row = self._layout.spread(displacement.to(self._theta))
        return self._measured([lambda: torch.add(self._theta, row, out=self._buffer)])[0][0]

    def _write(self, coefficients: Sequence[float]) -> None:
        coefficients = [float(c) for c in coefficients]
        if len(coefficients) > len(self._rows):
            raise ValueError(f"got {len(coefficients)} coefficients for {len(self._rows)} directions")
        if self.ways.exact:  # as θ + c₁ * d₁ + c₂ * d₂ rounds
            last = self._theta
            for c, row in zip(coefficients, self._rows, strict=False):
                last = torch.add(last, torch.mul(row, c, out=self._scratch), out=self._buffer)
        else:
            last = self._without_first(coefficients[1:])
            if coefficients:
                last = torch.add(last, self._rows[0], alpha=coefficients[0], out=self._buffer)
        if last is not self._buffer:
            self._buffer.copy_(last)

    def _without_first(self, coefficients: Sequence[float]) -> Tensor:
        """θ + c₂ d₂ + ...: along a line of a grid it stays."""
        if not coefficients:
            return self._theta
        if tuple(coefficients) != self._held:
            last, self._held = self._theta, ()
            for c, row in zip(coefficients, self._rows[1:], strict=False):
                last = torch.add(last, row, alpha=c, out=self._scratch)
            self._held = tuple(coefficients)
        return self._scratch

    def _measured(self, writers: Sequence[Callable[[], object]]) -> list[list[float]]:
        """The quantities where each writer puts the parameters."""
        shard = self._problem.shard
        if shard is None:
            sums = self._summed(writers)
        else:  # no point is compared: its coefficients come of sums that all ranks have alike
            rows = torch.zeros(len(writers), 2 * len(self.names), dtype=torch.float64)
            shard.add("losses at displaced parameters", lambda: self._fill(rows, writers, shard), rows)
            sums = rows.tolist()
        self._problem.cost.values += len(writers)
        return [self._quantities(row) for row in sums]

    def _fill(self, rows: Tensor, writers: Sequence[Callable[[], object]], shard: Shard) -> tuple[()]:
        rows.copy_(torch.tensor(self._summed(writers, shard.own), dtype=torch.float64))
        return ()

    def _quantities(self, sums: Sequence[float]) -> list[float]:
        require_weight(sums[1] > 0)
        found = [sums[0] / sums[1]]
        pairs = list(zip(self.names[1:], sums[2::2], sums[3::2], strict=True))
        return found + [
            above / (max(1, below) if name == "accuracy" else below) for name, above, below in pairs
        ]

    def _summed(self, writers: Sequence[Callable[[], object]], own: Own | None = None) -> list[list[float]]:
        """For each point and quantity, the sum over micro-batches and what it is divided by."""
        sums = [_Sums() for _ in writers]
        with ExitStack() as stack:
            stack.enter_context(self._evaluator.slots.filled(self._tensors))
            stack.enter_context(self._folded.active())
            stack.enter_context(self._in_place.active())
            stack.enter_context(self.ways.without_grad())
            if self._prepared.pieces is not None:
                pieces = self._prepared.pieces if own is None else list(own(iter(self._prepared.pieces)))
                for write, total in zip(writers, sums, strict=True):
                    self._move(write)
                    for piece in pieces:
                        self._add(piece, total)
            else:  # read anew: once for all points
                stream = passes.stream(self._problem, self.ways)
                for piece in stream if own is None else own(stream):
                    for write, total in zip(writers, sums, strict=True):
                        self._move(write)
                        self._add(piece, total)
        return [total.result(self.names[1:]) for total in sums]

    def _move(self, write: Callable[[], object]) -> None:
        write()
        self._folded.refresh()

    def _add(self, piece: Piece, total: _Sums) -> None:
        if not self._evaluator.has_outputs:
            with self.ways.precision(self._problem.device):
                loss = self._passed(self._evaluator.loss_of, piece)
        else:
            loss = self._loss_and_others(piece, total)
        total.losses.append(_kept(loss))
        total.pieces.append(piece)
        self._put_buffers_back()

    def _loss_and_others(self, piece: Piece, total: _Sums) -> Tensor:
        if self.ways.bfloat16:
            with self.ways.precision(self._problem.device):
                outputs = self._passed(self._evaluator.outputs, piece)
            outputs = batching.tree_map(self._evaluator.moved, outputs)
        else:
            outputs = self._passed(self._evaluator.outputs, piece)
        target = self._evaluator.target_of(piece.batch)
        if self._judge is not None:
            if piece.judged is None:
                piece.judged = self._judge.judged(target)
            total.judged += piece.judged
            total.right.append(_kept(self._judge.right(outputs, target)))
        for name, quantity in self._also.items():
            total.others.setdefault(name, []).append(
                (float(quantity(outputs, target)), batching.examples(target))
            )
        return self._evaluator.loss_from(outputs, target)

    def _passed(self, passing: Callable[[Any], Any], piece: Piece) -> Any:
        if self._in_place.lacks(piece.shapes):
            self._in_place.watch(passing, piece.batch, piece.shapes)
            self._put_buffers_back()
        return self._in_place(passing, piece.batch, piece.shapes)

    def _put_buffers_back(self) -> None:
        """Undo what a pass wrote into buffers, in place or by assigning others."""
        if not self._buffers:
            return
        versions = [t._version for t in self._buffers.values()]
        if versions != self._versions:
            for t, original in self._originals:
                t.copy_(original)
            self._versions = [t._version for t in self._buffers.values()]
        self._evaluator.slots.refill(self._buffers)


def judges(problem: Problem) -> bool:
    """Whether there are right and wrong answers: class labels and outputs for each class, or binary ones."""
    if not problem.evaluator.has_outputs:
        return False
    evaluator = problem.evaluator
    with problem.session(), torch.no_grad():
        piece = next(iter(evaluator.pieces(problem.batches)))[0]
        with problem.filled(problem.leaves()):
            outputs = evaluator.outputs(piece)
        return Judge(evaluator.loss, evaluator.ignored()).can(outputs, evaluator.target_of(piece))


class _Sums:
    """What the micro-batches of one point give; read at its end, so that a device need not wait before."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.losses: list[Tensor | float] = []
        self.right: list[Tensor | float] = []
        self.judged = 0
        self.others: dict[str, list[tuple[float, int]]] = {}

    def result(self, also: Sequence[str]) -> list[float]:
        """Of the loss and the other quantities, the sum and what it is divided by; sums are made in float64."""
        total = weights = 0.0
        for loss, piece in zip(_numbers(self.losses), self.pieces, strict=True):
            total += loss * piece.scale
            weights += piece.weight
        found = [total, weights]
        for name in also:
            if name == "accuracy":
                found += [sum(_numbers(self.right)), self.judged]
            else:
                values = self.others.get(name, [])
                found += [sum(value * count for value, count in values), sum(count for _, count in values)]
        return found


def _kept(value: Tensor) -> Tensor | float:
    """A number where nothing is waited for: on a CPU.

    Small tensors that are held between large ones keep the C library from using the memory of these again: a
    third of the time went into new pages (measured with glibc 2.36).
    """
    return float(value) if value.device.type == "cpu" else value


def _numbers(values: Sequence[Tensor | float]) -> list[float]:
    """Read 0-d tensors, all at once from where they are."""
    if values and all(isinstance(value, Tensor) for value in values):
        numbers: list[float] = torch.stack(list(values)).tolist()  # type: ignore[arg-type]
        return numbers
    return [float(value) for value in values]


class _Layout:
    """One flat buffer for all parameters, each on an address on which tensors of its own would start."""

    def __init__(self, space: ParameterSpace):
        self._space = space

    def spread(self, vector: Tensor) -> Tensor:
        """Bring a vector (n,) into a buffer of this layout.

        Raises:
            ValueError: if it does not have n entries.
        """
        pieces = self._space.split(vector)
        buffer = vector.new_zeros(sum(self._lengths(vector.element_size())))
        for view, piece in zip(self.views(buffer), pieces, strict=True):
            view.copy_(piece)
        return buffer

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The parameters' views of a buffer."""
        parts = torch.split(buffer, self._lengths(buffer.element_size()))
        return [
            part[:size].view(shape)
            for part, size, shape in zip(parts, self._space.sizes, self._space.shapes, strict=True)
        ]

    def _lengths(self, bytes_each: int) -> list[int]:
        step = _ALIGNMENT // bytes_each
        return [-(-size // step) * step for size in self._space.sizes]
