"""Smooth reparameterizations θ = g(η): the same loss in other coordinates, as a problem of its own.

∇²L_η = ∇gᵀ (∇²L)(g) ∇g + Σ_j (∂L/∂θ_j) ∇²g_j: at a critical point any bijection turns the Hessian into a congruent one,
elsewhere a second term comes in. Source: Dinh et al., "Sharp Minima Can Generalize For Deep Nets", section 5,
arXiv:1703.04933.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from landscape import guard, vectors
from landscape.errors import Refused
from landscape.transforms.transformed import function_change

if TYPE_CHECKING:
    from landscape.problem import Problem

Tensors = Mapping[str, Tensor]
Map = Callable[[dict[str, Tensor]], Tensors]

_NEWTON_STEPS = 100
_ORIGINAL = "reparametrized"  # the name of the model within ours


@dataclass(frozen=True)
class PulledBack:
    """A problem in other coordinates.

    Attributes:
        problem: L(g(η)) as a function of η, at η; its flat vector is η.
        g: from named tensors of η to named tensors of θ.
        function_change: the largest relative difference of f at g(η) from f at θ, on all data.
    """

    problem: Problem
    g: Map
    function_change: float

    def theta(self, eta: Tensor) -> Tensor:
        """g(η), a vector (n,), of η (m,)."""
        space = self.problem.space
        named = dict(zip(space.names, space.split(eta), strict=True))
        return torch.cat([t.reshape(-1) for t in self.g(named).values()])


class Reparametrized(nn.Module):
    """A model that computes with θ = g(η), where η are its parameters.

    Args:
        model: with parameters θ.
        g: from named η to named θ, differentiable twice.
        eta: names and values of η.
        fixed: other parameters of the model, by name, in place of its own.
    """

    def __init__(self, model: nn.Module, g: Map, eta: Tensors, fixed: Tensors):
        super().__init__()
        self._g, self._fixed = g, dict(fixed)
        self._places = guard.Slots(model)
        self._names = list(eta)
        for name, tensor in eta.items():  # register_parameter would refuse a dot in the name
            self._parameters[name] = nn.Parameter(tensor.detach().clone())
        self._modules[_ORIGINAL] = model

    def run(self, function: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        """Call a function while the model's parameters are g(η)."""
        theta = self._g({name: self._parameters[name] for name in self._names})  # type: ignore[misc]
        with self._places.filled({**self._fixed, **theta}):
            return function(*inputs, **named)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the model."""
        return self.run(self.original, *inputs, **named)

    @property
    def original(self) -> nn.Module:
        """The model."""
        return self._modules[_ORIGINAL]  # type: ignore[return-value]


def pulled_back(
    problem: Problem,
    g: Map | Callable[[Tensor], Tensor],
    eta: Tensors | Tensor,
    *,
    allowed: float | None = None,
) -> PulledBack:
    """Pull a problem back along θ = g(η).

    Args:
        problem: L(θ), at θ.
        g: either from named tensors of η to the measured parameters by name, or from one vector (m,) to θ (n,);
            differentiable twice by autograd. It need not be invertible.
        eta: a point with g(η) = θ: named tensors, or one vector.
        allowed: the largest relative change of the function; None is rounding.

    Raises:
        Refused: if g(η) does not give the function that the problem has.
        ValueError: if g does not return the measured parameters.

    >>> import torch, landscape
    >>> model = torch.nn.Linear(2, 1)
    >>> data = [(torch.ones(3, 2), torch.zeros(3, 1))]
    >>> problem = landscape.Problem(model, torch.nn.MSELoss(), data)
    >>> doubled = pulled_back(problem, lambda eta: eta / 2, 2 * problem.parameters_vector())
    >>> bool((4 * doubled.problem.hvp(torch.ones(3)) - problem.hvp(torch.ones(3))).abs().max() < 1e-5)
    True
    """
    named, start = _by_name(problem, g, eta)
    given = named({name: t.detach() for name, t in start.items()})
    shapes = dict(zip(problem.names, problem.space.shapes, strict=True))
    if {name: tuple(t.shape) for name, t in given.items()} != shapes:
        got = {name: tuple(t.shape) for name, t in given.items()}
        raise ValueError(f"g returned {got}; allowed are the measured parameters {shapes}")
    new = problem.replace(**_changes(problem, named, start))
    # Its η is the module's own; buffers of a moved problem come along under their longer names.
    moved = {f"{_ORIGINAL}.{name}": t for name, t in problem.buffers().items()}
    new = new.at(new.parameters_vector(), moved)
    change = function_change(problem, new)
    limit = allowed if allowed is not None else 2.0**13 * torch.finfo(problem.dtype).eps
    if not change <= limit:
        raise Refused(
            f"g(η) changes the function by {change:.1e} (relative), allowed is {limit:.1e}: give an η with g(η) = θ"
        )
    return PulledBack(new, named, change)


def _by_name(problem: Problem, g: Any, eta: Tensors | Tensor) -> tuple[Map, Tensors]:
    if isinstance(eta, Mapping):
        return g, eta
    space = problem.space
    if eta.numel() == space.size:
        start = dict(zip(space.names, space.split(eta.reshape(-1)), strict=True))
    else:
        start = {"eta": eta.reshape(-1)}

    def named(parts: dict[str, Tensor]) -> Tensors:
        theta = g(torch.cat([t.reshape(-1) for t in parts.values()]))
        return dict(zip(space.names, space.split(theta), strict=True))

    return named, start


def _changes(problem: Problem, g: Map, eta: Tensors) -> dict[str, Any]:
    """The arguments of the pulled-back problem that are not those of the original."""
    module = Reparametrized(problem.evaluator.model, g, eta, problem.fixed)
    changes: dict[str, Any] = {"model": module, "parameters": list(eta)}
    for name in ("output", "forward"):
        given = problem.arguments[name]
        if given is not None:
            changes[name] = lambda model, batch, f=given: model.run(f, model.original, batch)
    return changes


def elementwise(problem: Problem, factors: Tensor) -> PulledBack:
    """η = D θ with any D: every parameter in a unit of its own. The Hessian becomes D⁻¹HD⁻¹.

    Unlike a rescaling of nodes it takes other coordinates, not other weights: f stays, whatever D is.

    Args:
        problem: at θ.
        factors: D (n,), none of them 0.

    Raises:
        ValueError: for other factors.
    """
    theta = problem.parameters_vector()
    if factors.shape != theta.shape or not bool(((factors != 0) & factors.isfinite()).all()):
        raise ValueError(f"allowed are {problem.size} finite factors other than 0")
    d = factors.to(theta)
    return pulled_back(problem, lambda eta: eta / d.to(eta), d * theta)


def radial(problem: Problem, a: float, b: float, center: Tensor | None = None) -> PulledBack:
    """η = (‖θ − θ̂‖² + b)^a (θ − θ̂): a bijection that turns a minimum θ̂ sharp or flat.

    At θ̂, where it is critical, L_η'' = L'' b^(−2a): sharper for b < 1 and a > 0, flatter for a < 0.

    Args:
        problem: at θ.
        a: exponent, > −1/2, without which the map would fold.
        b: > 0; keeps it smooth at θ̂.
        center: θ̂ (n,); default θ.

    Raises:
        ValueError: if a or b is out of range.

    Source: Dinh et al., section 5.1 and figure 5, arXiv:1703.04933.
    """
    if not (a > -0.5 and b > 0):
        raise ValueError(f"got a = {a}, b = {b}; allowed are a > -1/2 and b > 0")
    theta = problem.parameters_vector()
    middle = theta if center is None else center.to(theta)
    offset = theta - middle
    eta = (offset.square().sum() + b) ** a * offset

    def g(eta: Tensor) -> Tensor:
        return middle.to(eta) + eta * (_squared_radius(eta.square().sum(), a, b) + b) ** -a

    return pulled_back(problem, g, eta)


def _squared_radius(rho: Tensor, a: float, b: float) -> Tensor:
    """The s >= 0 with (s + b)^(2a) s = ρ, differentiable twice in ρ."""

    def step(s: Tensor, rho: Tensor) -> Tensor:
        power = (s + b) ** (2 * a)
        slope = power * (1 + 2 * a * s / (s + b))
        return s - (power * s - rho) / slope

    with torch.no_grad():
        s = rho * b ** (-2 * a)
        for _ in range(_NEWTON_STEPS):
            # Newton may overshoot where the function bends; s stays positive.
            s = torch.maximum(step(s, rho), s / 16)
    # Each step from a constant doubles the order to which the result follows ρ: two make it three.
    return step(step(s, rho), rho)


def weight_normalized(problem: Problem, parameters: str | Sequence[str] | None = None) -> PulledBack:
    """Weight normalization: each row w of a weight as w = s v / ‖v‖, with η = (s, v) in place of w.

    The length of v has no effect, so v → α v leaves the function alone and divides that block of the Hessian by α²;
    `find` on the returned problem finds these directions.

    Args:
        problem: at θ.
        parameters: which (names or patterns; default all of at least two dimensions).

    Raises:
        ValueError: if one has fewer than two dimensions, or a row of zeros.
    """
    held = dict(zip(problem.names, (leaf.detach() for leaf in problem.leaves()), strict=True))
    chosen = (
        {name for name, t in held.items() if t.ndim >= 2}
        if parameters is None
        else vectors.matching(held, parameters)
    )
    eta: dict[str, Tensor] = {}
    for name, t in held.items():
        if name not in chosen:
            eta[name] = t
            continue
        if t.ndim < 2 or not bool((_row_norms(t) > 0).all()):
            what = "one dimension only" if t.ndim < 2 else "a row of zeros"
            raise ValueError(
                f"parameter {name!r} has {what}; allowed are weights whose rows have a direction"
            )
        eta[f"{name}_size"], eta[f"{name}_direction"] = _row_norms(t), t

    def g(parts: dict[str, Tensor]) -> Tensors:
        theta = {}
        for name in held:
            if name in chosen:
                direction = parts[f"{name}_direction"]
                theta[name] = parts[f"{name}_size"] * direction / _row_norms(direction)
            else:
                theta[name] = parts[name]
        return theta

    return pulled_back(problem, g, eta)


def _row_norms(t: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(t, dim=list(range(1, t.ndim)), keepdim=True)
    return norms
