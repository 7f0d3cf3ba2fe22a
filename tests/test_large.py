"""What `benchmarks/large.py` does with a GPT of 124 M parameters, on one of 3 M: the same code, fewer tokens."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import landscape
from landscape import metrics

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> landscape.Problem:
    spec = importlib.util.spec_from_file_location("large_problem", BENCHMARKS / "large_problem.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["large_problem"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: landscape.Problem = module.make_problem("tiny", str(tmp_path_factory.mktemp("large")))
    return made


def test_the_trace_by_sampled_outputs(problem: landscape.Problem) -> None:
    metric = metrics.Trace(curvature="ggn", method="hutchinson", rtol=0.05, max_probes=64)
    found = landscape.measure(metric, problem)
    assert found.attrs["way"] == "output_probes"
    assert problem.size > 3_000_000
    assert found["trace_stderr"] <= 0.05 * found["trace"]
    assert int(found["matvecs"]) == 0


def test_the_top_eigenvalue_from_few_vectors_goes_on_where_it_was_interrupted(
    problem: landscape.Problem, tmp_path: Path
) -> None:
    metric = metrics.Eigenvalues(k=1, rtol=1e-4, max_matvecs=30)
    memory = 21 * 4 * problem.size  # a half of it is for the basis: 10 vectors
    told: list[str] = []

    def interrupted(step: landscape.journal.Progress) -> None:
        told.append(step.message)
        if step.message.startswith("3 products"):
            raise KeyboardInterrupt

    out = tmp_path / "eigenvalues.h5"
    with pytest.raises(KeyboardInterrupt):
        landscape.measure(metric, problem, out=out, memory=memory, progress=interrupted)
    assert [text.split()[0] for text in told] == ["1", "2", "3"]
    states = list((tmp_path / ".parts").iterdir())
    assert len(states) == 1
    told.clear()
    resumed = landscape.measure(
        metric, problem, out=out, memory=memory, progress=lambda s: told.append(s.message)
    )
    assert int(told[0].split()[0]) > 1
    assert not list((tmp_path / ".parts").iterdir())
    whole = landscape.measure(metric, problem, memory=memory)
    for name in ("eigenvalues", "residual_norm"):
        assert np.array_equal(resumed[name], whole[name])
    assert int(resumed["matvecs"]) >= int(whole["matvecs"])
    assert int(whole["matvecs"]) <= 30
    assert resumed["residual_norm"][0] <= 2e-4 * resumed["eigenvalues"][0]


@pytest.mark.slow
def test_the_benchmark_itself(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(BENCHMARKS / "large.py"),
        "--size",
        "tiny",
        "--work",
        str(tmp_path),
        "--reference",
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "exit 130" in told
    assert "the same to the last bit" in told
