"""A problem whose model is sharded over processes: value, gradient, and Hessian products by differences.

Each process calls the same functions in the same order, with its own part of the data, and gets the same
numbers: L is the mean over the data of all processes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn

from landscape import batches as batching
from landscape import seeds, vectors
from landscape.checks import Need, Report
from landscape.errors import Refused
from landscape.parameter_shards import Shards
from landscape.problem import Problem
from landscape.product_checks import Matrix, ProductCheck
from landscape.product_checks import summary as summed_up

# ‖h v‖ / (1 + ‖θ‖). In float64 plain differences, which err by 1e-9 and cross few kinks; in float32 those of
# h and 2h, extrapolated (Richardson): 1e-5 to 3e-5 on MLPs and GPTs, where plain ones need a step found by trial.
_STEP, _STEP_FLOAT32 = 1e-6, 5e-3
# Products of two step lengths that differ by more are no derivative: kinks, or rounding.
_SETTLED = {torch.float64: 1e-4, torch.float32: 1e-2}
_REASON = "sharded parameters (FSDP, DTensor) have no second derivatives: differences of gradients"


class ShardedProblem(Problem):
    """`landscape.Problem` of a model wrapped by FSDP, or with DTensor parameters; it is made by calling that.

    Arguments are those of `Problem`; `data` are this process's batches (without FSDP, those of all processes).
    A product takes two gradients in float64, four in float32, each through the wrapper's own `.backward()`.
    Processes with fewer micro-batches repeat their first with weight 0, since all of them gather parameters in
    every pass.
    """

    apart: ClassVar[bool] = False

    def __init__(
        self, model: nn.Module, *args: Any, parameters: str | Sequence[str] | None = None, **named: Any
    ):
        super().__init__(model, *args, **named)
        self._arguments["parameters"] = parameters
        if self.products == "autodiff":
            raise Refused(f"{_REASON}. Use products='auto' or 'difference'")
        self.products = "difference"
        self._shards = Shards(self.evaluator.model, parameters)
        self.space = self._shards.space
        if self.dtype != self._shards.dtype:
            raise Refused(
                f"dtype is {self.dtype}, but the model is sharded in {self._shards.dtype}; shard it in another, or "
                "leave dtype out"
            )
        self._dealt: tuple[int, float] | None = None

    def parameters_vector(self) -> Tensor:
        """θ as one vector (n,), whole on every process."""
        return self._shards.whole(self._shards.local())

    def value(self) -> Tensor:
        """L(θ), a 0-d float64 tensor: the mean over the data of all processes."""
        self.cost.values += 1
        return self._slopes()[0]

    def gradient(self) -> Tensor:
        """∇L(θ), a vector (n,), whole on every process."""
        self.cost.gradients += 1
        return self._gathered(self._slopes()[1])

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """L(θ), a 0-d float64 tensor, and ∇L(θ), a vector (n,)."""
        self.cost.values += 1
        self.cost.gradients += 1
        value, slopes = self._slopes()
        return value, self._gathered(slopes)

    def hvp(self, V: Tensor) -> Tensor:
        """H V from differences of gradients, for one vector (n,) or a block (n, k); V is the same on all processes.

        Raises:
            ValueError: if V does not have n rows.
        """
        rows = vectors.column_major(V.to(self.device, self.dtype), self.size)
        if "hessian" not in self._found:
            self.check_products("hessian")
        with self.session():
            made = torch.stack([self._product_with(row) for row in rows])
        self.cost.matvecs += len(rows)
        return made[0] if V.ndim == 1 else made.T

    def examples(self) -> int | None:
        """The number of examples in the data of all processes; None where batches do not tell."""
        own = super().examples()
        counts = self._shards.gathered(math.nan if own is None else float(own))[: self._shards.averaged]
        return None if math.isnan(sum(counts)) else int(sum(counts))

    def fingerprint(self) -> str:
        """A hash of θ; 16 hexadecimal digits."""
        digest = batching.new_digest(str(list(self.space.ranges.items())))
        batching.update(digest, [self.parameters_vector()])
        return str(digest.hexdigest())

    def data_fingerprint(self) -> str:
        """A hash of the batches of all processes; 16 hexadecimal digits."""
        return self._together(super().data_fingerprint())

    def check(self, needs: frozenset[Need] = frozenset({Need.VALUE}), *, products: bool = True) -> Report:
        """Find out whether the loss is finite and deterministic, and how well differences settle.

        Raises:
            Refused: with the cause, if a measurement would return a wrong number or cannot be had here.
        """
        if missing := needs - {Need.VALUE, Need.GRADIENT, Need.HESSIAN}:
            self._refuse(", ".join(sorted(need.value for need in missing)))
        with self.session():
            first, before = float(self.value()), self.data_fingerprint()
            second = float(self.value())
            fresh = batching.fingerprint(self.batches.fresh())
            if before != self._together(fresh):
                raise Refused("the data changed between two passes; use shuffle=False and no augmentation")
            if not math.isfinite(first):
                raise Refused(f"the loss is {first}; check the parameters and the data of all processes")
            difference = abs(first - second) / abs(first) if first else abs(second)
            if difference > 1e3 * torch.finfo(self.dtype).eps:
                raise Refused(
                    f"the loss changed between two passes over the same data, {first!r} then {second!r}: the model is "
                    "random. A measurement needs a deterministic loss."
                )
            if products and Need.HESSIAN in needs:
                self.check_products("hessian")
        return Report(first, difference, math.nan, data_fingerprint=before, **summed_up(self._found))

    def check_products(self, matrix: Matrix) -> ProductCheck:
        """Compare differences of two step lengths along one random vector.

        Raises:
            Refused: if they do not settle, or for another matrix than the Hessian.
        """
        if matrix != "hessian":
            self._refuse(f"products with the matrix {matrix!r}")
        v = torch.randn(self.size, generator=seeds.generator(0, "check", 0), dtype=torch.float64)
        v = v.to(self.device, self.dtype)
        with self.session():
            error = vectors.relative_difference(self._product_with(v), self._product_with(v, 2.0))
        if error > _SETTLED[self.dtype]:
            raise Refused(
                f"differences of gradients do not settle: those of two step lengths differ by {error:.1e}, allowed is "
                f"{_SETTLED[self.dtype]:.0e}. This usually means kinks (ReLU) in float32; shard the model in float64"
            )
        self._found[matrix] = ProductCheck("difference", error, math.nan, _REASON)
        return self._found[matrix]

    # --- other problems from this one ---------------------------------------------------------------

    def only(self, parameters: str | Sequence[str]) -> Self:
        """The same problem as a function of some of its parameter tensors."""
        whole = {name: torch.empty(0) for name in self.names}
        return self.replace(parameters=sorted(vectors.matching(whole, parameters)))

    def on(self, data: Any) -> Self:
        """The same problem on other data of this process."""
        other = super().on(data)
        other._dealt = None
        return other

    def in_float64(self) -> None:
        """None: a sharded model stays in its precision."""

    def at(self, vector: Tensor, buffers: Mapping[str, Tensor] | None = None) -> Self:  # noqa: ARG002
        """Refuse."""
        self._refuse("moving the parameters")

    def split(self, examples: int) -> Iterator[tuple[Self, float]]:  # noqa: ARG002
        """Refuse: passes over a part of the data would not meet those of other processes."""
        self._refuse("products on a part of the data")

    def targets(self) -> Tensor:
        """Refuse: each process has its own."""
        self._refuse("targets")

    def leaves(self, displacement: Tensor | None = None) -> list[Tensor]:  # noqa: ARG002
        """Refuse: no process holds whole parameters."""
        self._refuse("this")

    def _refuse(self, what: str) -> NoReturn:
        raise Refused(
            f"{what} cannot be had where parameters are sharded (FSDP, DTensor). There are the trace by probes, "
            "spectral_norm, eigenvalues and density of the Hessian. For all else load the full state dict into "
            "an unwrapped model."
        )

    # --- passes -------------------------------------------------------------------------------------

    def _product_with(self, v: Tensor, stretch: float = 1.0) -> Tensor:
        """H v, from steps so many times longer than usual."""
        length = float(torch.linalg.vector_norm(v, dtype=torch.float64))
        if length == 0:
            return torch.zeros_like(v)
        squares = math.fsum(float(t.double().square().sum()) for t in self._shards.local())
        reach = stretch * (1 + math.sqrt(sum(self._shards.gathered(squares)))) / length
        if self.dtype == torch.float64:
            return self._gathered(self._difference(v, _STEP * reach))
        h = _STEP_FLOAT32 * reach
        pairs = zip(self._difference(v, h), self._difference(v, 2 * h), strict=True)
        return self._gathered([(4 * near - far) / 3 for near, far in pairs])

    def _difference(self, v: Tensor, h: float) -> list[Tensor]:
        up, down = (self._slopes(v * step)[1] for step in (h, -h))
        return [(a - b) / (2 * h) for a, b in zip(up, down, strict=True)]

    def _gathered(self, pieces: list[Tensor]) -> Tensor:
        return self._shards.whole(pieces).to(self.dtype)

    def _slopes(self, displacement: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """L(θ + displacement), and this process's pieces of its gradient, float64.

        Values too come from passes forward and backward: after a pass forward alone, FSDP may leave parameters
        unsharded, and the next pass would not see those that were moved.
        """
        shards, total = self._shards, 0.0
        most, weights = self._deal()
        with self.session(), self._buffers_kept(), shards.displaced(displacement):
            slopes = [torch.zeros_like(t, dtype=torch.float64) for t in shards.local()]
            for piece, weight in self._passes(most):
                scale = self.evaluator.scale(weight) if weight else 0.0
                loss = self.evaluator.loss_of(piece)
                # FSDP averages over processes what is to be added.
                (loss * (scale * shards.averaged / weights)).backward()  # type: ignore[no-untyped-call]
                shards.add_slopes(slopes)
                total += float(_whole(loss)) * scale if scale else 0.0
        sums = shards.gathered(total)[: shards.averaged]
        return torch.tensor(sum(sums) / weights, dtype=torch.float64), slopes

    def _passes(self, most: int) -> Iterator[tuple[Any, float]]:
        """This process's micro-batches with their weights, then the first again with weight 0, `most` in all."""
        first, made = None, 0
        for piece, weight in self.evaluator.pieces(self.batches):
            first = piece if first is None else first
            yield piece, weight
            made += 1
        yield from ((first, 0.0) for _ in range(made, most))

    def _deal(self) -> tuple[int, float]:
        """The most micro-batches of a process, and the weight of all of them.

        Raises:
            Refused: on every process, if one has no micro-batch of positive weight.
        """
        if self._dealt is None:
            try:
                own = [weight for _, weight in self.evaluator.pieces(self.batches)]
            except (Refused, ValueError):  # no batch, or none with weight; the others wait for an answer
                own = []
            counts = self._shards.gathered(float(len(own)))
            weights = self._shards.gathered(math.fsum(own))[: self._shards.averaged]
            if not min(counts):
                empty = [str(rank) for rank, count in enumerate(counts) if not count]
                raise Refused(
                    f"rank {', '.join(empty)} has no batch with a positive weight; every process runs the model, "
                    "since it holds a part of it. Give each at least one batch"
                )
            self._dealt = int(max(counts)), sum(weights)
        return self._dealt

    @contextlib.contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Put buffers back, which a pass in training mode changes."""
        held = list(self.evaluator.slots.buffers.values())
        before = [t.detach().clone() for t in held]
        try:
            yield
        finally:
            with torch.no_grad():
                for t, values in zip(held, before, strict=True):
                    t.copy_(values)

    def _together(self, text: str) -> str:
        """One hash of what each process has."""
        texts = self._shards.texts(text)[: self._shards.averaged]
        return texts[0] if len(texts) == 1 else str(batching.new_digest(" ".join(texts)).hexdigest())


def _whole(loss: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return (loss.full_tensor() if isinstance(loss, DTensor) else loss).detach().double()
