"""Boxes and ellipsoids around the origin, in which maxima are searched.

{δ ∈ Rᵈ: ‖δ/r‖_p <= 1} with half-widths r >= 0: a box for p = ∞, an ellipsoid for p = 2. A coordinate without
width stays where it is; it is never divided by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal[2, "inf"]

_NEWTON_STEPS = 60
_NEWTON_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Region:
    """The set {δ: ‖δ/r‖_p <= 1}.

    Attributes:
        radii: half-widths r, (d,), finite and not negative.
        norm: p, 2 or "inf".
    """

    radii: Tensor
    norm: Norm = "inf"

    def __post_init__(self) -> None:
        """Refuse what is no set.

        Raises:
            ValueError: saying what is allowed.
        """
        if self.norm not in {2, "inf"}:
            raise ValueError(f"norm is {self.norm!r}; allowed is 2 or 'inf'")
        if self.radii.ndim != 1 or not bool((self.radii.isfinite() & (self.radii >= 0)).all()):
            raise ValueError(
                f"radii have shape {tuple(self.radii.shape)}; needed is (d,), each finite and not negative"
            )

    @property
    def widest(self) -> float:
        """The largest half-width."""
        return float(self.radii.max())

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the δ of the set with the largest ⟨gradient, δ⟩, (d,); 0 where the gradient is 0."""
        return self.radii * unit_steepest(self.radii * gradient, self.norm)

    def rise(self, gradient: Tensor) -> float:
        """Return that largest ⟨gradient, δ⟩: the dual norm of r ⊙ gradient."""
        q = (self.radii * gradient).double()
        return float(q.abs().sum() if self.norm == "inf" else _length(q))

    def size(self, point: Tensor) -> float:
        """Return ‖δ/r‖_p, at most 1 within the set; coordinates without width are left out."""
        held = self.radii > 0
        u = (point[held] / self.radii[held]).double()
        if not len(u):
            return 0.0
        return float(u.abs().max() if self.norm == "inf" else _length(u))

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return a point uniform in the set, (d,)."""
        return self.radii * unit_draw(len(self.radii), self.norm, generator).to(self.radii)

    def pull_back(self, point: Tensor) -> Tensor:
        """Return the point of the set that is nearest in units of the half-widths, (d,).

        Steps along `steepest` go with this projection: with the Euclidean one they come to rest elsewhere than at
        the maximum, at δ ∝ r⁴g in place of r²g for a linear function on an ellipsoid.
        """
        return self.radii * unit_clip(quotient(point, self.radii), self.norm)

    def project(self, point: Tensor) -> Tensor:
        """Return the point of the set that is nearest in the Euclidean norm, (d,).

        For p = 2 it is δ r²/(r² + μ), with the μ >= 0 that brings it to the boundary: the root of
        1/‖δ r/(r² + μ)‖ = 1, which is nearly linear in μ, so that Newton's method needs few steps (as for
        trust regions; Conn, Gould & Toint 2000, §7.3).
        """
        if self.norm == "inf":
            return torch.maximum(torch.minimum(point, self.radii), -self.radii)
        held = self.radii > 0
        result = torch.zeros_like(point)
        if not bool(held.any()):
            return result
        r, d = self.radii[held].double(), point[held].double()
        # In units of the largest half-width: squares of small ones must not underflow.
        unit = r.max()
        r, d = r / unit, d / unit
        mu = torch.zeros((), dtype=torch.float64, device=point.device)
        for _ in range(_NEWTON_STEPS):
            denominator = r * r + mu
            t = d * r / denominator
            length = _length(t)
            if not bool(length > 1 + _NEWTON_TOLERANCE):
                break
            mu = mu + (length - 1) * length**2 / (t * t / denominator).sum()
        moved = d * r * r / (r * r + mu)
        moved = moved / torch.clamp(_length(moved / r), min=1.0)
        result[held] = (moved * unit).to(point.dtype)
        return result


def quotient(point: Tensor, radii: Tensor) -> Tensor:
    """Return δ/r, and 0 where there is no width."""
    return torch.where(radii > 0, point / torch.where(radii > 0, radii, torch.ones_like(radii)), 0 * point)


def unit_steepest(q: Tensor, norm: Norm) -> Tensor:
    """Return the u with ‖u‖_p <= 1 and the largest ⟨q, u⟩; 0 where q is 0."""
    if norm == "inf":
        return q.sign()
    length = _length(q)
    return q / length.to(q.dtype) if bool(length > 0) else torch.zeros_like(q)


def unit_clip(u: Tensor, norm: Norm) -> Tensor:
    """Return the point nearest to u with ‖u‖_p <= 1."""
    if norm == "inf":
        return u.clamp(-1, 1)
    return u / torch.clamp(_length(u), min=1.0).to(u.dtype)


def unit_draw(size: int, norm: Norm, generator: torch.Generator) -> Tensor:
    """Return a point uniform in {‖u‖_p <= 1}, (size,) float64."""
    if norm == "inf":
        return torch.rand(size, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
    direction = torch.randn(size, generator=generator, dtype=torch.float64)
    radius = float(torch.rand((), generator=generator, dtype=torch.float64)) ** (1 / size)
    return direction.mul_(radius / float(torch.linalg.vector_norm(direction)))


def _length(u: Tensor) -> Tensor:
    """‖u‖₂, in float64 and safe against under- and overflow."""
    return torch.linalg.vector_norm(u.double()) if u.numel() else torch.zeros((), dtype=torch.float64)
