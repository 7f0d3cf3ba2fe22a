"""The only source of randomness: (seed, name, unit index) -> `torch.Generator`.

Streams are spawned, never counted up: the streams of seed 1 have nothing in common with those of
seed 0 (a tool that seeds its replicates s, s+1, ... draws the same numbers twice).
"""

from __future__ import annotations

import hashlib

import torch

_MASK = 0xFFFFFFFF


def generator(seed: int, name: str, index: int) -> torch.Generator:
    """Return the CPU generator of one unit of work.

    PyTorch's CPU generator keeps 32 bits of its seed. Hashing (seed, name, index) into them would
    repeat a stream by chance (a birthday collision is likely at 10^5 units), so only (seed, name) is
    hashed, and the index runs through a bijection of 32-bit integers: within one measurement all
    streams are distinct.

    Args:
        seed: the seed of the measurement, any integer.
        name: what draws, for example `"trace"`.
        index: which unit draws, 0 <= index < 2**32.

    Raises:
        ValueError: if `index` is out of range.

    >>> a = generator(0, "trace", 3); b = generator(0, "trace", 3)
    >>> torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))
    True
    """
    if not 0 <= index <= _MASK:
        raise ValueError(f"unit index {index} is out of range; allowed is 0 to 2**32 - 1")
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key, offset = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    stream = torch.Generator()
    stream.manual_seed(_mix((_mix(index ^ key) + offset) & _MASK))
    return stream


def _mix(x: int) -> int:
    """Bijection of 32-bit integers: each step, an xor-shift or an odd product, can be undone.

    Constants: the finalizer of MurmurHash3 (Appleby, public domain).
    """
    x ^= x >> 16
    x = (x * 0x85EBCA6B) & _MASK
    x ^= x >> 13
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
