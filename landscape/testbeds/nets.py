"""Small networks for tests, benchmarks and the embedded default.

Each is built by a function with a `seed`: construction draws from that seed's own stream, and the
global random state is afterwards what it was before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape.seeds import generator


@contextmanager
def own_stream(seed: int, name: str) -> Iterator[None]:
    """Let the global CPU generator follow the stream of (seed, name) inside a `with` block.

    PyTorch's constructors and dropout take no generator. The state before the block is put back,
    also when the block raises.
    """
    state = torch.get_rng_state()
    torch.set_rng_state(generator(seed, name, 0).get_state())
    try:
        yield
    finally:
        torch.set_rng_state(state)


def mlp(
    sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, *, seed: int = 0
) -> nn.Sequential:
    """Return a fully connected network.

    Args:
        sizes: widths from input to output, at least two.
        activation: makes the module between two linear layers; none follows the last.
        seed: of the initial weights.

    Raises:
        ValueError: if `sizes` has fewer than two entries.

    >>> sum(p.numel() for p in mlp([64, 128, 128, 10]).parameters())
    26122
    """
    if len(sizes) < 2:
        raise ValueError(
            f"sizes has {len(sizes)} entries; an MLP needs at least an input and an output width"
        )
    layers: list[nn.Module] = []
    with own_stream(seed, "mlp"):
        for width, following in pairwise(sizes):
            layers += [nn.Linear(width, following), activation()]
    return nn.Sequential(*layers[:-1])


def resnet20(
    width: int = 16, classes: int = 10, *, channels: int = 3, blocks: int = 3, seed: int = 0
) -> nn.Sequential:
    """Return the CIFAR residual network of He et al. with batch normalization and ReLU.

    Three stages of `blocks` residual blocks at widths `width`, 2 `width`, 4 `width`; where the shape
    changes, the shortcut is a 1x1 convolution with batch normalization (option B).
    `blocks = 3` gives the 20 layers of the name.

    Args:
        width: channels of the first stage.
        classes: number of outputs.
        channels: channels of the input image, (batch, channels, height, width).
        blocks: residual blocks per stage.
        seed: of the initial weights.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", section 4.2,
    arXiv:1512.03385.

    >>> sum(p.numel() for p in resnet20().parameters())
    272474
    """
    with own_stream(seed, "resnet20"):
        layers: list[nn.Module] = [*_conv_norm(channels, width, 3), nn.ReLU()]
        inner = width
        for stage in range(3):
            outer = width * 2**stage
            for block in range(blocks):
                layers.append(_Residual(inner, outer, stride=2 if stage > 0 and block == 0 else 1))
                inner = outer
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, classes)]
        return nn.Sequential(*layers)


def _conv_norm(inner: int, outer: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inner, outer, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outer)]


class _Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_norm(inner, outer, 3, stride), nn.ReLU(), *_conv_norm(outer, outer, 3)
        )
        same = stride == 1 and inner == outer
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_norm(inner, outer, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def gpt(
    width: int = 160,
    layers: int = 4,
    heads: int = 4,
    context: int = 64,
    vocabulary: int = 256,
    *,
    seed: int = 0,
) -> nn.Module:
    """Return a byte-level decoder-only transformer whose output layer is its token embedding.

    Pre-norm blocks of causal self-attention and a GELU MLP of four times the width, learned positions,
    `F.scaled_dot_product_attention`. It maps token numbers (batch, time) with time <= `context` to
    logits (batch, time, vocabulary).

    Args:
        width: of the residual stream; a multiple of `heads`.
        layers: number of blocks.
        heads: number of attention heads.
        context: longest sequence.
        vocabulary: number of tokens, 256 for bytes.
        seed: of the initial weights.

    Raises:
        ValueError: if `width` is not a multiple of `heads`.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2).

    >>> sum(p.numel() for p in gpt().parameters())
    1288640
    """
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}; each head gets width / heads")
    with own_stream(seed, "gpt"):
        return _GPT(width, layers, heads, context, vocabulary)


class _GPT(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, context: int, vocabulary: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight
        # N(0, 0.02) as in GPT-2: the default N(0, 1) of embeddings gives logits of size sqrt(width).
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.blocks(self.token(tokens) + self.position(places))
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class _Block(nn.Module):
    """Causal self-attention, then an MLP, each added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.projection(self._attend(self.attention_norm(x)))
        mixed: Tensor = x + self.mlp(self.mlp_norm(x))
        return mixed

    def _attend(self, x: Tensor) -> Tensor:
        joint = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))  # batch, time, 3, heads, size
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(2)
