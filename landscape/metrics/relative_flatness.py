"""Relative flatness κ = Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'}, w_s the incoming weights of neuron s of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from landscape import layer_rows
from landscape.linear_maps import Maps, Rows
from landscape.metrics.base import setting
from landscape.metrics.base_trace import MappedTrace
from landscape.problem import Problem


@dataclass(frozen=True)
class RelativeFlatness(MappedTrace):
    """Relative flatness Σ ⟨w_s, w_s'⟩ tr H_ss' over pairs of neurons of a layer, w_s their incoming weights.

    H_ss' is the block of the Hessian between the weights of two neurons; those of a convolution are its output
    channels. The layer is one weight tensor, the last unless told otherwise; several add up, each is stored
    too. It is the trace of LᵀHL for L: Z -> W Z, exact or by probes as the adaptive trace. Scaling a layer, or
    the neurons of *this* layer, leaves it as it is where the function does not change; scaling the neurons
    before it does not. The layer's inputs are taken as they are, without the normalization of the authors'
    code.

    Source: Petzka et al. 2021 (arXiv 2001.00939), definition 3.
    """

    name: ClassVar[str] = "relative_flatness"
    headline: ClassVar[str] = "relative_flatness"
    citation: ClassVar[str] = "Petzka et al. 2021, arXiv:2001.00939"

    layer: str | None = setting(None, "which weight tensor, a name or a pattern (the last one)")

    def measured(self, problem: Problem) -> Problem:
        """The problem as a function of the layer's weights."""
        return problem.only(layer_rows.chosen(problem, self.layer))

    def maps(self, part: Problem) -> Maps:
        """Z -> W Z."""
        found = layer_rows.of(part)
        leaves = zip(part.leaves(), found, strict=True)
        return Maps([Rows(leaf.detach(), rows.axis, rows.groups) for leaf, rows in leaves])
