"""From a network's graph to its rescaling symmetries: equations, their solutions, and who they belong to."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from landscape.errors import Refused
from landscape.transforms import graph as graphs
from landscape.transforms import rules_elementwise, rules_layers, rules_norms, rules_shape
from landscape.transforms.exponents import Exponents
from landscape.transforms.graph import Graph, Node
from landscape.transforms.layout import Layout
from landscape.transforms.rules import Walk
from landscape.transforms.system import Row, System

if TYPE_CHECKING:
    from landscape.problem import Problem

_TABLES = (rules_elementwise, rules_layers, rules_norms, rules_shape)  # importing them fills the rule table
_EVALUATED = "_native_batch_norm_legit_no_training"


@dataclass(frozen=True)
class Vector:
    """One solution of the equations: a node symmetry.

    Attributes:
        origin: the module or parameter in which the node is made.
        order: where that is in the forward pass.
        entries: unknown of the layout -> coefficient.
        tensors: parameter or buffer -> the exponents of the factor with which its entries move.
        exact: whether it holds without a norm's epsilon being small.
    """

    origin: str
    order: int
    entries: Row
    tensors: dict[str, tuple[float, ...]]
    exact: bool


@dataclass(frozen=True)
class NullSpace:
    """All solutions.

    Attributes:
        layout: the unknowns of parameters and buffers.
        vectors: a basis, in forward order.
        excluded: parameter -> why no solution moves it.
        unknown: operation without a rule -> where it stands.
        buffers: the buffers that may move.
        rounding: the coarsest rounding of what the network computes.
    """

    layout: Layout
    vectors: list[Vector]
    excluded: dict[str, str]
    unknown: dict[str, list[str]]
    buffers: list[str]
    rounding: float


def solve(problem: Problem, *, move_buffers: bool = True) -> NullSpace:
    """Find all rescalings of parameters, and of running means, that leave a network's outputs alone.

    Args:
        problem: of any form.
        move_buffers: whether running means may move.

    Raises:
        Refused: where the network's graph cannot be read.
    """
    found = graphs.export(problem)
    system = System()
    layout = Layout(system)
    given: dict[Node, Any] = {}
    for node, name in found.parameters.items():
        if name in layout.terms:
            given[node] = layout.field(name)
        else:
            shape, groups = node.meta["val"].shape, _groups(node)
            given[node] = layout.add(name, shape, groups or 1, whole=groups is None and len(shape) > 2)
    running = _running_means(found) if move_buffers else {}
    for node, name in running.items():
        given[node] = layout.add(name, node.meta["val"].shape)
    walk = Walk(found, given, system)
    return NullSpace(
        layout,
        _vectors(layout, walk, set(problem.names)),
        _excluded(layout, found, problem.names),
        walk.unknown,
        sorted(running.values()),
        found.rounding,
    )


def _groups(node: Node) -> int | None:
    """The groups of the convolutions whose weight a placeholder is; None where it is no such weight.

    Such a weight cannot change over its kernel, and its rows and columns say all. Of other tensors with more
    than two dimensions any entry may (heads by features, say).
    """
    found = {_groups_of(user) for user in node.users if len(user.args) > 1 and user.args[1] is node}
    return found.pop() if len(found) == 1 else None


def _groups_of(node: Node) -> int | None:
    name = str(node.target)
    if "conv" not in name:
        return None
    place = 8 if "convolution" in name else 6
    given = node.args[place] if len(node.args) > place else node.kwargs.get("groups", 1)
    return int(given)  # type: ignore[arg-type]


def _running_means(found: Graph) -> dict[Node, str]:
    """The buffers from which an evaluated BatchNorm subtracts."""
    return {
        node: name
        for node, name in found.buffers.items()
        if any(_EVALUATED in str(user.target) and user.args[3] is node for user in node.users)
    }


def _vectors(layout: Layout, walk: Walk, measured: set[str]) -> list[Vector]:
    system = walk.system
    changes: dict[int, dict[str, Row]] = {}  # free unknown -> tensor -> its unknowns
    for name, unknowns in layout.unknowns(layout.terms).items():
        for unknown in unknowns:
            for free, coefficient in system.resolve(unknown).items():
                changes.setdefault(free, {}).setdefault(name, {})[unknown] = coefficient
    floored: set[int] = set()
    for row in walk.floored:
        floored.update(system.reduce(row))
    owner = {u: name for name, us in layout.unknowns(layout.terms).items() for u in us}
    starts = [first for first, _ in walk.origins]
    made = []
    for free, by_tensor in sorted(changes.items()):
        if not measured & by_tensor.keys():
            continue
        local = {name: layout.localized(name, row) for name, row in by_tensor.items()}
        powers = {name: tuple(sorted(map(float, layout.exponents(name, row)))) for name, row in local.items()}
        entries = {u: c for row in local.values() for u, c in row.items()}
        origin, order = _origin(free, owner, starts, walk)
        made.append(Vector(origin, order, entries, powers, free not in floored))
    return sorted(made, key=lambda v: v.order)


def _origin(free: int, owner: dict[int, str], starts: list[int], walk: Walk) -> tuple[str, int]:
    if free in owner:
        name = owner[free]
        node = next(n for n, p in walk.graph.parameters.items() if p == name)
        first = min(walk.graph.nodes.index(user) for user in node.users if user in walk.graph.nodes)
        return name, first
    node = walk.origins[bisect.bisect_right(starts, free) - 1][1]
    return graphs.where(node), walk.graph.nodes.index(node)


def _excluded(layout: Layout, found: Graph, names: list[str]) -> dict[str, str]:
    reasons = dict.fromkeys(found.unused, "the outputs do not depend on it")
    for name, unknowns in layout.unknowns([n for n in names if n in layout.terms]).items():
        if not any(layout.system.resolve(u) for u in unknowns):
            why = [layout.system.reason(u) for u in unknowns]
            reasons[name] = next((w for w in why if w), "no other parameter can undo a change of it")
    return {name: reasons[name] for name in names if name in reasons}


def require_any(found: NullSpace) -> None:
    """Refuse a network without a symmetry.

    Raises:
        Refused: naming its layers and what stands against them.
    """
    if not found.vectors:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(found.excluded.items())[:8])
        raise Refused(f"the network has no rescaling symmetry. {reasons}")


def exponents(found: NullSpace) -> Exponents:
    """The basis as a sparse matrix."""
    at = [(u, k, float(c)) for k, v in enumerate(found.vectors) for u, c in v.entries.items()]
    rows, columns = (torch.tensor([entry[i] for entry in at], dtype=torch.int64) for i in (0, 1))
    values = torch.tensor([c for _, _, c in at], dtype=torch.float64)
    return Exponents((found.layout.system.count, len(found.vectors)), rows, columns, values)
