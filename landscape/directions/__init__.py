"""Directions in parameter space that know what they are of: drawn, computed, or read from a file.

A direction is displaced along as it is: nothing is normalized or orthogonalized but on request, and then its
origin says so.
"""

from __future__ import annotations

from landscape.directions.base import Directions, gram, load
from landscape.directions.drawn import filter_normalized, gaussian, layer_normalized
from landscape.directions.of_loss import eigenvectors, gradient
from landscape.directions.paths import Trajectory, difference, pca, point, trajectory

__all__ = [
    "Directions",
    "Trajectory",
    "difference",
    "eigenvectors",
    "filter_normalized",
    "gaussian",
    "gradient",
    "gram",
    "layer_normalized",
    "load",
    "pca",
    "point",
    "trajectory",
]
