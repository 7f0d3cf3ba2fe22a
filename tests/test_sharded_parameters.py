"""Models sharded by FSDP, of both versions, and by DTensor: the numbers of one process with the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import groups
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import landscape
from landscape import metrics
from landscape.estimators.probes import draw
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
    x, y = (
        torch.randn(40, 7, generator=draws, dtype=torch.float64),
        torch.randint(0, 5, (40,), generator=draws),
    )
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
        assert error <= {torch.float64: 1e-6, torch.float32: 1e-4}[dtype]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))


METRICS = {
    "trace": metrics.Trace(max_probes=8, rtol=0.5),
    "spectral_norm": metrics.SpectralNorm(rtol=0.1),
    "eigenvalues": metrics.Eigenvalues(k=1, rtol=0.1, vectors=True),
    "density": metrics.Density(probes=1, steps=6),
}


@pytest.mark.parametrize("kind", [pytest.param("fsdp1", marks=pytest.mark.slow), "fsdp2"])
def test_metrics_by_products_are_those_of_one_process(kind: str, tmp_path: Path) -> None:
    def sharded(rank: int) -> Any:
        problem = landscape.Problem(
            wrapped(kind, network(torch.float64)), forward=step, data=own_part(data(torch.float64))
        )
        found = {name: landscape.measure(metric, problem, out=tmp_path) for name, metric in METRICS.items()}
        again = landscape.measure(METRICS["eigenvalues"], problem, out=tmp_path)
        assert again["eigenvalues"].identical(found["eigenvalues"]["eigenvalues"])
        assert {ds.attrs["products"] for ds in found.values()} == {"difference"}
        assert {ds.attrs["examples"] for ds in found.values()} == {40}
        return {name: ds[METRICS[name].headline].values for name, ds in found.items()}

    one, two = groups.run(sharded)
    whole = landscape.Problem(
        network(torch.float64), forward=step, data=data(torch.float64), products="autodiff"
    )
    probes = [draw(generator(0, "trace", i), whole.size, 1)[:, 0] for i in range(8)]
    expected: dict[str, Any] = {
        name: landscape.evaluate(metric, whole)[metric.headline]
        for name, metric in METRICS.items()
        if name != "trace"  # in one process each batch has its own probes
    }
    expected["trace"] = np.mean([float(v @ whole.hvp(v)) for v in probes])
    for name in METRICS:
        np.testing.assert_array_equal(one[name], two[name])
        np.testing.assert_allclose(one[name], expected[name], rtol=1e-6)


def test_what_needs_the_whole_model_is_refused_by_name() -> None:
    def sharded(rank: int) -> list[str]:
        model = wrapped("fsdp2", network(torch.float64))
        problem = landscape.Problem(
            model, nn.CrossEntropyLoss(), own_part(data(torch.float64)), parameters=["0", "4.*"]
        )
        assert problem.names == ["0.weight", "0.bias", "4.weight", "4.bias"]
        assert problem.only("4").names == ["4.weight", "4.bias"]
        refused = []
        for metric in (
            metrics.Trace(curvature="ggn"), metrics.Sharpness(), metrics.Surface(points=(5, 5)), metrics.FisherRao(),
            metrics.InputCurvature(),
        ):  # fmt: skip
            with pytest.raises(landscape.Refused) as error:
                landscape.measure(metric, problem)
            refused.append(str(error.value))
        for call in (problem.losses, problem.targets, lambda: problem.at(problem.gradient())):
            with pytest.raises(landscape.Refused, match="state dict"):
                call()
        return refused

    for refused in groups.run(sharded):
        assert all("state dict" in text and "eigenvalues" in text for text in refused), refused


def test_a_rank_without_data_is_told_to_all(tmp_path: Path) -> None:
    def sharded(rank: int) -> str:
        batches = data(torch.float64)
        mine = [(x, torch.full_like(y, -100)) for x, y in batches] if rank else batches
        problem = landscape.Problem(wrapped("fsdp2", network(torch.float64)), nn.CrossEntropyLoss(), mine)
        with pytest.raises(landscape.Refused) as error:
            problem.gradient()
        return str(error.value)

    assert all("rank 1 has no batch" in text for text in groups.run(sharded))


def test_kinks_in_float32_are_refused() -> None:
    def sharded(rank: int) -> str:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(7, 64), nn.ReLU(), nn.Linear(64, 5))
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        problem = landscape.Problem(model, forward=step, data=own_part(data(torch.float32)))
        with pytest.raises(landscape.Refused) as error:
            landscape.hessian(problem) @ torch.ones(problem.size)
        return str(error.value)

    assert all("do not settle" in text and "float64" in text for text in groups.run(sharded))


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_a_model_that_raises_is_put_back(kind: str) -> None:
    def sharded(rank: int) -> bool:
        calls = []

        def failing(model: nn.Module, batch: Batch) -> Tensor:
            calls.append(1)
            if len(calls) > 8:
                raise ArithmeticError
            return step(model, batch)

        model = wrapped(kind, network(torch.float64))
        batches = own_part(data(torch.float64))
        problem = landscape.Problem(model, forward=failing, data=batches, mode="train")
        before = bits(model)
        with pytest.raises(ArithmeticError):
            problem.hvp(torch.ones(problem.size, dtype=torch.float64))
        return same(before, bits(model))

    assert all(groups.run(sharded))


def test_tensor_parallel_models_without_fsdp() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5)).double()

    whole = landscape.Problem(model(), forward=step, data=data(torch.float64))
    V = vectors(whole.size, torch.float64)

    def sharded(rank: int) -> Any:
        parts = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallel = parallelize_module(model(), init_device_mesh("cpu", (dist.get_world_size(),)), parts)
        problem = landscape.Problem(parallel, forward=step, data=data(torch.float64))  # all processes see all
        return problem.value(), problem.gradient(), problem.hvp(V), problem.examples()

    for value, slope, products, examples in groups.run(sharded):
        torch.testing.assert_close(value, whole.value(), rtol=1e-12, atol=0)
        torch.testing.assert_close(slope, whole.gradient(), rtol=1e-10, atol=1e-14)
        assert (products - whole.hvp(V)).norm() <= 1e-6 * whole.hvp(V).norm()
        assert examples == 40


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")), "use_orig_params"),
        (lambda m: fully_shard(m.bfloat16(), mesh=init_device_mesh("cpu", (2,))), "bfloat16"),
    ],
)
def test_other_ways_of_sharding_are_refused(wrap: Any, message: str) -> None:
    def sharded(rank: int) -> str:
        with pytest.raises(landscape.Refused) as error:
            landscape.Problem(wrap(network(torch.float32)), forward=step, data=data(torch.float32))
        return str(error.value)

    assert all(message in text for text in groups.run(sharded))
