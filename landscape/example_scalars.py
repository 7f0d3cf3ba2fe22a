"""A scalar of each example as a function f_i(x_i) of its input, for a whole batch at once.

The examples of a batch do not influence each other (`landscape.input_checks` finds out whether that is so).
Then the gradient of the sum of their terms holds every ∇f_i: what one example costs alone, a batch costs once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from landscape import batches as batching
from landscape import inputs, stages
from landscape.errors import Refused
from landscape.example_outputs import LOGIT, logits, losses_of, one_by_one
from landscape.problem import Problem

INPUT = "input"
# Losses of examples made at once must add up to that of the batch.
_AGREE, _TINY = 1e-3, torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Setup:
    """What is differentiated with respect to what, and how.

    Attributes:
        scalar: f_i: "loss" of the example as a batch of one, "logit" of its label, "prediction" (its largest
            logit), or "logit:k".
        place: "input" for the input's floating-point tensors; else the name of a module whose output takes
            its place (an embedding).
        wide: whether the loss is computed in float64 from the model's outputs. In float32 a gradient p - 1
            of cross-entropy loses all its digits where the model is sure.
        products: how Hessian products are made.
    """

    scalar: str = "loss"
    place: str = INPUT
    wide: bool = False
    products: Literal["autodiff", "difference"] = "autodiff"

    def __post_init__(self) -> None:
        if self.scalar not in {"loss", "logit", "prediction"} and not LOGIT.fullmatch(self.scalar):
            raise ValueError(
                f"scalar is {self.scalar!r}; allowed is 'loss', 'logit' (of the label), 'prediction' (the largest "
                "logit) or 'logit:3'. Any other scalar of the outputs: give it to Problem as the loss"
            )


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of the model on a micro-batch.

    Attributes:
        total: Σ c_i f_i, 0-d.
        leaves: tensors of x, examples first.
        outputs: of the model; None for `forward=`.
        target: of the batch; None for `forward=`.
    """

    total: Tensor
    leaves: list[Tensor]
    outputs: Any
    target: Any


@dataclass(frozen=True, eq=False)
class ExampleScalars:
    """f_i(x_i) for the examples of a micro-batch.

    Attributes:
        problem: model and loss; its parameters are fixed.
        piece: the micro-batch.
        setup: what is differentiated.
    """

    problem: Problem
    piece: Any
    setup: Setup = field(default_factory=Setup)

    @property
    def count(self) -> int:
        """The number N of examples."""
        return batching.examples(self.piece)

    @functools.cached_property
    def size(self) -> int:
        """The number d of inputs of an example."""
        if self.setup.place == INPUT:
            every = batching.tensors(self.piece)
            tensors = [every[i] for i in self._places]
        else:
            with self.running():
                tensors = self.run().leaves
        return sum(t[0].numel() for t in tensors)

    def take(self, index: Tensor) -> ExampleScalars:
        """Those of some examples."""
        taken = dataclasses.replace(self, piece=batching.tree_map(lambda t: t[index], self.piece))
        vars(taken)["scales"] = self.scales[index]  # which one by one take longer than a small model
        if self.setup.place == INPUT:
            vars(taken)["_places"] = self._places
        return taken

    def in_float64(self) -> ExampleScalars:
        """The same in float64 where the model can run in it, else this."""
        double = self.problem.in_float64()
        if double is None:
            return self
        piece = batching.tree_map(lambda t: t.double() if t.is_floating_point() else t, self.piece)
        return dataclasses.replace(self, problem=double, piece=piece)

    def gradient(self, displacement: Tensor | None = None) -> Tensor:
        """∇f_i at x_i (+ displacement), (N, d), in the problem's precision."""
        return self.slopes(displacement)[0]

    def slopes(self, displacement: Tensor | None = None) -> tuple[Tensor, Pass]:
        """∇f_i at x_i (+ displacement), (N, d), and the run that it is of."""
        with self.running():
            done = self.run(displacement)
            found: Sequence[Tensor | None] = [None] * len(done.leaves)
            if done.total.requires_grad:
                found = torch.autograd.grad(done.total, done.leaves, allow_unused=True)
        return self.flat(found, done.leaves), done

    def points(self) -> Tensor:
        """x_i, (N, d)."""
        with self.running():
            leaves = self.run().leaves
        return torch.cat([t.detach().reshape(self.count, -1) for t in leaves], dim=1)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Hold the model as it is measured, with kernels that differentiate twice."""
        from landscape.kernels import active

        leaves = [leaf.requires_grad_(False) for leaf in self.problem.leaves()]
        _ = self.scales, self._whole  # made out here, where nothing stands between
        if self.setup.place == INPUT:
            _ = self._places
        with (
            self.problem.session(),
            self.problem.filled(leaves),
            self.problem.evaluator.twice_differentiable(),
            # Not channels_last, which some models cannot run with.
            active(dataclasses.replace(self.problem.kernels, channels_last=False)),
        ):
            yield

    def run(self, displacement: Tensor | None = None) -> Pass:
        """Run the model at x_i (+ displacement) with a graph; within `running`."""
        with torch.enable_grad():
            if self.setup.place == INPUT:
                return self._from_inputs(displacement)
            return self._from_module(displacement)

    @functools.cached_property
    def scales(self) -> Tensor:
        """c_i, by which f_i stands in the sum; NaN for an example without a valid target, (N,)."""
        evaluator, found = self.problem.evaluator, torch.ones(self.count, dtype=torch.float64)
        if self.setup.scalar == "loss":
            weights = [evaluator.weigh(batching.cut(self.piece, i, i + 1)) for i in range(self.count)]
            found = torch.tensor(
                [evaluator.scale(w) if w > 0 else torch.nan for w in weights], dtype=torch.float64
            )
        return found.to(self.problem.device)

    def flat(self, slopes: Sequence[Tensor | None], leaves: list[Tensor]) -> Tensor:
        """Slopes of the sum as rows of their own, divided by c_i, (N, d)."""
        parts = [
            torch.zeros_like(t) if s is None else s.detach() for s, t in zip(slopes, leaves, strict=True)
        ]
        whole = torch.cat([p.reshape(self.count, -1) for p in parts], dim=1)
        return whole / self.scales[:, None].to(whole.dtype)

    def values(self, done: Pass) -> Tensor:
        """f_i, (N,) float64; NaN where the loss is known for the whole batch only."""
        if self.setup.scalar != "loss":
            return logits(done.outputs, done.target, self.setup.scalar, self.count).detach().double()
        if done.outputs is None:
            return torch.full((self.count,), torch.nan, dtype=torch.float64)
        outputs, target = (self._widened(t) for t in (done.outputs, done.target))
        found = losses_of(self.problem.evaluator.loss_from, outputs, target, self.count)
        total = done.total.detach().double()
        if found is not None and bool(
            ((found * self.scales).nansum() - total).abs() <= _AGREE * total.abs() + _TINY
        ):
            return found
        return one_by_one(self.problem.evaluator.loss_from, outputs, target, self.count)

    @functools.cached_property
    def _whole(self) -> float:
        """The factor that makes the loss of the micro-batch the sum of its terms."""
        return self.problem.evaluator.scale(self.problem.evaluator.weigh(self.piece))

    @functools.cached_property
    def _places(self) -> list[int]:
        """Which of the micro-batch's tensors are the input."""
        # Copies, so that each tensor of the batch is an object of its own.
        piece = batching.cut(self.piece, 0, self.count)
        given = {id(t) for t in inputs.input_part(self.problem, piece)}
        if not given:
            raise Refused(_no_numbers(self.problem))
        return [i for i, t in enumerate(batching.tensors(piece)) if id(t) in given]

    def _from_inputs(self, displacement: Tensor | None) -> Pass:
        tensors = batching.tensors(self.piece)
        places = [tensors[i].detach() for i in self._places]
        if displacement is not None:
            places = [t + move for t, move in zip(places, split_rows(displacement, places), strict=True)]
        leaves = [t.detach().requires_grad_() for t in places]
        moved = dict(zip(self._places, leaves, strict=True))
        number = itertools.count()
        piece = batching.tree_map(lambda t: moved.get(next(number), t), self.piece)
        return self._summed(piece, leaves)

    def _from_module(self, displacement: Tensor | None) -> Pass:
        leaves: list[Tensor] = []

        def replaced(module: nn.Module, given: Any, output: Any) -> Tensor:  # noqa: ARG001
            leaves.append(self._leaf(output, displacement))
            return leaves[-1]

        handle = self._module().register_forward_hook(replaced)
        try:
            done = self._summed(self.piece, leaves)
        finally:
            handle.remove()
        if len(leaves) != 1:
            raise Refused(
                f"the model calls {self.setup.place!r} {len(leaves)} times; its output can take the input's place "
                "if it is called once"
            )
        return done

    def _leaf(self, output: Any, displacement: Tensor | None) -> Tensor:
        fine = isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 0
        if not fine or output.shape[0] != self.count:
            got = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise Refused(
                f"the output of {self.setup.place!r} is {got}; allowed is a floating-point tensor whose first "
                f"dimension counts the {self.count} examples (a token embedding, not one of positions)"
            )
        move = 0.0 if displacement is None else split_rows(displacement, [output])[0]
        leaf: Tensor = (output.detach() + move).requires_grad_()
        return leaf

    def _module(self) -> nn.Module:
        modules = dict(self.problem.evaluator.model.named_modules())
        if self.setup.place not in modules or not self.setup.place:
            raise Refused(
                f"the model has no module {self.setup.place!r}; allowed is 'input', or one of "
                f"{', '.join(list(filter(None, modules))[:8]) or '(it has none)'}"
            )
        chosen: nn.Module = modules[self.setup.place]
        return chosen

    def _summed(self, piece: Any, leaves: list[Tensor]) -> Pass:
        evaluator = self.problem.evaluator
        if not evaluator.has_outputs:
            total = evaluator.loss_of(piece) * self._whole
            return Pass(total, leaves, None, None)
        outputs, target = evaluator.outputs(piece), evaluator.target_of(piece)
        if self.setup.scalar == "loss":
            loss = evaluator.loss_from(self._widened(outputs), self._widened(target))
            total = loss * self._whole
        else:
            total = logits(outputs, target, self.setup.scalar, self.count).sum()
        return Pass(total, leaves, batching.tree_map(torch.detach, outputs), target)

    def _widened(self, tree: Any) -> Any:
        if not self.setup.wide:
            return tree
        return batching.tree_map(lambda t: t.double() if t.is_floating_point() else t, tree)


def split_rows(rows: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Cut (N, d) into tensors of these shapes, examples first."""
    parts = torch.split(rows, [t[0].numel() for t in like], dim=1)
    return [part.reshape(t.shape).to(t.dtype) for part, t in zip(parts, like, strict=True)]


def _no_numbers(problem: Problem) -> str:
    modules = problem.evaluator.model.named_modules()
    found = [name for name, module in modules if isinstance(module, nn.Embedding)]
    named = (
        f"with_respect_to={found[0]!r} (--with-respect-to {found[0]})"
        if found
        else "with_respect_to=its name"
    )
    return (
        "the input has no floating-point tensor (token ids?), so nothing can be differentiated with respect to it; "
        f"take the output of an embedding in its place: {named}"
    )


def by_example(
    problem: Problem,
    block: range,
    setup: Setup,
    measured: Callable[[ExampleScalars], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Measure a block of examples, micro-batch by micro-batch; each is a stage, kept until the block is done.

    Args:
        problem: model, loss and data.
        block: of the examples, as they come.
        setup: what is differentiated.
        measured: arrays of a micro-batch by name, examples first.
    """
    rows = problem.batches.rows(block.start, block.stop)
    parts = [
        stages.kept(lambda piece=piece: measured(ExampleScalars(problem, piece, setup)))  # type: ignore[misc]
        for piece in problem.evaluator.cut(rows)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
