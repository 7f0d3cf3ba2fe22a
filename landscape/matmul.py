"""A faster matrix product of float32 numbers, where the processor has one that is as exact.

PyTorch multiplies by MKL; oneDNN's kernel, which is faster on some processors, hides behind a setting whose name
allows bf16. Whether it rounds like float32 is probed, once in a process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn import functional

from landscape import seeds

# A sound product has errors of about √K eps, and kernels differ by a factor of two or so; products in bf16
# err ten thousand times more.
_ALLOWED_ERROR = 4.0
# Shapes (M, K, N) of the probe: small, large, and thin along each side.
_PROBED = ((16, 16, 16), (256, 1024, 256), (4, 2048, 64), (512, 8, 512))


@functools.cache
def faster_is_exact() -> bool:
    """Whether oneDNN's matrix product under the name "bf16" rounds like float32 on this processor.

    The name allows oneDNN to compute in bf16; only processors with matrix units for it (AMX) do. The
    others get oneDNN's float32 kernel, which is faster than MKL's on AMD.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return error("bf16") <= _ALLOWED_ERROR * error("none")


def error(precision: str) -> float:
    """The largest relative error ‖C − AB‖ / ‖AB‖ in float32 over fixed matrices, against float64."""
    worst = 0.0
    with precision_set(precision):
        for i, (m, k, n) in enumerate(_PROBED):
            draws = seeds.generator(0, "kernels", i)
            a, b = torch.randn(m, k, generator=draws), torch.randn(k, n, generator=draws)
            exact = a.double() @ b.double()
            bias = torch.zeros(n)
            made = [
                a @ b,
                a.T.contiguous().T @ b,
                functional.linear(a, b.T.contiguous(), bias),
                torch.bmm(a.expand(2, m, k), b.expand(2, k, n))[1],
            ]
            worst = max(worst, *(float((c - exact).norm() / exact.norm()) for c in made))
    return worst


def is_faster() -> bool:
    """Whether the faster kernel is to be taken: the user has left the setting alone, and it is exact here."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return str(setting.fp32_precision) == "none" and faster_is_exact()


def faster(wanted: bool) -> AbstractContextManager[None]:
    """Multiply by the faster kernel where that is wanted; else as it is."""
    return precision_set("bf16") if wanted else nullcontext()


@contextmanager
def precision_set(precision: str) -> Iterator[None]:
    """Multiply by this name; afterwards, also after an exception, the setting is as before."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    try:
        setting.fp32_precision = precision
        yield
    finally:
        setting.fp32_precision = before
