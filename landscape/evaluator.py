"""One pass: the model with given parameters on a micro-batch, its outputs, loss and weight."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from landscape import allocator, guard, losses
from landscape import batches as batching
from landscape.errors import Refused
from landscape.plain_passes import plain

Own = Callable[[Iterator[Any]], Iterator[Any]]


class Evaluator:
    """Runs a model and its loss on pieces of data, with parameters that are handed in.

    Arguments as for `landscape.Problem`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] | None,
        forward: Callable[[Any, Any], Tensor] | None,
        output: Callable[[Any, Any], Any] | None,
        target: Callable[[Any], Any] | None,
        weight: Callable[[Any], float] | None,
        reduction: str,
        training: bool,
        device: torch.device,
        dtype: torch.dtype,
        microbatch: int | None,
    ):
        self.model, self.loss, self._forward, self._output, self._target = (
            model,
            loss,
            forward,
            output,
            target,
        )
        self._weight, self._training, self.microbatch = weight, training, microbatch
        self.device, self.dtype = device, dtype
        self._mean = reduction == "mean"
        self._derived = None if weight or forward else losses.derived_weight(loss, reduction)
        # One module around model and loss, so that the loss' buffers (class weights) follow dtype and device.
        parts = {"model": model, "loss": loss}
        self._holder = nn.ModuleDict({k: m for k, m in parts.items() if isinstance(m, nn.Module)})
        self.slots = guard.Slots(self._holder)
        self._open = False
        self.autocast = "not met"  # whether the model wanted it, and got it
        self.plans: dict[Any, Any] = {}  # what was found out, for the time of a session

    @property
    def has_outputs(self) -> bool:
        """Whether model and loss are known apart (not so for `forward=`)."""
        return self._forward is None

    @contextmanager
    def session(self) -> Iterator[None]:
        """Hold the model in the measured mode; modes and random states return when the outermost ends."""
        if self._open:
            yield
            return
        allocator.keep_freed_memory()
        with (
            guard.restored(self._holder, self._training),
            plain(self.device, autocast=self.dtype.itemsize < 4, met=self._note_autocast),
        ):
            self._open = True
            try:
                yield
            finally:
                self._open = False
                self.plans.clear()

    def _note_autocast(self) -> None:
        self.autocast = "on" if self.dtype.itemsize < 4 else "switched off"

    @contextmanager
    def twice_differentiable(self) -> Iterator[None]:
        """Use only kernels that have a second derivative."""
        with self.unfused(), guard.PlainBinaryCrossEntropy():
            yield

    def unfused(self) -> contextlib.AbstractContextManager[None]:
        """The part of `twice_differentiable` that counts while a graph is run through, where no call is answered."""
        return guard.unfused(self.device.type == "cuda" and self.slots.recurrent)

    @contextmanager
    def filled(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the model compute with these parameters, its other ones fixed, and copies of its buffers.

        Args:
            parameters: by name within the model.
            buffers: by name within the model; those not given are the model's own.
        """
        with self.slots.filled(self.substitutes(parameters, buffers)):
            yield

    def substitutes(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the model computes with in `filled`, by name within our slots."""
        measured = {f"model.{name}": t for name, t in parameters.items()}
        given = {f"model.{name}": t for name, t in buffers.items()}
        others = {k: self.moved(t.detach()) for k, t in self.slots.tensors.items() if k not in measured}
        fixed = {k: nn.Parameter(t, requires_grad=False) for k, t in others.items()}
        copies = {k: self.moved(t).clone() for k, t in {**self.slots.buffers, **given}.items()}
        return {**measured, **fixed, **copies}

    def moved(self, t: Tensor) -> Tensor:
        """Bring a tensor to the device, and to the dtype if it is floating point."""
        return t.to(self.device, self.dtype if t.is_floating_point() else t.dtype)

    def loss_of(self, piece: Any) -> Tensor:
        """The loss of a micro-batch, 0-d."""
        if self._forward is not None:
            return _scalar(self._forward(self.model, piece))
        return self.loss_from(self.outputs(piece), self.target_of(piece))

    def loss_from(self, outputs: Any, target: Any) -> Tensor:
        """The loss of outputs, 0-d.

        Raises:
            Refused: if the loss is not one floating-point number.
        """
        assert self.loss is not None
        return _scalar(self.loss(outputs, target))

    def outputs(self, piece: Any) -> Any:
        """The model's outputs on a micro-batch."""
        return self.outputs_of(self.model, piece)

    def outputs_of(self, model: Any, piece: Any) -> Any:
        """The outputs of a model that takes this one's place."""
        if self._output is not None:
            return self._output(model, piece)
        inputs = _pair(piece)[0]
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)

    def target_of(self, piece: Any) -> Any:
        """The target of a micro-batch."""
        return self._target(piece) if self._target is not None else _pair(piece)[1]

    def pieces(self, data: Any, own: Own | None = None) -> Iterator[tuple[Any, float]]:
        """Yield micro-batches with their weights; those without weight are skipped.

        Args:
            data: the batches.
            own: picks some micro-batches out of all; then it may be that none has weight.

        Raises:
            Refused: if none has weight.
        """
        anything = own is not None
        for piece in self.cut(data) if own is None else own(self.cut(data)):
            weight = self.weigh(piece)
            if weight > 0:
                anything = True
                yield piece, weight
        require_weight(anything)

    def cut(self, data: Any) -> Iterator[Any]:
        """Yield batches, or pieces of at most `microbatch` examples."""
        for batch in data:
            if self.microbatch is None:
                yield batch
                continue
            count = batching.examples(batch)
            for start in range(0, count, self.microbatch):
                yield batching.cut(batch, start, min(start + self.microbatch, count))

    def weigh(self, piece: Any) -> float:
        """The denominator of a micro-batch's mean.

        Raises:
            Refused: if the user's weight is negative or not finite.
        """
        if self._weight is not None:
            weight = float(self._weight(piece))
            if not (math.isfinite(weight) and weight >= 0):
                raise Refused(f"weight(batch) returned {weight}; allowed is a finite number >= 0")
            return weight
        if self._derived is not None:
            return self._derived(self.target_of(piece))
        return float(batching.examples(piece))

    def scale(self, weight: float) -> float:
        """The factor that makes a batch's loss the sum of its terms."""
        return weight if self._mean else 1.0

    def ignored(self) -> int:
        """The label that marks what has no target."""
        return int(losses.describe(self.loss)[1].get("ignore_index", -100))

    def sums(
        self,
        data: Any,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        own: Own | None = None,
    ) -> tuple[float, float]:
        """The sum of all terms and the sum of all weights, in float64; of some micro-batches where `own` picks."""
        total = weights = 0.0
        with self.session(), torch.no_grad():
            for piece, weight in self.pieces(data, own):
                with self.filled(parameters, buffers):
                    total += float(self.loss_of(piece).double()) * self.scale(weight)
                weights += weight
        return total, weights


def require_weight(anything: bool) -> None:
    """Refuse data in which no batch has weight.

    Raises:
        Refused: always, unless there is anything.
    """
    if not anything:
        raise Refused("every batch has weight 0 (no valid target in any); there is nothing to average")


def _pair(piece: Any) -> Sequence[Any]:
    if not isinstance(piece, tuple | list) or len(piece) != 2:
        raise Refused(
            f"a batch is a {type(piece).__name__}, expected a pair (input, target); for other batches say "
            "Problem(..., output=lambda model, batch: ..., target=lambda batch: ...)"
        )
    return piece


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise Refused(
            f"the loss of a batch is {got}; allowed is one number per batch "
            "(a loss with reduction='mean', or reduction='sum' declared to Problem as well)"
        )
    return loss.reshape(()) if loss.ndim else loss
