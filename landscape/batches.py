"""Batches of any structure: read again and again, moved, cut, counted, fingerprinted."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Batches that fit are kept, so that a loader's work is done once and not once a product.
CACHE_BYTES = 1 << 30


class Batches:
    """The data as yielded: a re-iterable of batches.

    A batch is any nest of tuples, lists and mappings around tensors. Floating-point tensors are
    brought to `dtype`, all tensors to `device`. Up to 1 GiB of batches is kept after the first pass.

    Args:
        data: a list of batches, a `DataLoader`, any object that can be iterated more than once; one
            pair of tensors is taken as a single batch.

    Raises:
        TypeError: for a generator (it would be empty at the second pass), or for a `Dataset` (it
            yields examples, not batches).
    """

    def __init__(self, data: Any, device: torch.device, dtype: torch.dtype):
        if isinstance(data, tuple) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
            data = [data]
        if isinstance(data, torch.utils.data.Dataset):
            raise TypeError(
                f"data is a {type(data).__name__}, which yields single examples; "
                "give batches: DataLoader(dataset, batch_size=256, shuffle=False)"
            )
        if not isinstance(data, Iterable):
            raise TypeError(
                f"data is a {type(data).__name__}; allowed is a re-iterable of batches, such as a DataLoader"
            )
        if iter(data) is data:
            raise TypeError(
                f"data is a {type(data).__name__} that can be read only once; every product needs a pass over "
                "it. Give a list of batches or a DataLoader."
            )
        self.data, self.device, self.dtype = data, device, dtype
        self._kept: list[Any] | None = None
        self._reading: tuple[int, Iterator[Any]] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches; the first complete pass keeps them if they fit."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Any] | None = []
        total = 0
        for batch in self.fresh():
            if kept is not None:
                total += size(batch)
                kept.append(batch)
                if total > CACHE_BYTES:
                    kept = None
            yield batch
        self._kept = kept

    def fresh(self) -> Iterator[Any]:
        """Yield the batches as the user's object yields them now, past what was kept.

        Raises:
            ValueError: if there is none.
        """
        empty = True
        for batch in self.data:
            empty = False
            yield tree_map(self._move, batch)
        if empty:
            raise ValueError("data yields no batch; give at least one")

    def rows(self, start: int, stop: int) -> Iterator[Any]:
        """Yield examples start to stop, cut as the batches are.

        Reading goes on where it last stopped, so that blocks in order take one pass.

        Raises:
            ValueError: if examples cannot be told apart.
        """
        seen, source = self._reading or (0, iter(self))
        if seen > start or self._kept is not None:
            seen, source = 0, iter(self)
        self._reading = None
        for batch in source:
            count = examples(batch)
            first, last = max(start - seen, 0), min(stop - seen, count)
            if first < last:
                yield cut(batch, first, last)
            if seen + count >= stop:
                if self._kept is None:  # the rest of this batch is still to be read
                    rest = [batch] if seen + count > stop else []
                    self._reading = (
                        seen if rest else seen + count,
                        itertools.chain(rest, source),
                    )
                return
            seen += count

    def to(self, device: torch.device, dtype: torch.dtype) -> Batches:
        """Return the same data on another device or in another dtype."""
        return self if (device, dtype) == (self.device, self.dtype) else Batches(self.data, device, dtype)

    def _move(self, t: Tensor) -> Tensor:
        return t.to(self.device, self.dtype if t.is_floating_point() else t.dtype)


def tree_map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to each tensor of a nest; everything else stays."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: tree_map(function, value) for key, value in tree.items()}
        return mapped if type(tree) is dict else _rebuilt(tree, mapped)
    if isinstance(tree, tuple | list):
        items = [tree_map(function, value) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def _rebuilt(tree: Mapping[str, Any], mapped: dict[str, Any]) -> Any:
    try:
        return type(tree)(mapped)  # type: ignore[call-arg]
    except TypeError:
        return mapped


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a nest, in order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


def size(tree: Any) -> int:
    """Return the bytes of the tensors of a nest."""
    return sum(t.numel() * t.element_size() for t in tensors(tree))


def examples(tree: Any) -> int:
    """Return the number of examples: the length of the first dimension that all tensors share.

    Raises:
        ValueError: if there is no tensor, or if the tensors do not agree.
    """
    lengths = {t.shape[0] if t.ndim else 1 for t in tensors(tree)}
    if len(lengths) != 1:
        raise ValueError(
            f"the number of examples of a batch is unclear: its tensors have first dimensions "
            f"{sorted(lengths) or 'of no tensor'}. The first dimension must count examples in every tensor "
            "(recurrent layers: batch_first=True); or say what a batch weighs: Problem(..., weight=...)."
        )
    return lengths.pop()


def cut(tree: Any, start: int, stop: int) -> Any:
    """Return examples start to stop of a batch (a view)."""
    return tree_map(lambda t: t[start:stop], tree)


def fingerprint(batches: Iterable[Any]) -> str:
    """Hash the batches as yielded, their cut included; 16 hexadecimal digits."""
    digest = new_digest("")
    for _ in hashed(batches, digest):
        pass
    return str(digest.hexdigest())


def hashed(batches: Iterable[Any], digest: Any) -> Iterator[Any]:
    """Yield the batches and add each, with where it ends, to a hash."""
    for batch in batches:
        update(digest, tensors(batch))
        digest.update(b"|")
        yield batch


def new_digest(text: str) -> Any:
    """Begin a hash with a text."""
    return hashlib.blake2b(text.encode(), digest_size=8)


def update(digest: Any, items: Iterable[Tensor]) -> None:
    """Add the dtype, shape and bytes of tensors to a hash."""
    for item in items:
        t = item.detach().cpu().contiguous()
        digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy() if t.numel() else b"")
