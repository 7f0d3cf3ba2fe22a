"""Which units of a network can be exchanged: a label for each index of each dimension of each tensor.

Indices that must be permuted together carry one label. Hidden units end up with a label of their own, in the rows of
one weight, the columns of the next and all that lies between; the network's inputs and outputs, and what an operation
cannot be asked to permute, end up with the label RIGID.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

RIGID = 0

Dims = list[Tensor]  # labels (size,) for each dimension of a tensor


class Labels:
    """Labels, and which of them are the same."""

    def __init__(self) -> None:
        self._parent = [RIGID]

    def fresh(self, size: int) -> Tensor:
        """New labels, one for each index."""
        start = len(self._parent)
        self._parent.extend(range(start, start + size))
        return torch.arange(start, start + size)

    def find(self, label: int) -> int:
        """The least label that is the same."""
        root = label
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[label] != root:
            self._parent[label], label = root, self._parent[label]
        return root

    def tie(self, *dims: Tensor) -> Tensor:
        """Make labels of dimensions of one size the same, index by index."""
        for other in dims[1:]:
            for a, b in zip(dims[0].tolist(), other.tolist(), strict=True):
                low, high = sorted((self.find(a), self.find(b)))
                self._parent[high] = low
        return dims[0]

    def freeze(self, labels: Tensor) -> Tensor:
        """Make labels RIGID."""
        return self.tie(torch.zeros_like(labels), labels)

    def freeze_all(self, dims: Dims) -> Dims:
        """Make all labels of a tensor RIGID."""
        return [self.freeze(labels) for labels in dims]

    def broadcast(self, *tensors: Dims) -> Dims:
        """Tie tensors that broadcast, dimension by dimension from the last."""
        ndim = max(len(dims) for dims in tensors)
        found = []
        for place in range(-ndim, 0):
            there = [dims[place] for dims in tensors if len(dims) >= -place]
            wide = [labels for labels in there if len(labels) > 1]
            found.append(self.tie(*wide) if wide else there[0])
        return found

    def contracted(self, operands: Sequence[tuple[Dims, str]], output: str) -> Dims:
        """Tie the dimensions of the same letter; return those of the output's letters."""
        by_letter: dict[str, list[Tensor]] = {}
        for dims, letters in operands:
            for labels, letter in zip(dims, letters, strict=True):
                by_letter.setdefault(letter, []).append(labels)
        tied = {}
        for letter, every in by_letter.items():
            wide = [labels for labels in every if len(labels) > 1]
            tied[letter] = self.tie(*wide) if wide else every[0]
        return [tied[letter] for letter in output]

    def reshaped(self, dims: Dims, shape: Sequence[int]) -> Dims:
        """Labels after `view`: kept where dimensions are merged and only one of them can be permuted."""
        found: Dims = []
        for old, new in blocks([len(labels) for labels in dims], list(shape)):
            parts = dims[old[0] : old[1]]
            sizes = list(shape[new[0] : new[1]])
            wide = [i for i, labels in enumerate(parts) if bool(labels.any())]
            merged = [size for size in sizes if size != 1]
            if len(merged) <= 1 and len(wide) <= 1:
                along = [len(labels) for labels in parts]
                kept = torch.zeros(along, dtype=torch.int64)
                if wide:
                    view = [-1 if i == wide[0] else 1 for i in range(len(parts))]
                    kept = parts[wide[0]].reshape(view).expand(along)
                flat = kept.reshape(-1)
                found += [flat if size != 1 else torch.zeros(1, dtype=torch.int64) for size in sizes]
                if not merged and wide:
                    self.freeze(flat)
            else:
                self.freeze_all(parts)
                found += rigid(sizes)
        return found


def rigid(shape: Sequence[int]) -> Dims:
    """Labels of a tensor that cannot be permuted."""
    return [torch.zeros(size, dtype=torch.int64) for size in shape]


def blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Cut two shapes of one number of entries into the shortest runs of dimensions with equal products.

    >>> blocks((2, 3, 4, 4), (2, 48))
    [((0, 1), (0, 1)), ((1, 4), (1, 2))]
    """
    found = []
    i = j = 0
    while i < len(old) or j < len(new):
        start, other = i, j
        left = old[i] if i < len(old) else 1
        right = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while left != right:
            if left < right:
                left *= old[i]
                i += 1
            else:
                right *= new[j]
                j += 1
        found.append(((start, i), (other, j)))
    return found


def of(val: Any) -> Any:
    """Rigid labels for what an operation returns."""
    if isinstance(val, Tensor):
        return rigid(val.shape)
    return tuple(of(v) for v in val) if isinstance(val, tuple | list) else None
