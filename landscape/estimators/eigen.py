"""Extremal eigenpairs, with their residuals: thick-restart block Lanczos."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from landscape import stages
from landscape.estimators.krylov import Array, Krylov
from landscape.estimators.probes import Operator, order

WHICH: Final = ("largest", "smallest", "both")
MEMORY: Final = 2 << 30
_STREAM = "eigsh"
_ROUNDING = 10.0  # eps ‖A‖ that no residual is asked to fall below
_KEPT = 0.4  # of the room beside the wanted pairs that a restart keeps filled


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs θ, v of a symmetric A; within `residual_norms` of each value lies an eigenvalue.

    Attributes:
        values: descending, float64, shape (k,).
        vectors: orthonormal columns, of the type of A, shape (n, k).
        residual_norms: ‖Av - θv‖, float64, shape (k,). By the Lanczos relation, without further products; in it
            are the rounding of the products, measured as the largest difference of u·Av and v·Au (at least
            2 eps ‖A‖), and that of the sums, (8 + 2√matvecs) eps ‖A‖.
        converged: residual, sums taken as exact, <= max(rtol·|θ|, 10·eps·‖A‖), with eps that of the type of
            A; bool, shape (k,).
        matvecs: products with A that were spent.
    """

    values: Tensor
    vectors: Tensor
    residual_norms: Tensor
    converged: Tensor
    matvecs: int

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the result as arrays."""
        return {name: np.asarray(torch.as_tensor(value).cpu()) for name, value in vars(self).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], device: torch.device | str) -> EigenResult:
        """Return the result that `arrays` stored."""
        found: dict[str, Any] = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        return cls(**{**found, "matvecs": int(found["matvecs"])})


def eigsh(
    A: Operator,
    k: int = 10,
    which: str = "largest",
    rtol: float = 1e-3,
    seed: int = 0,
    *,
    block: int | None = None,
    copies: bool = True,
    start: Tensor | None = None,
    memory: int = MEMORY,
    max_matvecs: int | None = None,
) -> EigenResult:
    """Return the k largest or smallest eigenvalues of A, or both, with eigenvectors and residuals.

    Lanczos with full reorthogonalisation, in blocks and with thick restarts. It stops as soon as
    ‖Av - θv‖ <= max(rtol·|θ|, 10·eps·‖A‖) for all pairs wanted.

    *Multiple eigenvalues.* From c random vectors, a Krylov space contains exactly min(c, m) eigenvectors of
    an eigenvalue of multiplicity m, with probability one. So where fewer copies are found than there are
    random chains, there are no more; where as many are, a fresh random vector is carried as far as the
    others were, until this holds for every eigenvalue that could displace a returned one (further copies of
    the last one could not). Values that differ by less than their residuals count as copies. What can still
    be missed is an eigenvalue in whose direction a random vector has next to nothing: the share of it that
    stands below ε of the average has probability below √ε, and the steps needed grow as log(1/ε).

    Args:
        A: symmetric operator of shape (n, n).
        k: pairs wanted, 1 <= k <= n; with "both" at each end.
        which: "largest", "smallest" (algebraically, sign included) or "both".
        rtol: relative residual that is asked for; 0 asks for 10·eps·‖A‖.
        seed: any integer.
        block: chains at first; by default 1 for k = 1, where no copy can matter, else 2. More of them need
            more products; a product with several vectors at once costs less for each.
        copies: False to return what the first chains find, as other Lanczos codes do.
        start: vectors to begin with, shape (n,) or (n, b), for example eigenvectors of a similar matrix. They
            come before at least one random chain, which is carried ⌈ln n⌉ steps at least.
        memory: bytes for the basis. It holds m = min(n, max(100, 4k)) vectors in float64; where this is
            too little memory, in the type of A, or fewer; the longest wanted part survives each restart.
        max_matvecs: where the search ends unconverged, by default 100·k + 1000.

    Returns:
        k pairs; with "both" min(2k, n).

    Raises:
        ValueError: for an argument outside its range, an operator that is not square or not symmetric,
            a product that is not finite, or too little memory.

    Source: Wu, Simon (2000), doi:10.1137/S0895479898334605, on thick restarts; Golub, Underwood (1977) on
    blocks. The handling of copies is ours.

    >>> result = eigsh(torch.diag(torch.tensor([4.0, -5.0, 1.0, 2.0, 3.0]).double()), k=1, which="both")
    >>> [round(value, 3) for value in result.values.tolist()]
    [4.0, -5.0]
    """
    solver = Lanczos.for_operator(
        A, k, which, rtol, seed,
        block=block, copies=copies, warm=start is not None, memory=memory, max_matvecs=max_matvecs,
    )  # fmt: skip
    stage = stages.begin()
    if stage.result is not None:
        return EigenResult.from_arrays(stage.result, A.device)
    state = solver.init(A.device, start) if stage.state is None else Krylov.from_arrays(stage.state, A.device)
    while (result := solver.result(state)) is None:
        state = solver.step(A, state)
        stage.save(state.arrays)
    return EigenResult.from_arrays(stage.finish(result.arrays()), A.device) if stage.is_kept else result


@dataclass(frozen=True)
class Lanczos:
    """The solver behind `eigsh`: a configuration; what changes is in a `Krylov` state.

    `init`, then `step` until `result` is not None. A state that is stored by `Krylov.arrays` and brought
    back by `Krylov.from_arrays` between any two steps goes on to the same result, bit for bit.
    Attributes that `eigsh` does not explain: `capacity`, vectors that the basis may hold; `storage`, their
    type; `dtype`, that of A; `least_depth`, steps that a random chain goes at least.
    """

    n: int
    k: int
    which: str
    rtol: float
    seed: int
    block: int
    copies: bool
    capacity: int
    storage: torch.dtype
    dtype: torch.dtype
    least_depth: int
    max_matvecs: int

    @classmethod
    def for_operator(
        cls,
        A: Operator,
        k: int = 10,
        which: str = "largest",
        rtol: float = 1e-3,
        seed: int = 0,
        *,
        block: int | None = None,
        copies: bool = True,
        warm: bool = False,
        memory: int = MEMORY,
        max_matvecs: int | None = None,
    ) -> Lanczos:
        """Return the solver for operators of the shape and type of A; `warm` if `start` will be given.

        Raises:
            ValueError: as `eigsh`.
        """
        n = order(A)
        if not 1 <= k <= n:
            raise ValueError(f"k = {k} eigenvalues of an operator of shape ({n}, {n}); allowed is 1 to {n}")
        if which not in WHICH:
            raise ValueError(f"which = {which!r} is unknown; allowed are {', '.join(map(repr, WHICH))}")
        if not 0 <= rtol < 1:
            raise ValueError(f"rtol = {rtol}; allowed is 0 <= rtol < 1, for example 1e-3")
        block = min(n, (1 if k == 1 else 2) if block is None else block)
        if block < 1:
            raise ValueError(f"block = {block}; allowed is 1 or more")
        wanted = min(n, 2 * k if which == "both" else k)
        limit = 100 * wanted + 1000 if max_matvecs is None else max_matvecs
        if limit < wanted:
            raise ValueError(f"max_matvecs = {limit}; {wanted} eigenpairs need at least {wanted} products")
        capacity, storage = _room(n, wanted, block, A.dtype, memory)
        least = math.ceil(math.log(n)) if warm else 0
        return cls(n, k, which, rtol, seed, block, copies, capacity, storage, A.dtype, least, limit)

    @property
    def eps(self) -> float:
        """The rounding of the type of A."""
        return float(torch.finfo(self.dtype).eps)

    @property
    def wanted(self) -> int:
        """Pairs that the result holds."""
        return min(self.n, 2 * self.k if self.which == "both" else self.k)

    def init(self, device: torch.device | str = "cpu", start: Tensor | None = None) -> Krylov:
        """Return the state before the first product.

        Raises:
            ValueError: if start does not have n rows, is not finite, or holds more than the basis.
        """
        state = Krylov.empty(self.n, self.capacity, self.storage, torch.device(device))
        given = 0
        if start is not None:
            for column in self._columns(start):
                given += state.add(column.to(state.vectors.device))
        for _ in range(min(self.n - given, max(int(self.copies), self.block - given))):
            state.draw(self.seed, _STREAM)
        return state

    def _columns(self, start: Tensor) -> Tensor:
        columns = start.detach().reshape(len(start), -1).T
        room = self.capacity // 2 - self.block
        if columns.shape[1] != self.n or not 1 <= len(columns) <= max(1, room):
            raise ValueError(
                f"start has shape {tuple(start.shape)}; allowed is ({self.n},) or ({self.n}, b) with b <= {room}"
            )
        if not bool(torch.isfinite(columns).all()):
            raise ValueError("start holds NaN or infinity; leave it out to begin with random vectors")
        return columns

    def step(self, A: Operator, state: Krylov) -> Krylov:
        """Make one product of A with the ends of all chains; the state is changed in place.

        Raises:
            ValueError: if the product is not finite or shows that A is not symmetric.
        """
        idle = self._settled(state) or not state.pending
        fresh = int(idle and not state.full and not self._growing(state))
        # All chains go on, not the new one alone: rounding turns the ends of the others towards further
        # copies once their space is nearly invariant, and the new one is orthogonal to them.
        growing = state.pending + fresh
        if min(self.n, state.rows + fresh + growing) > self.capacity:
            state.restart(self._kept(state, growing))
        if fresh:
            state.draw(self.seed, _STREAM)
        state.expand(A)
        return state

    def result(self, state: Krylov) -> EigenResult | None:
        """Return the pairs, or None while it has to go on."""
        everything = state.full and not state.pending
        done = self._settled(state) and (not self.copies or self._complete(state))
        if not (done or everything or state.matvecs >= self.max_matvecs):
            return None
        ritz, chosen = state.ritz(), self._chosen(state)[::-1]
        values = ritz.values[chosen]
        vectors = state.combine(ritz.S[:, chosen], self.dtype)
        converged = self._measured(state)[chosen] <= self._allowed(state, values)
        on_device = (
            torch.from_numpy(np.ascontiguousarray(x)).to(vectors.device)
            for x in (values, self._stated(state)[chosen], converged)
        )
        values_, residuals_, converged_ = on_device
        return EigenResult(values_, vectors, residuals_, converged_, state.matvecs)

    # --- what is wanted -----------------------------------------------------------------------------

    def _chosen(self, state: Krylov) -> NDArray[np.intp]:
        """Return the indices of the wanted pairs among the Ritz values, ascending; fewer at the very first."""
        count = len(state.ritz().values)
        indices = np.arange(count)
        top, bottom = indices >= count - self.k, indices < self.k
        return np.flatnonzero({"largest": top, "smallest": bottom, "both": top | bottom}[self.which])

    def _allowed(self, state: Krylov, values: Array) -> Array:
        return np.asarray(np.maximum(self.rtol * np.abs(values), _ROUNDING * self.eps * state.norm))

    def _measured(self, state: Krylov) -> Array:
        """Return the residuals of all Ritz pairs, with the rounding of the products as far as it showed."""
        noise = max(state.rounding, 2 * self.eps * state.norm)
        return np.asarray(np.hypot(state.ritz().residuals, noise))

    def _stated(self, state: Krylov) -> Array:
        """Return the residuals that are reported: with the rounding of our own sums too."""
        own = float(torch.finfo(self.storage).eps) * (8 + 2 * math.sqrt(state.matvecs)) * state.norm
        return np.asarray(np.hypot(self._measured(state), own))

    def _settled(self, state: Krylov) -> bool:
        """Whether more products would not lower the residual of a wanted pair that is still too large."""
        if state.expanded < self.wanted:
            return False
        ritz, chosen = state.ritz(), self._chosen(state)
        return bool((ritz.residuals[chosen] <= self._allowed(state, ritz.values[chosen])).all())

    # --- chains -------------------------------------------------------------------------------------

    def _growing(self, state: Krylov) -> bool:
        """Whether the last chain has not gone as far as the first ones had when it began."""
        return bool(state.pending) and state.steps < max(state.goal, self.least_depth)

    def _complete(self, state: Krylov) -> bool:
        """Whether there are more random chains, fully grown, than copies of an eigenvalue that matters."""
        values, radius = state.ritz().values, self._stated(state)
        downwards, upwards = np.arange(len(values))[::-1][: self.k], np.arange(len(values))[: self.k]
        ends = {"largest": [downwards], "smallest": [upwards], "both": [downwards, upwards]}[self.which]
        copies = max(_most_copies(values[end], radius[end]) for end in ends)
        return (not copies or state.chains > copies) and not self._growing(state)

    def _kept(self, state: Krylov, growing: int) -> NDArray[np.intp]:
        """Return the Ritz pairs that survive a restart: those wanted, and the next ones to them."""
        count = state.expanded
        room = self.capacity - 2 * growing
        if room < self.wanted:
            raise ValueError(
                f"the basis holds {self.capacity} vectors, too few for {self.wanted} eigenpairs and "
                f"{growing} chains (an eigenvalue with many copies needs as many); "
                "raise memory, or ask for fewer pairs"
            )
        keep = min(count, self.wanted + int(_KEPT * (room - self.wanted)))
        top = {"largest": keep, "smallest": 0, "both": keep - keep // 2}[self.which]
        indices = np.arange(count)
        return indices[(indices < keep - top) | (indices >= count - top)]


def _most_copies(values: Array, radius: Array) -> int:
    """Return the size of the largest group of values within their radii, the last group left out."""
    together = np.abs(np.diff(values)) <= radius[:-1] + radius[1:]
    sizes = np.diff(np.flatnonzero(np.concatenate([[True], ~together, [True]])))
    return int(sizes[:-1].max(initial=0))


def _room(n: int, wanted: int, block: int, dtype: torch.dtype, memory: int) -> tuple[int, torch.dtype]:
    """Return how many vectors the basis may hold, and of which type, from shapes and stated memory alone."""
    best, least = min(n, max(100, 4 * wanted)), min(n, wanted + 4 * block + 2)
    if memory // (8 * n) >= best:
        return best, torch.float64
    # Half the precision is no loss where the products have no more; half the restarts are a gain.
    single = torch.float64 if dtype == torch.float64 else torch.float32
    capacity = min(best, memory // (single.itemsize * n))
    if capacity < least:
        raise ValueError(
            f"memory = {memory} bytes holds {capacity} vectors of length {n}; {wanted} eigenpairs need at "
            f"least {least}: allow {least * single.itemsize * n} bytes, or ask for fewer pairs"
        )
    return capacity, single
