"""The metric `robustness`: linear models with known radii, soundness of attacks, independence of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import landscape
from landscape import Problem, Refused, results
from landscape.attacks import Attack
from landscape.metrics import Robustness
from landscape.testbeds.nets import own_stream


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with own_stream(1, "test"):
        return build().double().eval()


def labels(count: int, classes: int) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(5))


def linear(count: int = 60) -> tuple[Problem, Tensor]:
    """Two classes, and each example's radius times ‖w‖: the margin, negative where it is wrong."""
    model, x, y = seeded(lambda: nn.Linear(5, 2)), randn(count, 5), labels(count, 2)
    logits = model(x).detach()
    margin = (logits[:, 1] - logits[:, 0]) * (2 * y - 1)
    return Problem(model, nn.CrossEntropyLoss(), [(x[:40], y[:40]), (x[40:], y[40:])]), margin


@pytest.mark.parametrize("norm", [2, "inf"])
def test_attacks_on_a_linear_model_find_exactly_what_there_is(norm: Any) -> None:
    problem, margin = linear()
    w = problem.evaluator.model.weight.detach()
    difference = w[1] - w[0]
    dual = difference.norm() if norm == 2 else difference.abs().sum()
    radius = (margin / dual).numpy()
    epsilon = (0.1, 0.4, 1.0, 3.0)
    ds = landscape.measure(Robustness(epsilon=epsilon, norm=norm, steps=5), problem)
    for k, e in enumerate(epsilon):
        clear = np.abs(radius - e) > 1e-9
        assert (ds["attacked"].values[clear, k] == (radius < e)[clear]).all()
        assert float(ds["adversarial_accuracy"][k]) == pytest.approx(np.mean(radius >= e))
    assert float(ds["accuracy"]) == pytest.approx(np.mean(radius > 0))
    share = ds["adversarial_accuracy"].values
    assert (ds["adversarial_accuracy_stderr"] > 0).all()
    assert "upper bound" in ds["adversarial_accuracy"].attrs["long_name"]
    assert (np.diff(share) <= 0).all()


def test_the_change_of_the_gradient_of_a_quadratic() -> None:
    x = randn(6, 5)
    problem = Problem(
        lambda params, x: 3 * (x**2).sum(dim=1) / 2 + 0 * params["a"],
        lambda output, target: (output + 0 * target).mean(),
        [(x, torch.zeros(6, dtype=torch.float64))],
        parameters={"a": torch.zeros((), dtype=torch.float64)},
    )
    with pytest.raises(Refused, match=r"targets are no integer labels; leave attacks out with steps=0"):
        landscape.measure(Robustness(), problem)
    for norm, length in ((2, 1.0), ("inf", math.sqrt(5))):
        ds = landscape.measure(Robustness(epsilon=(0.1, 2.0), norm=norm, steps=0), problem)  # type: ignore[arg-type]
        for k, e in enumerate((0.1, 2.0)):
            assert np.allclose(ds["gradient_change"][:, k], e * length / x.norm(dim=1), rtol=1e-9)
        assert np.allclose(ds["gradient_robustness"], ds["gradient_change"].mean(axis=0))
        assert "adversarial_accuracy" not in ds


def test_a_small_lipschitz_constant_bounds_the_change() -> None:
    """‖∇f(x+e) - ∇f(x)‖ ≤ ε max ‖∇²f‖; softmax regression has ‖∇²f‖ ≤ ‖W‖²/2."""
    problem, _ = linear()
    bound = float(torch.linalg.matrix_norm(problem.evaluator.model.weight.detach(), 2)) ** 2 / 2
    ds = landscape.measure(Robustness(epsilon=(0.01, 0.5), steps=0, directions=20), problem)
    absolute = ds["gradient_change"].values * ds["gradient_norm"].values[:, None]
    assert (absolute <= bound * np.array([0.01, 0.5]) * (1 + 1e-9)).all()


def net2d() -> Problem:
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)))
    with torch.no_grad():
        model[0].weight *= 4
        model[2].weight *= 4
    x = randn(40, 2)
    y = model(x).argmax(dim=1)
    return Problem(model, nn.CrossEntropyLoss(), [(x, y)])


@pytest.mark.parametrize("norm", [2, "inf"])
def test_what_is_found_exists_and_little_is_missed(norm: Any) -> None:
    """Against all points of a fine polar or square grid around each example."""
    problem, epsilon = net2d(), 0.5
    model = problem.evaluator.model
    x, y = next(iter(problem.batches))
    grid = torch.cartesian_prod(*[torch.linspace(-epsilon, epsilon, 121, dtype=torch.float64)] * 2)
    ball = grid[grid.norm(dim=1) <= epsilon] if norm == 2 else grid
    with torch.no_grad():
        there = (model(x[:, None] + ball).argmax(dim=2) != y[:, None]).any(dim=1).numpy()
        wider = (model(x[:, None] + 1.05 * ball).argmax(dim=2) != y[:, None]).any(dim=1).numpy()
    ds = landscape.measure(Robustness(epsilon=(epsilon,), norm=norm, steps=20, restarts=3), problem)
    found = ds["attacked"].values[:, 0]
    assert float(ds["accuracy"]) == 1
    assert 3 < there.sum() < 37
    assert not (found & ~wider).any()
    assert (there & ~found).sum() <= 1


@pytest.mark.parametrize("norm", [2, "inf"])
def test_displacements_stay_in_the_ball_and_in_the_range(norm: Any) -> None:
    attack = Attack(0.3, norm, 5, 0.1, (0.0, 1.0))
    x = torch.rand(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    move = attack.project(x, randn(50, 8))
    assert float((x + move).min()) >= 0
    assert float((x + move).max()) <= 1
    length = move.norm(dim=1) if norm == 2 else move.abs().max(dim=1).values
    assert float(length.max()) <= 0.3 * (1 + 1e-12)
    drawn = torch.stack([attack.random(8, torch.Generator().manual_seed(i)) for i in range(300)])
    sizes = drawn.norm(dim=1) if norm == 2 else drawn.abs().max(dim=1).values
    # Uniform in the ball: (‖e‖/ε)^8 is uniform on [0, 1]; its mean is off by 5 σ = 0.083 in 6e-7.
    assert float(sizes.max()) <= 0.3
    assert abs(float(((sizes / 0.3) ** 8).mean()) - 0.5) < 0.083
    assert float(attack.direction(torch.zeros(1, 8)).abs().max()) == 0


def test_results_do_not_depend_on_batch_or_position() -> None:
    problem = net2d()
    x, y = next(iter(problem.batches))
    metric = Robustness(epsilon=(0.05, 0.2), steps=4, restarts=2)
    expected = landscape.measure(metric, problem)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    other = problem.replace(data=[(x[i], y[i]) for i in order.split(9)], microbatch=4)
    found = landscape.measure(metric, other)
    assert (found["attacked"].values == expected["attacked"].values[order]).all()
    assert np.allclose(found["gradient_change"], expected["gradient_change"].values[order], rtol=1e-9)


class _Small(Robustness):
    block = 16


def test_interrupted_runs_end_with_the_same_bits_and_more_restarts_measure_again(tmp_path: Path) -> None:
    problem, metric = net2d(), _Small(epsilon=(0.1, 0.3), steps=3)

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        landscape.measure(metric, problem, out=tmp_path / "a.h5", progress=stop)
    assert int(results.read(tmp_path / "a.h5")["done"].sum()) == 16
    resumed, straight = (landscape.measure(metric, problem, out=tmp_path / f"{n}.h5") for n in "ab")
    for name in ("gradient_change", "attacked", "gradient_robustness", "adversarial_accuracy_stderr"):
        assert np.array_equal(resumed[name], straight[name]), name
    more = landscape.measure(_Small(epsilon=(0.1, 0.3), steps=3, restarts=4), problem, out=tmp_path / "a.h5")
    assert (more["adversarial_accuracy"] <= straight["adversarial_accuracy"]).all()
    assert (more["restarts_used"] == 4).all()


def test_bad_input() -> None:
    problem, _ = linear()
    with pytest.raises(Refused, match=r"clamp is 0 to 1, but the data go from -"):
        landscape.measure(Robustness(clamp=(0.0, 1.0)), problem)
    black = problem.replace(
        loss=None, forward=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    )
    with pytest.raises(Refused, match="output="):
        landscape.measure(Robustness(), black)
    assert float(landscape.measure(Robustness(steps=0), black)["gradient_robustness"][0]) > 0
    x = randn(4, 5)
    ignored = problem.replace(data=[(x, torch.tensor([0, 1, -100, 0]))])
    with pytest.raises(Refused, match="labels go from -100 to 1, but there are 2 logits"):
        landscape.measure(Robustness(), ignored)
    coupled = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with pytest.raises(Refused, match=r"influence each other|alone"):
        landscape.measure(Robustness(), problem.replace(model=coupled, mode="train"))
    for fields, words in (
        ({"epsilon": ()}, "epsilon"), ({"epsilon": (0.2, 0.1)}, "ascend"), ({"epsilon": (-1.0,)}, "> 0"),
        ({"norm": 1}, "norm is 1"), ({"steps": -1}, "steps"), ({"step_size": 0.0}, "step_size"),
        ({"clamp": (1.0, 0.0)}, "clamp"), ({"directions": 0}, "directions"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Robustness(**fields)  # type: ignore[arg-type]


def test_examples_without_gradient_are_counted_and_left_out() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        net[0].weight.copy_(randn(4, 3).abs())
        net[0].bias.zero_()
    x = torch.cat([-torch.ones(1, 3), randn(3, 3).abs()]).double()
    ds = landscape.measure(
        Robustness(epsilon=(0.01,)), Problem(net, nn.CrossEntropyLoss(), [(x, labels(4, 2))])
    )
    assert int(ds["zero_gradients"]) == 1
    assert np.isnan(ds["gradient_change"][0, 0])
    assert np.isfinite(float(ds["gradient_robustness"][0]))


@pytest.mark.parametrize("metric", ["robustness", "input_curvature"])
def test_command_line(metric: str, tmp_path: Path) -> None:
    from click.testing import CliRunner
    from landscape_cli import app

    def ran(*words: str) -> Any:
        return CliRunner().invoke(app.app, list(words))

    own = (
        ["--epsilon", "0.1,0.5", "--steps", "2", "--clamp", "0,1", "--norm", "inf"]
        if metric == "robustness"
        else ["--probes", "2", "--image", "8,8"]
    )
    done = ran("measure", "--metric", metric, *own, "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    name = "adversarial_accuracy(epsilon=0.5)" if metric == "robustness" else "mean_normalized_curvature"
    assert name in done.stdout
    assert name in ran("show", str(tmp_path)).stdout
    typo = ran("measure", "--metric", metric, "--epsilo", "0.1")
    assert typo.exit_code == 2
    assert "--epsilon" in typo.stderr
    assert "--epsilon" in ran("measure", "--metric", metric, "--help").stdout
    drawn = ran("plot", str(tmp_path / f"{metric}.h5"))
    assert drawn.exit_code == 0, drawn.output
