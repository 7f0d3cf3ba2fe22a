"""Inner products of the mean vectors of classes, in lots that fit into the memory, and G3 example by example."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from landscape import seeds
from landscape.class_structure.vectors import Source
from landscape.class_structure.work import NAME, Arrays, Limits, Task


class Grams(Task):
    """Inner products of the mean vectors of some classes with those of all later ones.

    As many vectors as fit are held; against them pass all later ones, class by class, made anew for each lot
    that is held. With a sketch, each vector is made once and hashed.

    Args:
        source: of the vectors.
        limits: on memory.
        classes: indices of the classes.
    """

    def __init__(self, source: Source, limits: Limits, classes: range):
        self.source, self.limits, self.classes, self.units = source, limits, classes, len(classes)
        S, C = source.layout.classes, source.layout.outputs
        size = max(1, limits.capacity if limits.sketch else limits.capacity // 2)
        first, last = classes.start * C, classes.stop * C
        lots = [range(lo, min(lo + size, last)) for lo in range(first, last, size)]
        self.size, self.width = size, limits.sketch or S * C
        if limits.sketch:
            self.pairs = [(range(c * C, (c + 1) * C), c) for c in classes]
        else:
            self.pairs = [(lot, d) for lot in lots for d in range(lot.start // C, S)]
        self.passes = self._counted(lots)
        self._held: tuple[range, Tensor] | None = None

    def _counted(self, lots: list[range]) -> float:
        """A pass over a class for each vector that is made; for an attribution two more, and one for its norm."""
        shares, C = self.source.layout.counts / self.source.layout.counts.sum(), self.source.layout.outputs
        own = 0.0 if self.limits.sketch else sum(float(shares[v // C]) for lot in lots for v in lot)
        streamed = sum(
            C * float(shares[d]) for lot, d in self.pairs if self.limits.sketch or (d + 1) * C > lot.stop
        )
        return (
            own
            + streamed
            + 3 * C * float(shares[self.classes.start : self.classes.stop].sum()) * self.limits.attribution
        )

    def start(self) -> Arrays:
        """Nothing is known."""
        most, C = int(self.source.layout.counts.max()), self.source.layout.outputs
        found = {"rows": np.full((self.units, C, self.width), np.nan), "position": np.array(0)}
        if self.limits.attribution:
            found["within"] = np.full((self.units, most), np.nan)
        return found

    def step(self, state: Arrays) -> Arrays:
        """One lot against one class."""
        lot, d = self.pairs[int(state["position"])]
        C = self.source.layout.outputs
        whole = state["rows"].reshape(-1, self.width)
        begin = self.classes.start * C
        for lo in range(0, C, self.size):
            columns = range(lo, min(lo + self.size, C))
            X = self._vectors(range(d * C + columns.start, d * C + columns.stop), lot)
            if self.limits.sketch:
                at = d * C - begin + columns.start
                whole[at : at + len(columns)] = self._sketched(X).cpu().numpy()
            else:
                products = self._lot(lot) @ X.T
                whole[lot.start - begin : lot.stop - begin, d * C + lo : d * C + columns.stop] = (
                    products.cpu().numpy()
                )
            if self.limits.attribution and d * C in lot:
                self._attribute(state["within"][d - self.classes.start], d, columns, X)
        state["position"] = state["position"] + 1
        return state

    def result(self, state: Arrays) -> list[Arrays] | None:
        """One row of blocks for each class."""
        if int(state["position"]) < len(self.pairs):
            return None
        self._held = None
        names = ["rows", "within"] if self.limits.attribution else ["rows"]
        hashed = (
            0 < self.limits.sketch < self.source.problem.size
        )  # single precision does not add to that error
        found = {**state, "rows": state["rows"].astype(np.float32)} if hashed else state
        return [{name: found[name][i] for name in names} for i in range(self.units)]

    def _lot(self, lot: range) -> Tensor:
        if self._held is None or self._held[0] != lot:
            self._held = None  # let go before the next is made
            self._held = lot, self._made(lot)
        return self._held[1]

    def _vectors(self, wanted: range, lot: range) -> Tensor:
        if not self.limits.sketch and lot.start <= wanted.start and wanted.stop <= lot.stop:
            return self._lot(lot)[wanted.start - lot.start : wanted.stop - lot.start]
        return self._made(wanted)

    def _made(self, wanted: range) -> Tensor:
        """Vectors by their place c C + c'."""
        C, rows = self.source.layout.outputs, []
        for c in range(wanted.start // C, -(-wanted.stop // C)):
            lo, hi = max(wanted.start - c * C, 0), min(wanted.stop - c * C, C)
            rows.append(self.source.pulled(c, torch.eye(C, dtype=torch.float64)[lo:hi]))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _sketched(self, X: Tensor) -> Tensor:
        """Entries with random signs, added up in random buckets (Charikar et al. 2002): ⟨Sx, Sy⟩ ≈ ⟨x, y⟩."""
        n, d = X.shape[1], self.limits.sketch
        if n <= d:
            return torch.nn.functional.pad(X, (0, d - n))
        stream = seeds.generator(self.limits.seed, f"{NAME}/sketch", 0)
        buckets = torch.randint(d, (n,), generator=stream).to(X.device)
        signs = (2 * torch.randint(2, (n,), generator=stream) - 1).to(X)
        return torch.zeros(len(X), d).to(X).index_add_(1, buckets, X * signs)

    def _attribute(self, within: np.ndarray, c: int, columns: range, X: Tensor) -> None:
        """Add to each example's share of tr G3, Σ_c' ω_ic' ‖u_ic' - v_cc'‖², what some columns give."""
        source = self.source
        count = int(source.layout.counts[c])
        if columns.start == 0:
            within[:count] = count * source.squares(c, self.limits.memory // 2).cpu().numpy()
        lengths, picked, at = X.square().sum(1), list(columns), 0
        for probabilities, _, s in source.pushed(c, X):
            p = probabilities[:, picked].T
            inner = s[torch.arange(len(picked)), :, picked]
            if source.weighting == "2019":
                more = lengths[:, None] - 2 * p.sqrt() * inner
            else:
                more = p * (lengths[:, None] - 2 * inner)
            stop = at + p.shape[1]
            within[at:stop] += source.factor * more.sum(0).cpu().numpy()
            at = stop
        if columns.stop == source.layout.outputs:
            within[:count] /= count * source.layout.classes
