"""Memory that is freed stays with the process, up to a limit."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

# In a process of its own: limits are learnt once. `mapped` counts the blocks that glibc gives back at once.
SCRIPT = """
import ctypes, sys, torch
from landscape import allocator

class Info(ctypes.Structure):
    _fields_ = [(f"_{i}", ctypes.c_size_t) for i in range(10)]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
def mapped():
    return mallinfo()._3  # hblks
if sys.argv[1] == "kept":
    allocator.keep_freed_memory()
before = mapped()
block = torch.empty(31 << 20, dtype=torch.uint8)
print(mapped() - before)
"""


def mapped(which: str) -> int:
    """Of one block of 31 MiB, how many are given back to the system as soon as they are freed: 0 or 1."""
    command = [sys.executable, "-c", SCRIPT, which]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="tells by glibc 2.33 or later",
)
def test_large_blocks_are_kept_once_they_are_freed() -> None:
    assert mapped("not kept") == 1
    assert mapped("kept") == 0
