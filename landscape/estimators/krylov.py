"""A Krylov space that is built vector by vector, with full reorthogonalisation; the state of `eigsh`.

The space holds orthonormal vectors q_r. Of the first ones, the *expanded* V, the product is known:
A q_i = Σ_r G_ri q_r, a sum over all vectors of the space. The last ones, P, are *pending*: the ends of chains,
each the normalised rest of the last product of its chain. So A V = V T + P B with T and B parts of G, which
is Lanczos with one chain, block Lanczos with several, and thick-restart Lanczos after `restart`; a random
vector can be taken up as a new chain at any time, since A V has no component along it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from landscape.estimators.probes import Operator, draw
from landscape.seeds import generator

Array = NDArray[np.float64]
_CHUNK = 1 << 20  # elements of a float64 working copy: 8 MiB
_ROUNDING = 8.0  # eps ‖A‖: below it the rest of a product is rounding; it must stay below the 10 of `eigsh`
_SYMMETRIC = 1e-2  # ‖(A - Aᵀ) q‖ over ‖A‖ from which A is no rounded symmetric matrix


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs: A ≈ V S diag(values) Sᵀ Vᵀ.

    Attributes:
        values: ascending, shape (j,).
        S: coordinates of the Ritz vectors in the expanded vectors, as columns, shape (j, j).
        coupling: B S, the rest of A y - θ y along each pending vector, shape (pending, j).
    """

    values: Array
    S: Array
    coupling: Array

    @property
    def residuals(self) -> Array:
        """‖A y - θ y‖ by the Lanczos relation, shape (j,)."""
        return np.asarray(np.sqrt((self.coupling**2).sum(axis=0)))


@dataclass
class Krylov:
    """The space. `arrays` and `from_arrays` store it and bring it back, bit for bit.

    Attributes:
        vectors: the vectors q_r as rows, shape (capacity, n); the first `rows` are in use.
        G: q_rᵀ A q_i where known, symmetric, shape (rows, rows).
        expanded: how many vectors, the first ones, have been multiplied by A.
        norm: the largest ‖A q‖ seen, a lower bound of ‖A‖.
        rounding: the largest error of a product that showed: ‖q_rᵀ A q_i - q_iᵀ A q_r‖ over expanded r, or a rest
            too small to begin a vector.
        matvecs: products spent.
        draws: random vectors drawn.
        chains: chains that began with a random vector.
        steps: calls of `expand` since the last of them began.
        goal: steps of the first chains until another was begun; 0 while there is none.
    """

    vectors: Tensor
    G: Array = field(default_factory=lambda: np.zeros((0, 0)))
    expanded: int = 0
    norm: float = 0.0
    rounding: float = 0.0
    matvecs: int = 0
    draws: int = 0
    chains: int = 0
    steps: int = 0
    goal: int = 0
    _ritz: Ritz | None = None

    @classmethod
    def empty(cls, n: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Krylov:
        """Return a space without vectors, with room for `capacity` of them."""
        return cls(torch.empty(capacity, n, dtype=dtype, device=device))

    @property
    def rows(self) -> int:
        """Vectors in use."""
        return len(self.G)

    @property
    def pending(self) -> int:
        """How many vectors, the last ones, wait for their product."""
        return self.rows - self.expanded

    @property
    def full(self) -> bool:
        """Whether the vectors span the whole of R^n."""
        return self.rows == self.vectors.shape[1]

    # --- growing ------------------------------------------------------------------------------------

    def add(self, vector: Tensor) -> bool:
        """Begin a chain with a given vector; False where it lies in the space already."""
        return self._begin(vector.to(torch.float64, copy=True))

    def _begin(self, x: Tensor) -> bool:
        """The same; x is float64, and is used up."""
        length = float(torch.linalg.vector_norm(x))
        if self.full or length == 0.0:
            return False
        _, rest = self._orthogonalise(x.div_(length), 1.0)
        if rest <= 1e3 * torch.finfo(self.vectors.dtype).eps:
            return False
        self._append(x.div_(rest))
        return True

    def draw(self, seed: int, name: str) -> None:
        """Begin a chain with a random vector, uniform on the sphere in what the space leaves out.

        The space must not be full.
        """
        n = self.vectors.shape[1]
        begun = False
        while not begun and not self.full:
            normal = draw(generator(seed, name, self.draws), n, 1, "gaussian", device=self.vectors.device)
            self.draws += 1
            begun = self._begin(normal[:, 0])
        if self.expanded:
            self.goal = self.goal or self.steps
        self.chains, self.steps = self.chains + 1, 0

    def expand(self, A: Operator) -> None:
        """Multiply the pending vectors by A, all in one product, and put what is new of it in their place.

        Raises:
            ValueError: if a product is not finite, or shows that A is not symmetric.
        """
        before, pending = self.rows, slice(self.expanded, self.rows)
        X = product(A, self.vectors[pending].clone())  # which A may write into, or return
        self.matvecs += len(X)
        self.steps += 1
        self.norm = max(self.norm, *_lengths(X))
        negligible = _ROUNDING * torch.finfo(A.dtype).eps * self.norm
        C = np.zeros((before + len(X), len(X)))
        # First along the vectors from the first one that is coupled to these on, few but after a restart: what a
        # pass over all then finds is small, and no second one is needed.
        near = min([self.expanded, *np.flatnonzero(self.G[:, pending].any(axis=1))])
        C[near:before] = self._project(X, near)
        lengths = _lengths(X)
        C[:before] += self._project(X)
        for i in range(len(X)):
            c, rest = self._orthogonalise(X[i], lengths[i], negligible, since=before)
            C[: len(c), i] += c
            if rest > negligible and not self.full:
                C[self.rows, i] = rest
                self._append(X[i].div_(rest))
            else:
                self.rounding = max(self.rounding, rest)
        self._learn(C[: self.rows], pending)
        if self.rounding > max(_SYMMETRIC, 100 * torch.finfo(A.dtype).eps) * self.norm:
            raise ValueError(
                f"the operator is not symmetric: u·Av and v·Au differ by {self.rounding / self.norm:.1e} of its "
                "norm. This usually means that two products see different data or different dropout; "
                "make the products deterministic, or pass (A + Aᵀ)/2"
            )

    def _learn(self, C: Array, columns: slice) -> None:
        """Enter the products' components; those with expanded vectors were known, from symmetry."""
        if self.expanded:
            defect = C[: self.expanded] - self.G[: self.expanded, columns]
            self.rounding = max(self.rounding, float(np.sqrt((defect**2).sum(axis=0)).max()))
        C[: self.expanded] = self.G[: self.expanded, columns]
        C[columns] = (C[columns] + C[columns].T) / 2
        self.G[:, columns] = C
        self.G[columns, :] = C.T
        self.expanded = columns.stop
        self._ritz = None

    def _append(self, unit: Tensor) -> None:
        self.vectors[self.rows] = unit
        G = np.zeros((self.rows + 1, self.rows + 1))
        G[:-1, :-1] = self.G
        self.G = G
        self._ritz = None

    def _orthogonalise(
        self, x: Tensor, length: float, negligible: float = 0.0, since: int = 0
    ) -> tuple[Array, float]:
        """Take the space out of x, in place, until nothing more of it is found; return what and the rest.

        After a pass that removes little, x is orthogonal to rounding (Daniel, Gragg, Kaufman, Stewart 1976).

        Args:
            x: a vector.
            length: its norm; where the first vectors have been taken out already, its norm before.
            negligible: a length at which to stop.
            since: how many of the first vectors need not be taken out again, unless much was found.
        """
        total = np.zeros(self.rows)
        for _ in range(4):
            if since < self.rows:
                total[since:] += self._project(x[None], since)[:, 0]
            rest = float(torch.linalg.vector_norm(x))
            if rest > 0.7 * length or rest <= negligible:
                break
            length, since = rest, 0
        return total, rest

    def _project(self, X: Tensor, since: int = 0) -> Array:
        """Take the vectors from the one numbered `since` out of the rows of X, in place; return the coefficients.

        Returns:
            Of shape (rows - since, len(X)).
        """
        chosen = slice(since, self.rows)
        total = torch.zeros(self.rows - since, len(X), dtype=torch.float64, device=X.device)
        for part in self._pieces():
            total += self.vectors[chosen, part].double() @ X[:, part].T
        for part in self._pieces():
            X[:, part].addmm_(total.T, self.vectors[chosen, part].double(), alpha=-1.0)
        return np.asarray(total.cpu())

    def _pieces(self) -> Iterator[slice]:
        """Cut the n components so that float64 copies stay small; float64 itself needs no copy."""
        n = self.vectors.shape[1]
        width = n if self.vectors.dtype == torch.float64 else max(1, _CHUNK // max(1, self.rows))
        return (slice(start, start + width) for start in range(0, n, width))

    # --- reading ------------------------------------------------------------------------------------

    def ritz(self) -> Ritz:
        """Solve the small eigenproblem of T = Vᵀ A V."""
        if self._ritz is None:
            T = self.G[: self.expanded, : self.expanded]
            # Divided by a power of two: what is scaled by one gives the same bits, and nothing underflows.
            scale = 2.0 ** np.frexp(np.abs(T).max(initial=0.0) or 1.0)[1]
            values, S = np.linalg.eigh(T / scale)
            self._ritz = Ritz(values * scale, S, self.G[self.expanded :, : self.expanded] @ S)
        return self._ritz

    def words(self) -> str:
        """The products spent and the outermost Ritz values with their residuals, in words."""
        ritz = self.ritz()
        ends = ", ".join(f"{ritz.values[i]:.4g} (residual {ritz.residuals[i]:.1e})" for i in (-1, 0))
        return f"{self.matvecs} products: {ends}"

    def combine(self, S: Array, dtype: torch.dtype) -> Tensor:
        """Return the vectors V S as columns, shape (n, S.shape[1])."""
        weights = torch.from_numpy(np.ascontiguousarray(S.T)).to(self.vectors.device)
        out = torch.empty(self.vectors.shape[1], S.shape[1], dtype=dtype, device=self.vectors.device)
        for part in self._pieces():
            out[part] = (weights @ self.vectors[: self.expanded, part].double()).T.to(dtype)
        return out

    def restart(self, keep: NDArray[np.intp]) -> None:
        """Keep these Ritz vectors and the pending vectors only (Wu, Simon 2000, doi:10.1137/S0895479898334605)."""
        ritz, count, rows = self.ritz(), len(keep), len(keep) + self.pending
        weights = torch.from_numpy(np.ascontiguousarray(ritz.S[:, keep].T)).to(self.vectors.device)
        for part in self._pieces():
            block = self.vectors[: self.rows, part].clone()
            self.vectors[:count, part] = (weights @ block[: self.expanded].double()).to(block.dtype)
            self.vectors[count:rows, part] = block[self.expanded :]
        self.G = np.zeros((rows, rows))
        self.G[range(count), range(count)] = ritz.values[keep]
        self.G[count:, :count] = ritz.coupling[:, keep]
        self.G[:count, count:] = ritz.coupling[:, keep].T
        self.expanded = count
        self._ritz = None

    # --- storing ------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the state as arrays, each vector in use as one of its own; on a CPU they are views."""
        kept = {name: np.array(getattr(self, name)) for name in _STORED}
        rows = {_row(i): self.vectors[i].cpu().numpy() for i in range(self.rows)}
        return {"capacity": np.array(len(self.vectors)), **kept, **rows}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], device: torch.device | str = "cpu") -> Krylov:
        """Return the state that `arrays` stored, in memory of its own.

        The vectors are taken out of `arrays` one by one, so that they are not held twice.
        """
        n, dtype = len(arrays[_row(0)]), torch.from_numpy(arrays[_row(0)][:1].copy()).dtype
        state = cls.empty(n, int(arrays["capacity"]), dtype, torch.device(device))
        for name in _STORED:
            value = np.array(arrays[name], order="C")
            setattr(state, name, value if value.ndim else value.item())
        for i in range(state.rows):
            state.vectors[i] = torch.from_numpy(arrays.pop(_row(i)))
        return state


def _row(index: int) -> str:
    return f"vector_{index}"


def _lengths(X: Tensor) -> list[float]:
    return [float(length) for length in torch.linalg.vector_norm(X, dim=1)]


_STORED = ("G", "expanded", "norm", "rounding", "matvecs", "draws", "chains", "steps", "goal")


def product(A: Operator, rows: Tensor) -> Tensor:
    """Return A applied to each row, as float64 rows.

    Raises:
        ValueError: if the product has another shape or is not finite.
    """
    block = rows.to(A.dtype)
    out = A @ (block[0] if len(block) == 1 else block.T.contiguous())
    if out.numel() != rows.numel():
        raise ValueError(
            f"A @ V has shape {tuple(out.shape)} for V of shape {tuple(block.T.shape)}; allowed is the same"
        )
    X = out.detach().reshape(rows.shape[1], len(rows)).T.double().contiguous()
    # The sum is cheaper than a look at each number; that of huge finite numbers may overflow.
    if not math.isfinite(float(X.sum())) and not bool(torch.isfinite(X).all()):
        raise ValueError(
            "a product A @ v holds NaN or infinity. This usually means (a) the model has diverged, (b) an "
            "operation without a finite second derivative (a square root at 0), or (c) overflow of a 16-bit "
            "type: look at the loss and the gradient, or measure in float32"
        )
    return X
