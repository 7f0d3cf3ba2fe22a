"""Power iteration with the residual as its stop rule; the field asks for it by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from landscape import stages
from landscape.estimators.krylov import product
from landscape.estimators.probes import Operator, draw, order
from landscape.seeds import generator

_ROUNDING = 10.0  # eps ‖A - sI‖ that the residual is not asked to fall below
_MAX_MATVECS = 1000


@dataclass(frozen=True)
class PowerResult:
    """What power iteration found; an eigenvalue of A lies within `residual_norm` of `value`.

    Attributes:
        value: θ = v·Av, the eigenvalue of A with the largest |θ - shift|, with its sign.
        vector: v, of length 1 and of the type of A, shape (n,).
        residual_norm: ‖Av - θv‖ for these θ and v, from the last product.
        converged: residual_norm <= max(rtol·|θ - shift|, 10·eps·‖Av - shift·v‖), eps of the type of A.
        opposite: it ended at two eigenvalues shift ± ρ, too equal in modulus to be told apart in the products
            allowed: `value` lies between them and means nothing. Another shift helps, and so does `eigsh`.
        matvecs: products with A that were spent.
        message: why it ended, in words.
    """

    value: float
    vector: Tensor
    residual_norm: float
    converged: bool
    opposite: bool
    matvecs: int
    message: str

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the result as arrays."""
        numbers = {name: np.asarray(value) for name, value in vars(self).items() if name in _NUMBERS}
        text = np.frombuffer(self.message.encode(), np.uint8)
        return {**numbers, "vector": self.vector.cpu().numpy(), "message": text}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], device: torch.device | str) -> PowerResult:
        """Return the result that `arrays` stored."""
        numbers = {name: arrays[name].item() for name in _NUMBERS}
        vector = torch.from_numpy(arrays["vector"]).to(device)
        return cls(vector=vector, message=arrays["message"].tobytes().decode(), **numbers)


_NUMBERS = ("value", "residual_norm", "converged", "opposite", "matvecs")


def power_iteration(
    A: Operator,
    rtol: float = 1e-3,
    seed: int = 0,
    *,
    shift: float = 0.0,
    start: Tensor | None = None,
    max_matvecs: int = _MAX_MATVECS,
) -> PowerResult:
    """Return the eigenvalue of A that is farthest from `shift`, by repeated products with A - shift·I.

    v ← (A - sI)v / ‖(A - sI)v‖, until the residual ‖Av - θv‖ with θ = v·Av is at most rtol·|θ - s|. The value of
    largest modulus λ_a comes first, with s = 0; `shift=λ_a` then gives the other end of the spectrum,
    whatever the signs (Böttcher, Wheeler, Algorithm 1). The number of products grows as the inverse of the
    relative gap; Lanczos, `eigsh`, needs about its square root.

    Args:
        A: symmetric operator of shape (n, n).
        rtol: relative residual that is asked for; 0 asks for rounding.
        seed: any integer; of the Gaussian start vector.
        shift: s.
        start: vector to begin with, shape (n,); a random one if left out.
        max_matvecs: products after which it gives up.

    Returns:
        The pair of the last product, converged or not. It has converged to an eigenpair, but nothing shows
        that none lies farther out: the start vector may hold next to nothing of it.

    Raises:
        ValueError: for an argument outside its range, an operator that is not square, or a product that is
            not finite.

    Source: L. Böttcher, G. Wheeler (2022), arXiv:2208.13219.

    >>> A = torch.diag(torch.tensor([-5.0, 1.0, 2.0, 4.0]).double())
    >>> low = power_iteration(A, rtol=1e-6); high = power_iteration(A, rtol=1e-6, shift=low.value)
    >>> round(low.value, 6), round(high.value, 6)
    (-5.0, 4.0)
    """
    n = order(A)
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol = {rtol}; allowed is 0 <= rtol < 1, for example 1e-3")
    if max_matvecs < 1:
        raise ValueError(f"max_matvecs = {max_matvecs}; allowed is 1 or more")
    stage = stages.begin()
    if stage.result is not None:
        return PowerResult.from_arrays(stage.result, A.device)
    if stage.state is None:
        v = _first(A, n, seed, start)
        previous, before = torch.zeros_like(v), 0
    else:
        v, previous = (torch.from_numpy(stage.state[name]).to(A.device) for name in ("v", "previous"))
        before = int(stage.state["matvecs"])
    found = _iterated(A, rtol, shift, v, previous, before, max_matvecs, stage)
    return PowerResult.from_arrays(stage.finish(found.arrays()), A.device) if stage.is_kept else found


def _iterated(
    A: Operator,
    rtol: float,
    shift: float,
    v: Tensor,
    previous: Tensor,
    before: int,
    max_matvecs: int,
    stage: stages.Stage,
) -> PowerResult:
    """Go on from v and the vector before it, of which `before` products are made."""
    floor = _ROUNDING * torch.finfo(A.dtype).eps
    asked = max(rtol, floor)
    for matvecs in range(before + 1, max_matvecs + 1):
        x = product(A, v[None])[0] - shift * v
        theta, length = float(v @ x), float(torch.linalg.vector_norm(x))
        residual = float(torch.linalg.vector_norm(x - theta * v))
        found = shift + theta, v.to(A.dtype), residual
        if residual <= max(rtol * abs(theta), floor * length):
            return PowerResult(*found, True, False, matvecs, "the residual is within the tolerance")
        # Two steps lead back where one does not: v and Av span eigenvectors of about shift ± length, whose
        # moduli differ by about gap · length.
        back = float(torch.linalg.vector_norm(x - length * previous))
        gap = back / residual
        opposite = gap < 0.1 and back <= asked * length
        if opposite and gap * (max_matvecs - matvecs) < math.log(residual / (asked * length)):
            break
        previous, v = v, x / length
        if matvecs < max_matvecs:
            stage.save(functools.partial(_state, v, previous, matvecs))
    message = _opposite(shift, length) if opposite else _slow(residual, matvecs)
    return PowerResult(*found, False, opposite, matvecs, message)


def _state(v: Tensor, previous: Tensor, matvecs: int) -> dict[str, np.ndarray]:
    return {"v": v.cpu().numpy(), "previous": previous.cpu().numpy(), "matvecs": np.asarray(matvecs)}


def _first(A: Operator, n: int, seed: int, start: Tensor | None) -> Tensor:
    if start is None:
        v = draw(generator(seed, "power_iteration", 0), n, 1, "gaussian", device=A.device)[:, 0]
    elif start.shape != (n,):
        raise ValueError(f"start has shape {tuple(start.shape)}; allowed is ({n},)")
    else:
        v = start.detach().to(A.device, torch.float64)
    length = float(torch.linalg.vector_norm(v))
    if not 0.0 < length < float("inf"):
        raise ValueError(f"start has length {length}; give a vector that is finite and not zero, or none")
    return v / length


def _opposite(shift: float, length: float) -> str:
    return (
        f"eigenvalues near {shift + length:.6g} and {shift - length:.6g} are equally far from the shift {shift:g}, "
        "so the iteration swings between them and never converges. Use another shift, or eigsh with which='both'"
    )


def _slow(residual: float, matvecs: int) -> str:
    return (
        f"the residual was still {residual:.2e} after {matvecs} products: other eigenvalues are nearly as far from "
        "the shift. Allow more products, or use eigsh, which needs about the square root of their number"
    )
