"""The loss on a plane, as contours and in space, and on a line; several runs side by side on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape.plots import PlotError, contours, profile, style, words
from landscape.plots.style import TEXT
from landscape.plots.words import Subject

if TYPE_CHECKING:
    import plotly.graph_objects
    from matplotlib.figure import Figure

    from landscape.results import Record

_LOGARITHMIC_FROM = 1.5  # decades that the losses span
_KINDS = {
    "filter": "filter-normalized random",
    "random": "Gaussian random",
    "layer": "layer-normalized random",
    "hessian": "Hessian",
    "pca": "principal",
    "gradient": "gradient",
    "difference": "difference",
}


@dataclass(frozen=True)
class SurfacePicture:
    """What a picture of a surface shows.

    Attributes:
        subject: run and size.
        caption: what is marked, in words.
        axes: coordinates, x first, one array or two.
        labels: of the axes, in words.
        loss: on the grid, (x,) or (y, x); NaN and inf as measured.
        measured: whether the point is, as loss.
        accuracy: share of right answers, as loss; None where it was not measured.
        refined: coordinates and losses of points beside the grid, (points, axes + 1).
        lowest: coordinates of the lowest loss.
        path: of training, (checkpoints, axes); empty without one.
        curvature: coordinates, λ_max and λ_min of points, (points, axes + 2).
        logarithmic: whether losses are drawn on a logarithmic scale.
    """

    subject: Subject
    caption: str
    axes: tuple[np.ndarray, ...]
    labels: tuple[str, ...]
    loss: np.ndarray
    measured: np.ndarray
    accuracy: np.ndarray | None
    refined: np.ndarray
    lowest: np.ndarray
    path: np.ndarray
    curvature: np.ndarray
    logarithmic: bool

    @property
    def finite(self) -> np.ndarray:
        """All finite losses."""
        every = np.concatenate([self.loss.ravel(), self.refined[:, -1]])
        return np.asarray(every[np.isfinite(every)])


def prepare(record: Record, name: str = "", log: bool | None = None) -> SurfacePicture:
    """Turn a stored surface into plain arrays.

    Args:
        record: the measurement.
        name: of the run, for the title.
        log: whether losses are drawn on a logarithmic scale; None: where they span 1.5 decades.

    Raises:
        PlotError: if nothing is measured yet, or a logarithmic scale is asked of losses that are not positive.
    """
    loss = record["loss"] if "loss" in record else np.zeros(0)
    if not np.any(np.isfinite(loss)):
        raise PlotError("no finite loss is measured yet; run `landscape measure` again to go on")
    names = [n for n in ("x", "y") if n in record]
    refined = _columns(record, [f"refined_{n}" for n in (*names, "loss")])
    finite = np.concatenate([loss.ravel(), refined[:, -1]])
    finite = finite[np.isfinite(finite)]
    if log and finite.min() <= 0:
        raise PlotError(
            f"the lowest loss is {finite.min():g}; a logarithmic scale needs positive ones: --linear"
        )
    spans = finite.min() > 0 and np.log10(finite.max() / finite.min()) >= _LOGARITHMIC_FROM
    size = max((stop for _, stop in record.attrs.get("parameter_ranges", {}).values()), default=None)
    return SurfacePicture(
        subject=Subject(_matrix(record), words.subject(record, name).run, size),
        caption=_caption(record, loss),
        axes=tuple(record[n] for n in names),
        labels=_labels(record, names),
        loss=loss,
        measured=record["measured"],
        accuracy=record["accuracy"] if "accuracy" in record else None,  # noqa: SIM401  (a Record is no dict)
        refined=refined[np.isfinite(refined).all(axis=1)],
        lowest=np.array([float(record[f"lowest_{n}"]) for n in names]),
        path=_columns(record, [f"trajectory_{n}" for n in names]),
        curvature=_columns(record, [f"curvature_{n}" for n in (*names, "lambda_max", "lambda_min")]),
        logarithmic=bool(spans) if log is None else log,
    )


def figure_size(pictures: Sequence[SurfacePicture], width: float) -> tuple[float, float]:
    """Return width and height in inches."""
    _require_one_kind(pictures)
    lines = sum(line.count("\n") + 1 for line in _heading(pictures, width))
    text = 0.25 + 0.17 * lines
    if len(pictures[0].axes) == 1:
        return width, text + profile.height(pictures, width)
    return width, text + contours.height(pictures, width)


def draw(figure: Figure, pictures: Sequence[SurfacePicture]) -> None:
    """Draw the pictures into an empty figure.

    One plane is drawn as contours and in space; several as contours beside each other, on one scale. Lines are
    drawn over each other, and the accuracy in a panel of its own.

    Args:
        figure: a `matplotlib.figure.Figure`.
        pictures: what `prepare` returned, one for each run.

    Raises:
        PlotError: if some are lines and some planes.
    """
    _require_one_kind(pictures)
    if len(pictures[0].axes) == 1:
        profile.draw(figure, pictures)
    else:
        contours.draw(figure, pictures)
    figure.suptitle("\n".join(_heading(pictures, figure.get_figwidth())), fontsize=TEXT)


def interactive(pictures: Sequence[SurfacePicture]) -> plotly.graph_objects.Figure:
    """Return the same as a plotly figure: planes in space, to be turned with the mouse.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
        PlotError: if some are lines and some planes.
    """
    _require_one_kind(pictures)
    made: Any = profile if len(pictures[0].axes) == 1 else contours
    figure = made.interactive(pictures)
    figure.update_layout(title="<br>".join(_heading(pictures, 20.0)), template="plotly_white")
    return figure


def vtk(picture: SurfacePicture) -> bytes:
    """Return a surface as a structured grid in VTK's legacy text format, which ParaView opens.

    The height is the loss (its logarithm to base 10 on a logarithmic scale); where that is not finite, the
    highest finite one, and the array `finite` is 0.

    Raises:
        PlotError: for a line.
    """
    if len(picture.axes) == 1:
        raise PlotError("ParaView draws surfaces, and this is a line; draw it as a .png, .pdf, .svg or .html")
    x, y = np.meshgrid(*picture.axes)
    height = contours.shown(picture, picture.loss)
    fine = np.isfinite(height)
    height = np.where(fine, height, height[fine].max())
    arrays = {"loss": picture.loss, "finite": fine.astype(float)}
    if picture.accuracy is not None:
        arrays["accuracy"] = picture.accuracy
    lines = [
        "# vtk DataFile Version 3.0", words.title("Loss", [picture.subject])[:250].encode("ascii", "replace").decode(),
        "ASCII", "DATASET STRUCTURED_GRID", f"DIMENSIONS {x.shape[1]} {x.shape[0]} 1", f"POINTS {x.size} double",
        *(f"{a!r} {b!r} {c!r}" for a, b, c in zip(*(v.ravel().tolist() for v in (x, y, height)), strict=True)),
        f"POINT_DATA {x.size}",
    ]  # fmt: skip
    for name, values in arrays.items():
        lines += [f"SCALARS {name} double 1", "LOOKUP_TABLE default", *map(repr, values.ravel().tolist())]
    return ("\n".join(lines) + "\n").encode()


# --- words --------------------------------------------------------------------------------------------


def _matrix(record: Record) -> str:
    """Which plane it is, as the title has it."""
    kind = str(words.configuration(record).get("directions", ""))
    if kind not in _KINDS:
        kind = str(record.attrs.get("direction_origin", {}).get("kind", ""))
    found, line = _KINDS.get(kind, "stored"), "y" not in record
    return f"the {found} {'line' if line else 'plane'}"


def _labels(record: Record, names: Sequence[str]) -> tuple[str, ...]:
    """What a coordinate is: the direction, and how far one unit of it moves."""
    made, norms = record.attrs.get("direction_labels", []), record.attrs.get("direction_norms", [])
    if words.configuration(record).get("curved"):
        return ("x, along the curve from θ (0) to the other point (1)",)
    found = []
    for i, name in enumerate(names):
        label = made[i] if i < len(made) else f"direction_{name}"
        unit = f" (unit: distance {words.number(norms[i])})" if i < len(norms) else ""
        found.append(f"{name}: {label}{unit}")
    return tuple(found)


def _caption(record: Record, loss: np.ndarray) -> str:
    """Return for example `loss at θ (+) 0.0458, lowest (○) 0.0448; 3 points not finite (grey)`."""
    mark = "+" if loss.ndim > 1 else "dotted"
    parts = [f"loss at θ ({mark}) {words.number(float(record['loss_origin']))}"]
    parts.append(f"lowest (○) {words.number(float(record['loss_lowest']))}")
    if "trajectory_x" in record:
        text = f"training path (line), {record['trajectory_x'].size} checkpoints"
        if "explained_variance" in record:
            shares = " and ".join(f"{100 * v:.3g} %" for v in record["explained_variance"])
            text += f", explained {shares}"
        parts.append(text)
    if "refined_x" in record:
        parts.append(f"{record['refined_x'].size} points added where it bends")
    if "precision_error" in record:
        error = words.number(float(record["precision_error"]), 2)
        parts.append(f"bfloat16, off by at most {error}")
    if broken := int(np.sum(~np.isfinite(loss) & record["measured"])):
        parts.append(f"{broken} point{'s' * (broken > 1)} not finite (grey)")
    if left := int(np.sum(~record["measured"])):
        parts.append(f"{left} not measured yet (white)")
    return "; ".join(map(words.unbroken, parts))


def _heading(pictures: Sequence[SurfacePicture], width: float) -> list[str]:
    title = words.title("Loss", [p.subject for p in pictures]).replace("Loss of the", "Loss on the", 1)
    lines = [title, *([pictures[0].caption] if len(pictures) == 1 else [])]
    return [style.wrapped(line, width, TEXT) for line in lines]


def _columns(record: Record, names: Sequence[str]) -> np.ndarray:
    """Stored columns side by side, (rows, names); no rows where one is not there."""
    if any(name not in record for name in names):
        return np.zeros((0, len(names)))
    return np.stack([record[name] for name in names], axis=1)


def _require_one_kind(pictures: Sequence[SurfacePicture]) -> None:
    if len({len(picture.axes) for picture in pictures}) > 1:
        raise PlotError("some of these are lines and some are planes; draw those of one kind together")
