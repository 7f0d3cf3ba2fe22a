"""Independent Lanczos chains in lockstep: one block product a step, full reorthogonalisation.

A chain from a unit vector q_1 builds orthonormal q_1, ..., q_m and the tridiagonal T_m = Qᵀ A Q with

    A q_j = beta_{j-1} q_{j-1} + alpha_j q_j + beta_j q_{j+1}

It is a solver with an explicit state: `start`, `step` and `result` pass a dict of arrays, and the chains can
stop, be stored and go on between any two steps with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from landscape.errors import Refused
from landscape.estimators.probes import Operator

State = dict[str, Tensor]

# A remainder of this many roundings of the chain's scale is what an invariant subspace leaves. Where rounding
# has grown to more, the chain meets the same eigenvalues again; `quadrature.merged` makes them one.
_BREAKDOWN: Final = 30.0
# "Twice is enough" (Kahan; Parlett 1998, §6.9): a vector that keeps this share of its norm is orthogonal.
_KEPT: Final = 0.7
_PASSES: Final = 3
_WORK_VECTORS: Final = 6  # beside the basis, of length n: the product, its float64 sum, copies of both


@dataclass(frozen=True)
class Chains:
    """The tridiagonal matrices of k chains.

    Attributes:
        alpha: diagonals, shape (k, m), float64; NaN from where a chain ended.
        beta: shape (k, m), float64; beta[:, j] links q_j and q_{j+1}. The last of a chain is the norm of what
            is left over, 0 where the chain met an invariant subspace; NaN beyond it.
    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of each chain, shape (k,)."""
        return np.asarray(np.isfinite(self.alpha).sum(axis=1), dtype=np.int64)

    def rows(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Yield (alpha, beta) of each chain, without its blank part."""
        for alpha, beta, length in zip(self.alpha, self.beta, self.lengths, strict=True):
            yield alpha[:length], beta[:length]

    def joined(self, other: Chains) -> Chains:
        """Return these chains and others of as many steps."""
        return Chains(np.vstack([self.alpha, other.alpha]), np.vstack([self.beta, other.beta]))


def start(V: Tensor, steps: int) -> State:
    """Return the state of the chains that begin at the columns of V.

    Args:
        V: start vectors, shape (n, k), none of them zero; normalised here.
        steps: length m of a chain; n are taken where n is smaller.

    Returns:
        Tensors by name. `basis`, shape (k, m + 1, n), is on the device of V, all others on the CPU.

    Raises:
        ValueError: for shapes, steps or vectors that allow no chain.
    """
    if V.ndim != 2 or V.shape[1] == 0:
        raise ValueError(f"V has shape {tuple(V.shape)}; needed is (n, k) with k >= 1 start vectors")
    if steps < 1:
        raise ValueError(f"steps = {steps}; allowed is 1 or more, 100 are usual")
    norms = torch.linalg.vector_norm(V, dim=0, dtype=torch.float64)
    if not (torch.isfinite(norms) & (norms > 0)).all():
        raise ValueError("a start vector is zero or not finite; a chain needs a direction: draw another")
    (n, k), m = V.shape, min(steps, V.shape[0])
    basis = torch.zeros(k, m + 1, n, dtype=V.dtype, device=V.device)
    basis[:, 0] = (V.double() / norms).T.to(V.dtype)
    blank = torch.full((k, m), torch.nan, dtype=torch.float64)
    return {
        "basis": basis,
        "alpha": blank,
        "beta": blank.clone(),
        "scale": torch.zeros(k, dtype=torch.float64),
        "live": torch.ones(k, dtype=torch.bool),
        "step": torch.tensor(0),
    }


def step(A: Operator, state: Mapping[str, Any]) -> State:
    """Take all chains that have not ended one step further, with one block product.

    The arrays are written in place: pass a copy to keep a state.

    Args:
        A: symmetric operator of shape (n, n).
        state: of `start` or `step`, as tensors or as arrays that were stored.

    Returns:
        The state after the step.

    Raises:
        Refused: if a product is not finite.
    """
    s = {name: torch.as_tensor(value) for name, value in state.items()}
    basis = s["basis"] = s["basis"].to(A.device)
    j, live = int(s["step"]), s["live"].nonzero().flatten().tolist()
    V = basis[live, j].T.contiguous()
    W = (A @ V).T.contiguous()
    for w, i in zip(W, live, strict=True):
        previous = float(s["beta"][i, j - 1]) if j else 0.0
        alpha, beta = _advance(basis[i], w, j, previous, float(s["scale"][i]))
        if not math.isfinite(alpha + beta):
            raise Refused(
                f"product {j + 1} of a Lanczos chain is not finite; the loss or its curvature overflows "
                "there: check problem.value() and the data, or measure in dtype=torch.float64"
            )
        s["alpha"][i, j], s["beta"][i, j] = alpha, beta
        s["scale"][i] = max(float(s["scale"][i]), abs(alpha), beta)
        s["live"][i] = beta > 0.0
    s["step"] = torch.tensor(j + 1)
    return s


def result(state: Mapping[str, Any]) -> Chains | None:
    """Return the chains, or None while they have to go on."""
    alpha, beta = np.asarray(state["alpha"]), np.asarray(state["beta"])
    if np.asarray(state["live"]).any() and int(state["step"]) < alpha.shape[1]:
        return None
    return Chains(alpha.copy(), beta.copy())


def arrays(state: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Return a state as arrays, to be stored; on the CPU they share its memory."""
    return {name: value.cpu().numpy() for name, value in state.items()}


def chains(A: Operator, V: Tensor, steps: int) -> Chains:
    """Run the chains that begin at the columns of V to their end.

    Args:
        A: symmetric operator of shape (n, n).
        V: start vectors, shape (n, k).
        steps: length m of a chain.

    Returns:
        Their tridiagonal matrices.

    Source: Lanczos (1950); reorthogonalisation as in Parlett, The Symmetric Eigenvalue Problem, §6.9, §13.

    >>> found = chains(torch.diag(torch.tensor([1.0, 2.0, 2.0])), torch.ones(3, 1), steps=3)
    >>> found.lengths.tolist()  # a double eigenvalue is met once: two steps exhaust what the start reaches
    [2]
    """
    state = start(V, steps)
    while (found := result(state)) is None:
        state = step(A, state)
    return found


def chains_that_fit(n: int, steps: int, dtype: torch.dtype, memory: int) -> int:
    """Return how many chains may run together.

    Args:
        n: order of the operator.
        steps: length m of a chain, whose basis holds (m + 1) n numbers.
        dtype: of the vectors.
        memory: bytes for bases and work vectors.

    Raises:
        ValueError: if not even one fits.
    """
    vector = n * dtype.itemsize
    fit = memory // (vector * (min(steps, n) + 1 + _WORK_VECTORS))
    if fit < 1:
        most = memory // vector - 1 - _WORK_VECTORS
        advice = f"take at most {most} steps or" if most >= 1 else "take"
        raise ValueError(
            f"a chain of {steps} steps of length {n} needs {vector * (steps + 1 + _WORK_VECTORS):,} bytes; "
            f"memory = {memory:,}: {advice} more memory"
        )
    return fit


def _advance(basis: Tensor, w: Tensor, j: int, previous: float, scale: float) -> tuple[float, float]:
    """Take one chain from q_j to q_{j+1}; return alpha_j and beta_j, 0 where it ends.

    Args:
        basis: q_1, q_2, ... as rows, shape (m + 1, n); row j + 1 is written.
        w: A q_j; overwritten.
        j: index of the step, from 0.
        previous: beta_{j-1}.
        scale: the largest |alpha| or beta before this step.
    """
    if j:
        w.sub_(basis[j - 1], alpha=previous)
    diagonal = float((basis[j] * w).sum(dtype=torch.float64))
    w.sub_(basis[j], alpha=diagonal)
    done = basis[: j + 1]
    size = _norm(w)
    for _ in range(_PASSES):
        w.addmv_(done.T, done.mv(w), alpha=-1.0)
        before, size = size, _norm(w)
        if size > _KEPT * before:
            break
    else:
        size = 0.0  # each pass takes away most of what the last one left: there is nothing else
    if size <= _BREAKDOWN * torch.finfo(w.dtype).eps * max(scale, abs(diagonal)):
        return diagonal, 0.0
    torch.mul(w, 1.0 / size, out=basis[j + 1])
    return diagonal, size


def _norm(w: Tensor) -> float:
    return float(torch.linalg.vector_norm(w, dtype=torch.float64))
