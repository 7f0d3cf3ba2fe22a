"""Parameter space: which tensors are measured, and named tensors <-> one flat vector.

One object owns selection and order, so that a direction can never be applied to other tensors than
those it was drawn for.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

# The bytes on which PyTorch's own allocations start, and the longest register of today's processors.
_ALIGNMENT = 64


class ParameterSpace:
    """The selected tensors, in order, each once.

    The flat vector θ ∈ Rⁿ is `torch.nn.utils.parameters_to_vector` of the selected tensors in
    `named_parameters()` order, each C-contiguous. A tied tensor counts once, under its first name.

    Args:
        tensors: name -> tensor, in order.

    Raises:
        ValueError: if nothing is selected or a tensor is not real floating point.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        if not tensors:
            raise ValueError(
                "no parameter to measure: the model has none that requires grad. "
                "Set requires_grad on some, or name them: Problem(..., parameters=['fc.*'])."
            )
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(
                    f"parameter {name!r} has dtype {tensor.dtype}; only real floating point is allowed"
                )
        self.names = list(tensors)
        self.shapes = [tuple(t.shape) for t in tensors.values()]
        self.sizes = [t.numel() for t in tensors.values()]
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        self.ranges = {
            name: (end - size, end) for name, size, end in zip(self.names, self.sizes, ends, strict=True)
        }
        self.size = ends[-1]

    def flatten(self, tensors: Iterable[Tensor]) -> Tensor:
        """Concatenate tensors given in the order of `names` to a vector (n,)."""
        return torch.cat([t.reshape(-1) for t in tensors])

    def split(self, vector: Tensor) -> list[Tensor]:
        """Cut a vector (n,) into views of the shapes of the parameters, in the order of `names`.

        Raises:
            ValueError: if the vector's length is not n.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"got a vector of shape {tuple(vector.shape)}; allowed is ({self.size},)")
        pieces = torch.split(vector, self.sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


def select(model: nn.Module, patterns: str | Sequence[str] | None) -> dict[str, Tensor]:
    """Choose parameters of a model by name.

    Args:
        model: the model.
        patterns: a name, a shell pattern (`"layer1.*"`), a module's name (`"layer1"`, all below it) or
            several; None selects all that require grad. A tied tensor answers to each of its names.

    Returns:
        First name -> tensor, in `named_parameters()` order.

    Raises:
        ValueError: if a pattern matches nothing; the message names the nearest parameters.
    """
    unique = dict(model.named_parameters())
    if patterns is None:
        return {name: p for name, p in unique.items() if p.requires_grad}
    every = dict(model.named_parameters(remove_duplicate=False))
    chosen = {id(every[name]) for name in matching(every, patterns)}
    return {name: p for name, p in unique.items() if id(p) in chosen}


def matching(named: Mapping[str, Tensor], patterns: str | Sequence[str]) -> set[str]:
    """Return the names that one of the patterns (see `select`) means.

    Raises:
        ValueError: if a pattern matches nothing; the message names the nearest.
    """
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [name for name in named if _means(pattern, name)]
        if not hits:
            raise ValueError(_nothing(pattern, list(named)))
        chosen.update(hits)
    return chosen


def _means(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)


def _nothing(pattern: str, names: list[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return f"no parameter matches {pattern!r}; the nearest are {', '.join(near) or '(none)'}"


def column_major(V: Tensor, size: int) -> Tensor:
    """Check one vector (n,) or a block (n, k) and return it as contiguous rows (k, n).

    Raises:
        ValueError: for any other shape, or for a dtype that is not floating point.
    """
    require_block(V, size)
    return V.reshape(size, -1).T.contiguous()


def require_block(V: Tensor, size: int) -> None:
    """Refuse what is neither one vector (n,) nor a block (n, k).

    Raises:
        ValueError: for any other shape, or for a dtype that is not floating point.
    """
    if V.ndim not in {1, 2} or V.shape[0] != size:
        raise ValueError(
            f"got a block of shape {tuple(V.shape)}; "
            f"allowed is ({size},) for one vector or ({size}, k) for k vectors"
        )
    if not V.is_floating_point():
        raise ValueError(f"got vectors of dtype {V.dtype}; allowed is floating point")


def aligned_pieces(V: Tensor, space: ParameterSpace) -> list[list[Tensor]]:
    """Cut each vector of V, (n,) or (n, k), into the shapes of the parameters.

    Each piece starts on a boundary of 64 bytes, in V itself where it does there: some kernels (FFT, matrix
    products) round otherwise on other addresses, and a product must not depend on where its vector stood
    in a block.

    Raises:
        ValueError: as `column_major`.
    """
    require_block(V, space.size)
    if V.numel() == space.size:
        alone = space.split(V.reshape(-1).contiguous())
        return [[p if p.data_ptr() % _ALIGNMENT == 0 else p.clone() for p in alone]]
    pieces: list[list[Tensor]] = [[] for _ in range(V.shape[1])]
    step = _ALIGNMENT // V.element_size()
    for (start, stop), shape in zip(space.ranges.values(), space.shapes, strict=True):
        size = stop - start
        held = V.new_empty(V.shape[1], -(-size // step) * step)[:, :size].copy_(V[start:stop].T)
        for row, column in zip(pieces, held, strict=True):
            row.append(column.view(shape))
    return pieces


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / max(‖a‖, ‖b‖), and 0 where both vanish."""
    scale = max(float(a.norm()), float(b.norm()))
    difference = float((a - b).norm())
    if scale == 0.0:
        return 0.0
    return difference / scale if math.isfinite(scale) else math.nan
