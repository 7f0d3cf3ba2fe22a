"""Rectifiers that write over their operand, and all that forbids it."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases_base import labels, normal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from landscape import Problem, in_place, testbeds

ITSELF = F.relu


class Counted(TorchDispatchMode):
    """Counts the operations of PyTorch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """Two layers, and a rectifier between them as a function has it."""

    def __init__(self, way: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.relu = nn.Linear(5, 5), nn.Linear(5, 3), nn.ReLU()
        self.way, self.kept = way, []
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def problem_of(model: nn.Module) -> Problem:
    return Problem(model, nn.CrossEntropyLoss(), [(normal(12, 5), labels(12, 3))])


def agrees(problem: Problem) -> bool:
    """Whether the passes use rectifiers in place; first, that they give what a problem that stands there gives."""
    d = 0.1 * normal(problem.size, seed=4)
    with problem.displaced(d) as at:
        for c in (0.0, 1.0, -0.5):
            expected = float(problem.at(problem.parameters_vector() + c * d).value())
            assert at(c) == pytest.approx(expected, rel=1e-13)
        return at.ways.in_place


# --- where they may ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rectifier",
    [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.ELU(0.7), nn.SELU(), nn.SiLU(), nn.Hardswish()],
    ids=lambda m: type(m).__name__,
)
def test_each_rectifier_gives_the_same_bits_in_place(rectifier: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), rectifier, nn.Linear(16, 3), nn.Flatten()).double()
    problem, d = problem_of(model), normal(147, seed=3)
    with problem.displaced(d) as at:
        assert at.ways.in_place
        apart = dataclasses.replace(at.ways, in_place=False)
        with Counted() as over:
            found = at.values([(0.0,), (0.7,)])
        with problem.displaced(d, ways=apart) as plain, Counted() as beside:
            assert plain.values([(0.0,), (0.7,)]) == found
    assert sum(count for name, count in (over.names - beside.names).items() if name.endswith("_")) == 2
    assert agrees(problem)


def test_a_residual_network_rectifies_in_place_only() -> None:
    model = testbeds.resnet20(width=4, blocks=2).eval()
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    problem = Problem(model, nn.CrossEntropyLoss(), [(x, labels(6, 10))])
    with problem.displaced() as at, Counted() as seen:
        at()
    assert seen.names["relu_"] == 13  # the first, and two of each of six blocks
    assert seen.names["relu"] == 0


def test_the_users_batches_and_layers_are_kept_where_that_is_asked() -> None:
    problem = problem_of(nn.Sequential(nn.Linear(5, 3), nn.ReLU()).double())
    with problem.displaced(exact=True) as at, Counted() as seen:
        at()
    assert seen.names["relu"] == 1
    assert not at.ways.in_place


MAY = {
    "temporary": lambda net, x: net.two(F.relu(net.one(x))),
    "bound anew": lambda net, x: net.two(_anew(net, x)),
    "sum": lambda net, x: net.two(F.relu(net.one(x) + x)),
    "shape looked at": lambda net, x: net.two(_shaped(net, x)),
    "twice": lambda net, x: net.two(net.relu(net.one(net.relu(net.one(x))))),
}


def _anew(net: Net, x: Tensor) -> Tensor:
    x = net.one(x)
    x = net.relu(x)
    return x * 2


def _shaped(net: Net, x: Tensor) -> Tensor:
    x = net.one(x)
    assert x.shape[1] == x.size(-1) == 5
    return F.relu(x)


@pytest.mark.parametrize("kind", MAY)
def test_an_operand_that_nobody_reads_is_written_over(kind: str) -> None:
    problem = problem_of(Net(MAY[kind]))
    assert agrees(problem)
    with problem.displaced() as at, Counted() as seen:
        at()
    assert seen.names["relu"] == 0
    assert seen.names["relu_"] == (2 if kind == "twice" else 1)


# --- where they may not --------------------------------------------------------------------------------


def _read_later(net: Net, x: Tensor) -> Tensor:
    h = net.one(x)
    return net.two(net.relu(h) - h)


def _read_in_part(net: Net, x: Tensor) -> Tensor:
    h = net.one(x)
    part = h[:, :2]
    h = F.relu(h)
    return net.two(h) + part.sum(1, keepdim=True)


def _view(net: Net, x: Tensor) -> Tensor:
    whole = net.one(x)
    rectified = net.relu(whole.chunk(2, dim=1)[0])
    return net.two(whole) + rectified.sum(1, keepdim=True)


def _kept_by_the_model(net: Net, x: Tensor) -> Tensor:
    net.kept = [net.one(x)]
    return net.two(F.relu(net.kept[0]) + net.kept[0])


def _numbers_decide(net: Net, x: Tensor) -> Tensor:
    h = net.relu(net.one(x))
    return net.two(h if bool(h.sum() > 0) else -h)


def _shapes_decide(net: Net, x: Tensor) -> Tensor:
    chosen = (x[:, 0] > 0).nonzero()[:, 0]
    added = net.relu(net.one(x[chosen]))
    return net.two(x.index_add(0, chosen, added))


def _handed_to_numpy(net: Net, x: Tensor) -> Tensor:
    h = net.one(x)
    array = h.detach().numpy()
    h = net.relu(h)
    return net.two(h) + float(array.sum())


MAY_NOT = {
    "read later": _read_later,
    "read in part": _read_in_part,
    "view": _view,
    "kept by the model": _kept_by_the_model,
    "numbers decide": _numbers_decide,
    "shapes decide": _shapes_decide,
    "numpy": _handed_to_numpy,
    "the data": lambda net, x: net.two(net.one(net.relu(x))),
    "a parameter": lambda net, x: F.linear(x, F.relu(net.one.weight)) @ net.two.weight.T,
}


@pytest.mark.parametrize("kind", MAY_NOT)
def test_an_operand_that_may_be_read_stays(kind: str) -> None:
    model = Net(MAY_NOT[kind])
    problem = problem_of(model)
    x, weight = problem.batches.data[0][0], model.one.weight
    before = x.clone(), weight.detach().clone()
    assert not agrees(problem)
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


def test_an_output_stays() -> None:
    """The model returns what it rectifies, and the loss reads both."""
    model = Net(lambda net, x: _both(net.one(x)))
    problem = Problem(
        model,
        lambda outputs, y: F.cross_entropy(outputs[0], y) + outputs[1].square().mean(),
        [(normal(12, 5), labels(12, 5))],
        weight=lambda batch: len(batch[1]),
    )
    assert not agrees(problem)


def _both(h: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(h), h


def test_what_a_hook_has_kept_stays() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    kept: list[Tensor] = []
    model[0].register_forward_hook(lambda module, given, made: kept.append(made))
    problem = problem_of(model)
    assert not agrees(problem)


# --- passes that are not like the one that was seen ----------------------------------------------------


def _keeps_at_times(net: Net, x: Tensor) -> Tensor:
    x = net.one(x)
    if net.kept:
        net.kept.append(x)
    x = net.relu(x)
    return net.two(x)


def test_an_operand_that_somebody_holds_later_stays() -> None:
    model = Net(_keeps_at_times)
    problem = problem_of(model)
    x = problem.batches.data[0][0]
    with problem.displaced() as at:
        assert at.ways.in_place
        expected = at()
        model.kept = [None]
        assert at() == expected
        assert torch.equal(model.kept[1], F.linear(x, model.one.weight, model.one.bias))
        assert (model.kept[1] < 0).any()


def _other_at_times(net: Net, x: Tensor) -> Tensor:
    h = net.one(x)
    if net.kept:
        return net.two(F.relu(h) + h)
    del x
    h = net.relu(h)
    return net.two(h)


def test_a_pass_with_other_rectifiers_leaves_their_operands() -> None:
    model = Net(_other_at_times)
    problem = problem_of(model)
    x = problem.batches.data[0][0]
    with problem.displaced() as at:
        assert at.ways.in_place
        model.kept = [None]
        h = F.linear(x, model.one.weight, model.one.bias)
        outputs = F.linear(F.relu(h) + h, model.two.weight, model.two.bias)
        expected = F.cross_entropy(outputs, problem.batches.data[0][1])
        assert at() == pytest.approx(float(expected.detach()), rel=1e-13)


# --- nothing is left behind ----------------------------------------------------------------------------


def test_pytorch_and_the_model_are_as_before_also_after_an_error() -> None:
    model = testbeds.resnet20(width=4, blocks=1).eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    problem = Problem(model, nn.CrossEntropyLoss(), [(x, labels(4, 10))])
    with problem.displaced(torch.zeros(problem.size)) as at:
        assert at.ways.in_place
        at(0.0)
        assert F.relu is ITSELF  # between the passes too
        with pytest.raises(ValueError, match="coefficients"):
            at(0.0, 1.0)
    assert F.relu is ITSELF
    assert not any("forward" in vars(module) for module in model.modules())


def test_other_threads_rectify_as_ever() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU()).double()
    with torch.no_grad():
        calls = in_place.seen(model, lambda: model(normal(2, 5)))
    assert calls
    begun, done = threading.Event(), threading.Event()
    found: list[Any] = []

    def other() -> None:
        begun.wait(10)
        operand = normal(4)
        found.extend([F.relu(operand), operand])
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    answering = in_place.InPlace(model, calls)
    with answering.active():
        answering.begin()
        begun.set()
        assert done.wait(10)
        kept = normal(4)
        assert torch.equal(F.relu(kept), kept.clamp(min=0))
    thread.join()
    assert torch.equal(found[0], normal(4).clamp(min=0))
    assert torch.equal(found[1], normal(4))
    assert F.relu is ITSELF


def test_two_who_end_in_another_order() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU()).double()
    with torch.no_grad():
        calls = in_place.seen(model, lambda: model(normal(2, 5)))
    assert calls
    assert F.relu is ITSELF
    first, second = (in_place.InPlace(nn.Sequential(), calls).active() for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert F.relu is not ITSELF
    second.__exit__(None, None, None)
    assert F.relu is ITSELF


class Own(Tensor):
    """A tensor with a way of its own to be rectified."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {F.relu, ITSELF}:
            return "rectified by its own"
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensors_of_another_kind_are_left_to_themselves() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU()).double()
    with torch.no_grad():
        calls = in_place.seen(model, lambda: model(normal(2, 5)))
    with in_place.InPlace(model, calls).active():
        assert F.relu(normal(3).as_subclass(Own)) == "rectified by its own"
        operand = normal(3)
        assert F.relu(operand, inplace=True) is operand
