"""Which classes make the sharp directions of a classifier: Papyan's decomposition of the Hessian.

Hess = G + H, G = G0 + G1 + G2 + G3: the derivatives of the logits, averaged over the examples of a class (G0, G1,
G2: C, C and C (C - 2) directions), and the scatter of the examples about them (G3).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from landscape.checks import Need
from landscape.class_structure import labels, spectra, summary
from landscape.class_structure.gram_tasks import Grams
from landscape.class_structure.spectrum_tasks import Chains, Top
from landscape.class_structure.vectors import Source, mean_probabilities
from landscape.class_structure.work import Limits, Task, Work
from landscape.errors import Refused
from landscape.estimators import lanczos
from landscape.memory import in_words
from landscape.metrics.base import Round, SequentialMetric, State, Values, setting
from landscape.operators import Operator
from landscape.problem import Problem
from landscape.results import Record, Variable

_SPECTRA = ("hessian", "G", "hessian-G", "hessian-G1", "hessian/G1", "G-G012")
_MOST_VECTORS = 2500  # mean vectors whose inner products are all stored: 50 MB
_SKETCH = (
    2048  # numbers that more of them are sketched to; inner products err by √(2/2048) = 3 % of the lengths
)
_MORE = 10  # eigenvalues beyond one for each class


@dataclass(frozen=True)
class ClassStructure(SequentialMetric):
    """Papyan's decomposition of a classifier's Hessian by classes, and which of them make its sharp directions.

    Hess = G + H and G = G0 + G1 + G2 + G3, by class (G0, G1), cross-class (G2) and within class (G3), from mean
    derivatives of the logits; in the weighting of 2019, all c' alike, or of 2020, by probability (G0 is called c = c'
    there). All means are over the examples of a class, then over classes; where that is not the mean over all
    examples, `eigenvalues_ggn` stands beside `eigenvalues_G`. Each eigenvector of the Hessian is split into these
    parts, and into pairs: "8 as 1" is the share of the examples of 8 and their logit of 1.

    Source: Papyan 2019 (arXiv 1901.08244); Papyan 2020 (JMLR 21, 252).
    """

    name: ClassVar[str] = "class_structure"
    headline: ClassVar[str] = "eigenvalues_hessian"
    unit: ClassVar[str] = "task"
    citation: ClassVar[str] = "Papyan 2019, arXiv:1901.08244"
    told: ClassVar[tuple[str, ...]] = ("spectrum_outliers", "trace_G3")
    listed: ClassVar[tuple[str, ...]] = (
        "eigenvalues_hessian", "eigenvalues_G", "share_G", "share_G1", "made_by",
    )  # fmt: skip

    weighting: Literal["2019", "2020"] = setting(
        "2019", "of the outputs c' of a class: alike, or by probability"
    )
    per_class: int | None = setting(None, "the first so many examples of each class; none: all")
    classes: tuple[int, ...] | None = setting(None, "labels of the classes to measure; none: all")
    class_names: tuple[str, ...] | None = setting(
        None, "names of the outputs; none: those of the data set, or numbers"
    )
    k: int | None = setting(None, "eigenvalues of G and of the Hessian; none: 10 more than classes")
    rtol: float = setting(1e-3, "residual that is asked of them, relative to the eigenvalue")
    spectra: tuple[str, ...] = setting(
        _SPECTRA,
        "densities: hessian, G, hessian-G, and with B = G0, G1, G2, G012 A-B (subtracted), A/B (projected)",
    )
    probes: int = setting(2, "random start vectors of each density")
    steps: int = setting(64, "products of a chain of a density")
    sketch: int | None = setting(
        None, "numbers that a mean vector is sketched to, 0: none; none: 2048 beyond 2500 mean vectors"
    )
    attribution: bool = setting(True, "attribute the scatter within classes to examples")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("per_class", 1), ("k", 1), ("probes", 1), ("steps", 1), ("sketch", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}; allowed is a number >= {least}")
        if not 0 <= self.rtol < 1:
            raise ValueError(f"rtol is {self.rtol}; allowed is 0 <= rtol < 1")
        for name in self.spectra:
            spectra.require(name)

    def needs(self) -> frozenset[Need]:
        """Labels, and products of both matrices."""
        return frozenset({Need.OUTPUTS, Need.LABELS, Need.HESSIAN, Need.GGN})

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Read the classes, and choose what is held at once."""
        layout = labels.read(problem, self.classes, self.per_class)
        factor = labels.factor(problem)
        names = labels.names(problem, layout, self.class_names)
        data = labels.ByClass(problem, layout)
        probabilities = mean_probabilities(labels.balanced(problem, layout), data)
        S, C = layout.classes, layout.outputs
        sketch = self.sketch if self.sketch is not None else _SKETCH if S * C > _MOST_VECTORS else 0
        own = np.array(layout.labels)
        examples = np.concatenate(layout.members)
        return Record(
            {
                "label": Variable(("label",), own, "1", "label of the class"),
                "class_name": Variable(
                    ("label",), np.array([names[c] for c in own]), "", "name of the class"
                ),
                "class_count": Variable(("label",), layout.counts, "1", "examples of the class"),
                "output_name": Variable(("output",), np.array(names), "", "name of the output"),
                "mean_probability": Variable(("label", "output"), probabilities, "1", "mean over the class"),
                "example": Variable(("example",), examples, "1", "index in the data, class after class"),
                "example_label": Variable(("example",), np.repeat(own, layout.counts), "1", "its class"),
            },
            {
                "weighting": self.weighting,
                "loss_factor": factor,
                "sketch": sketch,
                "balanced": layout.every,
                "perplexity": float(S),
                "counted": "tasks",
                "order": problem.size,
                "product_dtype": str(problem.dtype).removeprefix("torch."),
                "solver_seed": seed,
            },
        )

    def block_size(self, problem: Problem, memory: int) -> int:
        """As many classes as have room for all their mean vectors."""
        layout = labels.read(problem, self.classes, self.per_class)
        return min(layout.classes, max(1, _capacity(problem, memory) // (2 * layout.outputs)))

    def units(self, record: Record) -> Round | None:
        """One task for each class, one for the top of the spectrum, and one for each density, all in one round."""
        if record.attrs["stop"]:
            return None
        chosen, probes = self._fitting(record)
        words = "the matrix: - subtracted, / projected out"
        inputs = {"spectrum": Variable(("spectrum",), np.array(chosen), "", words)} if chosen else {}
        inputs["probes_used"] = Variable((), np.asarray(probes), "1", "chains of each density")
        return Round(len(record["label"]) + 1 + len(chosen), inputs)

    def _fitting(self, record: Record) -> tuple[list[str], int]:
        """The densities whose vectors fit into the memory, and how many chains do."""
        n, room = record.attrs["order"], record.attrs["memory"] // 4
        weights = summary.weights_of(record)
        chosen = []
        for name in self.spectra:
            part = spectra.part_of(name)
            columns = 0 if part is None else weights.columns(part)
            if columns * n * 8 <= room:
                chosen.append(name)
            elif self.spectra != _SPECTRA:
                raise Refused(
                    f"{name} of spectra needs {columns} vectors, {in_words(columns * n * 8)}; allowed is a "
                    f"quarter of the memory, {in_words(room)}. Leave it out, or allow more (memory=, --memory)"
                )
        if not chosen:
            return [], 0
        dtype = getattr(torch, record.attrs["product_dtype"])
        try:
            return chosen, min(self.probes, lanczos.chains_that_fit(n, self.steps, dtype, room))
        except ValueError as error:
            raise Refused(str(error)) from error

    def multiplied(self, problem: Problem, shared: Record) -> Problem:
        """The class-balanced problem."""
        return self._source(problem, shared).problem

    def start(
        self,
        problem: Problem,
        shared: Record,
        block: range,
        generators: Sequence[torch.Generator],  # noqa: ARG002  (the same vectors for every density)
    ) -> Work:
        """Return the tasks of a block, none of them begun."""
        return Work.begun(self._tasks(problem, shared, block))

    def step(self, problem: Problem, shared: Record, block: range, state: Work) -> Work:
        """Go on with the task that is on."""
        self._made(problem, shared, block, state).step()
        return state

    def result(self, problem: Problem, shared: Record, block: range, state: Work) -> Values | None:
        """Return what the tasks found, NaN where a task does not find that."""
        work = self._made(problem, shared, block, state)
        if (units := work.done()) is None:
            return None
        problem.cost.gradients += round(sum(task.passes for task in work.tasks or []))
        found = {}
        for key in {key: None for unit in units for key in unit}:
            like = next(unit[key] for unit in units if key in unit)
            rows = np.stack([unit.get(key, np.full(like.shape, np.nan)) for unit in units])
            dims = ("task", *(f"{key}_{axis}" for axis in range(like.ndim)))
            found[summary.TASK + key] = Variable(dims, rows, "1", "what each task found")
        return found

    def stored(self, state: Work) -> State:
        """Turn tasks into arrays."""
        return state.stored()

    def restored(self, problem: Problem, arrays: State) -> Work:  # noqa: ARG002
        """Bring them back."""
        return Work.restored(arrays)

    def summarize(self, record: Record) -> Values:
        """Compute spectra of the parts, shares, cosines, densities, and a t-SNE, as far as tasks are done."""
        found = summary.of_outliers(record) | summary.of_means(record) | summary.of_spectra(record)
        left = [name for name in self.spectra if "spectrum" not in record or name not in record["spectrum"]]
        if left:
            record.attrs["warning"] = f"left out, their vectors do not fit into the memory: {', '.join(left)}"
        fine = bool(record["done"].all()) and summary.converged(record)
        found["converged"] = Variable((), np.asarray(fine), "1", "whether all eigenpairs reached rtol")
        return found

    def outlook(self, problem: Problem) -> tuple[int, int]:
        """Predict the products: those of the chains, of two eigensolves, and the passes for the mean vectors."""
        C = labels.read(problem, self.classes, self.per_class).outputs
        k = min(problem.size, self._eigenvalues(C))
        fixed = len(self.spectra) * self.probes * self.steps + C * (3 if self.attribution else 1)
        return fixed + 2 * k, fixed + 2 * (100 * k + 1000)

    def _eigenvalues(self, classes: int) -> int:
        return self.k if self.k is not None else classes + _MORE

    def _made(self, problem: Problem, shared: Record, block: range, state: Work) -> Work:
        if state.tasks is None:
            state.with_tasks(self._tasks(problem, shared, block))
        return state

    def _tasks(self, problem: Problem, shared: Record, block: range) -> list[Task]:
        source, memory = self._source(problem, shared), shared.attrs["memory"]
        S, C = source.layout.classes, source.layout.outputs
        limits = Limits(
            capacity=_capacity(problem, memory), sketch=shared.attrs["sketch"], memory=memory // 2,
            eigenvalues=self._eigenvalues(C), rtol=self.rtol, probes=int(shared["probes_used"]), steps=self.steps,
            seed=shared.attrs["solver_seed"], attribution=self.attribution,
        )  # fmt: skip
        made: list[Task] = []
        if block.start < S:
            made.append(Grams(source, limits, range(block.start, min(S, block.stop))))
        if S in block:
            made.append(Top(source, limits, None if shared.attrs["balanced"] else problem))
        names = [str(shared["spectrum"][i - S - 1]) for i in block if i > S]
        for name in names:
            part = spectra.part_of(name)
            passes = source.weights.columns(part) / S if part else 0.0
            made.append(Chains(functools.partial(_matrix, name, source), limits, passes))
        return made

    def _source(self, problem: Problem, shared: Record) -> Source:
        """The source of mean vectors, the same for the time of a session."""
        plans, key = problem.evaluator.plans, ("class_structure", self, id(problem))
        if key not in plans:
            layout = labels.read(problem, self.classes, self.per_class)
            data = labels.ByClass(problem, layout)
            twin = labels.balanced(problem, layout)
            # with the problem itself, so that no other takes its identity
            known = shared["mean_probability"], shared.attrs["loss_factor"]
            plans[key] = Source(twin, data, self.weighting, *known), problem
        found: Source = plans[key][0]
        return found


def _matrix(name: str, source: Source) -> Operator:
    part = spectra.part_of(name)
    return spectra.operator(name, source, None if part is None else source.part(part))


def _capacity(problem: Problem, memory: int) -> int:
    """Mean vectors that a quarter of the memory holds, in float64."""
    return max(2, memory // 4 // (8 * problem.size))
