"""The denominator of a batch's mean, for the losses that PyTorch ships.

"Mean" is a mean over something: over examples, over valid targets (`ignore_index`), over summed class
weights, over elements. Batches can be averaged only with these weights.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# A class-index loss divides by the number of valid targets (or their summed class weights) ...
_INDEXED = {"cross_entropy", "nll_loss"}
# ... these divide by the number of elements of the target ...
_ELEMENTWISE = {
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "poisson_nll_loss", "soft_margin_loss", "kl_div",
    "hinge_embedding_loss", "gaussian_nll_loss",
}  # fmt: skip
# ... and these by the number of examples.
_MODULES: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.NLLLoss: "nll_loss",
    nn.MSELoss: "mse_loss",
    nn.L1Loss: "l1_loss",
    nn.SmoothL1Loss: "smooth_l1_loss",
    nn.HuberLoss: "huber_loss",
    nn.BCELoss: "binary_cross_entropy",
    nn.BCEWithLogitsLoss: "binary_cross_entropy_with_logits",
    nn.PoissonNLLLoss: "poisson_nll_loss",
    nn.SoftMarginLoss: "soft_margin_loss",
    nn.KLDivLoss: "kl_div",
    nn.HingeEmbeddingLoss: "hinge_embedding_loss",
    nn.GaussianNLLLoss: "gaussian_nll_loss",
}

_OPTIONS = ("reduction", "ignore_index", "weight", "label_smoothing", "pos_weight", "log_input", "full")
# Losses that are -log p(target) of an exponential family whose natural parameters are the outputs.
_LIKELIHOODS = {"cross_entropy", "binary_cross_entropy_with_logits", "mse_loss", "poisson_nll_loss"}

_NORMALIZERS = {
    "cross_entropy": (0.0, "categorical"),
    "nll_loss": (0.0, "categorical"),
    "binary_cross_entropy": (0.0, "Bernoulli"),
    "binary_cross_entropy_with_logits": (0.0, "Bernoulli"),
    "mse_loss": (math.log(math.pi) / 2, "Gaussian of variance 1/2"),
    "l1_loss": (math.log(2.0), "Laplace of scale 1"),
    "gaussian_nll_loss": (math.log(2 * math.pi) / 2, "Gaussian"),
}


def derived_weight(loss: Any, reduction: str) -> Callable[[Tensor], float] | None:
    """Return the function target -> denominator of a known loss's mean, or None for an unknown loss.

    Args:
        loss: a loss module, a function of `torch.nn.functional`, or a `functools.partial` of one.
        reduction: what the user declared, "mean" or "sum".

    Raises:
        ValueError: if the loss says of itself that it reduces otherwise.
    """
    name, options = describe(loss)
    if name is None:
        return None
    own = options.get("reduction", "mean")
    if own == "batchmean" and reduction == "mean":
        return _count_examples
    if own != reduction:
        raise ValueError(
            f"the loss has reduction={own!r}, the problem was declared with reduction={reduction!r}; "
            + (
                f"say Problem(..., reduction={own!r})"
                if own in {"mean", "sum"}
                else "allowed is a loss that returns one number per batch: reduction='mean' or 'sum'"
            )
        )
    if name in _INDEXED:
        return functools.partial(
            _count_indexed, ignore_index=options.get("ignore_index", -100), weight=options.get("weight")
        )
    return _count_elements if name in _ELEMENTWISE else _count_examples


def describe(loss: Any) -> tuple[str | None, dict[str, Any]]:
    """Return the functional name of a PyTorch loss and its options; (None, {}) for any other callable."""
    if isinstance(loss, nn.Module):
        name = _MODULES.get(type(loss))
        known = {key: getattr(loss, key) for key in _OPTIONS if hasattr(loss, key)}
        return name, known if name else {}
    options: dict[str, Any] = {}
    function: Any = loss
    while isinstance(function, functools.partial):
        options = {**function.keywords, **options}
        function = function.func
    name = getattr(function, "__name__", "")
    if getattr(F, name, None) != function or "reduction" not in inspect.signature(function).parameters:
        return None, {}
    return name, options


def no_likelihood(loss: Any) -> str:
    """Say why a loss is not the negative log-likelihood of natural parameters; empty if it is."""
    name, options = describe(loss)
    if name not in _LIKELIHOODS:
        return f"this one is {name or 'not known to be one'}"
    if options.get("weight") is not None or options.get("pos_weight") is not None:
        return f"this {name} has weights"
    if options.get("label_smoothing"):
        return f"this {name} smooths its labels"
    if not options.get("log_input", True):
        return f"this {name} takes rates, not their logarithms"
    return ""


def normalizer(loss: Any) -> tuple[float, str]:
    """Return what a loss lacks, per term, to be -ln p(target) in nats, and of which distribution.

    A loss of the user's own is taken at its word. NaN, and why, for a loss that is no such thing.
    """
    name, options = describe(loss)
    if name is None:
        return 0.0, "a loss of your own, taken as -ln p(target)"
    weighted = options.get("weight") is not None or options.get("pos_weight") is not None
    if weighted or options.get("label_smoothing"):
        return math.nan, f"{name} with weights or smoothed labels is none"
    if name == "gaussian_nll_loss" and options.get("full"):
        return 0.0, "Gaussian"
    if name not in _NORMALIZERS:
        return math.nan, f"{name} is none. Wrap the likelihood that is meant into a function of your own"
    return _NORMALIZERS[name]


def _count_indexed(target: Tensor, ignore_index: int, weight: Tensor | None) -> float:
    if (
        target.is_floating_point()
    ):  # class probabilities: every position counts once, class weights do not divide
        return float(target.numel() // target.shape[1 if target.ndim > 1 else 0])
    wanted = target != ignore_index
    if weight is None:
        return float(wanted.count_nonzero())
    valid = target[wanted]
    return float(weight.to(device=valid.device).double()[valid].sum())


def _count_elements(target: Tensor) -> float:
    return float(target.numel())


def _count_examples(target: Tensor) -> float:
    return float(target.shape[0])
