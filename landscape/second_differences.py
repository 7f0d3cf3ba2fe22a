"""vᵀHv from two forward passes: second differences along a line, no graph, no memory of activations.

With f± = f(θ ± hv) and f₀ = f(θ), δ = (f₊ − f₋)/2h and δ² = (f₊ − 2f₀ + f₋)/h²,

    vᵀRv ≈ ⟨∂ℓ/∂f, δ²⟩,    vᵀGv ≈ δᵀ (∂²ℓ/∂f²) δ,    vᵀHv = vᵀRv + vᵀGv :

only the network is differenced, the loss is differentiated. The rounding of outputs enters weighted with the
slopes, which nearly cancel, and not that of a loss. The error is O(h²); who needs it gone compares with a
product now and then.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from landscape.batches import tensors
from landscape.problem import Problem
from landscape.residual import detached

# As for first differences of gradients: measured on a GPT, errors of 1e-4 to 2e-3 of a probe, ten times
# those at steps three times larger (truncation) or ten times smaller (rounding).
_STEP_EXPONENT = 1 / 3


def quadratics(problem: Problem, V: Tensor, *, residual: bool = False) -> Tensor:
    """v·Hv, or v·Rv with R = H − G, for each column of a block.

    Args:
        problem: any; with outputs for the residual.
        V: the vectors (n, k).
        residual: of R instead of H.

    Returns:
        float64 (k,), on the CPU; each entry is the same in whatever block its vector stands.

    Raises:
        Refused: for the residual on a problem with `forward=`.
    """
    if residual:
        problem.require_outputs("the residual H - G")
    found = parts(problem, V)
    return found[:, 0] if residual else found.sum(dim=1)


def parts(problem: Problem, V: Tensor) -> Tensor:
    """v·Rv and v·Gv for each column of a block, float64 (k, 2); for `forward=` v·Hv and 0."""
    found, weights = torch.zeros(V.shape[1], 2, dtype=torch.float64), 0.0
    with problem.session(), torch.no_grad():
        for piece, weight in problem.evaluator.pieces(problem.batches):
            centre, scale = Centre(problem, piece), problem.evaluator.scale(weight)
            found += scale * torch.tensor([centre.along(v) for v in V.T], dtype=torch.float64)
            weights += weight
    return found / weights


class Centre:
    """One micro-batch at θ: what all second differences there share.

    Args:
        problem: at θ, in session.
        piece: the micro-batch.
    """

    def __init__(self, problem: Problem, piece: Any):
        self.problem, self.piece = problem, piece
        leaves = problem.leaves()
        length = float(torch.linalg.vector_norm(problem.space.flatten(leaves).detach(), dtype=torch.float64))
        self.reach = torch.finfo(problem.dtype).eps ** _STEP_EXPONENT * (1 + length)
        if not problem.evaluator.has_outputs:
            self.value = self._evaluated(leaves)[0]
            return
        with problem.filled(leaves):
            with self._fast(), torch.no_grad():
                outputs = problem.evaluator.outputs(piece)
            free, self.heads = detached(outputs)
            with torch.enable_grad(), problem.evaluator.twice_differentiable():
                loss = problem.evaluator.loss_from(free, problem.evaluator.target_of(piece))
                self.slopes = torch.autograd.grad(loss, self.heads, create_graph=True, allow_unused=True)

    def along(self, v: Tensor) -> tuple[float, float]:
        """The two parts of v·Hv on the micro-batch's loss: v·Rv and v·Gv; for `forward=` all, and 0."""
        v = v.contiguous()
        length = float(torch.linalg.vector_norm(v, dtype=torch.float64))
        if length == 0:
            return 0.0, 0.0
        h = self.reach / length
        above, below = (self._evaluated(self.problem.leaves(displacement=v * s)) for s in (h, -h))
        if not self.problem.evaluator.has_outputs:
            return float(above[0] - 2 * self.value + below[0]) / h**2, 0.0
        of_residual, pushed = 0.0, []
        for up, down, head, slope in zip(above, below, self.heads, self.slopes, strict=True):
            pushed.append(((up - down) / (2 * h)).to(head.dtype))
            if slope is not None:
                bent = (up - head.detach()) + (down - head.detach())
                of_residual += float((slope.detach().double() * bent).sum()) / h**2
        return of_residual, self._bent(pushed)

    def _bent(self, pushed: list[Tensor]) -> float:
        """δᵀ (∂²ℓ/∂f²) δ."""
        known = [
            (s, d) for s, d in zip(self.slopes, pushed, strict=True) if s is not None and s.requires_grad
        ]
        if not known:
            return 0.0
        slopes, along = [s for s, _ in known], [d for _, d in known]
        products = torch.autograd.grad(slopes, self.heads, along, retain_graph=True, allow_unused=True)
        return sum(
            float((d.double() * p.double()).sum())
            for d, p in zip(pushed, products, strict=True)
            if p is not None
        )

    def _fast(self) -> AbstractContextManager[None]:
        """The faster matrix product, where there is one."""
        from landscape.kernels import Kernels, active  # not every measurement makes products

        return active(Kernels(matmul=self.problem.kernels.matmul))

    def _evaluated(self, leaves: list[Tensor]) -> list[Tensor]:
        """The outputs, or the loss where there are none, float64."""
        evaluator = self.problem.evaluator
        with (
            torch.no_grad(),
            self.problem.filled(leaves),
            self._fast(),
        ):
            found = evaluator.outputs(self.piece) if evaluator.has_outputs else evaluator.loss_of(self.piece)
        return [t.double() for t in tensors(found) if t.is_floating_point()]
