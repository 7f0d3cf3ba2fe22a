"""How far a classifier's predictions move: the mean divergence KL(p_θ ‖ p_θ') over the data.

p is the distribution that the outputs give: softmax over classes for cross-entropy, a Bernoulli variable for each
logit of binary cross-entropy. The mean is over all positions that have a valid target, each counted once; class
weights and targets themselves do not enter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from landscape import losses
from landscape.errors import Refused

if TYPE_CHECKING:
    from landscape.problem import Problem

_CATEGORICAL = {"cross_entropy", "nll_loss"}
_BERNOULLI = {"binary_cross_entropy_with_logits"}


class Divergence:
    """The divergence of a classifier's predictions from those at θ, as a function of the parameters.

    Args:
        problem: at θ; its loss tells what the outputs mean.
        memory: bytes in which the log-probabilities at θ are kept; what does not fit is computed anew each time.

    Raises:
        Refused: on a problem with `forward=`, or with a loss that is not a classifier's.
    """

    def __init__(self, problem: Problem, memory: int):
        self.problem, self.memory = problem, memory
        self._logs = _log_probabilities(problem)
        self._kept: list[Tensor] = []
        self._full = False

    def at(self, vector: Tensor) -> float:
        """Return the mean of KL(p_θ ‖ p_θ') in nats, θ' = `vector` (n,); NaN where outputs are not finite."""
        moved = self.problem.at(vector)
        moved.cost.values += 1
        total, positions = 0.0, 0
        with self.problem.session(), torch.no_grad():
            for index, (piece, _) in enumerate(self.problem.evaluator.pieces(self.problem.batches)):
                before, after = self._reference(index, piece), self._predicted(moved, piece)
                target = self.problem.evaluator.target_of(piece)
                terms = (before.exp() * (before - after)).sum(-1)
                if torch.is_tensor(target) and not target.is_floating_point():
                    terms = terms[target.reshape(-1) != self.problem.evaluator.ignored()]
                total += float(terms.sum())
                positions += terms.numel()
        return total / positions

    def _reference(self, index: int, piece: Any) -> Tensor:
        if index < len(self._kept):
            return self._kept[index]
        found = self._predicted(self.problem, piece)
        size = found.numel() * found.element_size()
        self._full = self._full or sum(t.numel() * t.element_size() for t in self._kept) + size > self.memory
        if not self._full:
            self._kept.append(found)
        return found

    def _predicted(self, problem: Problem, piece: Any) -> Tensor:
        """Log-probabilities (positions, outcomes), float64, positions in the order of the target's."""
        with problem.filled(problem.leaves()):
            outputs = problem.evaluator.outputs(piece)
        if not isinstance(outputs, Tensor):
            raise Refused(
                f"cost='kl' needs one tensor of outputs; the model returns a {type(outputs).__name__}"
            )
        return self._logs(outputs.double())


def _log_probabilities(problem: Problem) -> Callable[[Tensor], Tensor]:
    problem.require_outputs("the divergence of predictions")
    name, _ = losses.describe(problem.evaluator.loss)
    if name in _CATEGORICAL:
        return _categorical
    if name in _BERNOULLI:
        return _bernoulli
    raise Refused(
        f"cost='kl' needs a classifier: a loss that is {', '.join(sorted(_CATEGORICAL | _BERNOULLI))}; this one is "
        f"{name or 'not known to be one'}. cost='loss' takes any loss"
    )


def _categorical(outputs: Tensor) -> Tensor:
    """Classes on the second axis, as in `cross_entropy`; log-probabilities themselves are left as they are."""
    logs = outputs.log_softmax(1 if outputs.ndim > 1 else 0)
    return logs.movedim(1, -1).reshape(-1, logs.shape[1]) if logs.ndim > 1 else logs[None]


def _bernoulli(outputs: Tensor) -> Tensor:
    flat = outputs.reshape(-1)
    return torch.stack([F.logsigmoid(flat), F.logsigmoid(-flat)], -1)
