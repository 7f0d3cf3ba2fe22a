"""The three problems that every peer measures: network, weights and data, each in one file of the working folder.

`prepare` trains and stores them and needs scikit-learn; `load` needs torch and `landscape.testbeds.nets` only,
so that it runs in the environment of a peer.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape.seeds import generator
from landscape.testbeds import nets

REFERENCE_SEED = 20  # of the probes of a reference trace; no other stream shares it


class ClassesSecond(nn.Module):
    """Logits (batch, time, classes) as (batch, classes, time), which `nn.CrossEntropyLoss` takes as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).transpose(1, 2)


@dataclass(frozen=True)
class Spec:
    """A problem and how it is best served.

    Attributes:
        network: builds the network without its weights.
        piecewise_linear: Tr H = Tr GGN, so the reference trace is exact.
        microbatch: examples at once in our measurement; None for all of them.
        batch: examples per batch of the peers that loop over batches; None for all. The fastest of those tried.
        columns: vectors that curvlinops gets at once. More of them take memory, and no less time per vector.
        math_attention: needs `sdpa_kernel(MATH)` around the peers, which do not see to it themselves.
    """

    network: Callable[[], nn.Module]
    piecewise_linear: bool
    microbatch: int | None
    batch: int | None
    columns: int
    math_attention: bool = False


SPECS = {
    "MLP": Spec(lambda: nets.mlp((64, 128, 128, 10)), True, None, None, 128),
    "ResNet-20": Spec(nets.resnet20, True, 64, 32, 4),
    "GPT": Spec(lambda: ClassesSecond(nets.gpt()), False, 8, None, 4, math_attention=True),
}


@dataclass(frozen=True)
class Case:
    """A loaded problem: L = loss(model(inputs), targets), the mean over all of the data.

    `cut` is the number of batches for everyone; None: as it suits each.
    """

    name: str
    model: nn.Module
    loss: nn.CrossEntropyLoss
    inputs: Tensor
    targets: Tensor
    cut: int | None = None

    @property
    def spec(self) -> Spec:
        return SPECS[self.name]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Cut the data, by default as it suits the peers that loop over batches, then into batches of one size."""
        size = -(-len(self.inputs) // self.cut) if self.cut else self.spec.batch or len(self.inputs)
        return list(zip(self.inputs.split(size), self.targets.split(size), strict=True))

    def gradient(self) -> tuple[Tensor, ...]:
        """Return the plain gradient, the unit of all ratios."""
        return torch.autograd.grad(
            self.loss(self.model(self.inputs), self.targets), list(self.model.parameters())
        )


def load(folder: Path, name: str) -> Case:
    """Read a problem that `prepare` stored."""
    stored = torch.load(folder / f"{name}.pt", weights_only=True)
    model = SPECS[name].network()
    model.load_state_dict(stored["state"])
    return Case(name, model.eval(), nn.CrossEntropyLoss(), stored["inputs"], stored["targets"])


def prepare(folder: Path, name: str) -> None:
    """Train a problem's network and store it with its data, unless that was done before."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / f"{name}.pt").exists():
        return
    makers = {"MLP": _digits, "ResNet-20": _images, "GPT": _text}
    model, inputs, targets = makers[name]()
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    unfinished = folder / f"{name}.pt.unfinished"
    torch.save({"state": state, "inputs": inputs, "targets": targets}, unfinished)
    unfinished.replace(folder / f"{name}.pt")


def _digits() -> tuple[nn.Module, Tensor, Tensor]:
    from landscape.testbeds.digits import digits, digits_mlp

    return digits_mlp(), *digits()


def _images() -> tuple[nn.Module, Tensor, Tensor]:
    from landscape.testbeds.train import train

    draws = generator(0, "peers", 0)
    images = torch.randn(128, 3, 32, 32, generator=draws)
    labels = torch.randint(0, 10, (128,), generator=draws)
    model = SPECS["ResNet-20"].network()
    train(model, nn.CrossEntropyLoss(), [(images[:32], labels[:32]), (images[32:], labels[32:])],
          epochs=40, lr=3e-3)  # fmt: skip
    return model, images, labels


def _text() -> tuple[nn.Module, Tensor, Tensor]:
    """Train on 512 sequences of the source of three modules of the standard library; measure on 32 of them."""
    from landscape.testbeds.train import train

    source = "".join(inspect.getsource(module) for module in (argparse, textwrap, ast)).encode()
    text = torch.tensor(list(source[: 512 * 65])).view(512, 65)
    inputs, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    model = SPECS["GPT"].network()
    batches = list(zip(inputs.split(32), targets.split(32), strict=True))
    train(model, nn.CrossEntropyLoss(), batches, epochs=30, lr=2e-3)
    return model, inputs[::16].contiguous(), targets[::16].contiguous()


def reference(folder: Path, name: str, probes: int) -> tuple[float, float]:
    """Return the trace of the Hessian and its standard error, 0 where it is exact; computed once.

    It shares no code with what is measured. Piecewise linear networks: the exact trace of the GGN in
    float64. Others: `probes` probes in float32, drawn anew for every two examples.
    """
    exact = SPECS[name].piecewise_linear
    path = folder / (f"{name}.reference.pt" if exact else f"{name}.reference.{probes}.pt")
    if not path.exists():
        case = load(folder, name)
        found = (ggn_trace(case), 0.0) if exact else averaged_trace(case, probes)
        torch.save(torch.tensor(found, dtype=torch.float64), path)
    value, stderr = torch.load(path, weights_only=True).tolist()
    return value, stderr


def ggn_trace(case: Case) -> float:
    """Return Tr GGN = mean over examples of sum_c p_c ||J^T (e_c - p)||^2, one backward per example and class.

    The sum over c of p_c (e_c - p)(e_c - p)^T is diag(p) - p p^T, the output Hessian of the cross-entropy.
    """
    model = case.model.double()
    weights, total = list(model.parameters()), 0.0
    for example in case.inputs.double().split(1):
        logits = model(example)[0]
        p = torch.softmax(logits.detach(), dim=0)
        for c, probability in enumerate(p):
            cotangent = nn.functional.one_hot(torch.tensor(c), len(p)) - p
            rows = torch.autograd.grad(logits, weights, cotangent, retain_graph=True)
            total += float(probability * sum(row.square().sum() for row in rows))
    return total / len(case.inputs)


def averaged_trace(case: Case, probes: int) -> tuple[float, float]:
    """Return the mean and standard error of `probes` probes, independent for every two examples."""
    weights = list(case.model.parameters())
    samples = torch.zeros(probes, dtype=torch.float64)
    pieces = list(zip(case.inputs.split(2), case.targets.split(2), strict=True))
    for index, (inputs, targets) in enumerate(pieces):
        draws = generator(REFERENCE_SEED, "peers reference", index)
        with sdpa_kernel(SDPBackend.MATH):
            loss = case.loss(case.model(inputs), targets)
            gradient = torch.autograd.grad(loss, weights, create_graph=True)
            for i in range(probes):
                v = [torch.randint(0, 2, w.shape, generator=draws).to(w) * 2 - 1 for w in weights]
                Hv = torch.autograd.grad(gradient, weights, v, retain_graph=True)
                samples[i] += _dot(v, Hv) * len(inputs) / len(case.inputs)
    return samples.mean().item(), samples.std().item() / probes**0.5


def _dot(left: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    return sum((a.double() * b.double()).sum().item() for a, b in zip(left, right, strict=True))
