"""The residual R = H − G of the Hessian, as the Hessian of a problem of its own.

H = G + R with R = Σ_k (∂ℓ/∂f_k) ∇²f_k: what is left of the Hessian when the loss is replaced by its tangent at
the outputs. With s = ∂ℓ/∂f(θ) held fixed, R is the Hessian at θ of ⟨s, f(θ)⟩; so a product R v costs one
Hessian-vector product and not one of H and one of G.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

from landscape.batches import tensors, tree_map
from landscape.evaluator import Evaluator
from landscape.problem import Problem

Nested = TypeVar("Nested")


def linearized(problem: Problem) -> Problem:
    """The same problem with the loss ⟨∂ℓ/∂f, f⟩, whose Hessian at the problem's θ is R = H − G.

    Its gradient at θ is the problem's own. Only where it stands: moved by `.at`, the tangent moves too.

    Raises:
        Refused: on a problem with `forward=`, whose outputs are unknown.
        ValueError: if its products are made by differences, which would move the tangent.
    """
    problem.require_outputs("the residual H - G")
    if problem.products == "difference":
        raise ValueError(
            "the residual H - G needs products by autodiff, got products='difference'; "
            "take products of the Hessian instead"
        )
    tangent = copy.copy(problem)
    tangent.evaluator = _Tangent(problem.evaluator)
    return tangent


def product(problem: Problem, V: Tensor) -> Tensor:
    """R V for one vector (n,) or a block (n, k); where autodiff is wrong for H, as H V − G V.

    Raises:
        Refused: on a problem with `forward=`.
        ValueError: if its products are asked for by differences, or V does not have n rows.
    """
    tangent = linearized(problem)
    if problem.products == "auto":
        found = problem.product_checks.get("hessian") or problem.check_products("hessian")
        if found.products == "difference":
            return problem.hvp(V) - problem.ggn_vp(V)
    return tangent.hvp(V)


def detached(outputs: Nested) -> tuple[Nested, list[Tensor]]:
    """Outputs cut off from the parameters, and those of their tensors that are differentiated."""
    free = tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point()), outputs)
    return free, [t for t in tensors(free) if t.requires_grad]


class _Tangent(Evaluator):
    """An evaluator whose loss is the tangent of another's."""

    def __init__(self, evaluator: Evaluator):
        vars(self).update(vars(evaluator))

    def loss_of(self, piece: Any) -> Tensor:
        outputs = self.outputs(piece)
        with torch.enable_grad():
            free, heads = detached(outputs)
            slopes = torch.autograd.grad(
                self.loss_from(free, self.target_of(piece)), heads, allow_unused=True
            )
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        floating = [t for t in tensors(outputs) if t.is_floating_point()]
        for f, slope in zip(floating, slopes, strict=True):
            if slope is not None:
                total = total + (slope * f).sum()
        return total
