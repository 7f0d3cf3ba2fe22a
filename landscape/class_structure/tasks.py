"""The work of a class structure, cut so that it can stop between any two steps: `start`, `step`, `result`.

Three kinds: inner products of the mean vectors of some classes with all later ones, the top of the spectrum, and
Lanczos chains for the density of one matrix. A state is a dict of arrays, or is turned into one by `stored`.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape import operators, seeds
from landscape.class_structure import outliers
from landscape.class_structure.vectors import Source
from landscape.estimators import lanczos
from landscape.estimators.eigen import Lanczos
from landscape.estimators.krylov import Krylov
from landscape.estimators.probes import draw
from landscape.problem import Problem

Arrays = dict[str, np.ndarray]
NAME = "class_structure"


@dataclass(frozen=True)
class Limits:
    """What the tasks were told before the first of them began.

    Attributes:
        capacity: mean vectors that may be held at once.
        sketch: numbers that a vector is sketched to, 0 for none.
        memory: bytes for the bases of Krylov spaces, and for explicit per-example gradients.
        eigenvalues: k, how many are wanted at the top.
        rtol: their relative residual.
        probes: chains of each density.
        steps: of each chain.
        seed: of all random streams.
        attribution: whether G3 is attributed to examples.
    """

    capacity: int
    sketch: int
    memory: int
    eigenvalues: int
    rtol: float
    probes: int
    steps: int
    seed: int
    attribution: bool


class Task(abc.ABC):
    """Some units of work that are measured together.

    Attributes:
        units: how many.
    """

    units: int = 1

    @abc.abstractmethod
    def start(self) -> Any:
        """Return the state before the first step."""

    @abc.abstractmethod
    def step(self, state: Any) -> Any:
        """Return the state one step further; it may be changed in place."""

    @abc.abstractmethod
    def result(self, state: Any) -> list[Arrays] | None:
        """Return the values of each unit, None while it has to go on."""

    def stored(self, state: Any) -> Arrays:
        """Turn a state into arrays."""
        return dict(state)

    def restored(self, arrays: Arrays) -> Any:
        """Bring a state back."""
        return {key: np.array(value) for key, value in arrays.items()}


class Grams(Task):
    """Inner products of the mean vectors of some classes with those of all later ones.

    As many vectors as fit are held; against them pass all later ones, class by class, made anew for each lot
    that is held. With a sketch, each vector is made once and hashed.

    Args:
        source: of the vectors.
        limits: on memory.
        classes: indices of the classes.
    """

    def __init__(self, source: Source, limits: Limits, classes: range):
        self.source, self.limits, self.classes, self.units = source, limits, classes, len(classes)
        S, C = source.layout.classes, source.layout.outputs
        size = max(1, limits.capacity if limits.sketch else limits.capacity // 2)
        first, last = classes.start * C, classes.stop * C
        lots = [range(lo, min(lo + size, last)) for lo in range(first, last, size)]
        self.size, self.width = size, limits.sketch or S * C
        if limits.sketch:
            self.pairs = [(range(c * C, (c + 1) * C), c) for c in classes]
        else:
            self.pairs = [(lot, d) for lot in lots for d in range(lot.start // C, S)]
        self._held: tuple[range, Tensor] | None = None

    def start(self) -> Arrays:
        """Nothing is known."""
        most, C = int(self.source.layout.counts.max()), self.source.layout.outputs
        found = {"rows": np.full((self.units, C, self.width), np.nan), "position": np.array(0)}
        if self.limits.attribution:
            found["within"] = np.full((self.units, most), np.nan)
        return found

    def step(self, state: Arrays) -> Arrays:
        """One lot against one class."""
        lot, d = self.pairs[int(state["position"])]
        C = self.source.layout.outputs
        whole = state["rows"].reshape(-1, self.width)
        begin = self.classes.start * C
        for lo in range(0, C, self.size):
            columns = range(lo, min(lo + self.size, C))
            X = self._vectors(range(d * C + columns.start, d * C + columns.stop), lot)
            if self.limits.sketch:
                at = d * C - begin + columns.start
                whole[at : at + len(columns)] = self._sketched(X).cpu().numpy()
            else:
                products = self._lot(lot) @ X.T
                whole[lot.start - begin : lot.stop - begin, d * C + lo : d * C + columns.stop] = products.cpu().numpy()
            if self.limits.attribution and d * C in lot:
                self._attribute(state["within"][d - self.classes.start], d, columns, X)
        state["position"] = state["position"] + 1
        return state

    def result(self, state: Arrays) -> list[Arrays] | None:
        """One row of blocks for each class."""
        if int(state["position"]) < len(self.pairs):
            return None
        self._held = None
        names = ["rows", "within"] if self.limits.attribution else ["rows"]
        return [{name: state[name][i] for name in names} for i in range(self.units)]

    def _lot(self, lot: range) -> Tensor:
        if self._held is None or self._held[0] != lot:
            self._held = None  # let go before the next is made
            self._held = lot, self._made(lot)
        return self._held[1]

    def _vectors(self, wanted: range, lot: range) -> Tensor:
        if not self.limits.sketch and lot.start <= wanted.start and wanted.stop <= lot.stop:
            return self._lot(lot)[wanted.start - lot.start : wanted.stop - lot.start]
        return self._made(wanted)

    def _made(self, wanted: range) -> Tensor:
        """Vectors by their place c C + c'."""
        C, rows = self.source.layout.outputs, []
        for c in range(wanted.start // C, -(-wanted.stop // C)):
            lo, hi = max(wanted.start - c * C, 0), min(wanted.stop - c * C, C)
            rows.append(self.source.pulled(c, torch.eye(C, dtype=torch.float64)[lo:hi]))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _sketched(self, X: Tensor) -> Tensor:
        """Entries with random signs, added up in random buckets (Charikar et al. 2002): ⟨Sx, Sy⟩ ≈ ⟨x, y⟩."""
        n, d = X.shape[1], self.limits.sketch
        if n <= d:
            return torch.nn.functional.pad(X, (0, d - n))
        stream = seeds.generator(self.limits.seed, f"{NAME}/sketch", 0)
        buckets = torch.randint(d, (n,), generator=stream).to(X.device)
        signs = (2 * torch.randint(2, (n,), generator=stream) - 1).to(X)
        return torch.zeros(len(X), d).to(X).index_add_(1, buckets, X * signs)

    def _attribute(self, within: np.ndarray, c: int, columns: range, X: Tensor) -> None:
        """Add to each example's share of tr G3, Σ_c' ω_ic' ‖u_ic' - v_cc'‖², what some columns give."""
        source = self.source
        count = int(source.layout.counts[c])
        if columns.start == 0:
            within[:count] = count * source.squares(c, self.limits.memory).cpu().numpy()
        lengths, picked, at = X.square().sum(1), list(columns), 0
        for p, _, s in source.pushed(c, X):
            p = p[:, picked].T
            inner = s[torch.arange(len(picked)), :, picked]
            if source.weighting == "2019":
                more = lengths[:, None] - 2 * p.sqrt() * inner
            else:
                more = p * (lengths[:, None] - 2 * inner)
            stop = at + p.shape[1]
            within[at:stop] += more.sum(0).cpu().numpy()
            at = stop
        if columns.stop == source.layout.outputs:
            within[:count] /= count * source.layout.classes


class Top(Task):
    """The largest eigenvalues of G and of the Hessian, what their eigenvectors are made of, and how spans overlap.

    Args:
        source: of the mean vectors.
        limits: on memory, and what is wanted.
        plain: a problem whose G averages over examples, where that is another matrix.
    """

    def __init__(self, source: Source, limits: Limits, plain: Problem | None):
        self.source, self.limits = source, limits
        made: dict[str, Callable[[], operators.Operator]] = {
            "G": lambda: operators.ggn(source.problem),
            "hessian": lambda: operators.hessian(source.problem),
        }
        if plain is not None:
            made["ggn"] = lambda: operators.ggn(plain)
        self.matrices = list(made.items())

    def start(self) -> dict[str, Any]:
        """No product was made."""
        return {"stage": 0, "krylov": self._begun(0), "found": {}}

    def step(self, state: dict[str, Any]) -> dict[str, Any]:
        """One product; at the end of each matrix its pairs are taken down."""
        if state["stage"] == len(self.matrices):
            state["found"].update(self._structure(state["found"]))
            state["stage"] += 1
            return state
        name, made = self.matrices[state["stage"]]
        A = made()
        solver = self._solver(A)
        state["krylov"] = solver.step(A, state["krylov"])
        if (pairs := solver.result(state["krylov"])) is not None:
            found = {
                f"values_{name}": pairs.values.cpu().numpy(),
                f"residuals_{name}": pairs.residual_norms.cpu().numpy(),
                f"converged_{name}": pairs.converged.double().cpu().numpy(),
            }
            if name != "ggn":
                found[f"vectors_{name}"] = pairs.vectors.T.contiguous().cpu().numpy()
            state["found"].update(found)
            state["stage"] += 1
            state["krylov"] = self._begun(state["stage"])
        return state

    def result(self, state: dict[str, Any]) -> list[Arrays] | None:
        """All but the eigenvectors."""
        if state["stage"] <= len(self.matrices):
            return None
        return [{key: x for key, x in state["found"].items() if not key.startswith("vectors_")}]

    def stored(self, state: dict[str, Any]) -> Arrays:
        """Turn the Krylov space, and what was found, into arrays."""
        inner = {} if state["krylov"] is None else state["krylov"].arrays()
        return {
            "stage": np.array(state["stage"]),
            **{f"krylov.{key}": value for key, value in inner.items()},
            **{f"found.{key}": value for key, value in state["found"].items()},
        }

    def restored(self, arrays: Arrays) -> dict[str, Any]:
        """Bring them back."""
        inner, found = _under(arrays, "krylov."), _under(arrays, "found.")
        device = self.source.problem.device
        return {
            "stage": int(arrays["stage"]),
            "krylov": Krylov.from_arrays(inner, device) if inner else None,
            "found": {key: np.array(value, order="C") for key, value in found.items()},
        }

    def _solver(self, A: operators.Operator) -> Lanczos:
        wanted = min(self.limits.eigenvalues, A.shape[0])
        return Lanczos.for_operator(
            A, wanted, "largest", self.limits.rtol, self.limits.seed, memory=self.limits.memory
        )

    def _begun(self, stage: int) -> Krylov | None:
        if stage >= len(self.matrices):
            return None
        A = self.matrices[stage][1]()
        return self._solver(A).init(A.device)

    def _structure(self, found: Arrays) -> Arrays:
        source, problem = self.source, self.source.problem
        U = {name: torch.from_numpy(found[f"vectors_{name}"]).to(problem.device) for name in ("G", "hessian")}
        zeroth, first = source.part("G0"), source.part("G1")
        S = source.layout.classes
        spans = {"G": U["G"], "hessian": U["hessian"], "G1": outliers.leading(first, problem.dtype)}
        made = outliers.composition(source, found["values_hessian"], U["hessian"])
        for a, b in itertools.combinations(spans, 2):
            most = min(S, len(spans[a]), len(spans[b]))
            both = outliers.overlaps(spans[a][:most], spans[b][:most])
            made[f"overlap_{a}_{b}"] = np.pad(both, (0, S - most), constant_values=np.nan)
        F = torch.cat([zeroth, first])
        made["class_gram"] = (F @ F.T).cpu().numpy()
        return made


class Chains(Task):
    """Lanczos chains of one matrix, in lockstep.

    Args:
        made: makes the matrix.
        limits: how many, how long, and from which random vectors; the same for every matrix.
    """

    def __init__(self, made: Callable[[], operators.Operator], limits: Limits):
        self._make, self.limits, self._matrix = made, limits, None

    @property
    def matrix(self) -> operators.Operator:
        """The matrix, made when it is first needed."""
        if self._matrix is None:
            self._matrix: operators.Operator | None = self._make()
        return self._matrix

    def start(self) -> dict[str, Tensor]:
        """Random directions."""
        A, limits = self.matrix, self.limits
        streams = [seeds.generator(limits.seed, f"{NAME}/chains", i) for i in range(limits.probes)]
        V = [draw(g, A.shape[0], 1, "gaussian", dtype=A.dtype, device=A.device) for g in streams]
        return lanczos.start(torch.cat(V, dim=1), min(limits.steps, A.shape[0]))

    def step(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One product with all chains."""
        return lanczos.step(self.matrix, state)

    def result(self, state: Mapping[str, Tensor]) -> list[Arrays] | None:
        """The tridiagonal matrices."""
        if (found := lanczos.result(state)) is None:
            return None
        self._matrix = None
        return [{"alpha": found.alpha, "beta": found.beta}]

    def stored(self, state: Mapping[str, Tensor]) -> Arrays:
        """Turn the chains into arrays."""
        return dict(lanczos.arrays(state))

    def restored(self, arrays: Arrays) -> dict[str, Tensor]:
        """Bring them back."""
        held = {name: torch.from_numpy(np.array(value, order="C")) for name, value in arrays.items()}
        held["basis"] = held["basis"].to(self.matrix.device)
        return held


@dataclass
class Work:
    """Tasks one after the other, and how far they are.

    Attributes:
        position: of the task that is on.
        finished: values of the units of those before it.
        inner: its state; arrays as they were stored where `tasks` is None.
        tasks: None after `restored`, until they are made again.
    """

    position: int
    finished: list[Arrays]
    inner: Any
    tasks: list[Task] | None

    @classmethod
    def begun(cls, tasks: list[Task]) -> Work:
        """Nothing is done."""
        return cls(0, [], tasks[0].start(), tasks)

    def step(self) -> None:
        """One step of the task that is on, or the first state of the next one."""
        assert self.tasks is not None
        task = self.tasks[self.position]
        self.inner = task.step(self.inner)
        if (found := task.result(self.inner)) is not None:
            self.finished += found
            self.position += 1
            self.inner = self.tasks[self.position].start() if self.position < len(self.tasks) else None

    def done(self) -> list[Arrays] | None:
        """The values of all units, None while there is work."""
        return self.finished if self.tasks is not None and self.position == len(self.tasks) else None

    def stored(self) -> Arrays:
        """Turn all of it into arrays."""
        assert self.tasks is not None
        on = self.position < len(self.tasks)
        inner = self.tasks[self.position].stored(self.inner) if on else {}
        units = {f"unit.{i}.{key}": x for i, one in enumerate(self.finished) for key, x in one.items()}
        counts = np.array([self.position, len(self.finished)])
        return {"counts": counts, **units, **{f"inner.{key}": x for key, x in inner.items()}}

    @classmethod
    def restored(cls, arrays: Arrays) -> Work:
        """Bring it back, but for the tasks."""
        position, units = map(int, arrays["counts"])
        finished = [_under(arrays, f"unit.{i}.") for i in range(units)]
        return cls(position, finished, _under(arrays, "inner."), None)

    def with_tasks(self, tasks: list[Task]) -> None:
        """Go on with these tasks, the same as before."""
        self.tasks = tasks
        if self.position < len(tasks):
            self.inner = tasks[self.position].restored(self.inner)


def _under(arrays: Arrays, prefix: str) -> Arrays:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
