"""What the probes of one unit are: decided once, stored, and followed by every unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Examples that share a probe where no pilot says better. Independent probes average over micro-batches
# whose top directions agree: on an MLP, 64 examples per probe left a twentieth of the variance at thrice
# the cost.
EXAMPLES_PER_PROBE = 64
# Units that also compare a cheap probe with an exact one: what they find is small, so a few tell it well enough.
PAIRS = 8


@dataclass(frozen=True)
class Plan:
    """Which matrix is probed, and how.

    Attributes:
        matrix: "hessian", "residual" (R = H − G, with G by output-space probes or exactly), or "ggn".
        form: "products" v·Av with parts per parameter tensor, or "differences": second differences along v,
            which give the whole trace only.
        examples: share a probe of the matrix.
        outputs: output-space probes of G in each unit; 0 for none.
        output_examples: share an output-space probe.
        pair_examples: on which a cheap probe is compared with an exact product; 0 for no comparison.
        bfloat16: whether products are made in bf16.
    """

    matrix: Literal["hessian", "residual", "ggn"]
    form: Literal["products", "differences"] = "products"
    examples: int = EXAMPLES_PER_PROBE
    outputs: int = 0
    output_examples: int = 0
    pair_examples: int = 0
    bfloat16: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The choices as plain values, to be stored."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Plan:
        """Read what `as_dict` wrote."""
        return cls(**stored)
