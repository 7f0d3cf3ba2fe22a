"""After any call of the adapter, also one that raises, the model and the random states are what they were."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME, CASES, reference
from cases_base import normal
from torch import Tensor, nn

from landscape.checks import Need
from landscape.errors import Refused
from landscape.problem import Problem


def bits(t: Tensor | None) -> tuple[Any, ...] | None:
    if t is None:
        return None
    return id(t), t.dtype, tuple(t.shape), t.stride(), t.requires_grad, t.detach().clone()


def snapshot(model: nn.Module) -> list[Any]:
    """Everything of a model that a measurement could touch: identity, layout and content."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        found += [(name, module.training, id(module))]
        for key, t in (*module._parameters.items(), *module._buffers.items()):
            found.append((name, key, bits(t), bits(t.grad) if t is not None and t.is_leaf else None))
        found += [(name, key, bits(t)) for key, t in vars(module).items() if isinstance(t, Tensor)]
        if isinstance(module, nn.RNNBase):
            found += [("flat", id(t)) for t in module._flat_weights]
    return found


def random_states() -> list[Any]:
    return [torch.get_rng_state(), np.random.get_state(), random.getstate()]  # noqa: NPY002


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray):
        return type(a) is type(b) and bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def with_gradients(model: nn.Module) -> nn.Module:
    """As in the middle of a user's training: .grad filled, one submodule in the other mode."""
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(i)) if p.requires_grad and i % 2 == 0 else None
    next(model.children(), model).eval()
    return model


def calls(problem: Problem, blackbox: bool) -> list[Any]:
    V = normal(problem.size, 2, seed=60).to(problem.dtype)
    found = [problem.value, problem.gradient, lambda: problem.hvp(V), lambda: problem.hvp(V[:, 0])]
    found += [lambda: problem.check(frozenset({Need.HESSIAN})), lambda: problem.at(V[:, 0]).value()]
    if not blackbox:
        found += [lambda: problem.ggn_vp(V), problem.losses, lambda: problem.check(frozenset({Need.GGN}))]
    return found


MODULES = [c for c in CASES if not c.name.startswith("function")]


@pytest.mark.parametrize("products", ["auto", "difference"])
@pytest.mark.parametrize("case", MODULES, ids=lambda c: c.name)
def test_nothing_is_left_behind(case, products):
    arguments = {**case.arguments(), "products": products}
    model = with_gradients(arguments["model"])
    before, states = snapshot(model), random_states()
    problem = Problem(**arguments)
    for call in calls(problem, case.blackbox):
        call()
        assert same(snapshot(model), before)
        assert same(random_states(), states)


class Noisy(nn.Module):
    """Draws from every generator, updates running statistics, counts its calls: all in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        self.rnn = nn.GRU(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(()) + float(np.random.rand()) + random.random()  # noqa: NPY002
        return self.rnn(self.body(x)[:, None])[0][:, 0] * (1 + 0.1 * noise)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_noisy_model_in_training_mode(mode, dtype):
    model = with_gradients(Noisy())
    problem = Problem(
        model,
        nn.MSELoss(),
        [(normal(4, 3), normal(4, 2)), (normal(3, 3), normal(3, 2))],
        mode=mode,
        dtype=dtype,
    )
    before, states = snapshot(model), random_states()
    V = normal(problem.size, 2, seed=61)
    for call in (
        problem.value,
        problem.gradient,
        lambda: problem.hvp(V),
        lambda: problem.ggn_vp(V),
        problem.losses,
    ):
        call()
        assert same(snapshot(model), before)
        assert same(random_states(), states)
    with pytest.raises(Refused):
        problem.check()
    assert same(snapshot(model), before)
    assert same(random_states(), states)


class Failing:
    """A loss that raises at its n-th call."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyError("the user's loss failed")
        return nn.functional.cross_entropy(output, target)


def attempt(call: Any) -> BaseException:
    """Return what `call` raises, with its traceback, so that its frames are still alive."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001
        return error
    pytest.fail("nothing was raised")


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("products", ["autodiff", "difference"])
@pytest.mark.parametrize("name", ["lstm", "batchnorm1d_eval", "transformer_encoder_layer"])
def test_a_loss_that_raises(name, products, after):
    case = BY_NAME[name]
    arguments = {**case.arguments(), "products": products}
    model = with_gradients(arguments["model"])
    before, states = snapshot(model), random_states()
    V = normal(len(reference(case).theta), 2, seed=62)
    for method in ("value", "gradient", "hvp", "ggn_vp", "losses", "check"):
        problem = Problem(**{**arguments, "loss": Failing(after)})
        call = getattr(problem, method)
        error = attempt(lambda call=call, m=method: call(V) if m in {"hvp", "ggn_vp"} else call())
        assert isinstance(error, KeyError)
        assert same(snapshot(model), before)
        assert same(random_states(), states)
        # The next measurement is unharmed.
        problem = Problem(**arguments)
        assert torch.equal(problem.value(), Problem(**case.arguments()).value())


@pytest.mark.parametrize("method", ["gradient", "hvp", "ggn_vp"])
def test_an_interrupt_between_two_products(method, monkeypatch):
    """Ctrl-C may come anywhere, also while the results of a micro-batch are added up."""
    arguments = BY_NAME["lstm"].arguments()
    model = with_gradients(arguments["model"])
    before = snapshot(model)
    problem = Problem(**arguments)
    V = normal(problem.size, 2, seed=63)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("landscape.averages._add", interrupt)
    call = getattr(problem, method)
    error = attempt(lambda: call() if method == "gradient" else call(V))
    assert isinstance(error, KeyboardInterrupt)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("fail", [False, True])
def test_a_recurrent_model_still_works_and_learns(kind, fail):
    """`torch.func.functional_call` leaves `_flat_weights` pointing at its substitutes; ours must not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({"rnn": kind(2, 3, num_layers=2, batch_first=True), "head": nn.Linear(3, 2)})
    x, y = normal(5, 4, 2).float(), normal(5, 2).float()

    def run(m: nn.Module) -> Tensor:
        return m["head"](m["rnn"](x)[0][:, -1])

    untouched = copy.deepcopy(model)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if fail:
            raise KeyError("stop")
        return nn.functional.mse_loss(output, target)

    problem = Problem(
        model, loss, [(x, y)], dtype=torch.float64, output=lambda m, b: m["head"](m["rnn"](b[0])[0][:, -1])
    )
    V = normal(problem.size, 2, seed=64)
    for call in (
        problem.value,
        problem.gradient,
        lambda: problem.hvp(V),
        lambda: problem.at(V[:, 0]).value(),
    ):
        if fail:
            attempt(call)
        else:
            call()
    for m in (model, untouched):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.5)
        nn.functional.mse_loss(run(m), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(run(model), run(untouched))
    assert run(model).dtype == torch.float32
    assert run(model.double().float()).isfinite().all()


def test_the_kernel_switches_go_back():
    flags = (
        torch.backends.mha.get_fastpath_enabled,
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.math_sdp_enabled,
    )
    before = [f() for f in flags]
    arguments = BY_NAME["multihead_attention"].arguments()
    problem = Problem(**arguments)
    V = normal(problem.size, 2, seed=65)
    problem.hvp(V)
    assert [f() for f in flags] == before
    failing = Problem(**{**arguments, "loss": Failing(1)})
    attempt(lambda: failing.hvp(V))
    assert [f() for f in flags] == before
