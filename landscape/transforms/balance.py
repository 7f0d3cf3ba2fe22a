"""The balanced point of an orbit: the one of least norm.

Along an orbit ‖θ‖² = Σ_p θ_p² exp(2 (Bz)_p) is a convex function of the log-scales z of the nodes. Directions that
only ever shrink it (a row before a norm, which takes the row's scale out again) have no least point; to them a
linear term −2 t Σ z_k is added, whose stationary point has Σ_p B_pk θ_p² = t: the squared norm of that row, its bias
included, is t = 1. The sum stays convex, and its least point is the same from wherever on the orbit one starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from landscape.errors import Refused
from landscape.transforms.exponents import Exponents
from landscape.transforms.layout import Layout

_STEPS = 100
_TOLERANCE = 1e-13  # of the gradient, relative to the norm that it balances
_FAR = 200.0  # log-scales beyond which a point counts as at infinity
_ROW_NORM = 1.0


class _Norm:
    """The function and its derivatives, over the entries that one combination of unknowns moves together."""

    def __init__(self, layout: Layout, B: Exponents, squares: Mapping[str, Tensor]):
        self._B = B
        self._parts: list[tuple[Tensor, list[Tensor]]] = []
        live = torch.zeros(B.shape[0], dtype=torch.bool)
        live[B.rows] = True
        for name, square in squares.items():
            terms = [ids for ids in layout.terms.get(name, []) if bool(live[ids].any())]
            if not terms:
                continue
            # Over dimensions along which no node scales, squares are summed up once.
            idle = [d for d in range(square.ndim) if all(ids.shape[d] == 1 for ids in terms)]
            self._parts.append((square.sum(idle, keepdim=True) if idle else square, terms))

    def at(self, z: Tensor) -> tuple[float, Tensor, list[Tensor]]:
        """Half the squared norm, its gradient (nodes,), and the squares where z leads."""
        s = self._B.times(z)
        scaled = [square * (2 * _total(terms, s)).exp() for square, terms in self._parts]
        return (
            0.5 * sum(float(q.sum()) for q in scaled),
            self._B.transposed_times(self.marginals(scaled)),
            scaled,
        )

    def curved(self, scaled: list[Tensor], v: Tensor) -> Tensor:
        """The Hessian times v."""
        s = self._B.times(v)
        turned = [q * _total(t, s) for q, (_, t) in zip(scaled, self._parts, strict=True)]
        return 2 * self._B.transposed_times(self.marginals(turned))

    def diagonal(self, scaled: list[Tensor]) -> Tensor:
        """An upper bound of the Hessian's diagonal up to a constant, to precondition with."""
        return 2 * self._B.transposed_times(self.marginals(scaled), power=2)

    def marginals(self, scaled: list[Tensor]) -> Tensor:
        """The squares that each unknown moves, (unknowns,)."""
        total = torch.zeros(self._B.shape[0], dtype=torch.float64)
        for values, (_, terms) in zip(scaled, self._parts, strict=True):
            for ids in terms:
                over = [d for d in range(values.ndim) if ids.shape[d] == 1]
                summed = values.sum(over, keepdim=True) if over else values
                total.index_add_(0, ids.expand(summed.shape).reshape(-1), summed.reshape(-1))
        return total


def balanced(layout: Layout, B: Exponents, squares: Mapping[str, Tensor]) -> Tensor:
    """Find the balanced point.

    Args:
        layout: the unknowns of the tensors.
        B: the nodes' exponents.
        squares: tensor -> θ² of its entries, float64.

    Returns:
        The log-scales z (nodes,) that lead there; 0 for nodes that move only zeros.

    Raises:
        Refused: if there is no such point.

    Source: convexity and uniqueness as in matrix scaling (Sinkhorn, "Diagonal equivalence to matrices with
    prescribed row and column sums", 1967); here by Newton's method with conjugate gradients.
    """
    norm = _Norm(layout, B, squares)
    target, live = _targets(norm, B)
    z = torch.zeros(B.shape[1], dtype=torch.float64)
    value, gradient, scaled = norm.at(z)
    for _ in range(_STEPS):
        residual = (gradient - target) * live
        size = norm.diagonal(scaled)
        # A node's gradient is a difference of two squared norms, of rows and of columns; its sum is `size` / 2.
        if float((residual.abs() / size.clamp_min(1e-300) * live).max()) <= _TOLERANCE:
            return z
        step = _conjugate_gradients(norm, scaled, -residual, live, size)
        z, value, gradient, scaled = _searched(norm, z, step, value, residual, target)
        if not float(z.abs().max()) < _FAR:
            break
    raise Refused(
        f"the orbit has no balanced point that Newton's method reaches in {_STEPS} steps: some combination of "
        "nodes only ever shrinks the parameters, or only ever grows them"
    )


def _targets(norm: _Norm, B: Exponents) -> tuple[Tensor, Tensor]:
    """The linear term (nodes,), and which nodes move anything (nodes,)."""
    scaled = norm.at(torch.zeros(B.shape[1], dtype=torch.float64))[2]
    weight = norm.marginals(scaled)
    unknown, node, exponent = B.rows, B.columns, B.values
    moved = weight[unknown] > 0
    grows = torch.zeros(B.shape[1], dtype=torch.bool)
    shrinks = grows.clone()
    grows[node[moved & (exponent > 0)]] = True
    shrinks[node[moved & (exponent < 0)]] = True
    target = _ROW_NORM**2 * ((grows & ~shrinks).double() - (shrinks & ~grows).double())
    return target, (grows | shrinks).double()


def _searched(
    norm: _Norm, z: Tensor, step: Tensor, value: float, residual: Tensor, target: Tensor
) -> tuple[Tensor, float, Tensor, list[Tensor]]:
    """Go along a descent direction, half as far again and again until the function has fallen enough."""
    slope = float(residual @ step)
    before = value - float(target @ z)
    length = 1.0
    while True:
        new = z + length * step
        value, gradient, scaled = norm.at(new)
        after = value - float(target @ new)
        # At the end of the road differences drown in rounding; then the full step is right.
        if after <= before + 1e-4 * length * slope + 1e-14 * abs(before) or length < 1e-10:
            return new, value, gradient, scaled
        length = length / 2 if math.isfinite(after) else length / 8


def _conjugate_gradients(norm: _Norm, scaled: list[Tensor], b: Tensor, live: Tensor, size: Tensor) -> Tensor:
    """Solve the Hessian times x = b on the live nodes."""
    inverse = live / size.clamp_min(1e-300)
    x, r = torch.zeros_like(b), b
    y = inverse * r
    p, rho = y, float(r @ y)
    first = rho
    for _ in range(4 * len(b) + 10):
        if rho <= 1e-24 * first:
            break
        q = norm.curved(scaled, p) * live
        curvature = float(p @ q)
        if curvature <= 1e-300:
            break
        x = x + (rho / curvature) * p
        r = r - (rho / curvature) * q
        y = inverse * r
        rho, old = float(r @ y), rho
        p = y + (rho / old) * p
    return x


def _total(terms: list[Tensor], s: Tensor) -> Tensor:
    total = s[terms[0]]
    for ids in terms[1:]:
        total = total + s[ids]
    return total
