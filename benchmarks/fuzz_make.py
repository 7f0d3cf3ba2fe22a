"""Sound files of every kind, to be damaged by fuzz.py: one folder for each, named like the kind.

python benchmarks/fuzz_make.py FOLDER [METRIC ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import landscape
from landscape import directions, results
from landscape.metrics import registry

# Small measurements: every metric that a net of 18 parameters has, in a second or two.
SETTINGS: dict[str, dict[str, Any]] = {
    "trace": {"method": "hutchinson", "max_probes": 16, "rtol": 0.0},
    "eigenvalues": {"k": 3, "which": "both", "vectors": True},
    "density": {"probes": 2, "steps": 8},
    "surface": {"points": (5, 4)},
    "sharpness": {"restarts": 2, "epsilon": (1e-3, 1e-2)},
    "volume": {"rays": 16},
    "projected_curvature": {"planes": 4},
    "input_curvature": {},
    "reparametrization": {"measures": ("trace",), "alpha": (0.5, 2.0)},
    "robustness": {},
    "fisher_rao": {},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.BatchNorm1d(2))


def problem() -> landscape.Problem:
    draws = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 3, generator=draws), torch.randint(0, 2, (24,), generator=draws)
    return landscape.Problem(network(), nn.CrossEntropyLoss(), [(x[:16], y[:16]), (x[16:], y[16:])])


def make(folder: Path, metrics: tuple[str, ...] = tuple(SETTINGS)) -> None:
    """Write one file of each kind below `folder`."""
    at = problem()
    for name in metrics:
        landscape.measure(registry.load(name)(**SETTINGS[name]), at, out=folder / name / "result.h5")
    landscape.measure(
        registry.load("surface")(**SETTINGS["surface"]), at, out=folder / "sidecar" / "result.h5"
    )
    state = {"basis": np.eye(5), "step": np.array(3), "mask": np.ones(3, bool)}
    results.write_state(folder / "state" / "unit.safetensors", state, {"key": "k"})
    directions.gaussian(at, 2).save(folder / "directions" / "plane.safetensors")
    for name in ("earliest", "latest"):
        foreign(folder / f"{name} layout" / "result.h5", name)
    checkpoints(folder)


def foreign(path: Path, libver: str) -> None:
    """Write what is ours in name only: the oldest layout, and the newest with much that is refused."""
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w", libver=libver) as file:
        file.attrs["schema_version"] = np.int64(1)
        file.attrs["json_attributes"], file.attrs["sidecar"] = np.bytes_(b"[]"), np.bytes_(b"{}")
        for k in range(20):
            dataset = file.create_dataset(f"x{k}", data=np.arange(30.0).reshape(5, 6))
            for key, value in {"dims": b'["a", "b"]', "units": b"1", "long_name": b"x"}.items():
                dataset.attrs[key] = np.bytes_(value)
        if libver == "latest":
            packed = {"chunks": (4, 7), "compression": "gzip", "shuffle": True, "fletcher32": True}
            file.create_dataset("y", data=np.ones((20, 30)), **packed)
            file.create_dataset("text", data=["a", "b"], dtype=h5py.string_dtype())


def checkpoints(folder: Path) -> None:
    state = network().state_dict()
    nested = {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1, "betas": (0.9, 0.999)}}
    for kind in ("checkpoint", "checkpoint before 1.6", "checkpoint safetensors"):
        (folder / kind).mkdir()
    torch.save(nested, folder / "checkpoint" / "w.pt")
    torch.save(nested, folder / "checkpoint before 1.6" / "w.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "checkpoint safetensors" / "w.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(Path(sys.argv[1]), tuple(sys.argv[2:]) or tuple(SETTINGS))
