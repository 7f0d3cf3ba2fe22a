"""The rescaling symmetries of a network, verified, and the points of its orbit that they lead to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from landscape import seeds
from landscape.transforms import nullspace
from landscape.transforms.balance import balanced
from landscape.transforms.exponents import Exponents
from landscape.transforms.transformed import Transformed, moved, widest
from landscape.transforms.verification import Verifier, log_moves, moves

if TYPE_CHECKING:
    from landscape.problem import Problem

# Relative change of the outputs up to which a symmetry is what its tag says: for an exact one in units of rounding
# (they stay below 50 on all networks tried); a norm's ε shows in changes of 1e-9 to 1e-2.
_EXACT = 2.0**12
_APPROXIMATE = 0.1


@dataclass(frozen=True)
class Node:
    """One rescaling: of a channel, a unit, a feature of a head.

    Attributes:
        index: which column of `Symmetries.exponents` it is.
        group: the index of its group.
        exponents: parameter or buffer -> exponents p of the factors α^p with which some of its entries move.
        exact: whether it leaves the function alone in exact arithmetic; else only up to a norm's ε.
    """

    index: int
    group: int
    exponents: Mapping[str, tuple[float, ...]]
    exact: bool


@dataclass(frozen=True)
class Group:
    """The nodes of one layer: those that begin in one activation and move the same tensors.

    Attributes:
        index: its place in forward order.
        name: the module in which the nodes begin.
        nodes: their indices.
        parameters: the parameter tensors that move.
        buffers: the buffers that must move with them.
        exponents: parameter or buffer -> all exponents with which its nodes move it.
        exact: as of its nodes.
        change: the largest relative change of the outputs at random factors of all nodes.
    """

    index: int
    name: str
    nodes: tuple[int, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    exponents: Mapping[str, tuple[float, ...]]
    exact: bool
    change: float

    def __str__(self) -> str:
        powers = [f"{name} α^{'/'.join(f'{p:g}' for p in each)}" for name, each in self.exponents.items()]
        kind = "exact" if self.exact else "up to a norm's ε"
        return f"{self.index} {self.name}: {len(self.nodes)} nodes, {kind}, {', '.join(powers)}"


@dataclass(frozen=True)
class Symmetries:
    """The rescalings that leave a network's function alone.

    Attributes:
        problem: whose they are.
        nodes: the node symmetries, a basis of all, in forward order.
        groups: the nodes by layer.
        excluded: parameter -> why no rescaling of it can be undone.
        unknown: operation -> where it stood; it has no rule, so nothing that reaches it may change.
        function_change: the largest relative change of the outputs under all exact nodes together at random
            factors, in float64 where the model runs in it; nan without any.
        exponents: of the nodes, a sparse matrix.
    """

    problem: Problem
    nodes: tuple[Node, ...] = field(repr=False)
    groups: tuple[Group, ...]
    excluded: Mapping[str, str]
    unknown: Mapping[str, Sequence[str]]
    function_change: float
    exponents: Exponents = field(repr=False)
    _found: nullspace.NullSpace = field(repr=False)

    def __str__(self) -> str:
        lines = [f"{len(self.nodes)} nodes in {len(self.groups)} groups", *map(str, self.groups)]
        return "\n".join([*lines, *(f"not included: {name}: {why}" for name, why in self.excluded.items())])

    def group(self, which: str | int = "auto") -> Group:
        """Choose a group.

        Args:
            which: its index or name; "auto" is the first in forward order that is exact, else the first.

        Raises:
            Refused: if the network has no symmetry.
            ValueError: if there is no such group.
        """
        nullspace.require_any(self._found)
        if which == "auto":
            return next((g for g in self.groups if g.exact), self.groups[0])
        for group in self.groups:
            if which in {group.index, group.name}:
                return group
        names = ", ".join(f"{g.index} ({g.name})" for g in self.groups[:20])
        raise ValueError(f"there is no symmetry group {which!r}; allowed is 'auto', 'all' or one of {names}")

    def scale(self, alpha: float, group: str | int | Sequence[str | int] = "auto") -> Transformed:
        """T_α: scale a layer's incoming tensors by α and its outgoing ones by 1/α.

        Args:
            alpha: the factor, positive.
            group: a group by index or name, several, "auto" (see `group`) or "all".

        Raises:
            ValueError: if alpha is not positive, or there is no such group.
            Refused: if the network has no symmetry, or if the function is not what it was.

        Source: Dinh et al., "Sharp Minima Can Generalize For Deep Nets", definition 5, arXiv:1703.04933.
        """
        nullspace.require_any(self._found)
        if group == "all":
            chosen = list(self.groups)
        else:
            chosen = [self.group(g) for g in ([group] if isinstance(group, str | int) else group)]
        factors = torch.ones(len(self.nodes), dtype=torch.float64)
        for each in chosen:
            factors[list(each.nodes)] = alpha
        return self.at(factors, name=f"α-scale {alpha:g} of {', '.join(g.name for g in chosen)}")

    def direction(self, groups: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The exponents p with which everything moves, by α^p, where all nodes of these groups move by α.

        Returns:
            Those of the parameters, (n,), float64, and of the buffers that move, of their shape.
        """
        z = torch.zeros(len(self.nodes), dtype=torch.float64)
        for index in groups:
            z[list(self.groups[index].nodes)] = 1.0
        return log_moves(self._found.layout, self.exponents, self.problem, z)

    def scale_node(self, alpha: float, node: int) -> Transformed:
        """Scale one channel or unit: what comes in by α, what goes out by 1/α.

        Raises:
            ValueError: if alpha is not positive or there is no such node.
        """
        if not 0 <= node < len(self.nodes):
            raise ValueError(f"there is no node {node}; allowed is 0 to {len(self.nodes) - 1}")
        factors = torch.ones(len(self.nodes), dtype=torch.float64)
        factors[node] = alpha
        return self.at(factors, name=f"α-scale {alpha:g} of node {node}")

    def at(self, factors: Tensor, name: str = "rescaling") -> Transformed:
        """Scale every node by a factor of its own.

        Args:
            factors: (nodes,), positive.
            name: what is done, for messages.

        Raises:
            ValueError: if a factor is not positive.
            Refused: if the function is not what it was.
        """
        if factors.shape != (len(self.nodes),) or not bool(((factors > 0) & factors.isfinite()).all()):
            raise ValueError(
                f"got factors {factors.tolist()}; allowed are {len(self.nodes)} positive numbers"
            )
        z = factors.double().log()
        moving = z.nonzero()[:, 0].tolist()
        diagonal, buffers = moves(self._found.layout, self.exponents, self.problem, z)
        return moved(
            self.problem,
            diagonal=diagonal,
            buffers=buffers,
            exact=all(self.nodes[k].exact for k in moving),
            name=name,
            rounding=0.0 if self.problem.dtype != torch.float64 else self._found.rounding,
        )

    def random(
        self, spread: float = 1.0, seed: int = 0, index: int = 0, *, exact: bool = True
    ) -> Transformed:
        """A random point of the orbit: factors exp(spread · N(0, 1)).

        Args:
            spread: standard deviation of the factors' logarithms.
            seed: of the draw.
            index: which draw of that seed.
            exact: whether to leave out nodes that are exact only up to a norm's ε.
        """
        nullspace.require_any(self._found)
        z = spread * torch.randn(
            len(self.nodes), dtype=torch.float64, generator=seeds.generator(seed, "orbit", index)
        )
        return self.at((z * self._taking_part(exact)).exp(), name="random point of the orbit")

    def balanced(self, *, exact: bool = True) -> Transformed:
        """The balanced (canonical) point of the orbit: that of least ‖θ‖, the same from all over the orbit.

        Rows whose scale a norm takes out again have norm 1 there.

        Args:
            exact: whether to leave out nodes that are exact only up to a norm's ε.

        Raises:
            Refused: if the orbit has no such point.
        """
        nullspace.require_any(self._found)
        theta = self.problem.parameters_vector().double().cpu()
        pieces = zip(self.problem.names, self.problem.space.split(theta), strict=True)
        taking = self._taking_part(exact)
        z = balanced(self._found.layout, self.exponents.only(taking), {name: t**2 for name, t in pieces})
        return self.at(z.exp(), name="balanced point of the orbit")

    def _taking_part(self, exact: bool) -> Tensor:
        return torch.tensor([node.exact or not exact for node in self.nodes])


def find(problem: Problem, *, buffers: Literal["move", "frozen"] = "move", seed: int = 0) -> Symmetries:
    """Find the rescaling symmetries of a network, exactly, from its graph, and verify them.

    A rescaling multiplies parameters by positive factors. Those that leave all outputs alone are the null space
    of a linear system in the factors' logarithms, which each operation adds its equations to; it is solved in
    rational numbers. Each layer is then verified at random factors on a few examples, in float64 where the
    model runs in it. A verification that fails removes the group and says so in `excluded`.

    Args:
        problem: of any form; with `forward=` the loss is what may not change.
        buffers: "move" lets the running means of evaluated BatchNorms move with the parameters; "frozen"
            finds only what leaves all buffers alone.
        seed: of the factors at which symmetries are verified.

    Raises:
        Refused: if the forward pass depends on the data's values, with the reason.
        ValueError: if `buffers` is something else.
    """
    if buffers not in {"move", "frozen"}:
        raise ValueError(f"buffers is {buffers!r}; allowed is 'move' or 'frozen'")
    wide = widest(problem)
    found = nullspace.solve(wide, move_buffers=buffers == "move")
    test = Verifier(wide, found.layout, nullspace.exponents(found), seed)
    groups: list[Group] = []
    kept: list[int] = []
    failed: dict[str, str] = {}
    for members in _by_layer(found.vectors):
        vectors = [found.vectors[k] for k in members]
        exact = vectors[0].exact
        change = test.change(members, len(groups))
        if not change <= (_EXACT * found.rounding if exact else _APPROXIMATE):
            why = f"its rescaling failed the verification: the outputs changed by {change:.1e}"
            failed |= dict.fromkeys(vectors[0].tensors, why)
            continue
        columns = tuple(range(len(kept), len(kept) + len(members)))
        powers: dict[str, set[float]] = {}
        for name, each in (item for v in vectors for item in v.tensors.items()):
            powers.setdefault(name, set()).update(each)
        group = Group(
            index=len(groups),
            name=_name(vectors[0].origin, groups),
            nodes=columns,
            parameters=tuple(name for name in powers if name not in found.buffers),
            buffers=tuple(name for name in powers if name in found.buffers),
            exponents={name: tuple(sorted(each)) for name, each in powers.items()},
            exact=exact,
            change=change,
        )
        groups.append(group)
        kept += members
    found = dataclasses.replace(found, vectors=[found.vectors[k] for k in kept])
    nodes = tuple(
        Node(k, g.index, found.vectors[k].tensors, found.vectors[k].exact) for g in groups for k in g.nodes
    )
    moving = {name for node in nodes for name in node.exponents}
    excluded = {**found.excluded, **{name: why for name, why in failed.items() if name not in moving}}
    exact_ones = [kept[node.index] for node in nodes if node.exact]
    together = test.change(exact_ones, len(found.vectors)) if exact_ones else math.nan
    exponents = nullspace.exponents(found)
    return Symmetries(problem, nodes, tuple(groups), excluded, found.unknown, together, exponents, found)


def _by_layer(vectors: Sequence[nullspace.Vector]) -> list[list[int]]:
    """The vectors of each layer: those that begin in one activation and move the same tensors."""
    keyed: dict[tuple[object, ...], list[int]] = {}
    for k, v in enumerate(vectors):
        keyed.setdefault((v.order, v.origin, frozenset(v.tensors), v.exact), []).append(k)
    return list(keyed.values())


def _name(origin: str, before: Sequence[Group]) -> str:
    """The origin's name, numbered where several groups begin there."""
    again = sum(g.name.partition("#")[0] == origin for g in before)
    return f"{origin}#{again + 1}" if again else origin
