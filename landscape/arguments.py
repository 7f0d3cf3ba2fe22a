"""What a Problem may be given, and a model brought into the form that it works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def validate(**arguments: Any) -> None:
    """Refuse arguments of a Problem that do not fit one another.

    Raises:
        TypeError, ValueError: saying what is allowed.
    """
    model, loss, data, forward = (arguments[k] for k in ("model", "loss", "data", "forward"))
    if data is None:
        raise TypeError("data is missing; give a re-iterable of batches, such as a DataLoader")
    if (loss is None) == (forward is None):
        raise TypeError(
            "give either loss (called as loss(output, target)) or forward (called as forward(model, batch))"
        )
    if forward is not None and (arguments["output"] or arguments["target"]):
        raise TypeError("output= and target= belong to the form with loss=; forward= returns the loss itself")
    for name, allowed in (
        ("reduction", ("mean", "sum")),
        ("mode", ("eval", "train")),
        ("products", ("auto", "autodiff", "difference")),
        ("kernels", ("auto", "none")),
    ):
        if arguments[name] not in allowed and not _are_kernels(arguments[name]):
            raise ValueError(f"{name} is {arguments[name]!r}; allowed is {' or '.join(map(repr, allowed))}")
    if arguments["microbatch"] is not None and arguments["microbatch"] < 1:
        raise ValueError(f"microbatch is {arguments['microbatch']}; allowed is a number of examples >= 1")
    dtype = arguments["dtype"]
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; allowed is a real floating-point dtype")
    by_name = isinstance(arguments["parameters"], Mapping)
    if not isinstance(model, nn.Module) and not (callable(model) and by_name):
        raise TypeError(
            f"model is a {type(model).__name__}; allowed is an nn.Module, or a function f(params, x) together with "
            "parameters={name: tensor}"
        )
    if isinstance(model, nn.Module) and by_name:
        raise TypeError(
            "parameters of an nn.Module are given by name or pattern, not by value; use .at(vector)"
        )


def _are_kernels(value: Any) -> bool:
    from landscape.kernels import Kernels  # needed by products only, which not every measurement makes

    return isinstance(value, Kernels)


def unwrapped(model: nn.Module) -> nn.Module:
    """Look through `torch.compile` (no second derivative) and data-parallel wrappers (collectives per pass)."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    original = getattr(model, "_orig_mod", None)
    return unwrapped(original) if isinstance(original, nn.Module) else model


class FunctionModule(nn.Module):
    """A function f(params, x) as a module, so that there is one way to substitute parameters."""

    def __init__(self, function: Callable[..., Any], parameters: Mapping[str, Tensor]):
        super().__init__()
        self._function = function
        for name, tensor in parameters.items():  # register_parameter would refuse a dot in the name
            self._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=tensor.is_floating_point())

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the function with the parameters first."""
        return self._function(dict(self._parameters), *inputs, **named)
