"""Papyan's decomposition written out: explicit Jacobians, explicit matrices, no code of the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call


@dataclass(frozen=True)
class Dense:
    """All matrices of a classifier, float64; means are over the examples of a class, then over classes."""

    hess: Tensor
    G: Tensor
    H: Tensor
    G0: Tensor
    G1: Tensor
    G2: Tensor
    G3: Tensor
    within: list[Tensor]  # of each class, its examples' shares of tr G3
    means: Tensor  # δ_c, or g_c of 2020 (S, n)
    own: Tensor  # δ_cc, or g_cc (S, n)
    class_weights: Tensor  # w_c of 2020
    own_weights: Tensor  # w_cc
    pairs: Tensor  # matrices of the examples of c towards c', (S, C, n, n); they add up to G


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()


def outputs_of(model: nn.Module, x: Tensor, theta: Tensor) -> Tensor:
    named, start = {}, 0
    for name, p in model.named_parameters():
        named[name] = theta[start : start + p.numel()].view(p.shape)
        start += p.numel()
    return functional_call(model, named, (x,))


def dense(model: nn.Module, x: Tensor, y: Tensor, weighting: str, labels: list[int] | None = None) -> Dense:
    theta = flat(model)
    f = outputs_of(model, x, theta)
    C, n = f.shape[1], len(theta)
    labels = list(range(C)) if labels is None else labels
    S = len(labels)
    J = jacobian(lambda t: outputs_of(model, x, t), theta)  # (N, C, n)
    p = torch.softmax(f, 1).detach()
    share = torch.zeros(len(x), dtype=torch.float64)
    for c in labels:
        share[y == c] = 1.0 / (S * int((y == c).sum()))

    def risk(t: Tensor) -> Tensor:
        return share @ nn.functional.cross_entropy(outputs_of(model, x, t), y, reduction="none")

    slope = p - nn.functional.one_hot(y, C)
    tangent = (share[:, None] * slope).detach()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    G = torch.einsum("i,iam,iab,ibn->mn", share, J, curvature, J)
    derivative = J - torch.einsum("ia,iam->im", p, J)[:, None]  # row c' of example i: J_iᵀ (e_c' - p_i)
    parts = {key: torch.zeros(n, n, dtype=torch.float64) for key in ("G0", "G1", "G2", "G3")}
    means, own, class_weights, own_weights, within, pairs = [], [], [], [], [], []
    for c in labels:
        rows = y == c
        count = int(rows.sum())
        others = [k for k in range(C) if k != c]
        D, P = derivative[rows], p[rows]
        if weighting == "2019":
            V, w = P.sqrt()[:, :, None] * D, torch.full_like(P, 1.0 / (S * count))
        else:
            V, w = -D, P / (S * count)
        whole = w.sum(0)  # w_cc'
        mean = torch.einsum("ij,ijn->jn", w, V) / whole[:, None]
        centre = (whole[others, None] * mean[others]).sum(0) / whole[others].sum()
        parts["G0"] += whole[c] * torch.outer(mean[c], mean[c])
        parts["G1"] += whole[others].sum() * torch.outer(centre, centre)
        for k in others:
            parts["G2"] += whole[k] * torch.outer(mean[k] - centre, mean[k] - centre)
        rest = V - mean
        parts["G3"] += torch.einsum("ij,ijm,ijn->mn", w, rest, rest)
        within.append((w * rest.square().sum(2)).sum(1))
        pairs.append(torch.stack([torch.einsum("i,im,in->mn", w[:, k], V[:, k], V[:, k]) for k in range(C)]))
        means.append(centre)
        own.append(mean[c])
        class_weights.append(whole[others].sum())
        own_weights.append(whole[c])
    return Dense(
        hessian(risk, theta), G, hessian(lambda t: (tangent * outputs_of(model, x, t)).sum(), theta),
        parts["G0"], parts["G1"], parts["G2"], parts["G3"], within, torch.stack(means), torch.stack(own),
        torch.stack(class_weights), torch.stack(own_weights), torch.stack(pairs),
    )  # fmt: skip


def spectrum(A: Tensor) -> Tensor:
    """Eigenvalues, descending."""
    return torch.linalg.eigvalsh(A).flip(0)
