"""Parameters that are spread over processes (FSDP, DTensor): whole vectors on one side, this process's on the other.

Under FSDP a process holds a part of each parameter tensor, and only `.backward()` gathers what a layer needs,
averages gradients over the processes and keeps this process's part of them: `torch.autograd.grad` finds
nothing to differentiate, and no second derivative exists. Vectors are held whole by every process, in the
order of the flat parameter vector of the unsharded model, so that what is computed with them is the same on
all of them and does not depend on their number.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from landscape import vectors
from landscape.errors import Refused

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def sharded(model: Any) -> bool:
    """Whether a model is wrapped by FSDP, of either version, or has DTensor parameters. Nothing is tried."""
    if not isinstance(model, nn.Module) or not dist.is_available() or not dist.is_initialized():
        return False  # both need a process group
    if not {"torch.distributed.fsdp", "torch.distributed.tensor"} & sys.modules.keys():
        return False  # nobody can have wrapped it; to import these takes seconds
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    wrapped = any(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in model.modules())
    return wrapped or any(isinstance(p, DTensor) for p in model.parameters())


class Shards:
    """The measured parameters of a sharded model.

    Args:
        model: wrapped by FSDP, or with DTensor parameters.
        parameters: names or patterns, as for `landscape.Problem`; wrappers leave no trace in names.

    Attributes:
        space: of the whole parameters; those of FSDP1, which keeps no shape, are flat.
        group: the processes that share the parameters.
        averaged: the number of processes over whose data FSDP averages gradients; 1 for DTensor alone.

    Raises:
        Refused: for a way of sharding that is not covered.
    """

    def __init__(self, model: nn.Module, parameters: str | Sequence[str] | None):
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        first = _fsdp1(model)
        every = {_clean(name): p for name, p in model.named_parameters()}
        chosen = (
            {name for name, p in every.items() if p.requires_grad}
            if parameters is None
            else vectors.matching(every, parameters)
        )
        self._own = {name: p for name, p in every.items() if name in chosen}
        self._every = list(every.values())
        self._first = first is not None
        fsdp = self._first or any(isinstance(m, FSDPModule) for m in model.modules())
        self.group = first.process_group if first is not None else _mesh_group(self._own, fsdp)
        self.averaged = dist.get_world_size(self.group) if fsdp else 1
        for name, p in self._own.items():
            if p.dtype not in {torch.float32, torch.float64}:
                raise Refused(
                    f"{name} is sharded in {p.dtype}, where differences of gradients are rounding; allowed are float32 "
                    "and float64. Shard the model in one of these"
                )
        self._ranges = self._flat_ranges() if self._first and self.averaged > 1 else {}
        sizes = {
            name: p.shape if isinstance(p, DTensor) else (self._ranges[name][0],) if self._ranges else p.shape
            for name, p in self._own.items()
        }
        self.space = vectors.ParameterSpace(
            {name: torch.empty(size, dtype=self.dtype, device="meta") for name, size in sizes.items()}
        )

    @property
    def dtype(self) -> torch.dtype:
        """In which gradients are computed."""
        return next(iter(self._own.values())).dtype

    # --- whole vectors and this process's pieces ------------------------------------------------------

    def local(self) -> list[Tensor]:
        """This process's pieces of the parameters themselves."""
        return [_local(p.detach()) for p in self._own.values()]

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """This process's pieces of a whole vector (n,), shaped as those of the parameters."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        found = []
        for (name, p), part in zip(self._own.items(), self.space.split(vector), strict=True):
            if isinstance(p, DTensor):  # each process cuts its own copy; nothing is sent
                cut = distribute_tensor(part, p.device_mesh, p.placements, src_data_rank=None)
                found.append(cut.to_local())
            elif self._ranges:
                _, start = self._ranges[name]
                found.append(part.reshape(-1)[start : start + p.numel()])
            else:
                found.append(part)
        return found

    def whole(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole vector (n,) of pieces that all processes hold; the same bits on each of them."""
        from torch.distributed.tensor import DTensor

        found = []
        for p, piece in zip(self._own.values(), pieces, strict=True):
            if isinstance(p, DTensor):
                laid = DTensor.from_local(
                    piece, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )
                found.append(laid.full_tensor())
            elif self._ranges:
                found.append(self._joined(piece))
            else:
                found.append(piece)
        return self.space.flatten(found)

    def _joined(self, piece: Tensor) -> Tensor:
        """The pieces of all processes one after the other; FSDP1 cuts flat tensors."""
        counts = self.gathered(float(piece.numel()))
        most = int(max(counts))
        padded = torch.cat([piece.reshape(-1), piece.new_zeros(most - piece.numel())])
        held = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(held, padded, group=self.group)
        return torch.cat([part[: int(count)] for part, count in zip(held, counts, strict=True)])

    def _flat_ranges(self) -> dict[str, tuple[int, int]]:
        """Of each parameter, its whole size and where this process's piece starts."""
        rank, found = dist.get_rank(self.group), {}
        for name, p in self._own.items():
            counts = self.gathered(float(p.numel()))
            found[name] = int(sum(counts)), int(sum(counts[:rank]))
        return found

    # --- the processes ------------------------------------------------------------------------------

    def gathered(self, number: float) -> list[float]:
        """A number of each process, in their order."""
        device = next(iter(self._own.values())).device
        given = torch.tensor(number, dtype=torch.float64, device=device)
        held = [torch.zeros_like(given) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(held, given, group=self.group)
        return [float(t) for t in held]

    def texts(self, text: str) -> list[str]:
        """A text of each process, in their order."""
        held: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(held, text, group=self.group)
        return [str(t) for t in held]

    # --- passes -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def displaced(self, vector: Tensor | None = None) -> Iterator[None]:
        """Let the model stand at θ + vector; afterwards parameters and gradients are bit for bit as before."""
        own = self.local()
        saved = [] if vector is None else [t.clone() for t in own]
        kept = [(p, p.grad) for p in self._every]
        try:
            with torch.no_grad():
                for p, _ in kept:
                    p.grad = None
                if vector is not None:
                    for t, step in zip(own, self.pieces(vector), strict=True):
                        t.add_(step)
            yield
        finally:
            with torch.no_grad():
                for t, before in zip(own, saved, strict=False):
                    t.copy_(before)
                for p, grad in kept:
                    p.grad = grad

    def add_slopes(self, total: list[Tensor]) -> None:
        """Add what `.backward()` left in `.grad` to this process's pieces, float64, and clear it."""
        for p, into in zip(self._own.values(), total, strict=True):
            if p.grad is not None:
                into.add_(_local(p.grad).reshape(into.shape))
        for p in self._every:
            p.grad = None


def _local(t: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return t.to_local() if isinstance(t, DTensor) else t


def _clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _fsdp1(model: nn.Module) -> Any:
    """The outermost module that FSDP1 wraps, None where there is none."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    whole = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
    found = [m for m in model.modules() if isinstance(m, FullyShardedDataParallel)]
    for module in found:
        alone = dist.get_world_size(module.process_group) == 1
        if not module._use_orig_params:
            raise Refused(
                "FSDP without the original parameters hides their order; wrap with use_orig_params=True"
            )
        if module.sharding_strategy not in whole and not alone:
            raise Refused(
                f"FSDP with {module.sharding_strategy.name} is not covered; allowed is FULL_SHARD or SHARD_GRAD_OP"
            )
    return found[0] if found else None


def _mesh_group(parameters: Mapping[str, Tensor], fsdp: bool) -> Any:
    from torch.distributed.tensor import DTensor

    meshes = {p.device_mesh for p in parameters.values() if isinstance(p, DTensor)}
    # Without FSDP all processes see the same data, and the same gradient of what is not sharded.
    plain = [name for name, p in parameters.items() if fsdp and not isinstance(p, DTensor)]
    if plain or len(meshes) != 1 or next(iter(meshes)).ndim != 1:
        what = (
            f"{', '.join(plain[:3])} not sharded"
            if plain
            else f"{len(meshes)} meshes, or one of several dimensions"
        )
        raise Refused(
            f"the measured parameters are to be DTensors on one mesh of one dimension; got {what}. Shard them all "
            "alike, or name those that are: parameters="
        )
    return next(iter(meshes)).get_group()
