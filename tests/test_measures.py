"""The measures of one number each, as a user meets them: command line, files, interruption, cuts of the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases_base import labels, normal
from click.testing import CliRunner, Result
from landscape_cli import app
from test_adaptive import network
from torch import nn

import landscape
from landscape import Problem, metrics
from landscape.metrics import registry
from landscape.metrics.base import Metric

NAMES = [
    "adaptive_trace", "adaptive_spectral_norm", "relative_flatness", "fisher_rao", "path_norm", "normalized_sharpness",
]  # fmt: skip
# Float32 products and sums, relative.
AGREE = 1e-4


def run(*words: str) -> Result:
    return CliRunner().invoke(app.app, list(words))


def made(name: str, **options: object) -> Metric:
    return registry.load(name)(**options)


def problem(sizes: tuple[int, ...] = (3,) * 40) -> Problem:
    x, y = normal(120, 4, seed=1), labels(120, 3, seed=2)
    data = list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))
    return Problem(network(), nn.CrossEntropyLoss(), data)


@pytest.mark.parametrize("name", NAMES)
def test_on_the_embedded_default(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = run("measure", "--metric", name, "--out", "one")
    assert first.exit_code == 0, first.output
    assert name in first.stdout
    again = run("measure", "--metric", name, "--out", "one")
    assert again.exit_code == 0
    assert first.stdout.split()[8:10] == again.stdout.split()[8:10]
    shown = run("show", "one")
    assert shown.exit_code == 0
    assert "converged" in shown.stdout
    assert "complete" in shown.stdout
    typo = run("measure", "--metric", name, "--rtoll", "1", "--out", "two")
    assert typo.exit_code == 2
    assert "--rtoll" in typo.stderr
    drawn = run("plot", f"one/{name}.h5")
    assert drawn.exit_code != 0
    assert len(drawn.stderr.strip().splitlines()) == 1
    assert "no picture" in drawn.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_python_name_and_a_line_of_help(name: str) -> None:
    chosen = registry.registered()[name]
    assert getattr(metrics, chosen.__name__) is chosen
    assert (chosen.__doc__ or "").splitlines()[0].endswith(".")
    assert chosen.citation
    assert name in run("metrics").stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_cut_of_the_data_does_not_matter(name: str) -> None:
    values = [
        float(landscape.evaluate(made(name), problem(sizes))[name])
        for sizes in ((3,) * 40, (120,), (50, 69, 1))
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(name: str) -> None:
    wide = problem()
    values = [
        float(landscape.evaluate(made(name), p)[name]) for p in (wide, wide.replace(dtype=torch.float32))
    ]
    assert values[1] == pytest.approx(values[0], rel=AGREE)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in {"path_norm"}])
def test_scaling_the_loss_scales_the_value(name: str) -> None:
    """By 2^-27, for which rounding is the same; the Fisher information is of a likelihood, and is left alone."""
    if name == "fisher_rao":
        metric = made(name, curvature="empirical_fisher")
        power = 2
    else:
        metric, power = made(name), 0.5 if name == "normalized_sharpness" else 1
    plain = nn.CrossEntropyLoss()
    data = list(problem().batches)
    values = [
        float(
            landscape.evaluate(
                metric,
                Problem(network(), lambda f, y, c=c: c * plain(f, y), data, weight=lambda b: len(b[0])),
            )[name]
        )
        for c in (1.0, 2.0**-27)
    ]
    assert values[1] == pytest.approx(values[0] * 2.0 ** (-27 * power), rel=1e-9)


def test_a_dry_run_counts_what_a_metric_makes():
    from landscape.metrics import registry

    counted = {name: metric().outlook_in[0] for name, metric in registry.registered().items()}
    assert counted["trace"] == counted["spectral_norm"] == counted["reparametrization"] == "products"
    assert counted["surface"] == counted["volume"] == counted["projected_curvature"] == "losses"
    assert counted["sharpness"] == counted["robustness"] == "gradients"
    assert registry.load("projected_curvature")(method="products").outlook_in[0] == "products"
    assert registry.load("sharpness")(definition="average").outlook_in[0] == "losses"
