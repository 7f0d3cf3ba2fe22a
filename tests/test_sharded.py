"""Models sharded by FSDP, of both versions, and by DTensor: the numbers of one process with the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import groups
import landscape
from landscape import metrics
from landscape.seeds import generator

Batch = tuple[Tensor, Tensor]


def network(dtype: torch.dtype) -> nn.Sequential:
    """Widths that no number of processes divides; a normalization with buffers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 13), nn.Tanh(), nn.Sequential(nn.Linear(13, 11), nn.BatchNorm1d(11)), nn.GELU(), nn.Linear(11, 5)
    ).to(dtype).eval()  # fmt: skip


def data(dtype: torch.dtype) -> list[Batch]:
    draws = generator(0, "sharded", 0)
    x, y = torch.randn(40, 7, generator=draws, dtype=torch.float64), torch.randint(0, 5, (40,), generator=draws)
    cuts = [9, 4, 12, 8, 7]  # 3 batches for rank 0, 2 for rank 1
    return list(zip(x.to(dtype).split(cuts), y.split(cuts), strict=True))


def step(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def wrapped(kind: str, model: nn.Sequential) -> nn.Module:
    if kind == "fsdp1":
        policy = ModuleWrapPolicy({nn.Sequential})
        return FullyShardedDataParallel(
            model, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu")
        )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[2], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def own_part(batches: list[Batch]) -> list[Batch]:
    return batches[dist.get_rank() :: dist.get_world_size()]


def vectors(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, 2, generator=generator(0, "sharded", 1), dtype=torch.float64).to(dtype)


def bits(model: nn.Module) -> list[Any]:
    def local(t: Tensor | None) -> Any:
        return None if t is None else (t.to_local() if hasattr(t, "to_local") else t).detach().clone()

    return [(n, local(p), local(p.grad)) for n, p in model.named_parameters()] + [
        (n, local(b), None) for n, b in model.named_buffers()
    ]


def same(a: list[Any], b: list[Any]) -> bool:
    def equal(x: Tensor | None, y: Tensor | None) -> bool:
        return (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))

    return all(n == m and equal(p, q) and equal(g, h) for (n, p, g), (m, q, h) in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_values_gradients_and_products_are_those_of_the_whole_model(kind: str, dtype: torch.dtype) -> None:
    whole = landscape.Problem(
        network(torch.float64), forward=step, data=data(torch.float64), products="autodiff"
    )
    V = vectors(whole.size, torch.float64)

    def sharded(rank: int) -> Any:
        model = wrapped(kind, network(dtype))
        step(model, own_part(data(dtype))[0]).backward()  # gradients of a training that is under way
        problem = landscape.Problem(model, forward=step, data=own_part(data(dtype)))
        before = bits(model)
        value, slope = problem.value_and_gradient()
        products = problem.hvp(V.to(dtype))
        assert problem.products_in_use == "difference"
        assert problem.names == whole.names
        return same(before, bits(model)), value, slope, products, problem.parameters_vector()

    for untouched, value, slope, products, theta in (found := groups.run(sharded)):
        assert untouched
        close = {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]
        torch.testing.assert_close(theta, whole.parameters_vector().to(dtype), rtol=0, atol=0)
        torch.testing.assert_close(value, whole.value(), rtol=close, atol=0)
        assert (slope.double() - whole.gradient()).norm() <= close * whole.gradient().norm()
        error = (products.double() - whole.hvp(V)).norm() / whole.hvp(V).norm()
        print(kind, dtype, "error", float(error))
        assert error <= {torch.float64: 1e-6, torch.float32: 1e-4}[dtype]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))
