"""The table of problems over which everything that takes a problem is checked.

`CASES` holds float64 problems of at most about 150 parameters; `reference(case)` is the dense truth.
"""

from __future__ import annotations

import cases_layers
import cases_losses
import cases_structure
from cases_base import Case, Reference, reference

CASES: list[Case] = [*cases_losses.CASES, *cases_structure.CASES, *cases_layers.CASES]
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
WITH_OUTPUTS: list[Case] = [case for case in CASES if not case.blackbox]

__all__ = ["BY_NAME", "CASES", "WITH_OUTPUTS", "Case", "Reference", "reference"]
