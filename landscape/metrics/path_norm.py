"""The ℓ_p path norm of a rectifier network, from one forward pass; `landscape.paths` says what is summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from landscape import paths
from landscape.checks import Need
from landscape.metrics.base import Metric, Round, Values, setting
from landscape.problem import Problem
from landscape.results import Record, Variable


@dataclass(frozen=True)
class PathNorm(Metric):
    """The ℓ_p norm of the vector of all paths' weights, (Σ_paths Π|w|^p)^(1/p), exactly.

    A path leads from an input or from a bias to an output; its weight is the product of the weights along it.
    It needs no data but the shape of an input. All parameters count, also those that are not measured;
    BatchNorm in evaluation mode is folded, each input of a pooling window is a path of its own. Networks
    of other operations than linear ones and rectifiers are refused.

    Source: Neyshabur et al. 2015 (arXiv 1503.00036); biases, pooling and BatchNorm as in Gonon et al. 2024
    (arXiv 2310.01225).
    """

    name: ClassVar[str] = "path_norm"
    headline: ClassVar[str] = "path_norm"
    unit: ClassVar[str] = "pass"
    citation: ClassVar[str] = "Neyshabur et al. 2015, arXiv:1503.00036"

    p: float = setting(2.0, "exponent of the norm over paths, at least 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.p < float("inf"):
            raise ValueError(f"p is {self.p}; allowed is a finite number >= 1, say 1 or 2")

    def needs(self) -> frozenset[Need]:
        """Outputs, of one example."""
        return frozenset({Need.OUTPUTS})

    def prepare(self, problem: Problem, seed: int) -> Record:  # noqa: ARG002
        """Refuse what hides its outputs."""
        problem.require_outputs("the path norm")
        return Record()

    def units(self, record: Record) -> Round | None:
        """One pass, once."""
        return Round(1) if record.attrs["stop"] == 0 else None

    def measure(
        self,
        problem: Problem,
        shared: Record,  # noqa: ARG002
        block: range,  # noqa: ARG002
        generators: Sequence[torch.Generator],  # noqa: ARG002
    ) -> Values:
        """Sum over all paths."""
        total = np.array([paths.path_sum(problem, self.p)])
        return {"path_sum": Variable(("pass",), total, "1", "Σ over paths of Π|w|^p")}

    def summarize(self, record: Record) -> Values:
        """Take the root."""
        norm = record["path_sum"][0] ** (1 / self.p)
        return {
            "path_norm": Variable((), np.asarray(norm), "1", "norm of the vector of paths"),
            "converged": Variable((), np.asarray(bool(record["done"].all())), "1", "whether it is measured"),
        }

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """The network's alone."""
        return {self.headline: 0.0}

    @property
    def outlook_in(self) -> tuple[str, float]:
        """What `outlook` counts."""
        return "passes", 0.35

    def outlook(self, problem: Problem) -> tuple[int, int]:  # noqa: ARG002
        """One pass."""
        return 1, 1
