"""Units over ranks: the same bits as one process, any number of ranks to go on, and one line for a lost rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import pytest
from test_run import same

import landscape
from landscape.metrics import registry

# Cheap settings; a small memory cuts the units of every metric into several blocks.
MEMORY = 20_000
SETTINGS: dict[str, dict[str, Any]] = {
    "density": {"probes": 5, "steps": 6},
    "evidence": {"curvature": "ggn"},
    "input_curvature": {},
    "reparametrization": {"measures": ("trace", "fisher_rao"), "alpha": (0.5, 1.0, 2.0)},
    "sharpness": {"epsilon": (1e-3, 1e-2), "restarts": 3},
    "surface": {"points": (9, 7)},
    "volume": {"rays": 40},
    "trace": {"method": "hutchinson", "max_probes": 48, "rtol": 0.0},
    "adaptive_trace": {"method": "hutchinson", "max_probes": 32},
}


def measured(name: str, out: Path | None, **options: Any) -> Any:
    metric = registry.load(name)(**SETTINGS.get(name, {}))
    memory = 300_000 if name == "evidence" else MEMORY
    return landscape.measure(metric, jobs.problem(), out=out, memory=memory, **options)


@pytest.mark.parametrize("name", sorted(registry.registered()))
def test_ranks_give_the_bits_of_one_process(name: str, tmp_path: Path) -> None:
    alone = measured(name, tmp_path / "one")
    assert jobs.run(3, lambda _: measured(name, tmp_path / "three") and None) == [0, 0, 0]
    stored = landscape.open(tmp_path / "three" / f"{name}.h5")
    assert same(alone, stored)
    assert stored.attrs["complete"]
    assert stored.attrs["exit_code"] == alone.attrs["exit_code"]
    assert stored.attrs["products"] == alone.attrs["products"]
    assert stored.attrs["world_size"] == 3
    assert not list((tmp_path / "three/.parts").glob("*.h5"))
