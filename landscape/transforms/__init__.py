"""Function-preserving reparameterizations: of a network's weights, and of the space that they live in."""

from landscape.transforms.permutations import Permutations, Units, permutations
from landscape.transforms.smooth import PulledBack, elementwise, pulled_back, radial, weight_normalized
from landscape.transforms.symmetries import Group, Node, Symmetries, find
from landscape.transforms.transformed import Transformed, function_change

__all__ = [
    "Group",
    "Node",
    "Permutations",
    "PulledBack",
    "Symmetries",
    "Transformed",
    "Units",
    "elementwise",
    "find",
    "function_change",
    "permutations",
    "pulled_back",
    "radial",
    "weight_normalized",
]
