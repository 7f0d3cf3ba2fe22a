"""Memory that is freed stays with the process, up to a limit."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# In a process of its own: limits are learnt once.
ROUNDS = """
import resource, sys, torch
from landscape import allocator
if sys.argv[1] == "kept":
    allocator.keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    before = pages()
    blocks = [torch.zeros(1 << 20, dtype=torch.uint8) + 1 for _ in range(20)]
    del blocks
    print(pages() - before)
"""


def new_pages(which: str) -> list[int]:
    """New pages in each of two rounds that take and free 20 MiB."""
    command = [sys.executable, "-c", ROUNDS, which]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other rules")
def test_what_was_freed_is_used_again() -> None:
    # In the second round: by itself glibc gives back all 20 MiB after the first one, and learns later.
    without, kept = new_pages("not kept")[1], new_pages("kept")[1]
    assert kept < without / 2
