"""What the C library does with memory that is freed: keep it, within limits that it learns."""

from __future__ import annotations

import functools

import torch

_LARGEST = (32 << 20) - (1 << 14)  # the largest block by which glibc raises its limits


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MiB of freed memory, once in a process.

    Else it gives the memory of one product back to the system, and asks for it again page by page in the next:
    of a small model that is a seventh of the time. glibc keeps up to twice the largest block that was freed,
    so a block is freed here that was never touched and takes no memory; elsewhere that has no effect.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")
