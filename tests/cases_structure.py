"""Cases about parameters: frozen, tied, unused, chosen, given by a function, oddly laid out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cases_base import Case, Params, labels, linear, log_softmax, net, nll, normal, relu, sigmoid
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ONES = torch.ones(10, dtype=torch.float64)
X = normal(10, 4, seed=20)
Y = labels(10, 3, seed=20)


def classified(name: str, make: Any, outputs: Any, x: Any = X, **options: Any) -> Case:
    selected = options.pop("selected", None)
    terms = options.pop("terms", lambda f: nll(f, Y))
    return Case(
        name, net(make), (x, Y), (8, 2), outputs, terms, ONES, {"loss": nn.CrossEntropyLoss(), **options}, selected
    )  # fmt: skip


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def plain_outputs(p: Params) -> Tensor:
    return linear(p, "4", torch.tanh(linear(p, "2", torch.tanh(linear(p, "0", X)))))


def frozen() -> nn.Module:
    model = plain()
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


def tied() -> nn.Module:
    model = plain()
    model[2].weight = model[0].weight
    return model


def tied_outputs(p: Params) -> Tensor:
    return plain_outputs({**p, "2.weight": p["0.weight"]})


class Repeated(nn.Module):
    """One layer applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.sin(self.cell(x))
        return self.out(x)


def repeated_outputs(p: Params) -> Tensor:
    h = X
    for _ in range(3):
        h = torch.sin(linear(p, "cell", h))
    return linear(p, "out", h)


class Language(nn.Module):
    """Predicts the next token with the transposed embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens).cumsum(1)))).flatten(0, 1)


TOKENS = labels((10, 4), 7, seed=21)
NEXT = labels((10, 4), 7, seed=22)


def language_outputs(p: Params) -> Tensor:
    table = p["embedding.weight"]
    running = torch.stack([table[TOKENS[:, : t + 1]].sum(1) for t in range(4)], 1)
    return (torch.tanh(linear(p, "mix", running)) @ table.T).flatten(0, 1)


class Unused(nn.Module):
    """Two parameters that the forward pass never touches, one that only shifts what softmax ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.zeros(2))
        self.fc = nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.zeros(()))
        self.after = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.shift


class Gated(nn.Module):
    """GLU, a bilinear form, dropout, a scalar temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 4)
        self.form = nn.Bilinear(2, 3, 3)
        self.temperature = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.glu(self.wide(x)), 0.5, self.training)
        return self.form(h, x[:, :3].contiguous()) * self.temperature.exp()


def gated_outputs(p: Params) -> Tensor:
    a, b = linear(p, "wide", X).chunk(2, 1)
    h = a * sigmoid(b)
    form = torch.einsum("ni,oij,nj->no", h, p["form.weight"], X[:, :3]) + p["form.bias"]
    return form * p["temperature"].exp()


def channels_last() -> nn.Module:
    """Parameters whose memory order is not that of their indices."""
    model = nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(3, 3))
    model[3].weight = nn.Parameter(torch.zeros(3, 3).t())
    return model.to(memory_format=torch.channels_last)


def channels_last_outputs(p: Params) -> Tensor:
    return linear(p, "3", torch.einsum("nc,oc->no", X, p["1.weight"][:, :, 0, 0]) + p["1.bias"])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Softplus())
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.body, x, use_reentrant=False))


class Counting(nn.Module):
    """A forward pass that changes a buffer, also in evaluation mode, and one that is no float."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = 0.5 * self.seen + x.detach().mean(0)
        return self.fc(torch.relu(x)) ** 2


def function(params: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w"]) @ params["v"] + params["b"]


FUNCTION = {"w": normal(4, 5, seed=23), "v": normal(5, 3, seed=24), "b": normal(3, seed=25)}


def with_purity(f: Tensor, y: Tensor) -> Tensor:
    return (log_softmax(f).exp() ** 2).sum(1).mean() + F.cross_entropy(f, y)


CASES = [
    classified("frozen", frozen, plain_outputs, selected=("2.weight", "2.bias", "4.weight")),
    classified("tied", tied, tied_outputs, selected=("0.weight", "0.bias", "2.bias", "4.weight", "4.bias")),
    classified("tied_one_chosen_by_its_second_name", tied, tied_outputs, parameters=["2.weight", "4.bias"],
               selected=("0.weight", "4.bias")),
    classified("repeated_layer", Repeated, repeated_outputs),
    Case(
        "tied_embedding", net(Language), (TOKENS, NEXT), (8, 2), language_outputs,
        lambda f: nll(f, NEXT.flatten()), torch.ones(40, dtype=torch.float64),
        {"loss": nn.CrossEntropyLoss(), "target": lambda batch: batch[1].flatten(),
         "output": lambda model, batch: model(batch[0])},
    ),
    classified("unused", Unused, lambda p: linear(p, "fc", X) + p["shift"]),
    classified("only_unused", Unused, lambda p: linear(p, "fc", X) + p["shift"], parameters="after",
               selected=("after.weight", "after.bias")),
    classified("subset_pattern", plain, plain_outputs, parameters="*.bias", selected=("0.bias", "2.bias", "4.bias")),
    classified("subset_module", plain, plain_outputs, parameters=["4", "0.weight"],
               selected=("0.weight", "4.weight", "4.bias")),
    classified("subset_frozen_by_name", frozen, plain_outputs, parameters=["0.weight", "2.*"],
               selected=("0.weight", "2.weight", "2.bias")),
    classified("gated_bilinear_scalar", Gated, gated_outputs),
    classified("channels_last", channels_last, channels_last_outputs),
    classified("checkpointed", Checkpointed,
               lambda p: linear(p, "out", torch.log1p(linear(p, "body.0", X).exp()))),
    classified("changing_buffers", Counting, lambda p: linear(p, "fc", relu(X)) ** 2),
    classified("training_mode", plain, plain_outputs, mode="train"),
    classified("own_loss_not_convex", plain, plain_outputs, loss=with_purity,
               terms=lambda f: (log_softmax(f).exp() ** 2).sum(1) + nll(f, Y)),
    Case("function", lambda: function, (X, Y), (4, 4, 2), lambda p: function(p, X), lambda f: nll(f, Y), ONES,
         {"loss": nn.CrossEntropyLoss(), "parameters": FUNCTION}),
    Case("function_forward", lambda: function, (X, Y), (4, 4, 2), lambda p: function(p, X), lambda f: nll(f, Y), ONES,
         {"forward": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), "parameters": FUNCTION}),
]  # fmt: skip
