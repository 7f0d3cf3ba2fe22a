"""Cases about what a mean is a mean over: losses, weights, reductions, the forms of a batch."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from cases_base import Case, Params, labels, linear, log_softmax, net, nll, normal, sigmoid
from torch import Tensor, nn

ONES = torch.ones(10, dtype=torch.float64)
X = normal(10, 3)
Y = labels(10, 4)
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.5], dtype=torch.float64)

tanh_net = net(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)))


def tanh_outputs(p: Params, x: Tensor = X) -> Tensor:
    return linear(p, "2", torch.tanh(linear(p, "0", x)))


def classified(
    name: str, loss: Any, terms: Any, weights: Tensor = ONES, target: Tensor = Y, **options: Any
) -> Case:
    return Case(name, tanh_net, (X, target), (8, 2), tanh_outputs, terms, weights, {"loss": loss, **options})


def squares(f: Tensor) -> Tensor:
    return ((f - normal(10, 4, seed=1)) ** 2).sum(1)


def regression(name: str, loss: Any, terms: Any, weights: Tensor = 4 * ONES, **options: Any) -> Case:
    return classified(name, loss, terms, weights, target=normal(10, 4, seed=1), **options)


def smoothed(f: Tensor, y: Tensor, amount: float, weight: Tensor) -> Tensor:
    """(1 - a) w_y (-log p_y) + (a / C) sum_c w_c (-log p_c)."""
    logp = log_softmax(f)
    return (1 - amount) * weight[y] * nll(f, y) - amount / f.shape[-1] * (logp * weight).sum(-1)


PROBABILITIES = torch.softmax(normal(10, 4, seed=2), 1)
BINARY = labels((10, 4), 2, seed=3).double()
POSITIVE = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
MASKED = Y.clone()
MASKED[[1, 4, 8, 9]] = -100  # of (8, 2), the second batch has no valid target at all
VALID = (MASKED != -100).double()


def log_sigmoid(f: Tensor) -> Tensor:
    return -(1 + (-f).exp()).log()


def binary(f: Tensor) -> Tensor:
    return -(BINARY * log_sigmoid(f) + (1 - BINARY) * log_sigmoid(-f)).sum(1)


def huber(f: Tensor) -> Tensor:
    e = f - normal(10, 4, seed=1)
    return torch.where(e.abs() < 0.7, 0.5 * e**2, 0.7 * (e.abs() - 0.35)).sum(1)


def at_valid(values: Tensor) -> Tensor:
    return torch.where(VALID > 0, values, torch.zeros_like(values))


WEIGHTED_VALID = VALID * CLASS_WEIGHT[MASKED.clamp(min=0)]

SHIPPED = [
    regression("mse", nn.MSELoss(), squares),
    regression("mse_function", F.mse_loss, squares),
    regression("mse_sum", nn.MSELoss(reduction="sum"), squares, reduction="sum"),
    regression("huber", nn.HuberLoss(delta=0.7), huber),
    regression(
        "poisson", nn.PoissonNLLLoss(), lambda f: (f.exp() - normal(10, 4, seed=1) * f).sum(1)
    ),
    classified("cross_entropy", nn.CrossEntropyLoss(), lambda f: nll(f, Y)),
    classified(
        "cross_entropy_sum", functools.partial(F.cross_entropy, reduction="sum"), lambda f: nll(f, Y),
        reduction="sum",
    ),
    classified(
        "label_smoothing", nn.CrossEntropyLoss(label_smoothing=0.2),
        lambda f: smoothed(f, Y, 0.2, torch.ones(4, dtype=torch.float64)),
    ),
    classified(
        "class_weights", nn.CrossEntropyLoss(weight=CLASS_WEIGHT), lambda f: CLASS_WEIGHT[Y] * nll(f, Y),
        CLASS_WEIGHT[Y],
    ),
    classified(
        "class_weights_label_smoothing", nn.CrossEntropyLoss(weight=CLASS_WEIGHT, label_smoothing=0.3),
        lambda f: smoothed(f, Y, 0.3, CLASS_WEIGHT), CLASS_WEIGHT[Y],
    ),
    classified(
        "ignore_index_empty_batch", nn.CrossEntropyLoss(),
        lambda f: at_valid(nll(f, MASKED.clamp(min=0))), VALID, MASKED,
    ),
    classified(
        "ignore_index_class_weights_smoothing",
        nn.CrossEntropyLoss(weight=CLASS_WEIGHT, ignore_index=-1, label_smoothing=0.1),
        lambda f: at_valid(smoothed(f, MASKED.clamp(min=0), 0.1, CLASS_WEIGHT)),
        WEIGHTED_VALID, torch.where(MASKED < 0, -1, MASKED),
    ),
    classified(
        "ignored_class", functools.partial(F.cross_entropy, ignore_index=1),
        lambda f: torch.where(Y == 1, 0.0, nll(f, Y)), (Y != 1).double(),
    ),
    classified(
        "probability_targets", nn.CrossEntropyLoss(), lambda f: -(PROBABILITIES * log_softmax(f)).sum(1),
        target=PROBABILITIES,
    ),
    classified(
        "probability_targets_class_weights", nn.CrossEntropyLoss(weight=CLASS_WEIGHT),
        lambda f: -(CLASS_WEIGHT * PROBABILITIES * log_softmax(f)).sum(1), target=PROBABILITIES,
    ),
    classified("bce_with_logits", nn.BCEWithLogitsLoss(), binary, 4 * ONES, BINARY),
    classified(
        "bce_pos_weight", nn.BCEWithLogitsLoss(pos_weight=POSITIVE),
        lambda f: -(POSITIVE * BINARY * log_sigmoid(f) + (1 - BINARY) * log_sigmoid(-f)).sum(1),
        4 * ONES, BINARY,
    ),
    Case(
        "bce_of_probabilities", net(lambda: nn.Sequential(nn.Linear(3, 4), nn.Sigmoid())), (X, BINARY), (8, 2),
        lambda p: sigmoid(linear(p, "0", X)),
        lambda f: -(BINARY * f.log() + (1 - BINARY) * (1 - f).log()).sum(1), 4 * ONES, {"loss": nn.BCELoss()},
    ),
    Case(
        "nll_of_log_softmax", net(lambda: nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1))), (X, Y), (4, 4, 2),
        lambda p: log_softmax(linear(p, "0", X)),
        lambda f: -CLASS_WEIGHT[Y] * f.gather(1, Y[:, None])[:, 0], CLASS_WEIGHT[Y],
        {"loss": nn.NLLLoss(weight=CLASS_WEIGHT)},
    ),
    Case(
        "kl_batchmean", net(lambda: nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1))), (X, PROBABILITIES), (8, 2),
        lambda p: log_softmax(linear(p, "0", X)),
        lambda f: (PROBABILITIES * (PROBABILITIES.log() - f)).sum(1), ONES,
        {"loss": nn.KLDivLoss(reduction="batchmean")},
    ),
]  # fmt: skip


# sequences with padding: the mean is over valid tokens


TOKENS = labels((9, 5), 6, seed=4)
NEXT = labels((9, 5), 6, seed=5)
for row, length in enumerate((5, 1, 3, 2, 5, 4, 1, 2, 3)):
    NEXT[row, length:] = -100
REAL = (NEXT != -100).double()


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.out = nn.Linear(3, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embedding(tokens))).transpose(1, 2)


def padded_terms(f: Tensor) -> Tensor:
    return (REAL * nll(f.transpose(1, 2), NEXT.clamp(min=0))).sum(1)


def tagger_outputs(p: Params) -> Tensor:
    return linear(p, "out", torch.tanh(p["embedding.weight"][TOKENS])).transpose(1, 2)


PADDED = [
    Case(
        "padding", net(Tagger), (TOKENS, NEXT), (4, 4, 1), tagger_outputs, padded_terms, REAL.sum(1),
        {"loss": nn.CrossEntropyLoss()},
    ),
    Case(
        "padding_sum", net(Tagger), (TOKENS, NEXT), (4, 4, 1), tagger_outputs, padded_terms, REAL.sum(1),
        {"loss": nn.CrossEntropyLoss(reduction="sum"), "reduction": "sum"},
    ),
]  # fmt: skip


# losses and batches of the user's own


SAMPLE_WEIGHT = torch.linspace(0.1, 2.0, 10, dtype=torch.float64)


def weighted_mean(f: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    y, weight = target
    return (weight * F.cross_entropy(f, y, reduction="none")).sum() / weight.sum()


def mean_fourth_power(f: Tensor, y: Tensor) -> Tensor:
    return ((f - y) ** 4).sum(1).mean()


def sum_fourth_power(f: Tensor, y: Tensor) -> Tensor:
    return ((f - y) ** 4).sum()


def penalized(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y) + 0.05 * sum((p**2).sum() for p in model.parameters())


def fourth(f: Tensor) -> Tensor:
    return ((f - normal(10, 4, seed=1)) ** 4).sum(1)


class Scaled(nn.Module):
    """Takes two inputs, returns a nest."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
        return {"logits": {"main": self.fc(x) * scale[:, None], "constant": x.detach()}, "aux": [self.fc(x)]}


SCALE = torch.linspace(-1, 1.5, 10, dtype=torch.float64)


def scaled_outputs(p: Params) -> tuple[Tensor, Tensor]:
    return linear(p, "fc", X) * SCALE[:, None], linear(p, "fc", X)


def coupled(out: dict[str, Any], y: Tensor) -> Tensor:
    """A loss that couples two outputs, so that the output Hessian has blocks between them."""
    return F.cross_entropy(out["logits"]["main"] * torch.tanh(out["aux"][0]), y)


def coupled_terms(f: Tensor, aux: Tensor) -> Tensor:
    return nll(f * torch.tanh(aux), Y)


DICTIONARY = {"x": X, "scale": SCALE, "meta": {"y": Y}}

OWN = [
    classified(
        "explicit_weight", weighted_mean, lambda f: SAMPLE_WEIGHT * nll(f, Y), SAMPLE_WEIGHT,
        (Y, SAMPLE_WEIGHT), weight=lambda batch: batch[1][1].sum(),
    ),
    regression("own_loss_mean", mean_fourth_power, fourth, ONES),
    regression("own_loss_sum", sum_fourth_power, fourth, ONES, reduction="sum"),
    Case(
        "forward", tanh_net, (X, Y), (8, 2), tanh_outputs, lambda f: nll(f, Y), ONES, {"forward": penalized},
        penalty=lambda p: 0.05 * sum((t**2).sum() for t in p.values()),
    ),
    Case(
        "forward_weight", net(Tagger), {"tokens": TOKENS, "next": NEXT}, (4, 4, 1), tagger_outputs, padded_terms,
        REAL.sum(1),
        {"forward": lambda m, b: F.cross_entropy(m(b["tokens"]), b["next"]),
         "weight": lambda b: (b["next"] >= 0).sum()},
    ),
    Case(
        "dict_batch_nested_outputs", net(Scaled), DICTIONARY, (8, 2), scaled_outputs, coupled_terms, ONES,
        {"loss": coupled, "output": lambda m, b: m(b["x"], b["scale"]), "target": lambda b: b["meta"]["y"]},
    ),
    Case(
        "keyword_inputs", net(Scaled), ({"x": X, "scale": SCALE}, Y), (4, 4, 2), scaled_outputs, coupled_terms, ONES,
        {"loss": coupled},
    ),
    Case(
        "tuple_inputs", net(Scaled), ((X, SCALE), Y), (4, 4, 2), scaled_outputs, coupled_terms, ONES,
        {"loss": coupled, "microbatch": 3},
    ),
    classified("microbatch", nn.CrossEntropyLoss(), lambda f: nll(f, Y), microbatch=3),
    classified(
        "microbatch_of_one_class_weights", nn.CrossEntropyLoss(weight=CLASS_WEIGHT),
        lambda f: CLASS_WEIGHT[Y] * nll(f, Y), CLASS_WEIGHT[Y], microbatch=1,
    ),
    classified("loss_linear_in_outputs", lambda f, y: (f * y).sum(1).mean(),
               lambda f: (f * BINARY).sum(1), ONES, BINARY),
]  # fmt: skip

CASES = [*SHIPPED, *PADDED, *OWN]
