"""scikit-learn's digits and the small network trained on them that ships with the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor, nn

from landscape.testbeds.nets import mlp

SIZES = (64, 128, 128, 10)
HELD_OUT_EVERY = 5
"""Rows 4, 9, 14, ... were not trained on."""
_WEIGHTS = "digits_mlp.safetensors"


def digits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the 1797 handwritten digits of scikit-learn, in their order.

    Args:
        dtype: of the inputs.

    Returns:
        Inputs (1797, 64), grey levels divided by their largest value 16, and targets (1797,), int64.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (test part).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.as_tensor(bunch.data, dtype=dtype) / 16, torch.as_tensor(bunch.target, dtype=torch.int64)


def batches(inputs: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Cut a data set into consecutive batches of `size` examples; the last one may be shorter.

    Raises:
        ValueError: if `size` is not positive or the numbers of inputs and targets differ.

    >>> [len(x) for x, _ in batches(torch.zeros(10, 2), torch.zeros(10), 4)]
    [4, 4, 2]
    """
    if size < 1:
        raise ValueError(f"batch size {size} is not positive")
    if len(inputs) != len(targets):
        raise ValueError(f"got {len(inputs)} inputs but {len(targets)} targets; each input needs one target")
    return list(zip(torch.split(inputs, size), torch.split(targets, size), strict=True))


def split(inputs: Tensor, targets: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the part that the shipped network was trained on, and every fifth row, which it never saw."""
    held_out = torch.arange(len(inputs)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return (inputs[~held_out], targets[~held_out]), (inputs[held_out], targets[held_out])


def digits_mlp() -> nn.Sequential:
    """Return the shipped network: 64-128-128-10, ReLU, 26 122 trained float32 parameters, in eval mode."""
    from safetensors.torch import load

    model = mlp(SIZES)
    model.load_state_dict(load(files("landscape.testbeds").joinpath(_WEIGHTS).read_bytes()))
    return model.eval()


@dataclass(frozen=True)
class DefaultInfo:
    """What there is to say about the embedded default, measured when it is loaded.

    `accuracy` and `loss` (mean cross-entropy, nats) are over all rows, as the batches hold them.
    """

    rows: int
    accuracy: float
    loss: float
    trained_rows: int
    trained_accuracy: float
    trained_loss: float
    held_out_rows: int
    held_out_accuracy: float
    held_out_loss: float

    @property
    def sentence(self) -> str:
        """One sentence for the user: which network, which data, how good."""
        return (
            f"a {'-'.join(map(str, SIZES))} ReLU network trained on {self.trained_rows} of scikit-learn's "
            f"{self.rows} digits: accuracy {self.accuracy:.1%}, mean cross-entropy {self.loss:.4f} on all of "
            f"them ({self.held_out_accuracy:.1%} on the {self.held_out_rows} it never saw)"
        )


def load_default(
    size: int = 512,
) -> tuple[nn.Sequential, nn.CrossEntropyLoss, Sequence[tuple[Tensor, Tensor]], DefaultInfo]:
    """Return the embedded default: what is measured when the user names no model.

    Args:
        size: examples per batch; the last of the batches is shorter.

    Returns:
        The shipped network, the mean cross-entropy, all 1797 digits in batches, and what is known of them.
    """
    model, loss = digits_mlp(), nn.CrossEntropyLoss()
    everything = digits()
    trained, held_out = split(*everything)
    parts = []
    for inputs, targets in (everything, trained, held_out):
        with torch.no_grad():
            logits = model(inputs)
        accuracy = (logits.argmax(dim=1) == targets).double().mean().item()
        parts += [len(inputs), accuracy, loss(logits.double(), targets).item()]
    return model, loss, batches(*everything, size), DefaultInfo(*parts)
