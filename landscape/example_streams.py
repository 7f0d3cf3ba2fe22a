"""Random streams that follow from an example's content, wherever it stands."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from landscape import batches as batching
from landscape import seeds


def streams(piece: Any, seed: int, name: str) -> Iterator[torch.Generator]:
    """Yield a generator for each example of a micro-batch; equal examples have equal streams.

    Args:
        piece: examples first.
        seed: of the measurement.
        name: what draws.
    """
    for i in range(batching.examples(piece)):
        digest = hashlib.blake2b(digest_size=8)
        batching.update(digest, batching.tensors(batching.cut(piece, i, i + 1)))
        yield seeds.generator(seed, f"{name}/{digest.hexdigest()}", 0)
