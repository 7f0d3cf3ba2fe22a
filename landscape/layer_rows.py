"""Which axis of a weight tensor counts the neurons that it leads to, and in how many groups: seen from its use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from landscape.capture import Capture
from landscape.errors import Refused
from landscape.ggn_passes import examples_of, few_of, outputs_of
from landscape.uses import Lookup, Outer, TransposedConvolution, Use

if TYPE_CHECKING:
    from landscape.problem import Problem


@dataclass(frozen=True)
class LayerRows:
    """How the neurons of a layer stand in its weight tensor.

    Attributes:
        axis: that counts them.
        groups: of neurons, each with inputs of its own.
    """

    axis: int
    groups: int


def chosen(problem: Problem, pattern: str | None) -> list[str]:
    """Return the names of the weight tensors that a pattern means; without one the last of them.

    Raises:
        Refused: if there is none.
    """
    try:
        names = problem.names if pattern is None else problem.only(pattern).names
    except ValueError as error:
        raise Refused(str(error)) from error
    wide = {name for name, shape in zip(problem.names, problem.space.shapes, strict=True) if len(shape) > 1}
    found = [name for name in names if name in wide]
    if not found:
        whose = "the measured parameters" if pattern is None else f"layer={pattern!r}"
        raise Refused(
            f"{whose} hold no weights of a layer (tensors of two axes or more): {', '.join(names[:4])}"
        )
    return found if pattern is not None else found[-1:]


def of(problem: Problem) -> list[LayerRows]:
    """Return for each measured tensor where its neurons stand, from a pass over a few examples.

    Raises:
        Refused: with `forward=`; or if a tensor is no weight of a linear layer or a convolution.
    """
    problem.require_outputs("the neurons of a layer")
    with problem.session():
        piece, _ = few_of(problem, next(iter(problem.evaluator.pieces(problem.batches)))[0])
        leaves = problem.leaves()
        with problem.filled(leaves):
            capture = Capture(leaves, examples_of(piece))
            with capture.watching():
                outputs_of(problem, piece, examples_of(piece))
    return [_rows(name, uses) for name, uses in zip(problem.names, capture.uses, strict=True)]


def _rows(name: str, uses: list[Use]) -> LayerRows:
    found = {_of_use(use) for use in uses}
    rows = found.pop() if len(found) == 1 else None
    if rows is None:
        kinds = " and ".join(sorted({use.kind for use in uses})) or "nothing that is known"
        raise Refused(
            f"{name} is used for {kinds}; which neurons its weights lead to is known of linear layers, convolutions "
            "and embeddings. Name one with layer="
        )
    return rows


def _of_use(use: Use) -> LayerRows | None:
    if isinstance(use, Outer):
        return LayerRows(1, 1) if use.transposed else LayerRows(0, use.groups)
    if isinstance(use, Lookup):
        return LayerRows(1, 1)
    return LayerRows(1, 1) if isinstance(use, TransposedConvolution) and use.groups == 1 else None
