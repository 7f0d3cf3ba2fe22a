"""Models as training leaves them: under DDP, with activation checkpoints, in mixed precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import groups
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import landscape
from landscape import metrics
from landscape.plain_passes import plain
from landscape.seeds import generator
from landscape.testbeds.nets import own_stream

Batch = tuple[Tensor, Tensor]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    with own_stream(0, "wrapped"):
        return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> list[Batch]:
    draws = generator(0, "wrapped", 0)
    x, y = (
        torch.randn(30, 6, generator=draws, dtype=torch.float64),
        torch.randint(0, 3, (30,), generator=draws),
    )
    return list(zip(x.to(dtype).split([7, 3, 11, 4, 5]), y.split([7, 3, 11, 4, 5]), strict=True))


def step(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def probe(problem: landscape.Problem) -> Tensor:
    return torch.randn(
        problem.size, generator=generator(0, "wrapped", 1), dtype=torch.float64
    ).to(problem.dtype)  # fmt: skip


def answers(problem: landscape.Problem) -> tuple[Tensor, ...]:
    return problem.value(), problem.gradient(), problem.hvp(probe(problem))


# --- DDP ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["loss", "forward"])
def test_ddp_models_are_measured_by_each_process_alone(form: str) -> None:
    def problem(model: nn.Module, batches: list[Batch]) -> landscape.Problem:
        return (
            landscape.Problem(model, nn.CrossEntropyLoss(), batches)
            if form == "loss"
            else landscape.Problem(model, forward=step, data=batches)
        )

    def wrapped(rank: int) -> bool:
        model, batches = (
            DistributedDataParallel(network()),
            data()[: 3 - rank],
        )  # ragged: DDP itself would hang
        found = answers(problem(model, batches))
        alone = answers(problem(network(), batches))
        metric = metrics.Eigenvalues(k=1, rtol=0.1)
        ours, theirs = (
            landscape.evaluate(metric, problem(m, batches))["eigenvalues"] for m in (model, network())
        )
        model.train()
        step(model, data()[rank]).backward()  # the wrapper still works
        slopes = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        shared = [s.clone() for s in slopes]
        for s in shared:
            dist.broadcast(s, 0)
        return (
            all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
            and bool((ours == theirs).all())
            and all(torch.equal(a, b) for a, b in zip(slopes, shared, strict=True))
        )

    assert groups.run(wrapped) == [True, True]


# --- activation checkpoints -----------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.body, self.reentrant = network(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.body(x)
        hidden = self.body[0](x)
        return checkpoint(self.body[1:], hidden, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_checkpointed_models_give_the_numbers_of_plain_ones(reentrant: bool, mode: Any) -> None:
    kept, plain = (
        landscape.Problem(Checkpointed(kind), nn.CrossEntropyLoss(), data(), mode=mode)
        for kind in (reentrant, None)
    )
    found = [*answers(kept), kept.ggn_vp(probe(kept))]
    for mine, expected in zip(found, [*answers(plain), plain.ggn_vp(probe(plain))], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-15)
    assert kept.products_in_use == "autodiff"


def test_checkpoints_of_training_are_theirs_again_afterwards() -> None:
    model = Checkpointed(True)
    answers(landscape.Problem(model, nn.CrossEntropyLoss(), data()))
    x = data()[0][0].requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        torch.autograd.grad(model(x).sum(), x)


# --- mixed precision ------------------------------------------------------------------------------------


class Autocasting(nn.Module):
    """Computes in bfloat16, as a model does that brings its own autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.seen = network(torch.float32), []

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.body[0](x)
            self.seen.append(hidden.dtype)
        return self.body[1:](hidden.to(x))


def test_autocast_is_switched_off_and_that_is_stored(tmp_path: Path) -> None:
    model = Autocasting().eval()
    with torch.no_grad():
        model(data(torch.float32)[0][0])
    assert model.seen == [torch.bfloat16]
    model.seen.clear()
    problem = landscape.Problem(model, nn.CrossEntropyLoss(), data(torch.float32))
    plain = landscape.Problem(network(torch.float32).eval(), nn.CrossEntropyLoss(), data(torch.float32))
    for found, expected in zip(answers(problem), answers(plain), strict=True):
        assert torch.equal(found, expected)
    assert set(model.seen) <= {torch.float32, torch.float64}  # float64: the check of products
    stored = landscape.measure(metrics.Eigenvalues(k=1), problem, out=tmp_path)
    assert stored.attrs["autocast"] == "switched off"
    assert stored.attrs["dtype"] == stored.attrs["model_dtype"] == "float32"
    model.seen.clear()
    with torch.no_grad():
        model(data(torch.float32)[0][0])
    assert model.seen == [torch.bfloat16]  # the model's own again


def test_autocast_around_a_measurement_is_off_in_it_too() -> None:
    problem = landscape.Problem(network(torch.float32).eval(), nn.CrossEntropyLoss(), data(torch.float32))
    expected = answers(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = answers(problem)
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert problem.evaluator.autocast == "switched off"


def test_measurements_that_overlap_leave_autocast_as_it_was() -> None:
    entering = torch.autocast.__enter__
    first, second = (
        plain(torch.device("cpu"), autocast=False, met=lambda: None) for _ in range(2)
    )  # fmt: skip
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as two threads may end
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.is_autocast_enabled("cpu")
    second.__exit__(None, None, None)
    assert torch.autocast.__enter__ is entering
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")


def test_a_measurement_in_sixteen_bits_keeps_autocast() -> None:
    model = Autocasting().eval()
    model.body[1] = nn.LayerNorm(9)
    problem = landscape.Problem(model, nn.CrossEntropyLoss(), data(), dtype=torch.bfloat16)
    problem.value()
    assert problem.evaluator.autocast == "on"
    assert set(model.seen) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_sixteen_bits_are_measured_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    narrow = network(torch.float32).eval().to(dtype)
    before = copy.deepcopy(narrow.state_dict())
    problem = landscape.Problem(narrow, nn.CrossEntropyLoss(), data(dtype))
    wide = landscape.Problem(
        copy.deepcopy(narrow).float(), nn.CrossEntropyLoss(), [(x.to(dtype).float(), y) for x, y in data()]
    )
    assert problem.dtype == torch.float32
    for found, expected in zip(answers(problem), answers(wide), strict=True):
        assert torch.equal(found, expected)
    stored = landscape.measure(metrics.Trace(), problem, out=tmp_path)
    assert stored.attrs["dtype"] == "float32"
    assert stored.attrs["model_dtype"] == str(dtype).removeprefix("torch.")
    assert float(stored["trace"]) == float(landscape.measure(metrics.Trace(), wide)["trace"])
    assert all(
        torch.equal(before[k], v) and v.dtype == before[k].dtype for k, v in narrow.state_dict().items()
    )
