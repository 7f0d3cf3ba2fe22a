"""The adapter: model + loss + data -> value, gradient, curvature products, per-example quantities."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from landscape import arguments, averages, checks, parameter_shards, product_checks, vectors
from landscape import batches as batching
from landscape.batches import Batches
from landscape.errors import Refused
from landscape.evaluator import Evaluator, require_weight
from landscape.product_checks import Matrix, ProductCheck
from landscape.products import Graph, KeptGraphs

if TYPE_CHECKING:
    from landscape.displaced import Displaced, Quantity
    from landscape.kernels import Kernels
    from landscape.sharded import Shard
    from landscape.ways import Ways

Reduction = Literal["mean", "sum"]
Mode = Literal["eval", "train"]
Products = Literal["auto", "autodiff", "difference"]

_Product = Callable[["Problem", Tensor], Tensor]

# Changes of a problem that leave open nothing about how its products are made.
_SAME_PRODUCTS = {"data", "microbatch", "weight", "reduction"}


@dataclass
class Cost:
    """What was computed: passes over all data. `matvecs` counts single vectors."""

    values: int = 0
    gradients: int = 0
    matvecs: int = 0


class Problem:
    """A model, its loss and data, as one function L(θ) with derivatives.

    L(θ) = Σ_b (sum of the terms of batch b) / Σ_b (weight of batch b): the mean over all terms of the
    data set, however it is cut into batches. Three forms:

    * `Problem(model, loss, data)`: batches are pairs (input, target), the loss is `loss(output, target)`;
      `model` is an `nn.Module`, or a function `f(params, x)` with `parameters={name: tensor}`.
    * `Problem(model, loss, data, output=lambda model, batch: ..., target=lambda batch: ...)`: any batch.
    * `Problem(model, forward=step, data=data)`: `step(model, batch)` returns the batch's mean loss. A
      black box: value, gradient and Hessian, but nothing that needs outputs.

    The model is bit-identical after any call, also one that raises: its weights are never written, our
    copies stand in their place for the time of a pass.

    Args:
        model: an `nn.Module`, or `f(params, x)`. One that FSDP wraps, or with DTensor parameters, makes a
            `landscape.sharded_parameters.ShardedProblem`.
        loss: `loss(output, target)` -> one number per batch.
        data: a re-iterable of batches, deterministic (no shuffling, no augmentation).
        forward: `step(model, batch)` -> one number per batch, in place of `loss`.
        output: `output(model, batch)`; default `model(input)` (a tuple input is unpacked, a mapping is
            passed as keywords).
        target: `target(batch)`; default the second of the pair.
        parameters: names or patterns of the parameters θ that are measured (default: all that require
            grad); for a function `f(params, x)`, its parameters.
        weight: `weight(batch)` -> the real denominator of that batch's mean (default: derived for the
            losses that PyTorch ships, `ignore_index` and class weights included; else the examples).
        reduction: whether the loss returns the batch's mean or sum. Declared, never guessed.
        mode: whether the model runs in evaluation or training mode.
        device: where to compute (default: where the parameters are).
        dtype: in which precision (default: the parameters', but at least float32).
        microbatch: the most examples in one pass (default: the batches as they come).
        products: how curvature products are made: "autodiff" (reverse over reverse), "difference"
            (central differences of gradients, for layers without a right second derivative), or "auto":
            by autodiff where that is right, which the first product finds out (`check()` tells).
        kernels: "auto" makes products with all cheaper kernels that are exact on this machine, "none" with
            PyTorch's own; or a choice of `landscape.kernels.Kernels`. Attribute `kernels` says what is on.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message says what is allowed.
    """

    # Whether examples may be taken apart: not where other processes wait for passes over all of them.
    apart: ClassVar[bool] = True

    def __new__(cls, model: Any = None, *_: Any, **__: Any) -> Self:  # noqa: D102  (copies are made without a model)
        if cls is not Problem or not parameter_shards.sharded(model):
            return object.__new__(cls)
        above = importlib.import_module("landscape.sharded_parameters")  # by name: a Problem of another kind
        kind: type[Self] = above.ShardedProblem
        return object.__new__(kind)

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        loss: Callable[[Any, Any], Tensor] | None = None,
        data: Any = None,
        *,
        forward: Callable[[Any, Any], Tensor] | None = None,
        output: Callable[[Any, Any], Any] | None = None,
        target: Callable[[Any], Any] | None = None,
        parameters: str | Sequence[str] | Mapping[str, Tensor] | None = None,
        weight: Callable[[Any], float] | None = None,
        reduction: Reduction = "mean",
        mode: Mode = "eval",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        microbatch: int | None = None,
        products: Products = "auto",
        kernels: Literal["auto", "none"] | Kernels = "auto",
    ):
        self._arguments = {k: v for k, v in locals().items() if k not in {"self", "__class__"}}
        arguments.validate(**self._arguments)
        self.mode, self.reduction, self.products, self.microbatch = mode, reduction, products, microbatch
        if isinstance(model, nn.Module):
            module = arguments.unwrapped(model)
            self._own = vectors.select(module, parameters)  # type: ignore[arg-type]
        else:
            module = arguments.FunctionModule(model, parameters)  # type: ignore[arg-type]
            self._own = vectors.select(module, None)
        self.space = vectors.ParameterSpace(self._own)
        first = next(iter(self._own.values()))
        self.device = torch.device(device) if device is not None else first.device
        self.dtype = dtype or torch.promote_types(first.dtype, torch.float32)
        # Chosen at the first product: the probe takes longer than many a measurement without products.
        self._kernels: list[Kernels] = [] if isinstance(kernels, str) else [kernels]
        self.batches = Batches(data, self.device, self.dtype)
        self.evaluator = Evaluator(
            model=module, loss=loss, forward=forward, output=output, target=target, weight=weight,
            reduction=reduction, training=mode == "train", device=self.device, dtype=self.dtype,
            microbatch=microbatch,
        )  # fmt: skip
        self._vector: Tensor | None = None
        self._buffers: Mapping[str, Tensor] = {}
        self._graphs: list[KeptGraphs] = []  # shared by `at`, `only` and `on`, like the kernels
        self._whole: Self | None = None  # what this problem was cut out of by `only`
        self._fixed: dict[str, Tensor] = {}  # moved parameters that are not measured
        self._double: Self | None = None
        self._found: dict[str, ProductCheck] = {}
        self.shard: Shard | None = None  # where several ranks have divided the data
        self.cost = Cost()

    # `help` and editors would show that of `__new__`.
    __signature__: ClassVar[inspect.Signature] = inspect.Signature(
        list(inspect.signature(__init__).parameters.values())[1:]
    )

    # --- what is measured -------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The number n of parameters."""
        return self.space.size

    @property
    def names(self) -> list[str]:
        """The names of the measured parameter tensors, in the order of the flat vector."""
        return self.space.names

    @property
    def kernels(self) -> Kernels:
        """What makes products cheaper."""
        if not self._kernels:
            from landscape import kernels  # needed by products only

            plain = self._arguments["kernels"] == "none"
            self._kernels.append(kernels.NONE if plain else kernels.choose(self.device, self.dtype))
        return self._kernels[0]

    @property
    def kernels_in_use(self) -> dict[str, Any] | None:
        """The kernels as plain values, None as long as no product was made."""
        return self._kernels[0].as_dict() if self._kernels else None

    @property
    def product_checks(self) -> dict[str, ProductCheck]:
        """What is known of products with each matrix, "hessian" and "ggn"."""
        return dict(self._found)

    def learn(self, found: Mapping[str, ProductCheck]) -> None:
        """Take over what was found of products before."""
        self._found.update(found)

    @property
    def products_in_use(self) -> str:
        """How products are made: as asked for; else as was found out, "not needed" as long as none was made."""
        return self.products if self.products != "auto" else product_checks.summary(self._found)["products"]

    def parameters_vector(self) -> Tensor:
        """θ as one vector (n,), the order of `torch.nn.utils.parameters_to_vector`."""
        return self.space.flatten(leaf.detach() for leaf in self.leaves())

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers by name, as this problem has them."""
        slots = self.evaluator.slots.buffers
        held = {name.removeprefix("model."): t for name, t in slots.items() if name.startswith("model.")}
        return {**held, **self._buffers}

    @property
    def fixed(self) -> dict[str, Tensor]:
        """The parameters that were moved but are not measured, by name."""
        return dict(self._fixed)

    @property
    def arguments(self) -> dict[str, Any]:
        """What this problem was built from, by name."""
        return dict(self._arguments)

    def value(self) -> Tensor:
        """L(θ), a 0-d float64 tensor."""
        self.cost.values += 1
        total, weights = self.sums(self.batches)
        return torch.tensor(total / weights, dtype=torch.float64)

    def gradient(self) -> Tensor:
        """∇L(θ), a vector (n,); sums over batches are made in float64."""
        self.cost.gradients += 1
        return averages.gradient(self)

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """L(θ), a 0-d float64 tensor, and ∇L(θ), a vector (n,), from one pass over the data."""
        self.cost.values += 1
        self.cost.gradients += 1
        return averages.value_and_gradient(self)

    def hvp(self, V: Tensor) -> Tensor:
        """H V with H = ∇²L(θ), for one vector (n,) or a block (n, k), in one pass over the data.

        Each micro-batch's graph is built once and used for all k vectors. Each column is the same, bit
        for bit, in whatever block it stands. With products="auto" the first product finds out whether
        autodiff is right here (`check_products`). Of a block the result is column-major: a transposed view.

        Raises:
            ValueError: if V does not have n rows.
        """
        return self._product(V, "hessian", averages.hessian_by_autodiff, averages.hessian_by_differences)

    def ggn_vp(self, V: Tensor) -> Tensor:
        """G V with G the generalized Gauss-Newton matrix, mean of Jᵀ(∂²ℓ/∂f²)J; V is (n,) or (n, k).

        Raises:
            Refused: on a problem with `forward=`, whose outputs are unknown.
            ValueError: if V does not have n rows.
        """
        self.require_outputs("the generalized Gauss-Newton matrix")
        return self._product(V, "ggn", averages.ggn_by_autodiff, averages.ggn_by_differences)

    def empirical_fisher_vp(self, V: Tensor) -> Tensor:
        """E V with E = Σ_i w_i g_i g_iᵀ / Σ_i w_i over the examples' gradients g_i; V is (n,) or (n, k).

        g_i is the gradient of example i's loss as a batch of one, w_i its weight (1 where batches weigh
        their examples).

        Raises:
            Refused: on a problem with `forward=`.
            ValueError: if V does not have n rows.
        """
        self.require_outputs("per-example gradients")
        made = self._with_kernels(averages.empirical_fisher, V)
        self.cost.matvecs += V.shape[1] if V.ndim > 1 else 1
        return made

    def losses(self) -> Tensor:
        """The loss of each example as a batch of one, (N,) float64.

        The model runs on whole micro-batches, the loss on each example's output alone. NaN where an
        example has no valid target.

        Raises:
            Refused: on a problem with `forward=`.
        """
        self.require_outputs("per-example losses")
        self.cost.values += 1
        found: list[Tensor] = []
        with self.evaluator.session(), torch.no_grad():
            leaves = self.leaves()
            for piece in self.evaluator.cut(self.batches):
                with self.filled(leaves):
                    outputs, target = self.evaluator.outputs(piece), self.evaluator.target_of(piece)
                    for i in range(batching.examples(target)):
                        one = batching.cut(outputs, i, i + 1), batching.cut(target, i, i + 1)
                        found.append(self.evaluator.loss_from(*one).double())
        return torch.stack(found).cpu()

    def targets(self) -> Tensor:
        """The targets of all examples, in the order of the data.

        Raises:
            Refused: on a problem with `forward=`.
        """
        self.require_outputs("targets")
        found = [self.evaluator.target_of(batch) for batch in self.batches]
        if not all(isinstance(target, Tensor) for target in found):
            raise Refused(
                f"the targets of a batch are a {type(found[0]).__name__}; allowed is one tensor. "
                "Say which part is meant: Problem(..., target=lambda batch: ...)"
            )
        return torch.cat(found).cpu()

    def examples(self) -> int | None:
        """The number of examples in the data; None where batches do not tell."""
        try:
            return sum(batching.examples(batch) for batch in self.batches)
        except ValueError:
            return None

    @property
    def classes(self) -> list[int]:
        """The labels that occur in the data, ascending.

        Raises:
            Refused: if the targets are not integers.
        """
        labels = self.targets()
        if labels.is_floating_point():
            raise Refused(f"the targets have dtype {labels.dtype}; classes need integer labels")
        ignored = self.evaluator.ignored()
        return [int(c) for c in torch.unique(labels) if int(c) != ignored]

    # --- other problems from this one -------------------------------------------------------------

    def at(self, vector: Tensor, buffers: Mapping[str, Tensor] | None = None) -> Self:
        """The same problem at other parameters θ (n,), and with other buffers where given by name.

        Raises:
            ValueError: if the vector does not have n entries, or a buffer is unknown.
        """
        self.space.split(vector)
        unknown = {f"model.{name}" for name in buffers or {}} - set(self.evaluator.slots.buffers)
        if unknown:
            raise ValueError(f"the model has no buffer {', '.join(sorted(unknown))}")
        moved = copy.copy(self)
        moved._vector = vector.detach().to(self.device, self.dtype)
        moved._buffers = dict(buffers or {})
        moved._double = None
        return moved

    def only(self, parameters: str | Sequence[str]) -> Self:
        """The same problem as a function of some of its parameter tensors; the others stay where they are.

        Its Hessian is a diagonal block of this one's.

        Args:
            parameters: names or patterns, as for the class.

        Raises:
            ValueError: if one of them names no measured parameter.
        """
        chosen = vectors.matching(self._own, parameters)
        part = copy.copy(self)
        part._whole = self
        part._own = {name: p for name, p in self._own.items() if name in chosen}
        part.space = vectors.ParameterSpace(part._own)
        if self._vector is not None:
            held = dict(zip(self.names, self.space.split(self._vector), strict=True))
            part._vector = part.space.flatten(held[name] for name in part.names)
            part._fixed = {**self._fixed, **{name: p for name, p in held.items() if name not in chosen}}
        part._double = None
        return part

    def replace(self, **changes: Any) -> Self:
        """A new Problem with some arguments changed; it stays `at` the same parameters.

        With another `model`, the parameters are that model's.
        """
        if self._whole is not None and "parameters" not in changes:
            part = self._whole.replace(**changes).only(self.names)
            return (
                part if self._vector is None or "model" in changes else part.at(self._vector, self._buffers)
            )
        new = type(self)(**{**self._arguments, **changes})
        if "data" not in changes:
            new.batches = self.batches.to(new.device, new.dtype)
            new.shard = self.shard
        if "model" not in changes and self._vector is not None:
            if new.names != self.names:
                raise ValueError(
                    "parameters= cannot change on a problem that was moved by .at(); change it first"
                )
            new = new.at(self._vector)
            new._buffers = self._buffers
        if changes.keys() <= _SAME_PRODUCTS:
            new._found = self._found
        new.cost = self.cost
        return new

    def knowing(self, found: Mapping[str, ProductCheck]) -> Self:
        """The same problem with a knowledge of its own of how products are made, and this to begin with."""
        new = self.replace()
        new._found = dict(found)
        return new

    def on(self, data: Any) -> Self:
        """The same problem on other data of the same kind, at little cost; it keeps its own count of passes."""
        other = copy.copy(self)
        other.cost = Cost()
        other.batches = Batches(data, self.device, self.dtype)
        other._double = other.shard = None
        other._whole = None if self._whole is None else self._whole.on(data)
        return other

    def split(self, examples: int) -> Iterator[tuple[Self, float]]:
        """Yield problems on micro-batches of at most that many examples, with their weights.

        Batches whose examples cannot be told apart stay whole.
        """
        for piece, _ in self.evaluator.pieces(self.batches):
            try:
                count = batching.examples(piece)
            except ValueError:
                count = 1
            parts = range(0, count, examples)
            cuts = (
                [batching.cut(piece, a, min(a + examples, count)) for a in parts]
                if count > examples
                else [piece]
            )
            for part in cuts:
                if (weight := self.evaluator.weigh(part)) > 0:
                    yield self.on([part]), weight

    def in_float64(self) -> Self | None:
        """The same problem in float64, or None where the model cannot run in it (a hard-coded dtype)."""
        if self._double is None:
            double = self.replace(dtype=torch.float64)
            double.cost = Cost()
            try:
                double.sums([next(iter(double.batches))])
            except RuntimeError:
                return None
            self._double = double
        return self._double

    @contextlib.contextmanager
    def displaced(
        self,
        *directions: Tensor,
        exact: bool = False,
        ways: Ways | None = None,
        accuracy: bool = False,
        also: Mapping[str, Quantity] | None = None,
    ) -> Iterator[Displaced]:
        """Evaluate losses at θ + Σ cᵢ dᵢ, each at the cost of the bare forward passes.

        >>> from landscape import testbeds
        >>> model, loss, data, _ = testbeds.load_default()
        >>> problem = Problem(model, loss, data)
        >>> with problem.displaced(-problem.gradient()) as at:
        ...     at(0.0) > at(0.01)
        True

        Args:
            directions: vectors dᵢ, each (n,).
            exact: keep the user's batches and layers: the value is that of `at(θ + Σ cᵢ dᵢ)`, bit for bit; else
                to rounding.
            ways: how passes are made, as chosen before by `landscape.ways.choose`.
            accuracy: share of right answers beside the loss.
            also: other quantities by name, `f(output, target)` -> a batch's mean over its examples.

        Yields:
            `at(*c)` -> L; `at.values(points)` -> all quantities at many points; `at.moved(v)` -> L(θ + v).

        Raises:
            Refused: if quantities of outputs are asked of a problem with `forward=`.
            ValueError: if a direction does not have n entries.
        """
        from landscape import displaced  # not every measurement moves
        from landscape.ways import choose

        with self.session():
            chosen = ways or choose(self, exact=exact)
            yield displaced.Displaced(self, directions, ways=chosen, accuracy=accuracy, also=also)

    # --- trust ------------------------------------------------------------------------------------

    def check(
        self, needs: frozenset[checks.Need] = frozenset({checks.Need.VALUE}), *, products: bool = True
    ) -> checks.Report:
        """Find out whether this problem can be measured, and how products are to be made.

        Args:
            needs: what of it will be used.
            products: False leaves products to be checked when the first one is made.

        Raises:
            Refused: with the cause, if a measurement would return a wrong number.
        """
        return checks.run(self, needs, products=products)

    def check_products(self, matrix: Matrix) -> ProductCheck:
        """Check products with a matrix, "hessian" or "ggn", and make them from here on as was found.

        Raises:
            Refused: if they are asked for by autodiff, which is wrong here.
        """
        self._found[matrix] = product_checks.run(self, matrix)
        return self._found[matrix]

    def fingerprint(self) -> str:
        """A hash of θ, of the other parameters and of the buffers; 16 hexadecimal digits."""
        slots = self.evaluator.slots
        given = {f"model.{name}": t for name, t in {**self._buffers, **self._fixed}.items()}
        constants = {**slots.tensors, **slots.buffers, **given}
        digest = batching.new_digest(str(list(self.space.ranges.items())))
        batching.update(digest, [leaf.detach() for leaf in self.leaves()])
        measured = {f"model.{name}" for name in self.names}
        batching.update(digest, [t for name, t in sorted(constants.items()) if name not in measured])
        return str(digest.hexdigest())

    def data_fingerprint(self) -> str:
        """A hash of the batches as yielded, their cut included; 16 hexadecimal digits."""
        return batching.fingerprint(self.batches)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Hold the model in the measured mode over many calls; modes and random states return at the end."""
        with self.evaluator.session():
            yield

    def loss_with_substitutes(self, piece: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch computed with substitutes, and the model's own parameters by name.

        A loss that depends on one of the latter has bypassed its substitute.
        """
        with self.filled(self.leaves()):
            loss = self.evaluator.loss_of(piece)
        own = {name: p for name, p in self.evaluator.slots.tensors.items() if p.requires_grad}
        return loss, {name.removeprefix("model."): p for name, p in own.items()}

    def require_outputs(self, what: str) -> None:
        """Refuse what a problem with `forward=` cannot give.

        Raises:
            Refused: naming `output=`.
        """
        if not self.evaluator.has_outputs:
            raise Refused(
                f"{what} cannot be had from forward=, which returns only a loss. Give model and loss apart: "
                "Problem(model, loss, data, output=lambda model, batch: ..., target=lambda batch: ...)"
            )

    # --- sums over the data -----------------------------------------------------------------------

    def sums(self, data: Any) -> tuple[float, float]:
        """The sum of all terms of these batches and the sum of their weights, in float64."""
        own = self.shard.own if self.shard is not None and data is self.batches else None

        def summed() -> tuple[float, float]:
            return self.evaluator.sums(data, self._named(self.leaves()), self._buffers, own)

        if self.shard is None or own is None:
            return summed()
        total, weights, _ = self.shard.add("the loss", summed, of=self.parameters_vector)
        require_weight(weights > 0)
        return total, weights

    def _product(self, V: Tensor, matrix: Matrix, by_autodiff: _Product, by_differences: _Product) -> Tensor:
        vectors.require_block(V, self.size)
        if self._made_by(matrix) == "difference":
            wide = self if self.dtype == torch.float64 else self.in_float64() or self
            made = by_differences(wide, V).to(self.dtype)
        else:
            made = self._with_kernels(by_autodiff, V)
        self.cost.matvecs += V.shape[1] if V.ndim > 1 else 1
        return made

    @contextlib.contextmanager
    def keeping_graphs(self) -> Iterator[None]:
        """Keep the graphs of products meanwhile, one for each micro-batch; the model must not change.

        Products with one vector after the other then cost no more than in a block. Held are the graphs of one
        matrix at one θ on one set of data, the last that was multiplied. In float32, where of so many rectified
        units some would stand on the wrong side of zero by rounding, they stand where float64 has them: products
        may differ from those made otherwise, by 1e-4 to 3e-3, and are right.
        """
        self._graphs.append(KeptGraphs())
        try:
            yield
        finally:
            self._graphs.clear()

    def kept_graphs(self, matrix: str) -> dict[int, Graph] | None:
        """The graphs that are kept of this matrix, by micro-batch; None where none are to be kept."""
        if not self._graphs:
            return None
        return self._graphs[0].of((matrix, *self.names), (self._vector, self.batches, self.evaluator))

    def _made_by(self, matrix: Matrix) -> str:
        if self.products != "auto":
            return self.products
        return (self._found.get(matrix) or self.check_products(matrix)).products

    def _with_kernels(self, product: _Product, V: Tensor) -> Tensor:
        try:
            return product(self, V)
        except RuntimeError as failure:
            from landscape.kernels import milder

            if (kernels := milder(self.kernels, failure)) is None:
                raise
            self._kernels[:] = [kernels]
            self._graphs[:] = [KeptGraphs() for _ in self._graphs]
            return product(self, V)

    def leaves(self, displacement: Tensor | None = None) -> list[Tensor]:
        """θ (+ displacement) as fresh leaves that require grad, without a copy where none is needed."""
        if self._vector is not None:
            held = self.space.split(self._vector)
        else:
            held = [p.detach().to(self.device, self.dtype) for p in self._own.values()]
        if displacement is not None:
            held = [p + d for p, d in zip(held, self.space.split(displacement), strict=True)]
        # Parameters, not tensors: some modules look themselves up by get_parameter.
        return [nn.Parameter(p.detach()) for p in held]

    def filled(self, leaves: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        """Let the model compute with these tensors as its parameters."""
        return self.evaluator.filled(self._named(leaves), self._buffers)

    def substitutes(self, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        """All tensors that the model computes with in `filled`, by name within the evaluator's slots."""
        return self.evaluator.substitutes(self._named(leaves), self._buffers)

    def _named(self, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        return {**self._fixed, **dict(zip(self.names, leaves, strict=True))}
