"""Laplace's approximation of the log-evidence, its Occam factor, and the noise scale of SGD.

With the summed cost C(θ) = N L(θ) + λ‖θ‖²/2 of N terms and a Gaussian prior of precision λ,

    ln P(data) ≈ -C(θ) - ½ ln det(∇∇C / λ),    ∇∇C / λ = I + (N/λ) A,

A the Hessian or the Gauss-Newton matrix of the mean loss L. The second term is the log of the Occam factor
λ^{P/2} |∇∇C|^{-1/2}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal

from landscape import losses, operators
from landscape.checks import Need
from landscape.errors import Refused
from landscape.estimators import lanczos
from landscape.estimators.logdet import DENSE, LogdetEstimate, from_chains, from_eigenvalues
from landscape.estimators.probes import draw
from landscape.metrics.base import Round, SequentialMetric, State, Values, setting
from landscape.problem import Problem
from landscape.results import Record, Variable

_COLUMNS = 16  # of the dense matrix, made by one block product


def noise_scale(learning_rate: float, batch_size: int, examples: int, momentum: float = 0.0) -> float:
    """The scale of SGD's noise, g = ε/(1 - m) (N/B - 1), ε for the mean loss.

    Args:
        learning_rate: ε.
        batch_size: B.
        examples: N, of the training set.
        momentum: m.

    Returns:
        g, in the unit of ε.

    Raises:
        ValueError: for a number outside its range.

    Source: Smith & Le 2018 (arXiv 1710.06451), §5.

    >>> noise_scale(0.5, 32, 1024), noise_scale(0.5, 32, 1024, momentum=0.5)
    (15.5, 31.0)
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate is {learning_rate}; allowed is a number > 0")
    if not 1 <= batch_size <= examples:
        raise ValueError(f"batch_size is {batch_size}; allowed is 1 to the number of examples, {examples}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; allowed is 0 <= momentum < 1")
    return learning_rate / (1 - momentum) * (examples / batch_size - 1)


@dataclass(frozen=True)
class _Chains:
    """Chains in lockstep; wrapped, so that their bases are not copied at each step."""

    state: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Matrix:
    """A dense matrix (n, n), of which so many columns are known."""

    matrix: torch.Tensor
    columns: int


@dataclass(frozen=True)
class Evidence(SequentialMetric):
    """Laplace log-evidence and Occam factor for a Gaussian prior, and the noise scale of SGD.

    The cost is C = N L + λ‖θ‖²/2, a sum over all N terms of the data, whatever the loss of a batch is divided
    by; L must be -ln p(target) in nats, without the prior. The log-determinant comes from all eigenvalues
    where there are at most 2048 parameters, else from stochastic Lanczos quadrature with its standard error.
    `gradient_norm` says how far θ is from the minimum of C that the approximation assumes.

    Source: MacKay 1992 (doi 10.1162/neco.1992.4.3.448); Smith & Le 2018 (arXiv 1710.06451).
    """

    name: ClassVar[str] = "evidence"
    headline: ClassVar[str] = "log_evidence"
    unit: ClassVar[str] = "probe"
    citation: ClassVar[str] = "Smith & Le 2018, arXiv:1710.06451"
    told: ClassVar[tuple[str, ...]] = ("noise_scale", "gradient_norm")

    prior_precision: float = setting(1.0, "λ of the Gaussian prior exp(-λ‖θ‖²/2)")
    curvature: Literal["ggn", "hessian"] = setting("ggn", "of which matrix the determinant is taken")
    method: Literal["auto", "dense", "lanczos"] = setting("auto", "auto is dense for at most 2048 parameters")
    probes: int = setting(16, "random start vectors", grows=True)
    steps: int = setting(100, "products of a chain, and nodes of its quadrature")
    learning_rate: float | None = setting(None, "of SGD on the mean loss, for the noise scale")
    batch_size: int | None = setting(None, "of SGD, for the noise scale")
    momentum: float = setting(0.0, "of SGD, for the noise scale")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.prior_precision < math.inf:
            raise ValueError(f"prior_precision is {self.prior_precision}; allowed is a number > 0")
        if self.probes < 1 or self.steps < 1:
            raise ValueError(f"probes and steps are {self.probes} and {self.steps}; allowed are numbers >= 1")
        if (self.learning_rate is None) != (self.batch_size is None):
            raise ValueError("the noise scale needs both, learning_rate and batch_size")
        if self.learning_rate is not None and self.batch_size is not None:
            noise_scale(self.learning_rate, self.batch_size, self.batch_size, self.momentum)

    def needs(self) -> frozenset[Need]:
        """Products of the chosen matrix, and the gradient."""
        return frozenset({Need.GGN if self.curvature == "ggn" else Need.HESSIAN, Need.GRADIENT})

    def prepare(self, problem: Problem, seed: int) -> Record:  # noqa: ARG002
        """Sum up the cost, its gradient and its constant."""
        constant, words = losses.normalizer(problem.evaluator.loss)
        if math.isnan(constant):
            raise Refused(f"the evidence needs a loss that is -ln p(target) in nats; {words}")
        total, terms = problem.sums(problem.batches)
        theta = problem.parameters_vector().double()
        slope = terms * problem.gradient().double() + self.prior_precision * theta
        cost = total + terms * constant + self.prior_precision / 2 * float(theta @ theta)
        noise = self._noise(problem)
        return Record(
            {
                "cost": Variable((), np.asarray(cost), "1", "C = N L + λ‖θ‖²/2 in nats, constants included"),
                "terms": Variable((), np.asarray(terms), "1", "N, the weight of all terms"),
                "gradient_norm": Variable((), np.asarray(float(slope.norm())), "1", "‖∇C‖"),
                "noise_scale": Variable((), np.asarray(noise), "1", "ε/(1 - m) (N/B - 1)"),
            },
            {
                "way": "dense" if self._dense(problem) else "lanczos",
                "likelihood": words,
                "order": problem.size,
                "product_dtype": str(problem.dtype).removeprefix("torch."),
            },
        )

    def block_size(self, problem: Problem, memory: int) -> int:
        """As many chains as fit, bases and all, into half of the memory."""
        fits = lanczos.chains_that_fit(problem.size, self.steps, problem.dtype, memory // 2)
        return max(1, min(self.probes, fits))

    def units(self, record: Record) -> Round | None:
        """All probes at once, or the one exact determinant."""
        wanted = 1 if record.attrs["way"] == "dense" else self.probes
        return Round(wanted) if record.attrs["stop"] < wanted else None

    def start(
        self,
        problem: Problem,
        shared: Record,
        block: range,  # noqa: ARG002
        generators: Sequence[torch.Generator],
    ) -> Any:
        """Return chains at their random start vectors, or an empty matrix."""
        if shared.attrs["way"] == "dense":
            return _Matrix(torch.zeros(problem.size, problem.size, dtype=torch.float64), 0)
        columns = [
            draw(g, problem.size, 1, "gaussian", dtype=problem.dtype, device=problem.device)
            for g in generators
        ]
        return _Chains(lanczos.start(torch.cat(columns, dim=1), min(self.steps, problem.size)))

    def step(self, problem: Problem, shared: Record, block: range, state: Any) -> Any:  # noqa: ARG002
        """Make one product with all chains, or one for some columns of the matrix."""
        A = self._scaled(problem, shared)
        if isinstance(state, _Chains):
            return _Chains(lanczos.step(A, state.state))
        stop = min(state.columns + _COLUMNS, problem.size)
        units = torch.zeros(problem.size, stop - state.columns, dtype=A.dtype, device=A.device)
        units[state.columns : stop].fill_diagonal_(1.0)
        columns = (A @ units).double().cpu()
        if not bool(torch.isfinite(columns).all()):
            raise Refused(
                "a product with the curvature matrix holds NaN or infinity, so it has no determinant; look at the loss "
                "and the gradient"
            )
        state.matrix[:, state.columns : stop] = columns
        return _Matrix(state.matrix, stop)

    def result(self, problem: Problem, shared: Record, block: range, state: Any) -> Values | None:  # noqa: ARG002
        """Return the tridiagonal matrices, or all eigenvalues."""
        dims = ("probe", "node")
        if isinstance(state, _Matrix):
            if state.columns < problem.size:
                return None
            eigenvalues = torch.linalg.eigvalsh((state.matrix + state.matrix.T) / 2).numpy()
            words = "eigenvalues of (N/λ) A, ascending"
            values = {"eigenvalues": Variable(dims, eigenvalues[None], "1", words)}
        elif (found := lanczos.result(state.state)) is None:
            return None
        else:
            values = {
                "alpha": Variable(dims, found.alpha, "1", "diagonals of the tridiagonal matrices of (N/λ) A"),
                "beta": Variable(
                    dims, found.beta, "1", "off-diagonals; the last is the norm of what is left"
                ),
            }
        arrays = {name: variable.data for name, variable in values.items()}
        self._determinant(arrays, shared.attrs)  # refuses now what has no determinant, not after all probes
        return values

    def stored(self, state: Any) -> State:
        """Turn the chains or the matrix into arrays."""
        if isinstance(state, _Chains):
            return dict(lanczos.arrays(state.state))
        return {"matrix": state.matrix.numpy(), "columns": np.asarray(state.columns)}

    def restored(self, problem: Problem, arrays: State) -> Any:
        """Bring the chains or the matrix back."""
        held = {name: torch.from_numpy(np.array(value, order="C")) for name, value in arrays.items()}
        if "matrix" in held:
            return _Matrix(held["matrix"], int(held["columns"]))
        held["basis"] = held["basis"].to(problem.device)
        return _Chains(held)

    def summarize(self, record: Record) -> Values:
        """Add up the evidence from the determinant of the probes that are done."""
        done = record["done"]
        names = ("eigenvalues",) if record.attrs["way"] == "dense" else ("alpha", "beta")
        found = self._determinant({name: record[name][done] for name in names}, record.attrs)
        error, words = found.stderr / 2, "over start vectors, with the quadrature's error"
        cost = float(record["cost"])
        return {
            "log_evidence": Variable((), np.asarray(-cost - found.value / 2), "1", "log-evidence in nats"),
            "log_evidence_stderr": Variable((), np.asarray(error), "1", f"standard error, {words}"),
            "log_occam_factor": Variable((), np.asarray(-found.value / 2), "1", "-½ ln det(I + (N/λ) A)"),
            "log_occam_factor_stderr": Variable((), np.asarray(error), "1", f"standard error, {words}"),
            "logdet": Variable((), np.asarray(self._logdet(record, found.value)), "1", "ln det(N A + λ I)"),
            "logdet_stderr": Variable((), np.asarray(found.stderr), "1", f"standard error, {words}"),
            "converged": Variable((), np.asarray(bool(done.all())), "1", "whether all probes are done"),
        }

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """None: the loss is a likelihood."""
        return {}

    def outlook(self, problem: Problem) -> tuple[int, int]:
        """Predict the products."""
        count = problem.size if self._dense(problem) else self.probes * min(self.steps, problem.size)
        return count, count

    def _determinant(self, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> LogdetEstimate:
        """Estimate ln det(I + (N/λ) A)."""
        dtype = getattr(torch, attrs["product_dtype"])
        lower = 0.0 if self.curvature == "ggn" else None
        chains = lanczos.Chains(arrays["alpha"], arrays["beta"]) if "alpha" in arrays else None
        try:
            if chains is None:
                return from_eigenvalues(arrays["eigenvalues"][0], dtype, shift=1.0, lower=lower)
            return from_chains(chains, attrs["order"], dtype, shift=1.0, lower=lower)
        except Refused as refusal:
            ends = (
                [arrays["eigenvalues"].min()]
                if chains is None
                else [eigvalsh_tridiagonal(alpha, beta[:-1])[0] for alpha, beta in chains.rows()]
            )
            least = self.prior_precision * float(min(ends))
            raise Refused(
                f"the Hessian of the cost, N H + {self.prior_precision:g} I, is not positive definite: lambda_min of "
                f"N H is at most {least:.6g}, so there is no log-evidence. Take prior_precision above "
                f"{-least:.6g}, curvature='ggn', or parameters at a minimum"
            ) from refusal

    def _dense(self, problem: Problem) -> bool:
        return self.method == "dense" or (self.method == "auto" and problem.size <= DENSE)

    def _logdet(self, record: Record, value: float) -> float:
        return value + float(record.attrs["order"]) * math.log(self.prior_precision)

    def _noise(self, problem: Problem) -> float:
        if self.learning_rate is None or self.batch_size is None:
            return math.nan
        if (examples := problem.examples()) is None:
            raise Refused("the noise scale needs the number of examples, which the batches do not tell")
        return noise_scale(self.learning_rate, self.batch_size, examples, self.momentum)

    def _scaled(self, problem: Problem, shared: Record) -> operators.Operator:
        return (float(shared["terms"]) / self.prior_precision) * operators.named(problem, self.curvature)
