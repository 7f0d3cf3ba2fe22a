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

from landscape import Problem, batches, in_place, testbeds, ways

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
        at()
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
    with problem.displaced() as at:
        at()
        with Counted() as seen:
            at()
    assert seen.names["relu_"] == 13  # the first, and two of each of six blocks
    assert seen.names["relu"] == 0


def test_ways_are_tried_in_place_before_they_are_taken() -> None:
    problem = problem_of(nn.Sequential(nn.Linear(5, 3), nn.ReLU()).double())
    with problem.session(), Counted() as seen:
        assert ways.choose(problem).in_place
    assert seen.names["relu_"] == 1


def test_batches_whose_examples_cannot_be_told_apart() -> None:
    """Time comes first: a batch of seven steps and twelve targets."""
    problem = Problem(
        nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).double(),
        forward=lambda model, batch: F.cross_entropy(model(batch["x"]).mean(0), batch["y"]),
        data=[{"x": normal(7, 12, 5), "y": labels(12, 3)}], weight=lambda batch: len(batch["y"]),
    )  # fmt: skip
    assert agrees(problem)


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
    with problem.displaced() as at:
        at()
        with Counted() as seen:
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


def _neighbours(net: Net, x: Tensor) -> Tensor:
    """Two rectifiers without a call between them; the first one's operand is read by examples that come later."""
    h = net.one(x)
    g = net.one(x + 1)
    rectified = F.relu(h)
    rectified = rectified + F.relu(g)
    return net.two(torch.where(x[:, :1] > 1, h, rectified))


def _recorded(net: Net, x: Tensor) -> Tensor:
    h = net.one(x)
    net.record = getattr(net, "record", x.new_zeros(0))
    net.record.data = h
    h = F.relu(h)
    return net.two(h) + net.record.sum(1, keepdim=True)


@pytest.mark.parametrize("way", [*MAY_NOT.values(), _neighbours, _recorded])
def test_what_must_not_is_seen_and_not_only_found_out_by_what_it_gives(way: Any) -> None:
    model = Net(way)
    with torch.no_grad():
        assert in_place.seen(model, model, normal(4, 5)) == in_place.NONE
    agrees(problem_of(Net(way)))


def test_neighbours_whose_operand_some_examples_read() -> None:
    x = normal(12, 5)
    x[:4, 0], x[4:, 0] = -1, 2  # the first four, on which ways are tried, do not read it
    problem = Problem(Net(_neighbours), nn.CrossEntropyLoss(), [(x, labels(12, 3))])
    agrees(problem)


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


class Recurrent(nn.Module):
    """As many rectifiers as the sequences are long, then one whose operand is read again."""

    def __init__(self, rectify: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.on, self.out = (nn.Linear(5, 5) for _ in range(3))
        self.rectify = rectify

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x[:, 0])
        for t in range(1, x.shape[1]):
            h = self.into(x[:, t]) + self.on(h)
            h = self.rectify(h)
        z = self.out(h)
        return self.rectify(z) - 0.5 * z


@pytest.mark.parametrize("kind", ["module", "function"])
def test_sequences_of_different_length(kind: str) -> None:
    model = Recurrent(nn.ReLU() if kind == "module" else _rectified).double()
    data = [(normal(8, n, 5, seed=n), labels(8, 5)) for n in (6, 4, 2)]
    assert agrees(Problem(model, nn.CrossEntropyLoss(), data))


def _views_of_many(net: Net, x: Tensor) -> Tensor:
    """Ways are tried on four examples."""
    h = net.one(x)
    first = h[:1] if len(x) > 4 else x.new_zeros(1, 5)
    h = F.relu(h)
    return net.two(h) + first.sum()


def test_a_view_that_only_larger_batches_keep() -> None:
    assert agrees(problem_of(Net(_views_of_many)))


def test_data_that_are_rectified_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "CACHE_BYTES", 0)
    whole, y = normal(12, 5), labels(12, 3)

    class Reading:
        def __iter__(self) -> Any:
            yield from ((F.relu(whole[i : i + 6]), y[i : i + 6]) for i in (0, 6))

    problem = Problem(
        Net(MAY["temporary"]), nn.CrossEntropyLoss(), Reading(),
        weight=lambda batch: 1.0 + float(F.relu(batch[0]).sum()),
    )  # fmt: skip
    assert agrees(problem)
    assert torch.equal(whole, normal(12, 5))


class Counting(nn.Module):
    """Counts its passes in a buffer, and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(5, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return F.relu(self.into(x)) * self.count


def test_watching_leaves_no_trace_in_buffers() -> None:
    assert agrees(problem_of(Counting().double()))


def test_modules_called_by_keyword() -> None:
    assert agrees(problem_of(Net(lambda net, x: net.two(net.relu(input=net.one(x))))))


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
    """Also with the model's own modules, and while a pass of this thread is under way."""
    found: list[Any] = []

    def rectified() -> None:
        for rectify in (F.relu, model[1]):
            operand = normal(4)
            found.append((rectify(operand), operand))

    def meanwhile(x: Tensor) -> Tensor:
        thread = threading.Thread(target=rectified)
        thread.start()
        thread.join()
        return model(x)

    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU()).double()
    passes = in_place.InPlace(model, {})
    with torch.no_grad(), passes.active():
        passes.watch(meanwhile, normal(2, 5), "kind")
        passes(meanwhile, normal(2, 5), "kind")
        rectified()  # outside of passes
    assert any(call.references for call in passes._known["kind"])
    assert len(found) == 6
    for made, operand in found:
        assert torch.equal(made, normal(4).clamp(min=0))
        assert torch.equal(operand, normal(4))
    assert F.relu is ITSELF


def test_a_model_that_cannot_be_watched_rectifies_as_ever() -> None:
    def within_inference(x: Tensor) -> Tensor:
        if not torch.is_inference_mode_enabled():
            raise RuntimeError("inference tensors cannot be written to outside of inference mode")
        return nn.functional.relu(x + 0)

    passes = in_place.InPlace(nn.Sequential(), {})
    with torch.inference_mode(), passes.active():
        passes.watch(within_inference, normal(3), "kind")
        assert torch.equal(passes(within_inference, normal(3), "kind"), normal(3).clamp(min=0))


def test_two_who_end_in_another_order() -> None:
    first, second = (in_place.InPlace(nn.Sequential(), {}).active() for _ in range(2))
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
    def of_its_own(x: Tensor) -> Tensor:
        assert F.relu(x.as_subclass(Own)) == "rectified by its own"
        assert act(x.as_subclass(Own)) == "rectified by its own"
        assert F.relu(x, inplace=True) is x
        return x

    act = nn.ReLU()
    passes = in_place.InPlace(act, {})
    with torch.no_grad(), passes.active():
        passes.watch(of_its_own, normal(3), "kind")
        passes(of_its_own, normal(3), "kind")


def test_a_function_that_the_user_has_put_in_place_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(x: Tensor, inplace: bool = False) -> Tensor:
        return F.leaky_relu(x, 0.3, inplace)

    monkeypatch.setattr(F, "relu", own)
    problem = problem_of(Net(MAY["temporary"]))
    agrees(problem)
    assert F.relu is own


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_function_that_is_scripted_during_a_pass() -> None:
    def scripted(net: Net, x: Tensor) -> Tensor:
        return net.two(torch.jit.script(_rectified)(net.one(x)))

    agrees(problem_of(Net(scripted)))


def _rectified(x: Tensor) -> Tensor:
    return F.relu(x)
