"""Hessians of examples in their inputs: one product with the Hessian of the sum holds every ∇²f_i v_i."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from landscape.example_scalars import ExampleScalars, split_rows

# Central differences: eps^(1/3) balances h² and eps/h (Press et al., Numerical Recipes, §5.7).
_STEP_EXPONENT = 1 / 3


class Hessians:
    """∇²f_i at x_i (+ displacement) of N examples, as one stack of matrices: `A.shape`, `A @ V`, `A[index]`.

    Args:
        scalars: f_i.
        held: keeps the model in its state as long as products are made.
        displacement: (N, d).

    Attributes:
        gradient: ∇f_i, (N, d).
        done: the run that the graph is of.
        shape: (N, d, d).
    """

    def __init__(
        self, scalars: ExampleScalars, held: contextlib.ExitStack, displacement: Tensor | None = None
    ):
        held.enter_context(scalars.running())
        self.scalars, self._held, self._displacement = scalars, held, displacement
        self.done = scalars.run(displacement)
        self._leaves = self.done.leaves
        slopes: list[Tensor | None] = [None] * len(self._leaves)
        if self.done.total.requires_grad:
            again = scalars.setup.products == "autodiff"
            slopes = list(
                torch.autograd.grad(self.done.total, self._leaves, create_graph=again, allow_unused=True)
            )
        self._edges = [None if s is None or not s.requires_grad else get_gradient_edge(s) for s in slopes]
        self.gradient = scalars.flat(slopes, self._leaves)
        self.shape = (*self.gradient.shape, self.gradient.shape[1])
        self.dtype, self.device = self.gradient.dtype, self.gradient.device

    def __matmul__(self, V: Tensor) -> Tensor:
        """∇²f_i v_i for a stack of columns V, (N, d, 1)."""
        v = V[..., 0]
        if self.scalars.setup.products == "difference":
            return self._by_differences(v)[..., None]
        used = [
            (e, p) for e, p in zip(self._edges, split_rows(v, self._leaves), strict=True) if e is not None
        ]
        made: list[Tensor | None] = [None] * len(self._leaves)
        if used:
            edges, parts = [e for e, _ in used], [p for _, p in used]
            made = list(torch.autograd.grad(edges, self._leaves, parts, retain_graph=True, allow_unused=True))
        return self.scalars.flat(made, self._leaves)[..., None]

    def __getitem__(self, index: Tensor) -> Hessians:
        """Those of some examples, with a smaller graph of their own."""
        moved = None if self._displacement is None else self._displacement[index]
        return Hessians(self.scalars.take(index), self._held, moved)

    def _by_differences(self, v: Tensor) -> Tensor:
        wide = self.scalars.in_float64()
        x = torch.cat([t.detach().reshape(len(t), -1) for t in self._leaves], dim=1)
        return differences(wide, x, v, around=self._displacement).to(v.dtype)


def differences(
    scalars: ExampleScalars,
    x: Tensor,
    v: Tensor,
    step: float | None = None,
    *,
    around: Tensor | None = None,
) -> Tensor:
    """∇²f_i v_i from central differences of gradients, (N, d).

    Args:
        scalars: f_i.
        x: their inputs, (N, d), for the scale of the step.
        v: (N, d).
        step: ‖h v_i‖ / (1 + ‖x_i‖); default eps^(1/3).
        around: displacement (N, d) of the place where the product is made.
    """
    dtype = scalars.problem.dtype
    relative = step if step is not None else torch.finfo(dtype).eps ** _STEP_EXPONENT
    length = v.norm(dim=1, keepdim=True).double()
    h = relative * (1 + x.norm(dim=1, keepdim=True).double()) / torch.where(length > 0, length, 1.0)
    move, place = h * v.double(), 0.0 if around is None else around.double()
    slopes = [scalars.gradient((place + sign * move).to(dtype)).double() for sign in (1, -1)]
    made: Tensor = ((slopes[0] - slopes[1]) / (2 * h)).to(dtype)
    return made
