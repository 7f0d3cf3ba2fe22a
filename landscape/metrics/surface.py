"""The loss on a line or a plane through the parameters: L(θ + x d₁ + y d₂)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from landscape import checkpoint_files, grids, norms, operators, planes, refinement
from landscape import directions as made
from landscape.checks import Need
from landscape.directions import Directions, Trajectory
from landscape.displaced import judges
from landscape.errors import Refused
from landscape.estimators.eigen import eigsh
from landscape.metrics.base import Metric, Round, Values, setting
from landscape.problem import Problem
from landscape.results import Record, Variable
from landscape.ways import Ways, choose

_LINES = {"gradient", "difference"}  # that give one direction
_WORK = 1 << 33  # parameters times examples times points that a block holds
_COMPARED = 25  # points at which another precision is compared with the model's own


@dataclass(frozen=True)
class Surface(Metric):
    """The loss, and accuracy where there are labels, on a line or plane through the parameters.

    L(θ + x d₁ + y d₂): a stored coordinate is the displacement, in units of its direction, whose norm is
    stored. Random directions show the mean curvature of the plane that they happen to span; those of the
    Hessian show the saddle (Böttcher & Wheeler 2022).

    Source: Li et al. 2018 (arXiv 1712.09913); Goodfellow et al. 2015 (arXiv 1412.6544) for lines.
    """

    name: ClassVar[str] = "surface"
    headline: ClassVar[str] = "loss"
    unit: ClassVar[str] = "point"
    block: ClassVar[int] = 256
    citation: ClassVar[str] = "Li et al. 2018, arXiv:1712.09913"
    told: ClassVar[tuple[str, ...]] = ("loss_origin", "loss_lowest")
    seed_chooses: ClassVar[bool] = True

    directions: Literal["filter", "random", "layer", "hessian", "gradient", "difference", "pca", "file"] = (
        setting("filter", "which line or plane")
    )
    points: int | tuple[int, ...] = setting(51, "along each axis, x first; `61,` is a line")
    span: tuple[tuple[float, float], ...] | None = setting(
        None,
        "range of each axis, x first; none: -1 to 1, between two points -1 to 2, with pca the whole path",
    )
    exact: bool = setting(False, "keep your batches and layers, so that losses are the same bit for bit")
    accuracy: bool = setting(True, "the share of right answers too, where there are labels")
    quantity: str | None = setting(
        None, "module:name of another f(output, target), a batch's mean over examples"
    )
    orthogonal: bool = setting(False, "take the first direction out of the second, which keeps its norm")
    file: str | None = setting(
        None, "directions that were saved; with hessian, an eigenvalues.h5 with vectors"
    )
    trajectory: tuple[str, ...] = setting(
        (), "checkpoints of a training run, or of the other point, in order"
    )
    curved: bool = setting(False, "between two points along cos θ + sin θ' in place of the straight line")
    statistics: Literal["fixed", "recomputed"] = setting(
        "fixed", "of BatchNorms: those of the model, or computed anew at each point"
    )
    precision: Literal["model", "bfloat16"] = setting(
        "model", "of the layers; the error of bfloat16 is measured"
    )
    curvature_points: int = setting(0, "along each axis, where the extreme Hessian eigenvalues are computed")
    refine: int = setting(0, "points to add where the surface bends", grows=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = self.shape
        if len(shape) not in {1, 2} or min(shape) < 2:
            raise ValueError(
                f"points is {self.points}; allowed is a number >= 2, or one for each of 1 or 2 axes"
            )
        if self.directions in _LINES and len(shape) > 1:
            raise ValueError(f"{self.directions} gives one direction; ask for a line, points=({shape[0]},)")
        if self.span is not None:
            if len(self.span) != len(shape):
                raise ValueError(
                    f"span has {len(self.span)} ranges; allowed is one for each of {len(shape)} axes"
                )
            for low, high in self.span:
                if not (math.isfinite(low) and math.isfinite(high) and low < high):
                    raise ValueError(
                        f"span has {low}:{high}; allowed is low:high with low < high, both finite"
                    )
        for name in ("refine", "curvature_points"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is a number >= 0")
        self._check_files()

    def _check_files(self) -> None:
        if self.directions == "file" and self.file is None:
            raise ValueError("directions is 'file' but file is none; name one that Directions.save wrote")
        if self.file is not None and self.directions not in {"file", "hessian"}:
            raise ValueError(f"file goes with directions 'file' or 'hessian', not {self.directions!r}")
        if self.directions in {"pca", "difference"} and not self.trajectory:
            raise ValueError(f"directions is {self.directions!r} but trajectory is empty; name checkpoints")
        if self.curved and self.directions != "difference":
            raise ValueError(f"curved goes with directions 'difference', not {self.directions!r}")
        if self.statistics == "recomputed" and (self.precision != "model" or self.curvature_points):
            raise ValueError(
                "statistics 'recomputed' goes with precision 'model' and without curvature_points"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Points along each axis, x first."""
        if isinstance(self.points, int):
            return (self.points,) * (1 if self.directions in _LINES else 2)
        return tuple(self.points)

    @property
    def _axes(self) -> tuple[str, ...]:
        return grids.AXES[: len(self.shape)]

    def needs(self) -> frozenset[Need]:
        """Values; outputs for another quantity, derivatives for directions and curvature."""
        found = {Need.VALUE}
        if self.quantity is not None:
            found.add(Need.OUTPUTS)
        if self.curvature_points or (self.directions == "hessian" and self.file is None):
            found.add(Need.HESSIAN)
        if self.directions == "gradient":
            found.add(Need.GRADIENT)
        return frozenset(found)

    # --- before the first point -----------------------------------------------------------------------

    def prepare(self, problem: Problem, seed: int) -> Record:
        """Make the directions, choose how passes are made, and measure at θ itself."""
        files, count = checkpoint_files.expand(self.trajectory), len(self.shape)
        plane, path = planes.make(problem, self.directions, count, seed=seed, file=self.file, files=files)
        if self.orthogonal and count > 1:
            plane = plane.orthogonalized()
        if files and self.directions != "pca" and not self.curved:
            path = made.trajectory(problem, plane, files)
        record = Record(attrs=self._described(problem, plane, seed))
        for name, row in zip(self._axes, plane.vectors, strict=False):
            words = f"direction of {name}, in the order of the flat parameter vector"
            record.variables[f"direction_{name}"] = Variable(
                ("parameter",), row.cpu().numpy(), "1", words, sidecar=True
            )
        for name, points, (low, high) in zip(self._axes, self.shape, self._span(path), strict=False):
            words = f"displacement along direction_{name}, in units of it"
            record.variables[name] = Variable((name,), _evenly(low, high, points), "1", words)
        record.attrs["origin_on_grid"] = all(0.0 in record[name] for name in self._axes)
        record.variables.update(planes.path_variables(path, self._axes))
        ways = Ways(**record.attrs["ways"])
        with problem.displaced(ways=ways) as at:
            origin = at()
        words = "loss at θ, in the way of all points"
        record.variables["loss_origin"] = Variable((), np.asarray(origin), "1", words)
        record.attrs["origin_difference"] = origin - float(problem.value())
        return record

    def _described(self, problem: Problem, plane: Directions, seed: int) -> dict[str, Any]:
        count = len(self.shape)
        ways = choose(problem, exact=self.exact, bfloat16=self.precision == "bfloat16")
        cosine = float(plane.cosines[0, 1]) if count > 1 else None
        return {
            "ways": ways.as_dict(),
            "accuracy_measured": self.accuracy and judges(problem),
            "direction_labels": list(plane.labels[:count]),
            "direction_origin": plane.origin,
            "direction_norms": plane.norms[:count],
            "direction_cosine": cosine,
            "direction_ranges": {name: list(span) for name, span in plane.ranges.items()},
            "solver_seed": seed,
            "formula": _CURVED if self.curved else _STRAIGHT[count],
        }

    def _span(self, path: Trajectory | None) -> Sequence[tuple[float, float]]:
        if self.span is not None:
            return self.span
        if self.directions == "difference":
            return [(0.0, 1.0)] if self.curved else [(-1.0, 2.0)]
        if self.directions == "pca" and path is not None:
            return planes.extent(path)
        return [(-1.0, 1.0)] * len(self.shape)

    # --- points -----------------------------------------------------------------------------------------

    def block_size(self, problem: Problem, memory: int) -> int:  # noqa: ARG002
        """Points that are stored together: fewer where each costs much."""
        return max(1, min(self.block, _WORK // (problem.size * (problem.examples() or 1))))

    def units(self, record: Record) -> Round | None:
        """The grid, then the points of the curvature map, then rounds of refinement."""
        axes, stop = [record[name] for name in self._axes], record.attrs["stop"]
        if stop == 0:
            kind, added = grids.GRID, grids.mesh(axes)
        elif self.curvature_points and not np.any(record["point_kind"] == grids.MAP):
            coarse = [np.linspace(axis[0], axis[-1], self.curvature_points) for axis in axes]
            kind, added = grids.MAP, grids.mesh(coarse)
        else:
            known = record["point_loss"][record["point_kind"] == grids.REFINED]
            on_grid = grids.on_grid(record, "point_loss", self.shape).T  # along x first, as the axes are
            kind, added = grids.REFINED, refinement.following(axes, on_grid, known, self.refine)
        return Round(stop + len(added), grids.lengthened(record, added, kind)) if len(added) else None

    def measure(
        self,
        problem: Problem,
        shared: Record,
        block: range,
        generators: Sequence[torch.Generator],  # noqa: ARG002
    ) -> Values:
        """Measure the quantities at the points of a block."""
        names = self._axes
        at = np.stack([shared[f"point_{name}"][block.start : block.stop] for name in names], axis=1)
        rows = [torch.from_numpy(shared[f"direction_{name}"]).to(problem.device) for name in names]
        points = [self._coefficients(row) for row in at.tolist()]
        rows = self._rows(problem, rows)
        ways, accuracy = Ways(**shared.attrs["ways"]), bool(shared.attrs["accuracy_measured"])
        if self.statistics == "recomputed":
            found = np.array([self._with_statistics(problem, rows, c, ways, accuracy) for c in points])
        else:
            with problem.displaced(*rows, ways=ways, accuracy=accuracy, also=self._also()) as here:
                found = np.array(here.values(points))
        values = {"point_loss": Variable(("point",), found[:, 0], "1", "loss at the point")}
        if accuracy:
            values["point_accuracy"] = Variable(
                ("point",), found[:, 1], "1", "share of right answers at the point"
            )
        if self.quantity is not None:
            values["point_quantity"] = Variable(
                ("point",), found[:, -1], "1", f"{self.quantity} at the point"
            )
        values.update(self._compared(problem, shared, block, rows, points))
        values.update(self._curvature(problem, shared, block, rows, points))
        return values

    def _coefficients(self, at: list[float]) -> list[float]:
        """Of the rows: the coordinates, or on a curve sin for θ' and cos − 1 for θ."""
        return [math.sin(at[0] * math.pi / 2), math.cos(at[0] * math.pi / 2) - 1] if self.curved else at

    def _rows(self, problem: Problem, rows: list[Tensor]) -> list[Tensor]:
        theta = problem.parameters_vector()
        return [theta + rows[0], theta] if self.curved else rows

    def _also(self) -> dict[str, Callable[[Any, Any], Tensor]]:
        return {} if self.quantity is None else {"quantity": _named(self.quantity)}

    def _with_statistics(
        self, problem: Problem, rows: list[Tensor], point: list[float], ways: Ways, accuracy: bool
    ) -> list[float]:
        moved = problem.at(_displaced(problem, rows, point))
        moved = problem.at(moved.parameters_vector(), norms.recomputed(moved))
        with moved.displaced(ways=ways, accuracy=accuracy, also=self._also()) as here:
            return here.values([()])[0]

    def _compared(
        self, problem: Problem, shared: Record, block: range, rows: list[Tensor], points: list[list[float]]
    ) -> Values:
        """The loss in the model's own precision at some points of the grid, where another one was chosen."""
        if self.precision == "model":
            return {}
        every = max(1, math.prod(self.shape) // _COMPARED)
        chosen = [i for i, k in enumerate(block) if k % every == 0 and shared["point_kind"][k] == grids.GRID]
        own = np.full(len(block), np.nan)
        if chosen:
            with problem.displaced(*rows) as here:
                own[chosen] = [here(*points[i]) for i in chosen]
        return {
            "point_own_loss": Variable(("point",), own, "1", "loss in the model's precision, at some points")
        }

    def _curvature(
        self, problem: Problem, shared: Record, block: range, rows: list[Tensor], points: list[list[float]]
    ) -> Values:
        """The largest and the smallest eigenvalue at the points of the curvature map."""
        if not self.curvature_points:
            return {}
        ends = np.full((3, len(block)), np.nan)
        for i, k in enumerate(block):
            if shared["point_kind"][k] == grids.MAP:
                moved = problem.at(_displaced(problem, rows, points[i]))
                found = eigsh(operators.hessian(moved), 1, which="both", seed=shared.attrs["solver_seed"])
                ends[:, i] = [*found.values.tolist(), float(found.residual_norms.max())]
        words = ("largest Hessian eigenvalue", "smallest Hessian eigenvalue", "larger residual of the two")
        names = ("point_lambda_max", "point_lambda_min", "point_lambda_residual_norm")
        return {n: Variable(("point",), row, "1", w) for n, row, w in zip(names, ends, words, strict=True)}

    # --- after the last point ---------------------------------------------------------------------------

    def summarize(self, record: Record) -> Values:
        """Lay the points out on the grid, and list those beside it."""
        names = {"loss": "loss", "accuracy": "share of right answers", "quantity": self.quantity or ""}
        curvature = ("lambda_max", "lambda_min", "lambda_residual_norm")
        values = {
            **grids.laid_out(record, names, self.shape),
            **grids.listed(record, grids.REFINED, "refined", list(names)),
            **grids.listed(record, grids.MAP, "curvature", curvature),
            **grids.lowest(record),
        }
        if "point_own_loss" in record:
            error = np.abs(record["point_loss"] - record["point_own_loss"])
            known = error[np.isfinite(error)]
            words = "largest |loss - loss in the model's precision| where both were measured"
            worst = known.max() if len(known) else np.nan
            values["precision_error"] = Variable((), np.asarray(worst), "1", words)
        return values

    @property
    def loss_powers(self) -> Mapping[str, float]:
        """The loss's own; the gradient as a direction is as long as it is."""
        return {} if self.directions == "gradient" else {self.headline: 1.0}

    @property
    def outlook_in(self) -> tuple[str, float]:
        """What `outlook` counts."""
        return "losses", 0.35

    def outlook(self, problem: Problem) -> tuple[int, int]:  # noqa: ARG002
        """Predict the losses: those of the grid, and with those that refinement may add."""
        grid = math.prod(self.shape)
        return grid, grid + self.refine


_STRAIGHT = {1: "L(θ + x direction_x)", 2: "L(θ + x direction_x + y direction_y)"}
_CURVED = "L(cos(πx/2) θ + sin(πx/2) (θ + direction_x))"


def _evenly(low: float, high: float, count: int) -> np.ndarray:
    """Evenly spaced coordinates; what is zero but for rounding is zero."""
    found = np.linspace(low, high, count)
    return np.where(np.abs(found) < 1e-12 * (high - low), 0.0, found)


def _displaced(problem: Problem, rows: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    vector = problem.parameters_vector()
    for c, row in zip(coefficients, rows, strict=True):
        vector = vector + c * row
    return vector


def _named(spec: str) -> Callable[[Any, Any], Tensor]:
    """Import `module:name`."""
    module, _, name = spec.partition(":")
    try:
        found: Callable[[Any, Any], Tensor] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Refused(f"quantity {spec!r} cannot be imported ({error}); allowed is module:name") from error
    return found
