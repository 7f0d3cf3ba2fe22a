"""Rescaling symmetries of networks that the ground truth does not name."""

from __future__ import annotations

import functools

import pytest
import torch
from cases_symmetries import FIVE, Net
from cases_symmetries_own import OWN, Accumulated, Between, Recurrent
from torch import Tensor
from torch.nn import functional as F

from landscape import transforms


@pytest.mark.parametrize("net", OWN, ids=lambda net: net.name)
def test_nodes_layers_and_soundness(net: Net) -> None:
    found = transforms.find(net.problem(), **net.find)
    approximate = sum(not node.exact for node in found.nodes)
    assert (len(found.nodes), len(found.groups), approximate) == (net.nodes, net.groups, net.approximate)
    assert all(group.change <= (1e-14 if group.exact else 1e-5) for group in found.groups)


def test_operations_without_a_rule_are_named_with_their_place() -> None:
    found = transforms.find(Net("", lambda: Accumulated(6, 4), FIVE, 0, 0).problem())
    assert set(found.unknown) == {"fft_rfft"}
    assert "fft_rfft is not known here" in found.excluded["a.weight"]
    recurrent = next(net for net in OWN if net.name == "lstm").problem()
    found = transforms.find(recurrent)
    assert found.unknown == {"lstm": ["cell"]}
    assert "lstm is not known here (cell)" in found.excluded["b.bias"]
    assert Recurrent.__name__ in type(recurrent.evaluator.model).__name__


class Rounded(Between):
    """Whole numbers are not homogeneous, whether something is positive is."""

    def between(self, h: Tensor) -> Tensor:
        return h * (h > 0).double() + h.long().double()


class Shifted(Between):
    """One is not a norm's epsilon."""

    def between(self, h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1)


class Tiny(Between):
    """1e-6 is, but not if what comes of it is used as it stands."""

    def between(self, h: Tensor) -> Tensor:
        size = h.pow(2).mean(-1, keepdim=True) + 1e-6
        return h / size.sqrt() + size


class Clamped(Between):
    def between(self, h: Tensor) -> Tensor:
        return h.clamp(-1, 1) + torch.clamp(h, max=2.0)


class Bounded(Between):
    """Its limits are the defaults, which the graph leaves out."""

    def between(self, h: Tensor) -> Tensor:
        return F.hardtanh(h)


class Drawn(Between):
    def between(self, h: Tensor) -> Tensor:
        return h * torch.bernoulli(h.clamp(min=0).clamp(max=1))


class FilledIn(Between):
    """A tensor filled with a value that changes."""

    def between(self, h: Tensor) -> Tensor:
        return h * torch.zeros_like(h).fill_(h.mean())


class Powers(Between):
    """Degree two, undone by a degree of one half."""

    def between(self, h: Tensor) -> Tensor:
        return (h.pow(2) * h.abs()).pow(0.5)


class Single(Between):
    """A layer that computes in float32 whatever comes in; what it loses is rounding, not a symmetry."""

    def between(self, h: Tensor) -> Tensor:
        return F.relu(h.float()).to(h.dtype)


class Nonzero(Between):
    def between(self, h: Tensor) -> Tensor:
        return h.relu().bool().to(h.dtype) * h


class Stacked(Between):
    def between(self, h: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(h), h], 1).amax(1)


@pytest.mark.parametrize(
    ("model", "nodes"),
    [
        (Rounded, 0),
        (Shifted, 0),
        (Tiny, 0),
        (Clamped, 0),
        (Bounded, 0),
        (Drawn, 0),
        (FilledIn, 1),
        (Powers, 6),
        (Single, 6),
        (Nonzero, 6),
        (Stacked, 6),
    ],
    ids=str,
)
def test_what_looks_homogeneous(model: type[Between], nodes: int) -> None:
    found = transforms.find(Net("", functools.partial(model, 6, 6), FIVE, nodes, 1).problem())
    assert len(found.nodes) == nodes
    assert not [why for why in found.excluded.values() if "verification" in why]


def test_exponents_that_are_no_whole_numbers() -> None:
    found = transforms.find(Net("", lambda: Powers(6, 6), FIVE, 6, 1).problem())
    assert {p for node in found.nodes for p in node.exponents["b.weight"]} <= {-1.5, 1.5}
