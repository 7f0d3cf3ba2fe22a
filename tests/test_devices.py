"""Every registered metric on another device than the CPU: on a simulated one always, on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import every
import numpy as np
import pytest
import torch
from second_device import second_device
from torch import nn

import landscape
from landscape import testbeds
from landscape.metrics.base import evaluate
from landscape.record import Record
from landscape.seeds import generator


def problem(device: torch.device | str | None = None, kind: str = "mlp") -> landscape.Problem:
    draws = generator(0, "devices", 0)
    y = torch.randint(0, 4, (14,), generator=draws)
    if kind == "images":  # convolutions, BatchNorm
        model, shape = testbeds.resnet20(width=2, classes=4, blocks=1, seed=1).double(), (3, 6, 6)
    else:
        model, shape = testbeds.mlp([5, 6, 4], nn.ReLU, seed=1).double(), (5,)
    x = torch.randn(14, *shape, generator=draws, dtype=torch.float64)
    if kind == "text":  # embeddings, fused attention, layer norms
        model = testbeds.gpt(8, 1, 2, 6, 11, seed=1).double()
        x, y = (torch.randint(0, 11, (14, 6), generator=draws) for _ in range(2))
    data = list(zip(x.split([8, 6]), y.split([8, 6]), strict=True))

    def output(model: nn.Module, batch: Any) -> torch.Tensor:
        found: torch.Tensor = model(batch[0])
        return found.transpose(1, -1) if kind == "text" else found

    return landscape.Problem(model, nn.CrossEntropyLoss(), data, output=output, device=device, kernels="none")


def measured(name: str, device: torch.device | str | None = None, kind: str = "mlp") -> Record:
    return evaluate(every.tiny(name), problem(device, kind))


def compare(here: Record, there: Record, rtol: float) -> None:
    """All numbers but times; eigenvectors up to a sign."""
    assert here.variables.keys() == there.variables.keys()
    for name, variable in here.variables.items():
        if name.endswith("seconds") or not np.issubdtype(variable.data.dtype, np.floating):
            continue
        a, b = variable.data, there[name]
        if "vectors" in name:
            a, b = np.abs(a), np.abs(b)
        largest = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
        np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol * largest, err_msg=name)


@pytest.mark.parametrize("name", every.names())
def test_a_metric_on_another_device_never_mixes_devices(name: str) -> None:
    here = measured(name)
    with second_device() as device:
        there = measured(name, device)
    compare(here, there, 1e-9)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("images", "surface"),
        ("images", "trace"),
        ("images", "input_curvature"),
        ("text", "surface"),
        ("text", "trace"),
    ],
)
def test_other_networks_on_another_device(kind: str, name: str) -> None:
    here = measured(name, kind=kind)
    with second_device() as device:
        there = measured(name, device, kind)
    compare(here, there, 1e-9 if kind == "images" else 1e-6)  # second differences magnify rounding


def test_a_measurement_with_checks_and_a_file_on_another_device(tmp_path: Path) -> None:
    metric = landscape.metrics.Eigenvalues(k=1, vectors=True)
    here = landscape.measure(metric, problem(), out=tmp_path / "here.h5")
    with second_device() as device:
        there = landscape.measure(metric, problem(device), out=tmp_path / "there.h5")
        again = landscape.measure(metric, problem(device), out=tmp_path / "there.h5")
    assert there["eigenvalues"].identical(again["eigenvalues"])
    assert there["eigenvalues"].equals(here["eigenvalues"])
    assert there.attrs["device"] == device.type


def test_the_simulated_device_is_strict() -> None:
    with second_device() as device:
        x = torch.ones(3, device=device)
        assert (x + torch.tensor(1.0)).cpu().tolist() == [2.0, 2.0, 2.0]  # numbers may come from the CPU
        for wrong in (
            lambda: x + torch.ones(3), x.numpy, lambda: np.asarray(x),
            lambda: torch.randn(3, generator=torch.Generator(), device=device),
        ):  # fmt: skip
            with pytest.raises((RuntimeError, TypeError)):
                wrong()


# --- where there is a GPU -------------------------------------------------------------------------------


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", every.names())
def test_a_metric_on_a_gpu_gives_the_numbers_of_the_cpu(name: str) -> None:
    compare(measured(name), measured(name, "cuda"), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["images", "text"])
@pytest.mark.parametrize("name", ["eigenvalues", "surface", "trace"])
def test_other_networks_on_a_gpu(name: str, kind: str) -> None:
    compare(measured(name, kind=kind), measured(name, "cuda", kind), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", every.names())
def test_deterministic_mode_on_a_gpu_repeats_every_bit(name: str, deterministic: None) -> None:
    compare(measured(name, "cuda"), measured(name, "cuda"), 0.0)


@pytest.mark.parametrize("name", every.names())
def test_no_metric_needs_what_deterministic_mode_forbids(name: str, deterministic: None) -> None:
    measured(name)


@pytest.mark.gpu
def test_a_product_on_a_gpu_stays_within_the_memory_that_is_stated() -> None:
    model = testbeds.gpt(256, 4, 4, 128, 2048)
    text = torch.randint(0, 2048, (64, 129), generator=generator(0, "devices", 1))
    whole = landscape.Problem(
        model, nn.CrossEntropyLoss(), [(text[:, :-1], text[:, 1:])], device="cuda",
        output=lambda model, batch: model(batch[0]).transpose(1, 2),
    )  # fmt: skip
    stated = 1 << 30
    metric = landscape.metrics.Eigenvalues(k=1, max_matvecs=4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = landscape.measure(metric, whole, memory=stated)
    assert found.attrs["memory_plan"]["microbatch"] < 64
    assert torch.cuda.max_memory_allocated() - before <= stated
