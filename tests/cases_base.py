"""What a case is: a problem for the adapter, and the same loss written by hand for the whole data set.

The reference uses no code of the package: `outputs` is the network as plain tensor formulas on all
examples at once, `terms` the numerator of each example's loss, `weights` its share of the denominator.
L = sum(terms) / sum(weights) + penalty. Dense derivatives follow by reverse-over-reverse rows in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

Params = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """One problem of the table."""

    name: str
    model: Callable[[], Any]  # a fresh model; the same weights every time
    batch: Any  # the whole data set as one batch: a nest of tensors, examples first
    sizes: tuple[int, ...]  # how it is cut
    outputs: Callable[[Params], Tensor | tuple[Tensor, ...]]
    terms: Callable[..., Tensor]  # (*outputs) -> (N,)
    weights: Tensor  # (N,)
    options: dict[str, Any] = field(default_factory=dict)  # of Problem
    selected: tuple[str, ...] | None = None  # names in the order of the flat vector; None: all
    penalty: Callable[[Params], Tensor] | None = None
    tolerance: float = 1e-12  # relative, in float64

    @property
    def examples(self) -> int:
        return sum(self.sizes)

    @property
    def blackbox(self) -> bool:
        return "forward" in self.options

    def arguments(self, sizes: tuple[int, ...] | None = None) -> dict[str, Any]:
        """Arguments of Problem, with a fresh model and the data cut into `sizes`."""
        return {"model": self.model(), "data": cut(self.batch, sizes or self.sizes), **self.options}

    def other_cuts(self) -> list[tuple[int, ...]]:
        """One batch, batches of three, and single examples."""
        count = self.examples
        return [(count,), (3,) * (count // 3) + ((count % 3,) if count % 3 else ()), (1,) * count]


@dataclass(frozen=True)
class Reference:
    """The dense float64 derivatives of a case at its own parameters."""

    names: tuple[str, ...]
    theta: Tensor
    value: Tensor
    gradient: Tensor
    hessian: Tensor
    ggn: Tensor
    losses: Tensor
    loss_of: Callable[[Tensor], Tensor]


def all_parameters(case: Case) -> dict[str, Tensor]:
    model = case.model()
    named = model.named_parameters() if isinstance(model, nn.Module) else case.options["parameters"].items()
    return {name: p.detach().double() for name, p in named}


@functools.cache
def reference(case: Case) -> Reference:
    """Build value, gradient, Hessian and Gauss-Newton matrix of a case, all dense."""
    everything = all_parameters(case)
    names = case.selected or tuple(everything)
    sizes = [everything[n].numel() for n in names]

    def named(theta: Tensor) -> Params:
        pieces = torch.split(theta, sizes)
        return {**everything, **{n: t.view(everything[n].shape) for n, t in zip(names, pieces, strict=True)}}

    def outputs_of(theta: Tensor) -> tuple[Tensor, ...]:
        found = case.outputs(named(theta))
        return found if isinstance(found, tuple) else (found,)

    def flat_outputs(theta: Tensor) -> Tensor:
        return torch.cat([t.reshape(-1) for t in outputs_of(theta)])

    def risk(flat: Tensor) -> Tensor:
        pieces = torch.split(flat, [s.numel() for s in shapes])
        terms = case.terms(*(t.view(s) for t, s in zip(pieces, shapes, strict=True)))
        return terms[case.weights > 0].sum() / case.weights.sum()

    def loss_of(theta: Tensor) -> Tensor:
        data = risk(flat_outputs(theta))
        return data if case.penalty is None else data + case.penalty(named(theta))

    theta = torch.cat([everything[n].reshape(-1) for n in names])
    outputs = outputs_of(theta)
    shapes = [t.shape for t in outputs]
    J = jacobian(flat_outputs, theta)
    B = hessian(risk, flat_outputs(theta))
    per_sum = case.options.get("reduction") == "sum"
    return Reference(
        names,
        theta,
        loss_of(theta),
        jacobian(loss_of, theta),
        hessian(loss_of, theta),
        J.T @ B @ J,
        case.terms(*outputs) / (1 if per_sum else case.weights),
        loss_of,
    )


# data and models that are the same every time


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + seed))


def labels(shape: tuple[int, ...] | int, classes: int, seed: int = 0) -> Tensor:
    size = (shape,) if isinstance(shape, int) else shape
    return torch.randint(classes, size, generator=torch.Generator().manual_seed(200 + seed))


def net(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Fill a float64 model with fixed random parameters and buffers; it is left in training mode."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            model = make().double()
        stream = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.empty(p.shape, dtype=p.dtype).uniform_(-0.9, 0.9, generator=stream))
            for name, b in model.named_buffers():
                if b.is_floating_point():
                    low, high = (0.5, 2.0) if name.endswith("var") else (-0.5, 0.5)
                    b.copy_(torch.empty(b.shape, dtype=b.dtype).uniform_(low, high, generator=stream))
        return model

    return build


def tree_map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: tree_map(function, item) for key, item in tree.items()}
    return type(tree)(tree_map(function, item) for item in tree)


def cut(batch: Any, sizes: tuple[int, ...]) -> list[Any]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [
        tree_map(lambda t, a=end - size, b=end: t[a:b], batch) for size, end in zip(sizes, ends, strict=True)
    ]


# formulas


def linear(p: Params, name: str, x: Tensor) -> Tensor:
    y = x @ p[f"{name}.weight"].transpose(0, 1)
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def log_softmax(f: Tensor) -> Tensor:
    """Over the last axis."""
    shifted = f - f.detach().amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def nll(f: Tensor, y: Tensor) -> Tensor:
    """-log softmax(f)[y], classes on the last axis."""
    return -log_softmax(f).gather(-1, y[..., None])[..., 0]


def standardized(x: Tensor, axes: tuple[int, ...], eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred / ((centred**2).mean(axes, keepdim=True) + eps).sqrt()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def convolution(
    x: Tensor, w: Tensor, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> Tensor:
    """Cross-correlation in two dimensions as a sum over the kernel's places."""
    n, c, height, width = x.shape
    padded = x.new_zeros(n, c, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = x
    rows = (padded.shape[2] - dilation * (w.shape[2] - 1) - 1) // stride + 1
    columns = (padded.shape[3] - dilation * (w.shape[3] - 1) - 1) // stride + 1
    inner, outer = c // groups, w.shape[0] // groups
    pieces = []
    for g in range(groups):
        y = x.new_zeros(n, outer, rows, columns)
        for i in range(w.shape[2]):
            for j in range(w.shape[3]):
                top, left = i * dilation, j * dilation
                patch = padded[:, g * inner : (g + 1) * inner]
                patch = patch[:, :, top : top + stride * (rows - 1) + 1 : stride]
                patch = patch[..., left : left + stride * (columns - 1) + 1 : stride]
                y = y + torch.einsum("ncxy,oc->noxy", patch, w[g * outer : (g + 1) * outer, :, i, j])
        pieces.append(y)
    return torch.cat(pieces, 1)
