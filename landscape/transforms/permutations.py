"""Permutations of hidden units, which leave a network's function alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from landscape import seeds
from landscape.errors import Refused
from landscape.transforms import graph as graphs
from landscape.transforms.label_rules import LabelWalk
from landscape.transforms.labels import RIGID, Labels
from landscape.transforms.transformed import Transformed, moved, outputs, relative_change, widest

if TYPE_CHECKING:
    from landscape.problem import Problem

_EXACT = 2.0**12  # in units of rounding: sums are added up in another order, nothing else changes

# (tensor, dimension) -> the indices that belong to a unit, ascending
Places = dict[tuple[str, int], list[int]]


@dataclass(frozen=True)
class Units:
    """Hidden units that can be exchanged for one another.

    Attributes:
        index: which group.
        name: the first parameter of which they have rows.
        places: for each unit, (tensor, dimension) -> the indices that are its own; of parameters and buffers.
        change: the largest relative change of the outputs at a random permutation.
    """

    index: int
    name: str
    places: tuple[Places, ...] = field(repr=False)
    change: float

    def __len__(self) -> int:
        return len(self.places)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parameters and buffers that are permuted."""
        return tuple(dict.fromkeys(name for name, _ in self.places[0]))


@dataclass(frozen=True)
class Permutations:
    """The exchanges of hidden units that leave a network's function alone.

    Heads of attention, and channels within groups of a convolution, stay where they are.

    Attributes:
        problem: whose they are.
        groups: layers of exchangeable units.
        rounding: the coarsest rounding of what the network computes, in float64 where the model runs in it.
    """

    problem: Problem
    groups: tuple[Units, ...]
    rounding: float

    def random(self, seed: int = 0, index: int = 0) -> Transformed:
        """Permute the units of every layer at random."""
        draws = seeds.generator(seed, "permutation", index)
        return self.at([torch.randperm(len(g), generator=draws).tolist() for g in self.groups])

    def swap(self, group: int, i: int, j: int) -> Transformed:
        """Exchange two units of a group.

        Raises:
            ValueError: if there is no such group or unit.
        """
        orders = [list(range(len(g))) for g in self.groups]
        if not 0 <= group < len(orders) or not {i, j} <= set(orders[group]):
            sizes = ", ".join(f"{g.index} ({g.name}, {len(g)} units)" for g in self.groups)
            raise ValueError(f"got units {i} and {j} of group {group}; allowed are {sizes or 'none'}")
        orders[group][i], orders[group][j] = j, i
        return self.at(orders)

    def at(self, orders: Sequence[Sequence[int]]) -> Transformed:
        """Put unit orders[g][i] of each group g in place i.

        Raises:
            Refused: if the network has no exchangeable units, or if the function is not what it was.
            ValueError: if these are no permutations.
        """
        if not self.groups:
            raise Refused("the network has no hidden units that can be exchanged")
        if [sorted(order) for order in orders] != [list(range(len(g))) for g in self.groups]:
            raise ValueError(
                f"allowed are permutations of {[len(g) for g in self.groups]} units, one for each group"
            )
        order, buffers = _moves(self.problem, list(zip(self.groups, orders, strict=True)))
        ones = torch.ones(self.problem.size, dtype=torch.float64)
        return moved(
            self.problem,
            diagonal=ones,
            buffers=buffers,
            exact=True,
            name="permutation",
            order=order,
            rounding=self.rounding if self.problem.dtype == torch.float64 else 0.0,
        )


def permutations(problem: Problem, *, seed: int = 0) -> Permutations:
    """Find the layers of a network whose hidden units can be exchanged, from its graph, and verify them.

    Args:
        problem: of any form.
        seed: of the permutations at which layers are verified; one that fails is left out.

    Raises:
        Refused: if the forward pass depends on the data's values.
    """
    wide = widest(problem)
    graph = graphs.export(wide)
    found = _units(wide, graph)
    piece = graphs.example(wide)
    before = outputs(wide, piece)
    groups: list[Units] = []
    for k, (name, places) in enumerate(found):
        order = torch.randperm(len(places), generator=seeds.generator(seed, "exchange", k)).tolist()
        index, buffers = _moves(wide, [(Units(0, name, places, 0.0), order)])
        there = wide.at(wide.parameters_vector()[index.to(wide.device)], {**wide.buffers(), **buffers})
        change = relative_change(before, outputs(there, piece))
        if change <= _EXACT * graph.rounding:
            groups.append(Units(len(groups), name, places, change))
    return Permutations(problem, tuple(groups), graph.rounding)


def _units(problem: Problem, graph: graphs.Graph) -> list[tuple[str, tuple[Places, ...]]]:
    """Units by layer: those with labels in the same dimensions of the same tensors, activations included."""
    labels = Labels()
    named = {**graph.parameters, **graph.buffers}
    tensors = {
        name: [labels.fresh(size) for size in node.meta["val"].shape]
        for node, name in reversed(named.items())
    }
    walk = LabelWalk(graph, {node: tensors[name] for node, name in named.items()}, labels)
    own: dict[int, Places] = {}
    kinds: dict[int, dict[tuple[str, int], int]] = {}
    for name, dims in tensors.items():
        _collect(labels, f"tensor {name}", dims, kinds)
        for dim, each in enumerate(dims):
            for i, label in enumerate(each.tolist()):
                own.setdefault(labels.find(label), {}).setdefault((name, dim), []).append(i)
    for node, dims in walk.values.items():
        if isinstance(dims, list):
            _collect(labels, f"node {node.name}", dims, kinds)
    layers: dict[tuple[object, ...], list[int]] = {}
    for label in own:
        if label != RIGID:
            layers.setdefault(tuple(sorted(kinds[label].items())), []).append(label)
    first = {name: i for i, name in enumerate(problem.names)}
    made = []
    for members in layers.values():
        names = [name for name, _ in own[members[0]] if name in first]
        if len(members) > 1 and names:
            made.append((min(names, key=first.__getitem__), tuple(own[m] for m in members)))
    return sorted(made, key=lambda item: first[item[0]])


def _collect(
    labels: Labels, place: str, dims: list[Tensor], kinds: dict[int, dict[tuple[str, int], int]]
) -> None:
    for dim, each in enumerate(dims):
        for label in each.tolist():
            there = kinds.setdefault(labels.find(label), {})
            there[place, dim] = there.get((place, dim), 0) + 1


def _moves(
    problem: Problem, permuted: Sequence[tuple[Units, Sequence[int]]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The positions (n,) that the entries of T(θ) come from, and the permuted buffers."""
    taken: dict[tuple[str, int], dict[int, int]] = {}
    for units, order in permuted:
        for place, source in enumerate(order):
            for key, indices in units.places[place].items():
                taken.setdefault(key, {}).update(zip(indices, units.places[source][key], strict=True))
    positions = dict(zip(problem.names, problem.space.split(torch.arange(problem.size)), strict=True))
    held: Mapping[str, Tensor] = problem.buffers()
    buffers: dict[str, Tensor] = {}
    for (name, dim), changes in taken.items():
        now = positions[name] if name in positions else buffers.get(name, held[name])
        index = torch.arange(now.shape[dim])
        index[list(changes)] = torch.tensor(list(changes.values()))
        made = now.index_select(dim, index.to(now.device))
        if name in positions:
            positions[name] = made
        else:
            buffers[name] = made
    return torch.cat([p.reshape(-1) for p in positions.values()]), buffers
