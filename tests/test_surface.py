"""The metric `surface`: every stored cell is the loss at θ + x d₁ + y d₂, and what lies beside the grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME
from cases_base import labels, normal
from click.testing import CliRunner
from landscape_cli import app as cli_app
from test_displaced import trained_images
from test_problem_untouched import same, snapshot
from torch import Tensor, nn

import landscape
from landscape import Problem, Refused, directions, norms, refinement, seeds
from landscape.metrics import Eigenvalues, Surface
from landscape.metrics.base import Journal, _Streams
from landscape.record import Record


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def problem_of(model: nn.Module) -> Problem:
    x, y = normal(23, 5), labels(23, 3)
    return Problem(model, nn.CrossEntropyLoss(), [(x[i : i + 9], y[i : i + 9]) for i in (0, 9, 18)])


def assert_by_hand(ds: object, problem: Problem, *, exact: bool) -> None:
    """Re-evaluate every cell of the grid at θ + x d₁ + y d₂, with what is stored alone."""
    theta = problem.parameters_vector()
    along = [torch.from_numpy(ds[f"direction_{n}"].values) for n in ("x", "y") if f"direction_{n}" in ds]
    loss = ds["loss"].values
    for index in np.ndindex(loss.shape):
        place = theta
        coordinates = [ds[n].values[i] for n, i in zip("xy", index[::-1], strict=False)]
        for c, d in zip(coordinates, along, strict=True):
            place = place + float(c) * d
        expected = float(problem.at(place).value())
        if exact:
            assert loss[index] == expected, index
        else:
            assert loss[index] == pytest.approx(expected, rel=1e-13), index


# --- cells ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("points", "span"),
    [(4, None), ((5, 3), ((-0.3, 1.7), (0.1, 0.4))), ((2, 7), ((-2, -1), (-1, 1))), ((9,), ((-0.5, 2),))],
)
@pytest.mark.parametrize("kind", ["filter", "random", "layer", "hessian"])
def test_every_cell_is_the_loss_at_its_coordinates(
    kind: str, points: object, span: object, exact: bool
) -> None:
    problem = problem_of(network())
    ds = landscape.measure(Surface(directions=kind, points=points, span=span, exact=exact), problem)
    shape = (points, points) if isinstance(points, int) else points
    assert ds["loss"].dims == ("y", "x")[-len(shape) :]
    assert ds["loss"].shape == shape[::-1]
    for name, count, (low, high) in zip("xy", shape, span or ((-1, 1),) * 2, strict=False):
        assert np.allclose(ds[name].values, np.linspace(low, high, count), atol=1e-15)
    assert ds.attrs["origin_on_grid"] == all(0 in ds[n].values for n in ds["loss"].dims)
    assert float(ds["loss_origin"]) == pytest.approx(float(problem.value()), rel=1e-13)
    assert ds["measured"].values.all()
    assert_by_hand(ds, problem, exact=exact)


@pytest.mark.parametrize("name", ["tied_embedding", "padding", "forward_weight", "frozen", "batchnorm"])
def test_problems_of_every_kind(name: str) -> None:
    found = [case for key, case in BY_NAME.items() if name in key]
    if not found:
        pytest.skip(f"no case is called {name}")
    arguments = found[0].arguments()
    before = snapshot(arguments["model"])
    problem = Problem(**arguments)
    for exact in (False, True):
        ds = landscape.measure(
            Surface(directions="random", points=(3, 2), span=((-0.1, 0.2),) * 2, exact=exact), problem
        )
        assert_by_hand(ds, problem, exact=exact)
    assert same(before, snapshot(arguments["model"]))


def test_a_convolutional_network_with_batchnorm() -> None:
    model, x, y = trained_images()
    before = snapshot(model)
    problem = Problem(model, nn.CrossEntropyLoss(), [(x[:30], y[:30]), (x[30:], y[30:])])
    ds = landscape.measure(Surface(points=(3, 2)), problem)
    assert ds.attrs["ways"]["folded"]
    assert_by_hand(ds, problem, exact=False)
    assert_by_hand(landscape.measure(Surface(points=(3, 2), exact=True), problem), problem, exact=True)
    assert same(before, snapshot(model))


def test_float32_cells_are_the_losses_bit_for_bit_where_asked() -> None:
    model, loss, data, _ = landscape.testbeds.load_default()
    problem = Problem(model, loss, data)
    ds = landscape.measure(Surface(points=(3, 2), exact=True), problem)
    assert_by_hand(ds, problem, exact=True)


def test_accuracy_and_another_quantity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine_for_test.py").write_text(
        "def largest(output, target):\n    return output.amax(1).mean()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = problem_of(network())
    ds = landscape.measure(Surface(points=(3, 2), quantity="mine_for_test:largest"), problem)
    x, y = (torch.cat(part) for part in zip(*problem.batches, strict=True))
    theta = problem.parameters_vector()
    for j, i in np.ndindex(2, 3):
        place = theta + float(ds["x"][i]) * torch.from_numpy(ds["direction_x"].values)
        place = place + float(ds["y"][j]) * torch.from_numpy(ds["direction_y"].values)
        model = network()
        nn.utils.vector_to_parameters(place, model.parameters())
        output = model(x).detach()
        assert float(ds["accuracy"][j, i]) == float((output.argmax(1) == y).double().mean())
        assert float(ds["quantity"][j, i]) == pytest.approx(float(output.amax(1).mean()), rel=1e-13)
    plain = landscape.measure(Surface(points=(3, 2), accuracy=False), problem)
    assert "accuracy" not in plain
    with pytest.raises(Refused, match="cannot be imported"):
        landscape.measure(Surface(points=2, quantity="mine_for_test:other"), problem)


def test_regression_has_no_accuracy() -> None:
    problem = Problem(nn.Linear(2, 1), nn.MSELoss(), [(torch.ones(4, 2), torch.ones(4, 1))])
    assert "accuracy" not in landscape.measure(Surface(points=2), problem)


# --- directions -----------------------------------------------------------------------------------------


def test_the_directions_of_a_seed_are_those_of_the_library() -> None:
    problem = problem_of(network())
    ds = landscape.measure(Surface(points=2), problem, seed=3)
    made = directions.filter_normalized(problem, seed=3)
    assert np.array_equal(ds["direction_x"].values, made.vectors[0].numpy())
    assert np.array_equal(ds["direction_y"].values, made.vectors[1].numpy())
    assert ds.attrs["direction_norms"] == made.norms
    right = landscape.measure(Surface(points=2, orthogonal=True), problem, seed=3)
    assert abs(right.attrs["direction_cosine"]) < 1e-15 < abs(ds.attrs["direction_cosine"])


def test_the_hessian_plane_from_a_measurement_of_these_weights_only(tmp_path: Path) -> None:
    model = network()
    problem = problem_of(model)
    landscape.measure(Eigenvalues(k=1, which="both", vectors=True), problem, out=tmp_path)
    metric = Surface(directions="hessian", points=2, file=str(tmp_path / "eigenvalues.h5"))
    ds = landscape.measure(metric, problem)
    values = landscape.open(tmp_path / "eigenvalues.h5")["eigenvalues"].values
    assert ds.attrs["direction_origin"]["eigenvalues"] == pytest.approx(values.tolist())
    assert int(ds["matvecs"]) == 0
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-9
    with pytest.raises(Refused, match="made for other weights"):
        landscape.measure(metric, problem)


def test_a_stale_file_of_directions_is_refused(tmp_path: Path) -> None:
    problem = problem_of(network())
    plane = directions.gaussian(problem)
    plane.save(tmp_path / "plane.safetensors")
    metric = Surface(directions="file", file=str(tmp_path / "plane.safetensors"), points=2)
    ds = landscape.measure(metric, problem)
    assert np.array_equal(ds["direction_y"].values, plane.vectors[1].numpy())
    with pytest.raises(Refused, match="made for other weights"):
        landscape.measure(metric, problem_of(network(seed=1)))
    directions.gradient(problem).save(tmp_path / "line.safetensors")
    line = {"directions": "file", "file": str(tmp_path / "line.safetensors")}
    with pytest.raises(Refused, match="holds 1 directions, not 2"):
        landscape.measure(Surface(points=2, **line), problem)
    assert landscape.measure(Surface(points=(2,), **line), problem)["loss"].shape == (2,)


def checkpoints(tmp_path: Path, count: int = 6) -> tuple[Problem, list[Tensor]]:
    """A short training run, with a file for each step, and the problem at its end."""
    model = network()
    problem = problem_of(model)
    found = []
    for i in range(count):
        theta = problem.parameters_vector().clone()
        torch.save(model.state_dict(), tmp_path / f"step{i + 5}.pt")
        found.append(theta)
        if i < count - 1:
            nn.utils.vector_to_parameters(theta - 2.0 * problem.gradient(), model.parameters())
    return problem, found


def test_the_plane_of_a_training_run(tmp_path: Path) -> None:
    problem, points = checkpoints(tmp_path)
    metric = Surface(directions="pca", points=4, trajectory=(str(tmp_path / "step*.pt"),))
    ds = landscape.measure(metric, problem)
    made, path = directions.pca(problem, points)
    assert np.allclose(ds["trajectory_x"], path.coordinates[:, 0])
    assert np.allclose(ds["trajectory_y"], path.coordinates[:, 1])
    assert np.allclose(ds["trajectory_residual"], path.residuals)
    assert np.allclose(ds["explained_variance"], path.explained_variance)
    assert np.allclose(ds["direction_x"], made.vectors[0])
    for name in "xy":  # the whole path, and room around it
        along = ds[f"trajectory_{name}"].values
        assert ds[name].values[0] < along.min() < along.max() < ds[name].values[-1]
    assert_by_hand(ds, problem, exact=False)
    other = landscape.measure(Surface(points=2, trajectory=metric.trajectory), problem)
    assert other["trajectory_x"].shape == (6,)
    assert "explained_variance" not in other


def test_lines_between_two_points(tmp_path: Path) -> None:
    problem = problem_of(network())
    end = network(seed=1)
    torch.save(end.state_dict(), tmp_path / "end.pt")
    given = {"directions": "difference", "trajectory": (str(tmp_path / "end.pt"),)}
    straight = landscape.measure(Surface(points=7, **given), problem)
    assert straight["x"].values[[0, -1]].tolist() == [-1.0, 2.0]
    assert_by_hand(straight, problem, exact=False)
    theta, other = problem.parameters_vector(), directions.point(problem, end)
    at_end = float(problem.at(other).value())
    assert float(straight["loss"].sel(x=1.0)) == pytest.approx(at_end, rel=1e-13)
    curved = landscape.measure(Surface(points=5, curved=True, **given), problem)
    assert curved["x"].values.tolist() == [0, 0.25, 0.5, 0.75, 1]
    for x, loss in zip(curved["x"].values, curved["loss"].values, strict=True):
        place = math.cos(x * math.pi / 2) * theta + math.sin(x * math.pi / 2) * other
        assert loss == pytest.approx(float(problem.at(place).value()), rel=1e-13)
    gradient = landscape.measure(Surface(directions="gradient", points=3), problem)
    assert_by_hand(gradient, problem, exact=False)


# --- BatchNorm statistics -------------------------------------------------------------------------------


def test_recomputed_statistics_are_weighted_means_over_batches() -> None:
    model, x, y = trained_images()
    cuts = [(x[:20], y[:20]), (x[20:25], y[20:25]), (x[25:], y[25:])]
    problem = Problem(model, nn.CrossEntropyLoss(), cuts)
    before = snapshot(model)
    found = norms.recomputed(problem)
    assert same(before, snapshot(model))
    first = [(len(batch), model[0](batch).detach()) for batch, _ in cuts]
    mean = sum(n * t.mean((0, 2, 3)) for n, t in first) / len(x)
    variance = sum(n * t.var((0, 2, 3)) for n, t in first) / len(x)
    torch.testing.assert_close(found["1.running_mean"], mean)
    torch.testing.assert_close(found["1.running_var"], variance)
    assert set(found) == {k for k in model.state_dict() if "running" in k}
    assert norms.recomputed(problem_of(network())) == {}


def test_a_line_with_recomputed_statistics(tmp_path: Path) -> None:
    model, x, y = trained_images()
    end, *_ = trained_images(seed=1)
    torch.save(end.state_dict(), tmp_path / "end.pt")
    problem = Problem(model, nn.CrossEntropyLoss(), [(x[:20], y[:20]), (x[20:], y[20:])])
    ds = landscape.measure(
        Surface(directions="difference", points=3, span=((0, 1),), statistics="recomputed",
                trajectory=(str(tmp_path / "end.pt"),)), problem
    )  # fmt: skip
    there = problem.replace(model=end)
    expected = there.at(there.parameters_vector(), norms.recomputed(there)).value()
    assert float(ds["loss"][-1]) == pytest.approx(float(expected), rel=1e-13)
    assert "accuracy" in ds


# --- beside the grid ------------------------------------------------------------------------------------


def test_refined_points_stand_where_the_surface_bends() -> None:
    def step(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return ((params["a"][0] - 0.3) * 8).tanh() + 0 * x.sum()

    problem = Problem(
        step, forward=lambda m, b: m(b), data=[torch.ones(2)], parameters={"a": torch.zeros(2).double()}
    )
    metric = Surface(directions="random", points=(9, 5), refine=80)
    ds = landscape.measure(metric, problem)
    assert ds["refined_loss"].shape == (80,)
    d = np.stack([ds["direction_x"], ds["direction_y"]])
    places = np.stack([ds["refined_x"], ds["refined_y"]], 1)
    assert np.allclose(ds["refined_loss"], np.tanh((places @ d[:, 0] - 0.3) * 8), atol=1e-12)
    grid = {(a, b) for a in ds["x"].values for b in ds["y"].values}
    assert len({tuple(p) for p in places} | grid) == 80 + 45
    every = [np.abs(a * d[0, 0] + b * d[1, 0] - 0.3) for a, b in grid]
    assert np.median(np.abs(places @ d[:, 0] - 0.3)) < 0.6 * np.median(every)


@pytest.mark.parametrize("shape", [(9,), (6, 5)])
def test_rounds_of_refinement_do_not_depend_on_how_often_one_asks_for_more(shape: tuple[int, ...]) -> None:
    axes = [np.linspace(-1, 1, n) for n in shape]

    def loss(at: np.ndarray) -> np.ndarray:
        return np.exp(-20 * ((at - 0.15) ** 2).sum(-1))

    grid = loss(np.stack(np.meshgrid(*axes, indexing="ij"), -1))
    found = {}
    for limits in ([200], [7, 50, 51, 200], [1, 13, 199, 200]):
        points = np.zeros((0, len(shape)))
        for limit in limits:
            while len(more := refinement.following(axes, grid, loss(points), limit)):
                points = np.concatenate([points, more])
            assert len(points) == limit
        found[tuple(limits)] = points
    first, *others = found.values()
    assert all(np.array_equal(first, other) for other in others)


def test_refinement_leaves_alone_what_is_flat_or_not_finite() -> None:
    axes = [np.linspace(0, 1, 4), np.linspace(0, 1, 3)]
    flat = np.add.outer(2 * axes[0], axes[1])
    assert not len(refinement.following(axes, np.round(flat * 0), np.zeros(0), 50))
    broken = np.where(np.arange(4)[:, None] > 1, np.inf, np.nan) * np.ones((4, 3))
    assert not len(refinement.following(axes, broken, np.zeros(0), 50))


def test_the_curvature_map_is_the_spectrum_at_its_points() -> None:
    problem = problem_of(network())
    ds = landscape.measure(
        Surface(points=(3, 2), curvature_points=2, span=((-0.4, 0.2), (-0.1, 0.3))), problem
    )
    assert ds["curvature_x"].values.tolist() == [-0.4, 0.2, -0.4, 0.2]
    assert ds["curvature_y"].values.tolist() == [-0.1, -0.1, 0.3, 0.3]
    for x, y, high, low, residual in zip(
        *(
            ds[f"curvature_{n}"].values
            for n in ("x", "y", "lambda_max", "lambda_min", "lambda_residual_norm")
        ),
        strict=True,
    ):
        place = problem.parameters_vector() + x * torch.from_numpy(ds["direction_x"].values)
        place = place + y * torch.from_numpy(ds["direction_y"].values)
        H = landscape.hessian(problem.at(place)) @ torch.eye(problem.size, dtype=torch.float64)
        values = torch.linalg.eigvalsh((H + H.T) / 2)
        assert abs(high - float(values[-1])) <= residual + 1e-12
        assert abs(low - float(values[0])) <= residual + 1e-12


def test_bfloat16_tells_its_error() -> None:
    model, x, y = trained_images(dtype=torch.float32)
    problem = Problem(model, nn.CrossEntropyLoss(), [(x, y)])
    near = landscape.measure(Surface(points=6, precision="bfloat16"), problem)
    own = landscape.measure(Surface(points=6), problem)
    compared = np.isfinite(near["point_own_loss"].values)
    assert 20 <= compared.sum() <= 40
    assert np.allclose(near["point_own_loss"].values[compared], own["point_loss"].values[compared], rtol=1e-6)
    error = np.abs(near["point_loss"].values - own["point_loss"].values)[compared].max()
    assert float(near["precision_error"]) == pytest.approx(error, rel=1e-3)
    assert 0 < error < 0.1


def test_not_a_number_and_infinity_are_stored() -> None:
    problem = Problem(
        lambda p, x: (1 + p["a"] * x).log().mean(), forward=lambda m, b: m(b), data=[torch.ones(2).double()],
        parameters={"a": torch.zeros(1).double()},
    )  # fmt: skip
    made = directions.Directions(
        torch.ones(1, 1).double(), ("one",), {}, dict(problem.space.ranges), problem.fingerprint()
    )
    with problem.displaced(*made) as at:
        assert at(-1.0) == -math.inf
    ds = landscape.measure(Surface(directions="random", points=(5,), span=((-50, 50),), refine=4), problem)
    assert np.isnan(ds["loss"].values).any()
    assert math.isfinite(float(ds["loss_lowest"]))
    assert ds["measured"].values.all()


# --- files ----------------------------------------------------------------------------------------------


class Stops(Journal):
    """Stops an evaluation after some blocks."""

    def __init__(self, after: int):
        self.after = after

    def commit(self, record: Record, *, final: bool = False) -> None:
        self.after -= 1
        if self.after == 0 and not final:
            raise KeyboardInterrupt


def test_interrupted_surfaces_end_as_uninterrupted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Surface, "block", 4)
    metric = Surface(directions="hessian", points=(5, 4), refine=20, curvature_points=2)
    whole = landscape.evaluate(metric, problem_of(network()))
    for after in (2, 3):
        record = Record()
        for _ in range(100):
            try:
                landscape.evaluate(metric, problem_of(network()), journal=Stops(after), record=record)
                break
            except KeyboardInterrupt:
                continue
        for name, variable in whole.variables.items():
            if name not in {"wall_seconds"}:
                known = variable.data.dtype.kind == "f"
                assert np.array_equal(variable.data, record[name], equal_nan=known), name


def test_a_partial_file_is_not_a_number_where_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Surface, "block", 4)
    record = Record()
    metric = Surface(points=(5, 4))
    with pytest.raises(KeyboardInterrupt):
        landscape.evaluate(metric, problem_of(network()), journal=Stops(3), record=record)
    values = metric.summarize(record)
    assert values["measured"].data.sum() == np.isfinite(values["loss"].data).sum() == 8


def test_more_refinement_keeps_all_points(tmp_path: Path) -> None:
    few = landscape.measure(Surface(points=5, refine=10), problem_of(network()), out=tmp_path)
    more = landscape.measure(Surface(points=5, refine=30), problem_of(network()), out=tmp_path)
    fresh = landscape.measure(Surface(points=5, refine=30), problem_of(network()))
    assert np.array_equal(few["refined_loss"].values, more["refined_loss"].values[:10])
    assert np.array_equal(fresh["refined_loss"].values, more["refined_loss"].values)
    with pytest.raises(Refused, match="the metric's settings"):
        landscape.measure(Surface(points=6), problem_of(network()), out=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 1}, "points is 1; allowed is a number >= 2"),
        ({"points": (3, 3, 3)}, "points is"),
        ({"points": (9,)}, None),
        ({"span": ((-1, 1),)}, "span has 1 ranges; allowed is one for each of 2 axes"),
        ({"span": ((1, -1), (0, 1))}, "span has 1:-1; allowed is low:high"),
        ({"span": ((0, math.inf), (0, 1))}, "both finite"),
        ({"refine": -1}, "refine is -1"),
        ({"directions": "filtre"}, "directions is 'filtre'; allowed is 'filter'"),
        ({"directions": "file"}, "file is none"),
        ({"file": "x"}, "file goes with directions 'file' or 'hessian'"),
        ({"directions": "pca"}, "trajectory is empty"),
        ({"directions": "gradient", "points": (3, 3)}, r"ask for a line, points=\(3,\)"),
        ({"curved": True}, "curved goes with directions 'difference'"),
        ({"statistics": "recomputed", "curvature_points": 2}, "statistics 'recomputed' goes"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, object], message: str | None) -> None:
    if message is None:
        Surface(**settings)
        return
    with pytest.raises(ValueError, match=message):
        Surface(**settings)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Any:
        return CliRunner().invoke(cli_app.app, list(words))

    measured = (
        "measure",
        "--metric",
        "surface",
        "--points",
        "7,5",
        "--span",
        "-1:1,-0.3:0.9",
        "--examples",
        "512",
    )
    done = run(*measured)
    assert done.exit_code == 0, done.output
    assert "loss_origin" in done.output
    ds = landscape.open(tmp_path / "runs/digits_mlp/surface.h5")
    assert ds["loss"].shape == (5, 7)
    assert ds["y"].values[[0, -1]].tolist() == [-0.3, 0.9]
    assert "35 losses" in run(*measured, "--dry-run").output
    shown = run("show", "runs/digits_mlp").output
    assert "35 of 35 points, complete" in shown
    assert "37 evaluations of the loss" in shown  # and twice at the origin
    assert run("plot", "runs/digits_mlp/surface.h5", "-o", "s.png", "--linear").exit_code == 0
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    wrong = run("measure", "--metric", "surface", "--point", "7")
    assert wrong.exit_code == 2
    assert "did you mean --points" in wrong.output
    missing = run(
        "measure", "--metric", "surface", "--directions", "pca", "--trajectory", "a.pt,b.pt", "--out", "x"
    )
    assert missing.exit_code == 3
    assert "a.pt: no such file" in missing.output


def test_streams_of_a_block_are_those_of_its_units_and_go_on() -> None:
    streams, units = _Streams(3, "mine", range(5, 9)), [seeds.generator(3, "mine", i) for i in range(5, 9)]
    assert len(streams) == 4
    for _ in range(2):
        for stream, unit in zip(streams, units, strict=True):
            assert torch.equal(torch.rand(3, generator=stream), torch.rand(3, generator=unit))
    assert [g.initial_seed() for g in streams[1:3]] == [g.initial_seed() for g in units[1:3]]
