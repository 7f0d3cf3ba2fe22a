"""The classes of a problem: which examples belong to which, and the problem that weighs all classes alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from landscape import batches as batching
from landscape import losses, seeds
from landscape.errors import Refused
from landscape.problem import Problem

_TESTED = 4  # examples on which loss and outputs are tested
_ROUNDING = 1e3  # units in the last place that are rounding
_MOST_NAMED = 8  # classes that a message names


@dataclass(frozen=True, eq=False)
class Layout:
    """Which examples are measured.

    Attributes:
        labels: of the classes c, ascending, S of them.
        outputs: C, the number of logits; c' goes over all of them.
        members: for each class, the examples' indices in the order of the data.
        every: whether these are all examples with a label, and each class has as many.
    """

    labels: tuple[int, ...]
    outputs: int
    members: tuple[np.ndarray, ...]
    every: bool

    @property
    def counts(self) -> np.ndarray:
        """Examples of each class, (S,)."""
        return np.array([len(rows) for rows in self.members])

    @property
    def classes(self) -> int:
        """S."""
        return len(self.labels)


def read(problem: Problem, classes: Sequence[int] | None, per_class: int | None) -> Layout:
    """Read the classes from the labels.

    Args:
        problem: with logits and integer labels.
        classes: labels of the classes to measure; None takes one for each logit.
        per_class: the most examples of a class, the first ones; None takes all.

    Raises:
        Refused: for a problem without classes, fewer than two, a class without examples, or labels that no
            logit stands for.
    """
    problem.require_outputs("the class structure")
    outputs, targets = _logits(problem), _labels(problem)
    valid = targets != problem.evaluator.ignored()
    found = [int(c) for c in np.unique(targets[valid])]
    if not found or found[0] < 0 or found[-1] >= outputs:
        said = f"from {found[0]} to {found[-1]}" if found else "missing"
        raise Refused(
            f"labels are {said}, but there are {outputs} logits, for the labels 0 to {outputs - 1}; allowed are these, "
            f"and {problem.evaluator.ignored()} for an example without one"
        )
    wanted = sorted(set(range(outputs) if classes is None else classes))
    _require_examples(wanted, found, outputs)
    members = tuple(np.flatnonzero(targets == c)[:per_class] for c in wanted)
    counts = {len(rows) for rows in members}
    every = sum(len(rows) for rows in members) == int(valid.sum()) and len(counts) == 1
    return Layout(tuple(wanted), outputs, members, every)


def _require_examples(wanted: Sequence[int], found: Sequence[int], outputs: int) -> None:
    if outputs < 2:
        raise Refused("the model has 1 logit, so there is one class; the class structure needs two or more")
    if outside := [c for c in wanted if not 0 <= c < outputs]:
        raise Refused(f"classes names {_named(outside)}; allowed are labels from 0 to {outputs - 1}")
    empty = [c for c in wanted if c not in found]
    left = [c for c in wanted if c in found]
    if len(wanted) < 2 or len(left) < 2:
        what = f"only class {left[0]} has examples" if left else "no class has examples"
        what = f"classes names {len(wanted)} class" if len(wanted) < 2 else what
        raise Refused(f"{what}; the class structure needs two classes or more, with examples of each")
    if empty:
        one = len(empty) == 1
        which = (
            f"class{'' if one else 'es'} {_named(empty)} in the data, so {'it has' if one else 'they have'}"
        )
        raise Refused(
            f"there is no example of {which} no mean; give some, or measure the others: classes={_named(left)}"
        )


def _named(labels: Sequence[int]) -> str:
    more = ",..." if len(labels) > _MOST_NAMED else ""
    return ",".join(map(str, labels[:_MOST_NAMED])) + more


def _labels(problem: Problem) -> np.ndarray:
    targets = problem.targets()
    count = problem.examples()
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise Refused(
            f"the targets have dtype {str(targets.dtype).removeprefix('torch.')}, as in a regression; the class "
            "structure needs a classification problem, with one integer label for each example"
        )
    if targets.numel() != count:
        raise Refused(
            f"there are {targets.numel()} labels, of shape {tuple(targets.shape)}, for {count} examples; the class "
            "structure needs one label for each example (output=, target= can pick one)"
        )
    labels: np.ndarray = targets.reshape(-1).long().numpy()
    return labels


def _logits(problem: Problem) -> int:
    with problem.session(), torch.no_grad(), problem.filled(problem.leaves()):
        few = _few(next(iter(problem.batches)))
        f = problem.evaluator.outputs(few)
    if not (isinstance(f, Tensor) and f.ndim == 2 and len(f) == batching.examples(few)):
        got = f"of shape {tuple(f.shape)}" if isinstance(f, Tensor) else f"a {type(f).__name__}"
        raise Refused(
            f"the outputs of {batching.examples(few)} examples are {got}; the class structure needs logits "
            "(examples, classes): Problem(..., output=lambda model, batch: ...) can pick them"
        )
    return int(f.shape[1])


def _few(batch: Any) -> Any:
    return batching.cut(batch, 0, min(_TESTED, batching.examples(batch)))


def factor(problem: Problem) -> float:
    """Test on a few examples that the loss is κ times the cross-entropy of logits, and that examples do not meet.

    Returns:
        κ > 0, 1 for the cross-entropy itself.

    Raises:
        Refused: if one is not so.
    """
    few = _few(next(piece for piece, _ in problem.evaluator.pieces(problem.batches)))
    count = batching.examples(few)
    with problem.session(), torch.no_grad(), problem.filled(problem.leaves()):
        f = problem.evaluator.outputs(few)
        try:
            alone = problem.evaluator.outputs(batching.cut(few, count - 1, count))
        except (RuntimeError, ValueError):  # BatchNorm in training mode refuses a single example
            alone = torch.full_like(f[-1:], torch.inf)
    if bool(torch.isfinite(f).all()) and not _close(alone[0], f[-1]):
        raise Refused(
            "the outputs of an example depend on the others of its batch (BatchNorm in training mode does that); the "
            "class structure needs examples that stand alone: mode='eval'"
        )
    found = _factor(problem, few, f)
    if not found > 0:
        name, options = losses.describe(problem.evaluator.loss)
        what = f"{name} with class weights" if options.get("weight") is not None else name or "another"
        raise Refused(
            f"the loss is {what}, whose second derivative in the outputs is not diag(p) - p pᵀ with p = softmax; the "
            "class structure needs the cross-entropy of logits: loss=torch.nn.functional.cross_entropy"
        )
    return found


def _factor(problem: Problem, few: Any, f: Tensor) -> float:
    """The κ for which ∂ℓ/∂f − κ softmax(f) is the same at two points, so that all higher derivatives agree; or 0."""
    evaluator, stream = problem.evaluator, seeds.generator(0, "class_structure", 0)
    target, scale = evaluator.target_of(few), evaluator.scale(evaluator.weigh(few))
    slopes, shares = [], []
    for _ in range(2):
        z = torch.randn(f.shape, generator=stream, dtype=torch.float64).to(f).requires_grad_()
        with torch.enable_grad():
            slope = torch.autograd.grad(evaluator.loss_from(z, target) * scale, z)[0]
        slopes.append(slope.double())
        shares.append(torch.softmax(z.detach().double(), 1))
    labelled = (target.reshape(-1) != evaluator.ignored())[:, None].double()
    changed, expected = (labelled * (one - two) for one, two in (slopes, shares))
    kappa = float((changed * expected).sum() / expected.square().sum())
    allowed = _ROUNDING * torch.finfo(f.dtype).eps
    if not float((changed - kappa * expected).abs().max()) <= allowed * abs(kappa):
        return 0.0
    return 1.0 if abs(kappa - 1) <= allowed else kappa


def _close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) <= _ROUNDING * torch.finfo(a.dtype).eps * float(b.norm())


class ByClass:
    """The measured examples; they can be read again and again.

    As a whole they come in batches of one class, whose weights differ, or mixed where all classes have as many.

    Args:
        problem: whose data.
        layout: which of them.
    """

    def __init__(self, problem: Problem, layout: Layout):
        self.batches, self.layout = problem.batches, layout
        self.size = max(batching.examples(batch) for batch in problem.batches)

    def __iter__(self) -> Iterator[Any]:
        members = self.layout.members
        alike = len(set(self.layout.counts)) == 1
        for rows in [np.sort(np.concatenate(members))] if alike else members:
            yield from self._batches(rows)

    def of(self, c: int) -> Iterator[Any]:
        """The batches of one class."""
        return self._batches(self.layout.members[c])

    def _batches(self, indices: np.ndarray) -> Iterator[Any]:
        """Some examples, ascending, joined across the batches of the data as far as their shapes allow."""
        rows, begin = torch.from_numpy(indices), 0
        held: list[Any] = []
        for batch in self.batches:
            end = begin + batching.examples(batch)
            chosen = rows[(rows >= begin) & (rows < end)] - begin
            begin = end
            if not len(chosen):
                continue
            part = _picked(batch, chosen)
            if held and (not _joinable(held[0], part) or _count(held) + len(chosen) > self.size):
                yield _joined(held)
                held = []
            held.append(part)
        if held:
            yield _joined(held)


def _picked(batch: Any, rows: Tensor) -> Any:
    return batching.tree_map(lambda t: t[rows.to(t.device)], batch)


def _count(parts: Sequence[Any]) -> int:
    return sum(batching.examples(part) for part in parts)


def _joinable(a: Any, b: Any) -> bool:
    return [t.shape[1:] for t in batching.tensors(a)] == [t.shape[1:] for t in batching.tensors(b)]


def _joined(parts: Sequence[Any]) -> Any:
    columns = iter([torch.cat(t) for t in zip(*map(batching.tensors, parts), strict=True)])
    return batching.tree_map(lambda _: next(columns), parts[0])


class _MeanLoss(nn.Module):
    """The mean of a loss that sums."""

    def __init__(self, loss: Any):
        super().__init__()
        self.loss = loss

    def forward(self, output: Any, target: Any) -> Any:
        return self.loss(output, target) / len(target)


def balanced(problem: Problem, layout: Layout) -> Problem:
    """The same problem with the mean over the examples of a class, then over classes, for its loss."""
    target_of = problem.evaluator.target_of
    counts = dict(zip(layout.labels, map(int, layout.counts), strict=True))

    def weight(batch: Any) -> float:
        target = target_of(batch).reshape(-1)
        return len(target) / counts[int(target[0])]

    changes: dict[str, Any] = {"data": ByClass(problem, layout), "weight": weight}
    if problem.reduction == "sum":
        changes |= {"loss": _MeanLoss(problem.evaluator.loss), "reduction": "mean"}
    return problem.replace(**changes, kernels=problem.kernels).knowing(problem.product_checks)


def names(problem: Problem, layout: Layout, given: Sequence[str] | None) -> list[str]:
    """Names of all C outputs: those given, those that the data set has (`classes`), or the labels.

    Raises:
        Refused: if other than C are given.
    """
    if given is not None and len(given) != layout.outputs:
        raise Refused(
            f"class_names has {len(given)} names; allowed is one for each of {layout.outputs} logits"
        )
    if given is not None:
        return list(given)
    source: Any = problem.batches.data
    for _ in range(4):  # loader, subset, data set
        held = getattr(source, "classes", None)
        if (
            isinstance(held, list | tuple)
            and len(held) == layout.outputs
            and all(isinstance(s, str) for s in held)
        ):
            return list(held)
        source = getattr(source, "dataset", None)
    return [str(c) for c in range(layout.outputs)]
