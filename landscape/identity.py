"""What makes two runs the same measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landscape.errors import Refused
from landscape.record import Record

if TYPE_CHECKING:
    from landscape.metrics.base import Metric
    from landscape.problem import Problem

# Attributes that have to agree, and what they are called. The number of processes is none of them.
SAME = {
    "metric": "the metric",
    "fixed_configuration": "the metric's settings",
    "seed": "the seed",
    "parameters_fingerprint": "the model's parameters",
    "data_fingerprint": "the data or their batches",
    "dtype": "the dtype",
    "device": "the device",
    "mode": "the model's mode",
    "reduction": "the reduction",
    "microbatch": "the micro-batch",
    "stated_memory": "the memory",
}


def of(metric: Metric, problem: Problem, seed: int, memory: int, data: str) -> dict[str, Any]:
    """Return the identity of a measurement as attributes.

    Args:
        metric: what is measured.
        problem: on what.
        seed: of all random streams.
        memory: bytes that may be used.
        data: fingerprint of the batches as yielded.
    """
    return {
        "metric": metric.name,
        "configuration": json.dumps(metric.configuration(), sort_keys=True),
        "fixed_configuration": json.dumps(metric.configuration(without_demands=True), sort_keys=True),
        "seed": seed,
        "parameters_fingerprint": problem.fingerprint(),
        "data_fingerprint": data,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": problem.device.type,
        "mode": problem.mode,
        "reduction": problem.reduction,
        "microbatch": problem.microbatch,
        "stated_memory": memory,  # that for blocks may be less
    }


def differing(first: Mapping[str, Any], second: Mapping[str, Any], there: str, here: str) -> list[str]:
    """Name what differs between two identities, with the values `there` (the first) and `here`."""
    return [
        f"{words} ({first.get(key)} {there}, {second.get(key)} {here})"
        for key, words in SAME.items()
        if first.get(key) != second.get(key)
    ]


def require_same(path: Path, record: Record, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with a file of another measurement.

    Raises:
        Refused: naming what differs.
    """
    if found := differing(record.attrs, identity, "there", "now"):
        raise Refused(
            f"{path} holds another measurement; different: {'; '.join(found)}. Choose another place "
            "(out=..., --out), or start anew (overwrite=True, --overwrite)."
        )
