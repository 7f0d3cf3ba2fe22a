"""Cases about layers: each network stands beside its formula."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cases_base import (
    Case,
    Params,
    convolution,
    labels,
    linear,
    log_softmax,
    net,
    nll,
    normal,
    relu,
    sigmoid,
    standardized,
)
from torch import Tensor, nn

Y = labels(9, 3, seed=10)
ONES = torch.ones(9, dtype=torch.float64)
FLAT = normal(9, 4, seed=10)
IMAGE = normal(9, 2, 6, 6, seed=11)
SEQUENCE = normal(9, 4, 2, seed=12)
WIDE = normal(9, 3, 4, seed=13)


def classified(name: str, make: Any, x: Any, outputs: Any, sizes: tuple[int, ...] = (4, 4, 1)) -> Case:
    """A network from `x` to three classes with cross-entropy."""
    return Case(
        name, net(make), (x, Y), sizes, outputs, lambda f: nll(f, Y), ONES, {"loss": nn.CrossEntropyLoss()}
    )


def sequential(*layers: Any) -> Any:
    """Constructors, so that each model is fresh."""
    return lambda: nn.Sequential(*(layer() for layer in layers))


# normalization


def batchnorm(p: Params, name: str, x: Tensor, model: nn.Module) -> Tensor:
    """Evaluation mode: by the running statistics."""
    stats = dict(model.named_buffers())
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean, var = stats[f"{name}.running_mean"].view(shape), stats[f"{name}.running_var"].view(shape)
    return (x - mean) / (var + 1e-5).sqrt() * p[f"{name}.weight"].view(shape) + p[f"{name}.bias"].view(shape)


bn1d = sequential(lambda: nn.Linear(4, 5), lambda: nn.BatchNorm1d(5), nn.ReLU, lambda: nn.Linear(5, 3))
bn2d = sequential(
    lambda: nn.Conv2d(2, 3, 3, bias=False), lambda: nn.BatchNorm2d(3), nn.SiLU, nn.Flatten,
    lambda: nn.AvgPool1d(16), lambda: nn.Linear(3, 3),
)  # fmt: skip


def bn2d_outputs(p: Params) -> Tensor:
    h = batchnorm(p, "1", convolution(IMAGE, p["0.weight"]), net(bn2d)())
    h = h * sigmoid(h)
    return linear(p, "5", h.mean((2, 3)))


def layernorm_outputs(p: Params) -> Tensor:
    h = standardized(linear(p, "0", FLAT), (1,)) * p["1.weight"] + p["1.bias"]
    return linear(p, "3", 0.5 * h * (1 + torch.erf(h / 2**0.5)))


def groupnorm_outputs(p: Params) -> Tensor:
    h = convolution(IMAGE, p["0.weight"], stride=2)
    h = standardized(h.view(9, 2, 2, 2, 2), (2, 3, 4)).view(9, 4, 2, 2)
    h = torch.tanh(h * p["1.weight"].view(1, 4, 1, 1) + p["1.bias"].view(1, 4, 1, 1))
    return linear(p, "4", h.flatten(1))


def instancenorm_outputs(p: Params) -> Tensor:
    h = standardized(convolution(IMAGE, p["0.weight"], stride=3), (2, 3))
    h = h * p["1.weight"].view(1, 3, 1, 1) + p["1.bias"].view(1, 3, 1, 1)
    return linear(p, "4", torch.tanh(h).flatten(1))


def rmsnorm_outputs(p: Params) -> Tensor:
    h = linear(p, "0", FLAT)
    h = h / ((h**2).mean(1, keepdim=True) + 1e-6).sqrt() * p["1.weight"]
    return linear(p, "3", torch.log1p(h.exp()))


NORMS = [
    classified("batchnorm1d_eval", bn1d, FLAT, lambda p: linear(
        p, "3", relu(batchnorm(p, "1", linear(p, "0", FLAT), net(bn1d)())))),
    classified("batchnorm2d_eval", bn2d, IMAGE, bn2d_outputs),
    classified("layernorm_gelu", sequential(
        lambda: nn.Linear(4, 5), lambda: nn.LayerNorm(5), nn.GELU, lambda: nn.Linear(5, 3)), FLAT, layernorm_outputs),
    classified("groupnorm", sequential(
        lambda: nn.Conv2d(2, 4, 3, stride=2, bias=False), lambda: nn.GroupNorm(2, 4), nn.Tanh, nn.Flatten,
        lambda: nn.Linear(16, 3, bias=False)), IMAGE, groupnorm_outputs),
    classified("instancenorm", sequential(
        lambda: nn.Conv2d(2, 3, 3, stride=3, bias=False), lambda: nn.InstanceNorm2d(3, affine=True), nn.Tanh,
        nn.Flatten, lambda: nn.Linear(12, 3)), IMAGE, instancenorm_outputs),
    classified("rmsnorm_softplus", sequential(
        lambda: nn.Linear(4, 5), lambda: nn.RMSNorm(5, eps=1e-6), nn.Softplus, lambda: nn.Linear(5, 3)),
        FLAT, rmsnorm_outputs),
]  # fmt: skip


# attention


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """Softmax attention of one head, (..., time, size)."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu(1)
    return log_softmax(scores).exp() @ value


def multihead(p: Params, name: str, x: Tensor) -> Tensor:
    """nn.MultiheadAttention with two heads."""
    joint = x @ p[f"{name}.in_proj_weight"].T + p[f"{name}.in_proj_bias"]
    query, key, value = joint.chunk(3, -1)
    half = x.shape[-1] // 2
    heads = [attend(query[..., h], key[..., h], value[..., h]) for h in (slice(0, half), slice(half, None))]
    return linear(p, f"{name}.out_proj", torch.cat(heads, -1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.Linear(4, 12, bias=False)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.joint(x).chunk(3, -1)
        attended = F.scaled_dot_product_attention(
            query[:, None], key[:, None], value[:, None], is_causal=True
        )
        return self.out(attended[:, 0].mean(1))


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.1)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.1, batch_first=True)
        self.out = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[:, 0])


def attention_outputs(p: Params) -> Tensor:
    query, key, value = linear(p, "joint", WIDE).chunk(3, -1)
    return linear(p, "out", attend(query, key, value, causal=True).mean(1))


def encoder_outputs(p: Params) -> Tensor:
    def norm(name: str, h: Tensor) -> Tensor:
        return standardized(h, (2,)) * p[f"layer.{name}.weight"] + p[f"layer.{name}.bias"]

    h = norm("norm1", WIDE + multihead(p, "layer.self_attn", WIDE))
    h = norm("norm2", h + linear(p, "layer.linear2", relu(linear(p, "layer.linear1", h))))
    return linear(p, "out", h[:, 0])


ATTENTION = [
    classified("attention", Attention, WIDE, attention_outputs),
    classified("multihead_attention", Multihead, WIDE, lambda p: linear(
        p, "out", multihead(p, "attention", WIDE).mean(1))),
    classified("transformer_encoder_layer", Encoder, WIDE, encoder_outputs),
]  # fmt: skip


# convolution


def conv_outputs(p: Params) -> Tensor:
    h = relu(convolution(IMAGE, p["0.weight"], padding=1, groups=2) + p["0.bias"].view(1, 4, 1, 1))
    h = h.view(9, 4, 3, 2, 3, 2).amax((3, 5))
    h = convolution(h, p["3.weight"], dilation=2, padding=2, stride=2) + p["3.bias"].view(1, 3, 1, 1)
    return linear(p, "6", torch.tanh(h).flatten(1))


def conv1d_outputs(p: Params) -> Tensor:
    x = SEQUENCE.transpose(1, 2)[:, :, None]
    h = convolution(x, p["0.weight"][:, :, None])[:, :, 0] + p["0.bias"][:, None]
    h = torch.where(h > 0, h, h * p["1.weight"].view(1, 4, 1))
    return h.mean(2) @ p["4.weight"].T + p["4.bias"]


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=3)
        self.squeeze = nn.Linear(4, 2)
        self.excite = nn.Linear(2, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(h.mean((2, 3))))))
        return self.out(F.hardswish(h * gate[:, :, None, None]).mean((2, 3)))


def squeeze_outputs(p: Params) -> Tensor:
    h = convolution(IMAGE, p["conv.weight"], stride=3) + p["conv.bias"].view(1, 4, 1, 1)
    gate = sigmoid(linear(p, "excite", relu(linear(p, "squeeze", h.mean((2, 3))))))
    h = h * gate[:, :, None, None]
    h = torch.where(h <= -3, 0 * h, torch.where(h >= 3, h, h * (h + 3) / 6))
    return linear(p, "out", h.mean((2, 3)))


def transposed_outputs(p: Params) -> Tensor:
    x = IMAGE[:, :, ::3, ::3]
    w = p["0.weight"].flip(2, 3).transpose(0, 1)  # a transposed convolution is a full one, kernel turned
    h = torch.tanh(convolution(x, w, padding=1) + p["0.bias"].view(1, 4, 1, 1))
    return torch.einsum("ncxy,oc->no", h, p["2.weight"][:, :, 0, 0]) / 9 + p["2.bias"]


class Spectral(nn.Module):
    """The power spectrum of a learned projection: autodiff through complex numbers to a real loss."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.fc(x))
        return self.out((spectrum.real**2 + spectrum.imag**2) / 6)


def spectral_outputs(p: Params) -> Tensor:
    h = linear(p, "fc", FLAT)
    angle = 2 * torch.pi * torch.arange(6, dtype=torch.float64)[:, None] * torch.arange(4) / 6
    return linear(p, "out", ((h @ angle.cos()) ** 2 + (h @ angle.sin()) ** 2) / 6)


CONVOLUTION = [
    classified("convolution", sequential(
        lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2), lambda: nn.ReLU(inplace=True), lambda: nn.MaxPool2d(2),
        lambda: nn.Conv2d(4, 3, 2, dilation=2, padding=2, stride=2), nn.Tanh, nn.Flatten,
        lambda: nn.Linear(27, 3, bias=False)), IMAGE, conv_outputs),
    classified("conv1d_prelu", sequential(
        lambda: nn.Conv1d(2, 4, 3), lambda: nn.PReLU(4), lambda: nn.AdaptiveAvgPool1d(1), nn.Flatten,
        lambda: nn.Linear(4, 3)), SEQUENCE.transpose(1, 2).contiguous(), conv1d_outputs),
    classified("conv_transpose", sequential(
        lambda: nn.ConvTranspose2d(2, 4, 2), nn.Tanh, lambda: nn.Conv2d(4, 3, 1),
        lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten), IMAGE[:, :, ::3, ::3].contiguous(), transposed_outputs),
    classified("squeeze_excite", SqueezeExcite, IMAGE, squeeze_outputs),
    classified("spectral", Spectral, FLAT, spectral_outputs),
]  # fmt: skip


# recurrence


class Recurrent(nn.Module):
    def __init__(self, kind: Any, outer: int = 3, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(2, 3, batch_first=True, **options)
        self.head = nn.Linear(outer, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


def gates(p: Params, x: Tensor, h: Tensor, suffix: str = "l0") -> tuple[Tensor, Tensor]:
    inner = x @ p[f"rnn.weight_ih_{suffix}"].T + p[f"rnn.bias_ih_{suffix}"]
    return inner, h @ p[f"rnn.weight_hh_{suffix}"].T + p[f"rnn.bias_hh_{suffix}"]


def lstm_outputs(p: Params) -> Tensor:
    h = c = torch.zeros(9, 3, dtype=torch.float64)
    states = []
    for x in SEQUENCE.unbind(1):
        a, b = gates(p, x, h)
        i, f, g, o = (a + b).chunk(4, 1)
        c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
        h = sigmoid(o) * torch.tanh(c)
        states.append(h)
    return linear(p, "head", sum(states) / 4)


def gru_outputs(p: Params) -> Tensor:
    h = torch.zeros(9, 3, dtype=torch.float64)
    states = []
    for x in SEQUENCE.unbind(1):
        (ar, az, an), (br, bz, bn) = (t.chunk(3, 1) for t in gates(p, x, h))
        z = sigmoid(az + bz)
        h = (1 - z) * torch.tanh(an + sigmoid(ar + br) * bn) + z * h
        states.append(h)
    return linear(p, "head", sum(states) / 4)


def bidirectional_outputs(p: Params) -> Tensor:
    means = []
    for suffix, steps in (("l0", SEQUENCE.unbind(1)), ("l0_reverse", SEQUENCE.flip(1).unbind(1))):
        h = torch.zeros(9, 3, dtype=torch.float64)
        states = []
        for x in steps:
            a, b = gates(p, x, h, suffix)
            h = torch.tanh(a + b)
            states.append(h)
        means.append(sum(states) / 4)
    return linear(p, "head", torch.cat(means, 1))


RECURRENT = [
    classified("lstm", lambda: Recurrent(nn.LSTM), SEQUENCE, lstm_outputs),
    classified("gru", lambda: Recurrent(nn.GRU), SEQUENCE, gru_outputs),
    classified("rnn_bidirectional", lambda: Recurrent(nn.RNN, 6, bidirectional=True), SEQUENCE, bidirectional_outputs),
]  # fmt: skip

CASES = [*NORMS, *ATTENTION, *CONVOLUTION, *RECURRENT]
