"""What rescaled inputs do to the output of an operation: the rule table, and how a graph is gone through.

A rule takes the fields of an operation's inputs, writes the equations without which the output would not
simply be rescaled, and returns the output's field. An operation without a rule is pinned: none of its inputs
may change. That can miss a symmetry, and never invents one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from landscape.transforms.fields import Field, Fields
from landscape.transforms.graph import Graph, Node, where
from landscape.transforms.system import Row, System

Rule = Callable[..., Any]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations, by their names in `torch.ops.aten`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Walk:
    """One pass through a graph.

    Attributes:
        system: the equations.
        fields: statements about fields.
        node: the operation at hand.
        unknown: operation -> the modules where it stood and was pinned for want of a rule.
        floored: log-scales that only matter up to a norm's epsilon; each is zero or one free unknown.
        origins: the first unknown that each operation may have made.
    """

    def __init__(self, graph: Graph, given: dict[Node, Field], system: System):
        self.system, self.fields = system, Fields(system)
        self.graph = graph
        self.unknown: dict[str, list[str]] = {}
        self.floored: list[Row] = []
        self.origins: list[tuple[int, Node]] = []
        self._floors: list[Node] = []  # where the floored log-scales are
        self._values: dict[Node, Any] = dict(given)
        for self.node in graph.nodes:
            if self.node not in self._values:
                self.origins.append((self.system.count, self.node))
                self._values[self.node] = self._value()
        for output in graph.outputs:
            for field in _fields(self._values[output]):
                self.fields.pin(field, f"the network's output, {where(output)}")
        self._isolate_floored()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the operation's (first) output."""
        found = self.node.meta["val"]
        return tuple((found[0] if isinstance(found, tuple | list) else found).shape)

    def uniform(self, field: Field, dims: Sequence[int]) -> Field:
        """Require a field to be constant along dimensions, which are kept with length 1."""
        return self.fields.uniform(field, dims, self.reason("mixes what it sums over"))

    def equal(self, a: Field, b: Field) -> Field:
        """Require two tensors to change alike."""
        return self.fields.equal(a, b, self.reason("adds what does not change"))

    def pin(self, field: Field, why: str = "is not positively homogeneous") -> None:
        """Require a tensor not to change."""
        self.fields.pin(field, self.reason(why))

    def floor(self, field: Field) -> None:
        """Note that a field does not matter, but for a norm's epsilon."""
        forms = self.fields.forms(field)
        self.floored += forms
        self._floors += [self.node] * len(forms)

    def reason(self, why: str) -> str:
        """A sentence about the operation at hand."""
        place = where(self.node)
        return f"{self.name} {why}" + (f" ({place})" if place != self.node.name else "")

    @property
    def name(self) -> str:
        """The operation's name."""
        return operation(self.node)

    def _isolate_floored(self) -> None:
        """Let each floored log-scale be one free unknown, so that all others are exact.

        Of a sum of two free unknowns both would count as inexact, their difference included.
        """
        for row, node in zip(self.floored, self._floors, strict=True):
            if len(self.system.reduce(row)) > 1:
                alone = self.system.unknowns(1, bound=False)[0]
                self.system.require({**row, alone: -1}, "", keep=alone)
                self.origins.append((alone, node))

    def _value(self) -> Any:
        node = self.node
        if node.op in {"get_attr", "placeholder"}:
            val = node.meta.get("val")
            return Field(tuple(val.shape)) if isinstance(val, Tensor) else None
        args, kwargs = cast(
            tuple[Any, Any], torch.fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        )
        if node.target is operator.getitem:
            return args[0][args[1]]
        if self.name not in RULES or not isinstance(node.target, torch._ops.OpOverload):
            return self._pinned((args, kwargs))
        made = RULES[self.name](self, *args, **kwargs)
        return self._pinned((args, kwargs)) if made is NotImplemented else made

    def _pinned(self, inputs: Any) -> Any:
        news = [self.fields.pin(f, self.reason("is not known here")) for f in _fields(inputs)]
        if any(news):
            self.unknown.setdefault(self.name, []).append(where(self.node))
        return constants(self.node.meta.get("val"))


def constants(val: Any) -> Any:
    """Fields of outputs that do not change."""
    if isinstance(val, Tensor):
        return Field(tuple(val.shape))
    return tuple(constants(v) for v in val) if isinstance(val, tuple | list) else None


def operation(node: Node) -> str:
    """An operation's name."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).removeprefix("aten::")
    return str(getattr(target, "__name__", target))


def _fields(tree: Any) -> list[Field]:
    if isinstance(tree, Field):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [f for item in tree for f in _fields(item)] if isinstance(tree, tuple | list) else []
