"""Vectors of parameter length with their origin, and the file that keeps both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from landscape import atomic, tensor_file, tensors
from landscape.errors import Refused

if TYPE_CHECKING:
    from landscape.problem import Problem

_FORMAT = "landscape directions 1"
_PIECE = 1 << 22  # entries of long vectors that are multiplied at once in float64


@dataclass(frozen=True, eq=False)
class Directions:
    """Vectors in the order of a problem's flat parameter vector, and where they come from.

    Attributes:
        vectors: one to a row, (k, n).
        labels: what each is, in words.
        origin: how they were made, as plain values: "kind", and for example "seed" or "eigenvalues".
        ranges: where each parameter tensor stands, name -> (start, stop).
        parameters_fingerprint: of the parameters and buffers that they were made for.
    """

    vectors: Tensor
    labels: tuple[str, ...]
    origin: dict[str, Any]
    ranges: dict[str, tuple[int, int]]
    parameters_fingerprint: str

    def __len__(self) -> int:
        return len(self.vectors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.vectors)

    @property
    def norms(self) -> list[float]:
        """‖d‖ of each: the distance that a coordinate of 1 moves."""
        return [float(row.double().norm()) for row in self.vectors]

    @property
    def cosines(self) -> Tensor:
        """Cosines of the angles between them, (k, k); NaN where a direction is zero."""
        norms = torch.tensor(self.norms, dtype=torch.float64)
        return gram(self.vectors) / norms.outer(norms)

    def normalized(self) -> Directions:
        """Return the directions with norm 1.

        Raises:
            ValueError: if one is zero.
        """
        rows = [scaled(row, 1.0, label) for row, label in zip(self.vectors, self.labels, strict=True)]
        return self._with(torch.stack(rows), normalized=True)

    def orthogonalized(self) -> Directions:
        """Return the directions with what each has of those before it taken out; each keeps its norm.

        Raises:
            ValueError: if one lies in the span of those before it.
        """
        made: list[Tensor] = []
        for row, norm, label in zip(self.vectors.double(), self.norms, self.labels, strict=True):
            left = row.clone()
            for _ in range(2):  # twice is enough against rounding (Kahan, Parlett)
                for before in made:
                    left -= before * (before @ left) / (before @ before)
            if float(left.norm()) <= 1e-6 * norm:
                raise ValueError(f"{label} lies in the span of {', '.join(self.labels[: len(made)])}")
            made.append(scaled(left, norm, label))
        return self._with(torch.stack(made).to(self.vectors), orthogonalized=True)

    def coordinates(self, displacements: Tensor) -> tuple[Tensor, Tensor]:
        """Project displacements (t, n) onto the span, by least squares; the directions need not be orthogonal.

        Returns:
            Coefficients (t, k), and the norms of what is left (t,), float64.
        """
        products = gram(self.vectors)
        right = gram(displacements, self.vectors)
        found = torch.linalg.lstsq(products, right.T, driver="gelsd").solution.T
        left = torch.stack(
            [
                (row.double() - c.to(row.device) @ self.vectors.double()).norm()
                for row, c in zip(displacements, found, strict=True)
            ]
        )
        return found, left

    def save(self, path: Path | str) -> None:
        """Write the directions to a safetensors file, as a whole or not at all.

        Raises:
            landscape.ResultsError: if it cannot be written.
        """
        notes = {
            "format": _FORMAT,
            "labels": json.dumps(self.labels),
            "origin": json.dumps(self.origin),
            "ranges": json.dumps(self.ranges),
            "parameters_fingerprint": self.parameters_fingerprint,
            "blake2b": tensors.digest(self.vectors.cpu().numpy()),
        }
        atomic.replace(Path(path), [save({"directions": self.vectors.cpu().contiguous()}, notes)])

    def _with(self, vectors: Tensor, **more: Any) -> Directions:
        return dataclasses.replace(self, vectors=vectors, origin={**self.origin, **more})


def load(path: Path | str, problem: Problem) -> Directions:
    """Read directions that were saved for this problem.

    Raises:
        Refused: if the file is damaged or no such file, or of other parameters than the problem's.
    """
    path = Path(path)
    try:
        with tensor_file.opened(path, most=1) as file:
            notes = file.metadata
            if notes.get("format") != _FORMAT:
                raise Refused(f"{path} holds no directions; Directions.save writes such a file")
            found = tensors.array_of(file, "directions")
        if tensors.digest(found) != notes["blake2b"]:
            raise Refused(f"{path} is damaged: its directions differ from their hash")
        labels, origin, ranges = (json.loads(notes[key]) for key in ("labels", "origin", "ranges"))
        spans = {str(name): (int(start), int(stop)) for name, (start, stop) in ranges.items()}
        origin, labels = {**origin, "file": path.name}, tuple(map(str, labels))
        fingerprint = notes["parameters_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{path} cannot be read as directions: {' '.join(str(error).split())[:200]}") from error
    require_same(path, spans, fingerprint, problem)
    if found.shape != (len(labels), problem.size):
        raise Refused(f"{path} is damaged: it holds {found.shape} entries for {len(labels)} directions")
    vectors = torch.from_numpy(found).to(problem.device, problem.dtype)
    return Directions(vectors, labels, origin, spans, fingerprint)


def require_same(path: Path, ranges: Mapping[str, Sequence[int]], fingerprint: str, problem: Problem) -> None:
    """Refuse vectors of another model, or of the same one with other weights.

    Raises:
        Refused: naming what differs.
    """
    here = {name: tuple(span) for name, span in problem.space.ranges.items()}
    there = {name: tuple(span) for name, span in ranges.items()}
    if here != there:
        other = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        raise Refused(
            f"{path} was made for another model or for other parameters of it: they differ from "
            f"{other[0] if other else 'the order of tensors'} on. Make it anew for this one."
        )
    if fingerprint != problem.fingerprint():
        raise Refused(
            f"{path} was made for other weights: their fingerprint is {fingerprint} there, {problem.fingerprint()} "
            "here. Make it anew for these, or load the weights that it was made for."
        )


def made(problem: Problem, rows: Sequence[Tensor], labels: Sequence[str], **origin: Any) -> Directions:
    """Bring rows to the problem's device and precision, and note what they belong to."""
    vectors = torch.stack([row.to(problem.device, problem.dtype) for row in rows])
    return Directions(vectors, tuple(labels), origin, dict(problem.space.ranges), problem.fingerprint())


def gram(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """Return the products of rows (a, n) with others (b, n), or with each other, in float64 (a, b)."""
    others = rows if others is None else others
    total = torch.zeros(len(rows), len(others), dtype=torch.float64)
    for a, b in zip(torch.split(rows, _PIECE, dim=1), torch.split(others, _PIECE, dim=1), strict=True):
        total += (a.double() @ b.double().T).cpu()
    return total


def scaled(row: Tensor, norm: float, label: str) -> Tensor:
    """Give a vector another norm.

    Raises:
        ValueError: if it is zero.
    """
    length = float(row.double().norm())
    if not length > 0:
        raise ValueError(f"{label} is zero and has no direction")
    return (row.double() * (norm / length)).to(row.dtype)
