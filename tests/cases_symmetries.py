"""Networks whose rescaling symmetries are known: nodes and layer groups, counted by hand.

A row's `nodes` is the dimension of the space of rescalings, `groups` the number of layers that it falls into,
`approximate` how many of the nodes hold only up to a norm's epsilon.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from cases_base import labels, net, normal
from torch import Tensor, nn

from landscape import testbeds, transforms


@dataclass(frozen=True, eq=False)
class Net:
    name: str
    make: Callable[[], nn.Module]
    x: Tensor
    nodes: int
    groups: int
    approximate: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    find: dict[str, Any] = field(default_factory=dict)

    def problem(self, **changes: Any) -> Any:
        import landscape

        def loss(output: Tensor, target: Tensor) -> Tensor:
            return ((output.flatten(1) - 0.3) ** 2).mean(1).mean() + 0 * target.sum()

        y = torch.zeros(len(self.x))
        dtype = {"dtype": torch.float64}
        return landscape.Problem(
            net(self.make)(), loss, [(self.x, y)], **{**dtype, **self.options, **changes}
        )


def mlp(*sizes: int, bias: bool = True, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def lenet(*widths: int) -> nn.Module:
    a, b, c, d = widths
    return nn.Sequential(
        nn.Conv2d(1, a, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(a, b, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(16 * b, c), nn.ReLU(), nn.Linear(c, d), nn.ReLU(), nn.Linear(d, 10),
    )  # fmt: skip


def vgg(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    inner = 3
    for factor, pool in [(1, 1), (2, 1), (4, 0), (4, 1), (8, 0), (8, 1), (8, 0), (8, 1)]:
        layers += [nn.Conv2d(inner, width * factor, 3, padding=1), nn.BatchNorm2d(width * factor), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * pool
        inner = width * factor
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inner, 10))


class Functional(nn.Module):
    """Two branches added, a third beside them, and a dilated convolution: no module but those with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.c3, self.c4 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(10, 5, 3, padding=2, dilation=2)
        self.fc = nn.Linear(5 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([F.relu(self.c1(x) + self.c2(x)), F.relu(self.c3(x))], 1)
        h = F.max_pool2d(F.relu(self.c4(h)), 2)
        return self.fc(h.view(h.size(0), -1))


def mobile(frozen: bool = False) -> nn.Module:
    """Depthwise-separable blocks; 8, 8, 16, 16, 16 channels."""

    def block(inner: int, outer: int, groups: int) -> list[nn.Module]:
        kernel = 1 if groups == 1 else 3
        convolution = nn.Conv2d(inner, outer, kernel, padding=kernel // 2, groups=groups, bias=False)
        return [convolution, nn.BatchNorm2d(outer), nn.ReLU()]

    return nn.Sequential(
        *block(3, 8, 1), *block(8, 8, 8), *block(8, 16, 1), *block(16, 16, 16), *block(16, 16, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 12, 1, groups=4),
        nn.ReLU(), nn.Conv2d(12, 12, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 3),
    )  # fmt: skip


class Transformer(nn.Module):
    """Pre-norm blocks with separate projections; the head tied to the embedding or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([_Block() for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.v, self.o = (nn.Linear(8, 8) for _ in range(3))
        self.k = nn.Linear(8, 8, bias=False)  # softmax does not see a bias of the keys
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(x)
        q, k, v = (f(y).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        return x + self.down(F.gelu(self.up(self.n2(x))))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 3))


class UNet(nn.Module):
    """4, 6, 8 down; 6, 6, 5 up, with a transposed convolution and concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2, self.d3 = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((2, 4), (4, 6), (6, 8)))
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.u1, self.u2 = nn.Conv2d(12, 6, 3, padding=1), nn.Conv2d(10, 5, 3, padding=1)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.d1(x))
        b = F.relu(self.d2(F.max_pool2d(a, 2)))
        c = F.relu(self.d3(F.max_pool2d(b, 2)))
        h = F.relu(self.u1(torch.cat([self.up(c), b], 1)))
        h = F.interpolate(h, scale_factor=2, mode="bilinear")
        return self.head(F.relu(self.u2(torch.cat([h, a], 1))))


class Shared(nn.Module):
    """One layer used twice."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6, bias=bias), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))))


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6),
        nn.LayerNorm(6),
        nn.ReLU(),
        nn.Linear(6, 6),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )


class SqueezeExcite(nn.Module):
    """A gate of four channels, computed from their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(2, 6, 3), nn.Linear(6, 3), nn.Linear(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(h.mean((2, 3))))))
        return self.head((h * gate[:, :, None, None]).mean((2, 3)))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.never = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class ControlFlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return h if h.sum() > 1 else -h


class ByNumpy(ControlFlow):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return h * float(h.detach().numpy().mean() > 0)


class ByItem(ControlFlow):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return h * h.max().item()


VECTORS, IMAGES = normal(4, 8, seed=1), normal(2, 3, 8, 8, seed=2)
FIVE, TOKENS = normal(4, 5, seed=3), labels((2, 6), 11, seed=4)

TRUTH = [
    Net("mlp", lambda: mlp(8, 16, 12, 4), VECTORS, 28, 2),
    Net("mlp without bias", lambda: mlp(8, 16, 12, 4, bias=False), VECTORS, 28, 2),
    Net("lenet", lambda: lenet(6, 16, 120, 84), normal(2, 1, 28, 28), 226, 4),
    Net("vgg-11-bn", lambda: vgg(8), normal(2, 3, 32, 32), 688, 16),
    Net("vgg-11-bn, frozen buffers", lambda: vgg(8), normal(2, 3, 32, 32), 344, 8, find={"buffers": "frozen"}),
    Net("resnet-20 of width 4", lambda: testbeds.resnet20(4), IMAGES, 308, 33),
    Net("resnet-20, frozen buffers", lambda: testbeds.resnet20(4), IMAGES, 112, 12, find={"buffers": "frozen"}),
    Net("resnet-20, training", lambda: testbeds.resnet20(4), IMAGES, 308, 33, 196, {"mode": "train"}),
    Net(
        "leaky and parametric relu",
        lambda: nn.Sequential(
            nn.Linear(8, 10), nn.LeakyReLU(), nn.Linear(10, 9), nn.PReLU(), nn.Linear(9, 7), nn.PReLU(7),
            nn.Linear(7, 2),
        ),
        VECTORS, 26, 3,
    ),
    Net("functional", Functional, IMAGES, 15, 3),
    Net("mobilenet", mobile, IMAGES, 128, 10),
    Net("mobilenet, frozen buffers", mobile, IMAGES, 64, 5, find={"buffers": "frozen"}),
    Net("depthwise and grouped convolution", grouped, IMAGES[:, :, :, :], 40, 4),
    Net("gelu", lambda: mlp(8, 10, 9, 4, activation=nn.GELU), VECTORS, 0, 0),
    Net(
        "gelu with two linear layers",
        lambda: nn.Sequential(nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 6), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2)),
        VECTORS, 6, 1,
    ),
    Net("transformer, tied", lambda: Transformer(True), TOKENS, 65, 9, 1),
    Net("transformer, untied", lambda: Transformer(False), TOKENS, 73, 10, 1),
    Net("nn.TransformerEncoderLayer", encoder, normal(2, 4, 5), 42, 6, 2),
    Net("u-net", UNet, normal(2, 2, 8, 8), 35, 6),
    Net("shared layer with bias", lambda: Shared(True), FIVE, 6, 1),
    Net("shared layer without bias", lambda: Shared(False), FIVE, 7, 2),
    Net("layer and group norm", norms, FIVE, 15, 4, 3),
    Net("squeeze and excite", SqueezeExcite, normal(2, 2, 5, 5), 9, 2),
    Net("unused layer", Unused, FIVE, 6, 1),
]  # fmt: skip

BY_NAME = {net.name: net for net in TRUTH}


@functools.cache
def found(name: str) -> transforms.Symmetries:
    """The symmetries of a network of the table, looked for once."""
    return transforms.find(BY_NAME[name].problem(), **BY_NAME[name].find)
