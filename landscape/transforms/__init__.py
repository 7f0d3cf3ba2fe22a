"""Function-preserving reparameterizations: of a network's weights, and of the space that they live in."""

from landscape.transforms.symmetries import Group, Node, Symmetries, find
from landscape.transforms.transformed import Transformed, function_change

__all__ = ["Group", "Node", "Symmetries", "Transformed", "find", "function_change"]
