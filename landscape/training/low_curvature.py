"""Networks of low curvature: conversion before training, and the penalty that keeps them so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from landscape.training.layers import CenteredSoftplus, LipschitzBatchNorm
from landscape.training.spectral import spectrally_normalized


def to_low_curvature(model: nn.Module, example: Any, *, beta: float = 5.0, gamma: float = 10.0) -> nn.Module:
    """Turn a network into one whose curvature is bounded by its β and γ, in place, before it is trained.

    ReLUs become `CenteredSoftplus`, batch normalizations `LipschitzBatchNorm`, linear layers and convolutions
    are divided by their spectral norms. This changes the function: train afterwards, with
    `low_curvature_penalty` in the loss.

    Args:
        model: changed in place.
        example: an input with which the model is run once.
        beta: β of each softplus at the start.
        gamma: γ of each normalization at the start.

    Returns:
        The model.

    Raises:
        ValueError: if there is nothing to convert, or a convolution pads other than with zeros.

    Source: Srinivas et al. 2022 (arXiv 2206.07144).
    """
    converted = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            new = _converted(child, beta, gamma)
            if new is not None:
                setattr(parent, name, new.train(child.training))
                converted += 1
    if not converted:
        raise ValueError(
            "the model has neither nn.ReLU nor batch normalization among its modules (functions such as F.relu are "
            "not seen); make them modules"
        )
    return spectrally_normalized(model, example)


def low_curvature_penalty(model: nn.Module, beta: float = 1e-2, gamma: float = 1e-2) -> Tensor:
    """λ_β Σ β_i + λ_γ Σ |log γ_i| over the layers of a converted model, 0-d.

    Args:
        model: what `to_low_curvature` returned.
        beta: λ_β.
        gamma: λ_γ.

    Raises:
        ValueError: if the model has no such layer.

    Source: Srinivas et al. 2022 (arXiv 2206.07144), §3.4.
    """
    terms = [beta * m.beta for m in model.modules() if isinstance(m, CenteredSoftplus)]
    terms += [gamma * m.log_gamma.abs() for m in model.modules() if isinstance(m, LipschitzBatchNorm)]
    if not terms:
        raise ValueError(
            "the model has no layer of low curvature; convert it first: to_low_curvature(model, x)"
        )
    return torch.stack(terms).sum()


def _converted(module: nn.Module, beta: float, gamma: float) -> nn.Module | None:
    if isinstance(module, nn.ReLU):
        return CenteredSoftplus(beta)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        new = LipschitzBatchNorm(module.num_features, gamma, module.eps, module.momentum)
        held = next(module.parameters(), None)
        return new if held is None else new.to(held)
    return None
