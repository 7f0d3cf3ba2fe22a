"""More networks of known rescaling symmetries: what the ground truth does not name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases_base import labels, normal
from cases_symmetries import Net, mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Llama(nn.Module):
    """RMSNorm written out, rotary positions, grouped-query attention, SwiGLU; no bias, untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 16)
        self.n1, self.n2, self.n3 = (nn.Parameter(torch.ones(16)) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(16, width, bias=False) for width in (16, 8, 8))
        self.o = nn.Linear(16, 16, bias=False)
        self.gate, self.up = (nn.Linear(16, 12, bias=False) for _ in range(2))
        self.down, self.head = nn.Linear(12, 16, bias=False), nn.Linear(16, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        y = self.norm(x, self.n1)
        q, k, v = (f(y).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm(x, self.n2)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm(x, self.n3))

    @staticmethod
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    @staticmethod
    def turn(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.1]).to(x)
        a, b = x.chunk(2, -1)
        return x * torch.cat([angle.cos()] * 2, -1) + torch.cat([-b, a], -1) * torch.cat(
            [angle.sin()] * 2, -1
        )


class Dense(nn.Module):
    """Everything before is an input of everything after."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1), nn.Conv2d(7, 5, 1)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = torch.cat([x, F.relu(self.b(x))], 1)
        x = torch.cat([x, F.relu(self.c(x))], 1)
        return self.head(F.adaptive_max_pool2d(x, 1).flatten(1))


def weight_norm() -> nn.Module:
    a, b = parametrizations.weight_norm(nn.Linear(5, 6)), parametrizations.weight_norm(nn.Linear(6, 3))
    return nn.Sequential(a, nn.ReLU(), b)


class Between(nn.Module):
    """Something between two linear layers."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, width), nn.Linear(inner, 3)
        self.p = nn.Parameter(torch.ones(3))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))

    def between(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class ReluGate(Between):
    def between(self, h: Tensor) -> Tensor:
        value, gate = h.chunk(2, -1)
        return value * F.relu(gate)


class SigmoidGate(Between):
    def between(self, h: Tensor) -> Tensor:
        return F.glu(h)


class InPlaceView(Between):
    def between(self, h: Tensor) -> Tensor:
        h[:, :3].mul_(self.p)
        return h


class LeakyByWhere(Between):
    def between(self, h: Tensor) -> Tensor:
        return torch.where(h > 0, h, 0.1 * h)


class Maxout(Between):
    def between(self, h: Tensor) -> Tensor:
        return h.view(-1, 4, 3).amax(2)


class MaskedByThreshold(Between):
    """A comparison with one, which no rescaling leaves alone."""

    def between(self, h: Tensor) -> Tensor:
        return h * (h > 1)


class ZeroPadded(Between):
    """Two channels of zeros in front; the columns that meet them can be anything."""

    def between(self, h: Tensor) -> Tensor:
        return F.relu(F.pad(h, (2, 0)))


class Shuffled(Between):
    def between(self, h: Tensor) -> Tensor:
        return F.relu(h.view(-1, 2, 3).transpose(1, 2).flatten(1).flip(1))


class Cosine(Between):
    def between(self, h: Tensor) -> Tensor:
        return F.normalize(F.relu(h), dim=-1)


class Accumulated(Between):
    """An operation without a rule."""

    def between(self, h: Tensor) -> Tensor:
        return torch.fft.rfft(F.relu(h)).abs()


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(5, 5), nn.Bilinear(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.a(x)), F.relu(self.b(x)))


class ByHeads(nn.Module):
    """Attention by einsum, with weights of three dimensions: heads, width, features."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.zeros(2, 5, 3)) for _ in range(3))
        self.o = nn.Parameter(torch.zeros(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hde->bhte", x, w) for w in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 3**0.5, -1)
        return torch.einsum("bhte,hed->btd", weights @ v, self.o)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 4)
        self.cell, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.b(F.relu(self.a(x))))[0])


class PreActivation(nn.Module):
    """Norm, ReLU, convolution, twice, beside a stream that no ReLU touches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n1, self.c1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.n2, self.c2, self.n3 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.c2(F.relu(self.n2(self.c1(F.relu(self.n1(x))))))
        return self.head(F.relu(self.n3(x)).mean((2, 3)))


class ReZero(nn.Module):
    """A branch times a number that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = (
            nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 2)
        )  # fmt: skip
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(x + self.gain * self.down(F.relu(self.up(x))))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(11, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.b(F.relu(self.a(self.words(tokens).mean(1))))


def instance() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 3, 3))


def statistics_of_the_batch() -> nn.Module:
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    return nn.Sequential(nn.Linear(5, 6), norm, nn.ReLU(), nn.Linear(6, 3))


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, groups=3), nn.ReLU(), nn.ConvTranspose1d(6, 4, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose1d(4, 2, 3, stride=2),
    )  # fmt: skip


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.RMSNorm(6), nn.ReLU(), nn.Linear(6, 3))


class Unrolled(nn.Module):
    """A recurrence from a state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state, self.out = nn.Linear(5, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            h = F.relu(self.inner(x[:, t]) + self.state(h))
        return self.out(h)


class ConvNeXt(nn.Module):
    """Layer norms around a depthwise convolution, GELU, and a gain for each channel of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.stem, self.n1 = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6)
        self.depthwise, self.n2 = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.n3, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(self.stem(x).permute(0, 2, 3, 1))
        y = self.n2(self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x = x + self.gain * self.down(F.gelu(self.up(y)))
        return self.head(self.n3(x.mean((1, 2))))


class Attended(nn.Module):
    """`nn.MultiheadAttention` with the weights asked for, which takes it through plain matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(self.attention(h, h, h, need_weights=True)[0])


class SplitAndShuffle(nn.Module):
    """One half passes, the other goes through convolutions; then channels are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.c, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.a(x)).chunk(2, 1)
        x = torch.cat([left, F.relu(self.c(self.norm(self.b(right))))], 1)
        x = x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return self.head(x.mean((2, 3)))


FIVE, TOKENS, IMAGES = normal(4, 5, seed=3), labels((2, 6), 11, seed=4), normal(2, 3, 8, 8, seed=2)
SEQUENCE = normal(2, 4, 5, seed=6)

OWN = [
    Net("llama", Llama, TOKENS, 73, 7, 1),
    Net("dense concatenation", Dense, IMAGES, 12, 3),
    Net("weight norm", weight_norm, FIVE, 10, 3),
    Net("gate by relu", lambda: ReluGate(12, 6), FIVE, 12, 1),
    Net("gate by sigmoid", lambda: SigmoidGate(12, 6), FIVE, 6, 1),
    Net("write through a view", lambda: InPlaceView(6, 6), FIVE, 9, 3),
    Net("leaky by where", lambda: LeakyByWhere(6, 6), FIVE, 6, 1),
    Net("maxout", lambda: Maxout(12, 4), FIVE, 4, 1),
    Net("threshold at one", lambda: MaskedByThreshold(6, 6), FIVE, 0, 0),
    Net("padded with zeros", lambda: ZeroPadded(6, 8), FIVE, 8, 2),
    Net("shuffled", lambda: Shuffled(6, 6), FIVE, 6, 1),
    Net("normalized features", lambda: Cosine(6, 6), FIVE, 1, 1, 1),
    Net("no rule", lambda: Accumulated(6, 4), FIVE, 0, 0),
    Net("bilinear", Products, FIVE, 9, 2),
    Net("attention by einsum", ByHeads, SEQUENCE, 12, 2),
    Net("lstm", Recurrent, SEQUENCE, 6, 1),
    Net("pre-activation", PreActivation, IMAGES, 20, 5),
    Net("rezero", ReZero, FIVE, 14, 3),
    Net("bag of words", Bag, TOKENS, 9, 2),
    Net("instance norm", instance, IMAGES, 8, 2, 4),
    Net("batch norm without buffers", statistics_of_the_batch, FIVE, 12, 2, 6),
    Net("transposed convolution", transposed, normal(2, 3, 9), 10, 2),
    Net("rms norm", normed, FIVE, 7, 2, 1),
    Net("unrolled recurrence", Unrolled, SEQUENCE, 6, 1),
    Net("convnext", ConvNeXt, IMAGES, 21, 6, 3),
    Net("multi-head attention", Attended, SEQUENCE, 32, 4),
    Net("split and shuffled", SplitAndShuffle, IMAGES, 20, 5),
    Net("embedding bag", lambda: nn.Sequential(nn.EmbeddingBag(11, 5), *mlp(5, 4, 3)), TOKENS, 9, 2),
    Net("some parameters", lambda: mlp(5, 6, 4, 3), FIVE, 6, 1, options={"parameters": ["0", "2"]}),
]
