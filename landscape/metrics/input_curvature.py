"""Curvature of each example's loss with respect to its own input.

Per example i, with f_i(x) its loss as a batch of one (or a logit), g = ∇f_i and H = ∇²f_i at its input:
‖g‖, ‖H‖ = max |λ|, C_f = ‖H‖ / (‖g‖ + ε), Tr H and Tr H² = E ‖Hv‖², and
Curv = ‖∇f_i(x + h z) - g‖ with z = sign(g) / ‖sign(g)‖.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from landscape import input_checks, seeds
from landscape.checks import Need
from landscape.errors import Refused
from landscape.estimators.calibration import calibrated_stderr
from landscape.estimators.probes import draw
from landscape.estimators.stacks import spectral_norms
from landscape.example_hessians import Hessians
from landscape.example_outputs import labels_of, predictions_of
from landscape.example_scalars import INPUT, ExampleScalars, Setup, by_example
from landscape.example_streams import streams
from landscape.metrics.base import Metric, Round, Values, setting
from landscape.problem import Problem
from landscape.results import Record, Variable

_PIXEL = 8 / 255  # change of each number under the default step: an adversarial attack's on grey levels
_BLOCK = 512
_IMAGE_NUMBERS = 1 << 24  # numbers that a file may hold for the gallery
_EACH = {
    "gradient_norm": "‖∇f‖",
    "hessian_norm": "largest modulus of an eigenvalue of ∇²f",
    "normalized_curvature": "‖∇²f‖ / (‖∇f‖ + ε)",
    "trace": "Tr ∇²f",
    "trace_squared": "Tr (∇²f)²",
    "curvature": "Curv = ‖∇f(x + h z) - ∇f(x)‖, z = sign(∇f) / ‖sign(∇f)‖",
    "cure": "CURE's form of the same, ‖∇f(x + h z) - ∇f(x)‖²",
}


@dataclass(frozen=True)
class InputCurvature(Metric):
    """Gradient and Hessian of each example's loss in its input: norms, normalized curvature, traces, Curv(X).

    A fixed example's values do not depend on the batch it stands in: its probes follow from its content, its
    norm is solved to a tolerance of its own. Where a gradient vanishes there is no direction z; Curv is 0
    there, the limit of a loss that grows flat. Means over examples come with their standard errors;
    `matvecs` counts a product with one example's Hessian as one.

    Source: Srinivas et al. 2022 (arXiv 2206.07144); Garg & Roy 2023 (arXiv 2205.15943); Moosavi-Dezfooli
    et al. 2019 (arXiv 1811.09716).
    """

    name: ClassVar[str] = "input_curvature"
    headline: ClassVar[str] = "mean_normalized_curvature"
    unit: ClassVar[str] = "example"
    block: ClassVar[int] = _BLOCK
    citation: ClassVar[str] = "Srinivas et al. 2022, arXiv:2206.07144"
    told: ClassVar[tuple[str, ...]] = ("unconverged", "zero_gradients", "not_finite")

    scalar: str = setting("loss", "f: loss, logit (of the label), prediction (the largest logit), or logit:3")
    with_respect_to: str = setting(INPUT, "input, or the module (an embedding) whose output takes its place")
    epsilon: float = setting(1e-6, "ε of the normalized curvature, in the unit of a gradient")
    step: float | None = setting(
        None, "h of Curv, the length of the displacement in the unit of the input; none is 8/255 √d"
    )
    image: tuple[int, ...] | None = setting(
        None, "shape of an input as a picture (8,8 or 3,32,32); keeps the inputs, for the gallery"
    )
    rtol: float = setting(1e-4, "residual of a Hessian's norm that is asked for, relative to it", grows=True)
    max_matvecs: int = setting(200, "products after which an example's norm is given up", grows=True)
    probes: int = setting(8, "random signs for the traces; 0 leaves them out", grows=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        Setup(self.scalar)
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon is {self.epsilon}; allowed is a number >= 0")
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"step is {self.step}; allowed is a number > 0, or none")
        if not 0 <= self.rtol < 1:
            raise ValueError(f"rtol is {self.rtol}; allowed is 0 <= rtol < 1")
        if self.max_matvecs < 1 or self.probes < 0:
            raise ValueError(
                f"max_matvecs is {self.max_matvecs} and probes is {self.probes}; allowed is at least 1 and 0"
            )
        if self.image is not None and not (len(self.image) in {2, 3} and min(self.image) > 0):
            raise ValueError(
                f"image is {self.image}; allowed is (height, width) or (channels, height, width)"
            )

    def needs(self) -> frozenset[Need]:
        """The inputs; outputs where f is a logit."""
        return frozenset({Need.INPUTS} if self.scalar == "loss" else {Need.INPUTS, Need.OUTPUTS})

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Find out whether examples decouple, and how products are made."""
        if (count := problem.examples()) is None:
            raise Refused(
                "the batches do not tell how many examples they hold, so that none has a curvature of its own; "
                "the first dimension of every tensor must count examples"
            )
        found = input_checks.examine(problem, Setup(self.scalar, self.with_respect_to))
        if self.image is not None:
            _require_image(self.image, found.size, count)
        return Record(attrs={"count": count, "input_check": found.as_dict(), "probe_seed": seed})

    def unit_bytes(self, problem: Problem) -> int:
        """The bases of the Lanczos chains, and the rows of gradients."""
        size = input_checks.numbers_of_an_example(problem, self.with_respect_to)
        return (min(self.max_matvecs, size) + 16) * size * problem.dtype.itemsize

    def units(self, record: Record) -> Round | None:
        """All examples once, and again for a larger demand."""
        count = record.attrs["count"]
        if record.attrs["stop"] == 0:
            return Round(count)
        missed = not record["hessian_converged"].all() and self.max_matvecs > record["limit"].min()
        finer = self.rtol < record["asked"].max() or self.probes > record["probes_used"].min()
        return Round(count, again=True) if missed or finer else None

    def measure(
        self,
        problem: Problem,
        shared: Record,
        block: range,
        generators: Sequence[torch.Generator],  # noqa: ARG002  (streams follow from the examples' content)
    ) -> Values:
        """Measure a block of examples, batch by batch."""
        setup = Setup(**shared.attrs["input_check"]["setup"])
        seed = shared.attrs["probe_seed"]
        found = by_example(problem, block, setup, lambda scalars: self._of(scalars, seed))
        if block.start == 0:  # the cost is counted in passes over all data
            problem.cost.gradients += 2
        problem.cost.matvecs += int(found["products"].sum())
        return {name: _variable(name, data) for name, data in found.items()}

    def _of(self, scalars: ExampleScalars, seed: int) -> dict[str, np.ndarray]:
        signs = _signs(scalars, self.probes, scalars.size, seed)
        with contextlib.ExitStack() as held:
            H = Hessians(scalars, held)
            traces, squares = _traces(H, signs)
            size = H.gradient.shape[1]
            start = draw(seeds.generator(seed, f"{self.name}/start", 0), size, 1, "gaussian", dtype=H.dtype)
            norms = spectral_norms(H, start[:, 0], self.rtol, self.max_matvecs)
            described = _described(scalars, H)
            step = self.step if self.step is not None else _PIXEL * math.sqrt(size)
            gradient = H.gradient
        slope = _numpy(gradient.double().norm(dim=1))
        curved = _numpy(_change(scalars, gradient, step))
        top = np.abs(norms.values)
        with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 with ε = 0 has no value
            normalized = top / (slope + self.epsilon)
        every = np.ones(len(slope))
        return {
            "gradient_norm": slope,
            "hessian_norm": top,
            "hessian_eigenvalue": norms.values,
            "hessian_residual_norm": norms.residual_norms,
            "hessian_converged": norms.converged,
            "normalized_curvature": normalized,
            **_moments("trace", traces),
            **_moments("trace_squared", squares),
            "curvature": curved,
            "cure": curved**2,
            "step": every * step,
            "products": (norms.matvecs + self.probes).astype(float),
            "asked": every * self.rtol,
            "limit": every * self.max_matvecs,
            "probes_used": every * self.probes,
            **described,
            **self._picture(scalars),
        }

    def _picture(self, scalars: ExampleScalars) -> dict[str, np.ndarray]:
        if self.image is None:
            return {}
        flat = scalars.points()
        return {"image": _numpy(flat.reshape(-1, *self.image)).astype(np.float32)}

    def summarize(self, record: Record) -> Values:
        """Take means over the examples that have a value, and count and name those that lack one."""
        done = record["done"]
        found: Values = {}
        for name, words in _EACH.items():
            if name not in record:
                continue
            x = record[name][done]
            x = x[np.isfinite(x)]
            stderr = calibrated_stderr(x) if len(x) else np.asarray(np.nan)
            mean = x.mean() if len(x) else np.nan
            found[f"mean_{name}"] = Variable((), np.asarray(mean), "1", f"mean over examples of {words}")
            found[f"mean_{name}_stderr"] = Variable((), stderr, "1", "standard error over examples")
        slope, converged = record["gradient_norm"], record["hessian_converged"]
        bad = done & ~np.isfinite(slope)
        missed = np.flatnonzero(done & ~converged & np.isfinite(slope))
        words = "examples whose Hessian norm did not reach rtol"
        found["unconverged"] = Variable((), np.asarray(len(missed)), "1", words)
        found["unconverged_examples"] = Variable(("unconverged_example",), missed, "1", words)
        zero = int((slope[done] == 0).sum())
        found["zero_gradients"] = Variable((), np.asarray(zero), "1", "examples whose gradient is zero")
        found["not_finite"] = Variable(
            (), np.asarray(int(bad.sum())), "1", "examples without a finite gradient; left out of the means"
        )
        fine = len(missed) == 0
        found["converged"] = Variable((), np.asarray(fine), "1", "whether every Hessian norm reached rtol")
        return found

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """Those of single examples; in the normalized one ε has the unit of a gradient."""
        return dict.fromkeys(("gradient_norm", "hessian_norm", "trace", "curvature"), 1.0)

    def outlook(self, problem: Problem) -> tuple[int, int]:  # noqa: ARG002
        """Predict the passes over the data that make a product with each example's Hessian."""
        return self.probes + 4, self.probes + self.max_matvecs


def _require_image(image: tuple[int, ...], size: int, count: int) -> None:
    if math.prod(image) != size:
        raise Refused(f"image is {image}, {math.prod(image)} numbers, but an input has {size}")
    if size * count > _IMAGE_NUMBERS:
        raise Refused(
            f"the pictures of {count} examples are {size * count} numbers, allowed are {_IMAGE_NUMBERS}; measure "
            "fewer examples (--examples), or leave image= out"
        )


def _signs(scalars: ExampleScalars, probes: int, size: int, seed: int) -> Tensor:
    """Random signs (N, d, probes); each example's follow from its content alone, wherever it stands."""
    found = torch.zeros(scalars.count, size, probes, dtype=scalars.problem.dtype)
    if probes:
        for i, stream in enumerate(streams(scalars.piece, seed, "input_curvature")):
            found[i] = draw(stream, size, probes, dtype=found.dtype)
    return found


def _traces(H: Hessians, V: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """vᵀHv and ‖Hv‖² of each example and probe, (probes, N)."""
    V = V.to(H.device)
    found = np.zeros((2, V.shape[2], len(V)))
    for k in range(V.shape[2]):
        v = V[:, :, k]
        Hv = (H @ v[..., None])[..., 0].double()
        found[:, k] = _numpy(torch.stack([(v.double() * Hv).sum(dim=1), Hv.square().sum(dim=1)]))
    return found[0], found[1]


def _change(scalars: ExampleScalars, gradient: Tensor, step: float) -> Tensor:
    """‖∇f(x + h z) - ∇f(x)‖, 0 where the gradient is."""
    sign = torch.sign(gradient)
    length = sign.norm(dim=1, keepdim=True)
    moved = scalars.gradient(step * sign / torch.where(length > 0, length, 1.0))
    change: Tensor = (moved.double() - gradient.double()).norm(dim=1)
    return change


def _described(scalars: ExampleScalars, H: Hessians) -> dict[str, np.ndarray]:
    """What each example is: its f, its label, and what the model takes it for."""
    found = {"value": _numpy(scalars.values(H.done))}
    for name, numbers in (
        ("label", labels_of(H.done.target, scalars.count)),
        ("predicted", predictions_of(H.done.outputs, scalars.count)),
    ):
        if numbers is not None:
            found[name] = _numpy(numbers).astype(np.int64)
    return found


def _moments(name: str, samples: np.ndarray) -> dict[str, np.ndarray]:
    if not len(samples):
        return {}
    if not np.isfinite(samples).all():  # the error of one example must not hide that of the others
        columns = [
            _moments(name, column[:, None]) if np.isfinite(column).all() else None for column in samples.T
        ]
        keys = (name, f"{name}_stderr")
        return {k: np.array([np.nan if c is None else c[k][0] for c in columns]) for k in keys}
    stderr = calibrated_stderr(samples)
    return {name: samples.mean(axis=0), f"{name}_stderr": stderr}


def _numpy(t: Tensor) -> np.ndarray:
    found: np.ndarray = t.detach().cpu().numpy()
    return found


def _variable(name: str, data: np.ndarray) -> Variable:
    words = {
        **_EACH,
        "hessian_eigenvalue": "eigenvalue of largest modulus of ∇²f",
        "hessian_residual_norm": "‖∇²f v - λ v‖ of it",
        "hessian_converged": "whether rtol was reached",
        "trace_stderr": "standard error over probes",
        "trace_squared_stderr": "standard error over probes",
        "step": "h of Curv, length of the displacement in the unit of the input",
        "products": "products with this example's Hessian",
        "asked": "rtol of the solve",
        "limit": "products allowed to the solve",
        "probes_used": "probes of the traces",
        "value": "f",
        "label": "target",
        "predicted": "class of the largest output",
        "image": "the input",
    }
    dims = {1: (), 3: ("row", "column"), 4: ("channel", "row", "column")}[data.ndim]
    return Variable(("example", *dims), data, "1", words[name])
