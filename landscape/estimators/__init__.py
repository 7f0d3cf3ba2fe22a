"""Matrix-free numerics: they know of an operator only its shape, dtype, device and `@`."""

from landscape.estimators.density import PRESETS, DensityEstimate, density
from landscape.estimators.eigen import EigenResult, eigsh
from landscape.estimators.hutchinson import HutchinsonResult, hutchinson
from landscape.estimators.hutchpp import hutchpp
from landscape.estimators.logdet import LogdetEstimate, logdet
from landscape.estimators.power import PowerResult, power_iteration
from landscape.estimators.probes import TraceEstimate
from landscape.estimators.xtrace import xtrace

__all__ = [
    "PRESETS",
    "DensityEstimate",
    "EigenResult",
    "HutchinsonResult",
    "LogdetEstimate",
    "PowerResult",
    "TraceEstimate",
    "density",
    "eigsh",
    "hutchinson",
    "hutchpp",
    "logdet",
    "power_iteration",
    "xtrace",
]
