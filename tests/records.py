"""Records for the tests of storage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from landscape.results import Record, Variable

SCALAR = Variable((), 1.0)


def sample() -> Record:
    """One of every kind that the format knows."""
    return Record(
        {
            "trace": Variable((), np.float64(12.5), "1", "trace of the Hessian"),
            "converged": Variable((), np.bool_(True)),
            "layer": Variable(("layer",), np.array(["0.weight", "schicht_größe.λ", "", "层"])),
            "layer_trace": Variable(("layer",), np.array([1.0, np.nan, np.inf, -0.0])),
            "layer_size": Variable(("layer",), np.array([1, 2, 2**62, -1])),
            "samples": Variable(
                ("probe", "layer"), np.arange(12, dtype=np.float32).reshape(3, 4), "1", "vᵀHv"
            ),
            "done": Variable(("probe",), np.array([True, False, True])),
            "round": Variable(("round",), np.zeros(0, np.int64)),
            "running_trace": Variable(("round",), np.zeros(0)),
            "nothing": Variable(("probe", "none"), np.zeros((3, 0), np.float32)),
            "no_names": Variable(("none",), np.array([], dtype=np.str_)),
            "method": Variable((), np.array("xtrace")),
            "small": Variable((), np.uint8(255)),
            "wall_time": Variable((), np.float64(0.5), "s", "wall seconds"),
            "direction_x": Variable(("parameter",), np.arange(7.0), sidecar=True),
            "mask": Variable(("parameter",), np.arange(7) % 2 == 0, sidecar=True),
        },
        {
            "metric": "trace",
            "cite": "Škoda & λ",
            "empty": "",
            "nul": "a\0",
            "argument": "\udc80",
            "seed": 3,
            "huge": 2**80,
            "rtol": 0.02,
            "nan": math.nan,
            "checked": True,
            "missing": None,
            "names": ["a", 1, 2.5, None],
            "config": {"a": {"b": [True]}, "λ": "μ"},
            "long": "x" * 300_000,
        },
    )


def assert_same(got: Record, expected: Record) -> None:
    assert set(got.variables) == set(expected.variables)
    for name, variable in expected.variables.items():
        other = got.variables[name]
        labels = ("dims", "units", "long_name", "sidecar")
        assert [getattr(other, k) for k in labels] == [getattr(variable, k) for k in labels], name
        if variable.data.dtype.kind in "UO":
            assert other.data.shape == variable.data.shape
            assert other.data.tolist() == variable.data.tolist()
        else:
            assert (other.data.dtype, other.data.shape) == (variable.data.dtype, variable.data.shape), name
            assert other.data.tobytes() == variable.data.tobytes(), name
    assert json.dumps(got.attrs) == json.dumps(expected.attrs)
    assert [type(v) for v in got.attrs.values()] == [type(v) for v in expected.attrs.values()]


def names_in(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def with_vector(value: float, *more: str) -> Record:
    names = ("direction_x", *more)
    return Record(
        {"value": Variable((), value)}
        | {n: Variable(("parameter",), np.full(50, value + k), sidecar=True) for k, n in enumerate(names)}
    )


def sample_small() -> Record:
    return Record({"value": Variable(("a",), np.arange(5000.0))}, {"metric": "trace"})
