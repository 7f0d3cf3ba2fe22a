"""Matrix-free numerics: they know of an operator only its shape, dtype, device and `@`."""

from landscape.estimators.hutchinson import HutchinsonResult, hutchinson
from landscape.estimators.hutchpp import HutchppResult, hutchpp
from landscape.estimators.xtrace import XtraceResult, xtrace

__all__ = ["HutchinsonResult", "HutchppResult", "XtraceResult", "hutchinson", "hutchpp", "xtrace"]
