"""The density of a curvature matrix's eigenvalues, with an error band, and its outliers.

φ(u) = (1/n) Σ_i N(u; u(λ_i), σ²): the eigenvalues, smoothed by a Gaussian of stated width σ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from landscape import operators
from landscape.checks import Need
from landscape.errors import Refused
from landscape.estimators import lanczos
from landscape.estimators.deflation import Deflated, deflated
from landscape.estimators.density import PRESETS, DensityEstimate, from_chains
from landscape.estimators.eigen import eigsh
from landscape.estimators.probes import draw
from landscape.metrics.base import Round, SequentialMetric, State, Values, curvature_power, setting
from landscape.problem import Problem
from landscape.results import Record, Variable

_NEEDS = {
    "hessian": Need.HESSIAN,
    "ggn": Need.GGN,
    "fisher": Need.GGN,
    "empirical_fisher": Need.OUTPUTS,
    "input_hessian": Need.INPUTS,
}
_WIDEST = 0.3 * math.log(10.0)  # of the kernel on a logarithmic axis, unless told otherwise: 0.3 decades
_SCALES = {"linear": "linear", "log": "symlog", "log_magnitude": "log"}


@dataclass(frozen=True)
class _Chains:
    """Chains in lockstep; wrapped, so that their bases are not copied at each step."""

    state: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Density(SequentialMetric):
    """Spectral density by stochastic Lanczos quadrature, with a 95 % band, and the outliers beyond the bulk.

    Chains from random start vectors run in lockstep as one block. The band holds the sampling error and that
    of the quadrature. `log` draws over a signed logarithm of the eigenvalues. A preset takes probes, steps,
    kernel width and axis from the literature, scaled with the loss; `deflate` takes the largest eigenvalues
    out first, and draws them as atoms.

    Source: Lin, Saad & Yang 2016 (doi 10.1137/130934283); Ghorbani et al. 2019 (arXiv 1901.10159); Papyan 2020
    (JMLR 21, 252).
    """

    name: ClassVar[str] = "density"
    headline: ClassVar[str] = "outlier_count"
    unit: ClassVar[str] = "probe"
    citation: ClassVar[str] = "Ghorbani, Krishnan & Xiao 2019, arXiv:1901.10159"
    told: ClassVar[tuple[str, ...]] = ("bulk_low", "bulk_high", "width")

    probes: int = setting(8, "random start vectors", grows=True)
    steps: int = setting(100, "products of a chain, and nodes of its quadrature")
    curvature: Literal["hessian", "ggn", "fisher", "empirical_fisher", "input_hessian"] = setting(
        "hessian", "of which matrix"
    )
    log: bool = setting(False, "over the logarithm of the eigenvalues, signed")
    width: float | None = setting(
        None,
        "σ of the smoothing Gaussian, with log in decades; none: what the nodes resolve (log: at most 0.3)",
    )
    preset: Literal["none", "ghorbani", "pyhessian", "papyan", "papyan_code", "papyan_log"] = setting(
        "none", "probes, steps, width and axis as these authors have them"
    )
    deflate: int = setting(0, "how many of the largest eigenvalues to take out first")
    layer: str | None = setting(
        None, "only the diagonal block of these parameter tensors, a name or a pattern"
    )
    example: int = setting(0, "for input_hessian, of which example")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("probes", 1), ("steps", 1), ("deflate", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is a number >= {least}")
        if self.width is not None and not self.width > 0:
            raise ValueError(f"width is {self.width}; allowed is a number > 0, or none")
        if self.preset != "none" and (self.log or self.width is not None):
            raise ValueError(f"preset {self.preset} sets axis and width; leave out log and width")

    def needs(self) -> frozenset[Need]:
        """Products of the chosen matrix."""
        return frozenset({_NEEDS[self.curvature]})

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Find the eigenpairs that are taken out."""
        A = self._matrix(problem)
        record = Record(attrs={"order": A.shape[0], "product_dtype": str(A.dtype).removeprefix("torch.")})
        if self.deflate:
            if self.deflate >= A.shape[0]:
                raise Refused(f"deflate is {self.deflate}, but the matrix has {A.shape[0]} eigenvalues")
            pairs = eigsh(A, self.deflate, seed=seed)
            rows = pairs.vectors.T.cpu().numpy()
            words = "deflated eigenvectors"
            record.variables["atoms"] = Variable(
                ("atom",), pairs.values.cpu().numpy(), "1", "deflated eigenvalues"
            )
            record.variables["atom_vectors"] = Variable(("atom", "parameter"), rows, "1", words, sidecar=True)
        return record

    def block_size(self, problem: Problem, memory: int) -> int:
        """As many chains as fit, bases and all, into half of the memory."""
        A, settings = self._matrix(problem), self._settings
        fits = lanczos.chains_that_fit(A.shape[0], settings["steps"], A.dtype, memory // 2)
        return max(1, min(int(settings["probes"]), fits))

    def units(self, record: Record) -> Round | None:
        """All probes at once."""
        wanted = int(self._settings["probes"])
        return Round(wanted) if record.attrs["stop"] < wanted else None

    def start(
        self,
        problem: Problem,
        shared: Record,
        block: range,  # noqa: ARG002
        generators: Sequence[torch.Generator],
    ) -> _Chains:
        """Return chains at their random start vectors."""
        A = self._operator(problem, shared)
        kind = self._settings["distribution"]
        columns = [draw(g, A.shape[0], 1, kind, dtype=A.dtype, device=A.device) for g in generators]
        length = min(self._settings["steps"], A.dimension)
        return _Chains(lanczos.start(A.project(torch.cat(columns, dim=1)), length))

    def step(self, problem: Problem, shared: Record, block: range, state: _Chains) -> _Chains:  # noqa: ARG002
        """Make one product with all chains that go on."""
        return _Chains(lanczos.step(self._operator(problem, shared), state.state))

    def result(
        self,
        problem: Problem,  # noqa: ARG002
        shared: Record,  # noqa: ARG002
        block: range,  # noqa: ARG002
        state: _Chains,
    ) -> Values | None:
        """Return the tridiagonal matrices."""
        if (found := lanczos.result(state.state)) is None:
            return None
        dims = ("probe", "node")
        return {
            "alpha": Variable(dims, found.alpha, "1", "diagonals of the tridiagonal matrices"),
            "beta": Variable(dims, found.beta, "1", "off-diagonals; the last is the norm of what is left"),
        }

    def stored(self, state: _Chains) -> State:
        """Turn the chains into arrays."""
        return dict(lanczos.arrays(state.state))

    def restored(self, problem: Problem, arrays: State) -> _Chains:
        """Bring the chains back."""
        held = {name: torch.from_numpy(np.array(value, order="C")) for name, value in arrays.items()}
        held["basis"] = held["basis"].to(problem.device)
        return _Chains(held)

    def summarize(self, record: Record) -> Values:
        """Smooth the quadratures of the probes that are done, and count the outliers."""
        done = record["done"]
        atoms = record["atoms"] if "atoms" in record else np.zeros(0)
        chains = lanczos.Chains(record["alpha"][done], record["beta"][done])
        options = {key: self._settings[key] for key in ("axis", "width", "floor")}
        dtype = getattr(torch, record.attrs["product_dtype"])
        found = from_chains(chains, record.attrs["order"], dtype, atoms=atoms, **options)
        if options["width"] is None and found.axis.name != "linear" and found.width > _WIDEST:
            # Where the nodes resolve less than a reader wants to see, the band says so, not the width.
            options["width"] = _WIDEST
            found = from_chains(chains, record.attrs["order"], dtype, atoms=atoms, **options)
        shape = record["alpha"].shape
        nodes, weights = (_placed(done, x, shape) for x in (found.ritz_values, found.weights))
        # A logarithmic axis is told in decades: u / ln 10.
        decade, unit = (1.0, "unit") if found.axis.name == "linear" else (math.log(10.0), "decade")
        curve = {"density": found.density, "density_low": found.low, "density_high": found.high}
        words = {
            "density": f"share of eigenvalues per {unit}",
            "density_low": "lower end of the 95 % band",
            "density_high": "upper end of the 95 % band",
        }
        record.attrs.update(
            x_scale=_SCALES[found.axis.name], x_floor=found.axis.epsilon, smoothing="Gaussian kernel"
        )
        return {
            "x": Variable(("x",), found.grid, "1", "eigenvalue"),
            "coordinate": Variable(("x",), found.coordinate / decade, "1", f"x in {unit}s, evenly spaced"),
            **{key: Variable(("x",), decade * data, "1", words[key]) for key, data in curve.items()},
            "width": Variable((), np.asarray(found.width / decade), "1", f"σ of the kernel, in {unit}s"),
            "ritz_values": Variable(("probe", "node"), nodes, "1", "nodes of the quadratures"),
            "weights": Variable(("probe", "node"), weights, "1", "weights of the nodes"),
            **_outliers(found, atoms),
            "converged": Variable((), np.asarray(bool(done.all())), "1", "whether all probes are done"),
        }

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """The axis scales, the count stays."""
        power = curvature_power(self.curvature)
        ends = dict.fromkeys(("x", "bulk_low", "bulk_high"), power)
        return {self.headline: 0.0, **ends}

    def outlook(self, problem: Problem) -> tuple[int, int]:
        """Predict the products: probes times steps, and what deflation takes."""
        count = self._settings["probes"] * min(self._settings["steps"], self._matrix(problem).shape[0])
        return count + 2 * self.deflate, count + (100 * self.deflate + 1000 if self.deflate else 0)

    @property
    def _settings(self) -> dict[str, Any]:
        own = {
            "probes": self.probes,
            "steps": self.steps,
            "axis": "log" if self.log else "linear",
            "width": self.width if self.width is None or not self.log else self.width * math.log(10.0),
            "floor": 1e-6,
            "distribution": "gaussian",
        }
        return own if self.preset == "none" else {**own, **PRESETS[self.preset]}

    def _matrix(self, problem: Problem) -> operators.Operator:
        return operators.named(problem, self.curvature, layer=self.layer, example=self.example)

    def _operator(self, problem: Problem, shared: Record) -> Deflated:
        pairs = None
        if "atoms" in shared:
            vectors = torch.from_numpy(np.ascontiguousarray(shared["atom_vectors"].T))
            pairs = shared["atoms"], vectors
        return deflated(self._matrix(problem), pairs)


def _placed(done: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Put the rows of the probes that are done in their places; NaN elsewhere, and where a chain ended early."""
    whole = np.full(shape, np.nan)
    whole[done, : rows.shape[1]] = rows
    return whole


def _outliers(found: DensityEstimate, atoms: np.ndarray) -> Values:
    """Name the eigenvalues beyond the bulk, those taken out among them, and where the bulk ends."""
    above, below = found.outliers.above, found.outliers.below
    # The i-th outlier is the i-th outermost node of each chain.
    chains = [row[np.isfinite(row)] for row in found.ritz_values]
    inside = np.concatenate([nodes[len(below) : len(nodes) - len(above)] for nodes in chains])
    beyond = atoms[(atoms > inside.max()) | (atoms < inside.min())]
    values = np.sort(np.concatenate([beyond, above, below]))[::-1]
    return {
        "outliers": Variable(("outlier",), values, "1", "eigenvalues beyond the bulk, descending"),
        "outlier_count": Variable((), np.asarray(len(values)), "1", "number of eigenvalues beyond the bulk"),
        "bulk_low": Variable((), np.asarray(inside.min()), "1", "lower end of the bulk"),
        "bulk_high": Variable((), np.asarray(inside.max()), "1", "upper end of the bulk"),
    }
