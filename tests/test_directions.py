"""Directions: what they are, against closed forms and dense matrices, and that a file of another model is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cases_base import labels, normal
from torch import Tensor, nn

import landscape
from landscape import Problem, Refused, directions
from landscape.metrics import Eigenvalues


def network(seed: int = 0, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, width), nn.LayerNorm(width),
        nn.Linear(width, 3),
    ).double()  # fmt: skip


def problem_of(model: nn.Module, **options: object) -> Problem:
    data = [(normal(12, 2, 6), labels(12, 3))]
    return Problem(model, nn.CrossEntropyLoss(), data, **options)


def straight(problem: Problem, parts: list[float], seed: int = 1) -> tuple[list[Tensor], Tensor]:
    """Points θ + s v on a line."""
    theta, v = problem.parameters_vector(), normal(problem.size, seed=seed)
    return [theta + s * v for s in parts], v


# --- drawn ----------------------------------------------------------------------------------------------


def test_gaussian_directions_are_standard_normal_and_differ_by_seed_and_number() -> None:
    problem = Problem(lambda p, x: p["a"].sum() * x, lambda o, t: (o * t).mean(), [(torch.ones(2), torch.ones(2))],
                      parameters={"a": torch.zeros(40_000)})  # fmt: skip
    x, y = directions.gaussian(problem, seed=3)
    for d in (x, y):
        # of 40 000 draws: mean within 5 standard errors; fails for one seed in 10^6
        assert abs(float(d.mean())) < 5 / 200
        assert float(d.norm()) == pytest.approx(200, rel=5 / 200 / math.sqrt(2))
    assert abs(float(x @ y)) < 5 * 200
    again, other = directions.gaussian(problem, seed=3), directions.gaussian(problem, seed=4)
    assert torch.equal(again.vectors[0], x)
    assert not torch.equal(other.vectors[0], x)
    assert not torch.equal(other.vectors[0], y)
    assert again.norms == pytest.approx([float(x.double().norm()), float(y.double().norm())], rel=1e-12)


@pytest.mark.parametrize("kind", ["filter", "layer"])
def test_filters_have_the_norms_of_the_weights_and_biases_and_norms_do_not_move(kind: str) -> None:
    model = network()
    model[5].weight.data.mul_(3.0)
    model[4].weight.data[2] = 0.0  # a dead filter stays dead
    problem = problem_of(model)
    made = getattr(directions, f"{kind}_normalized")(problem, 2, seed=1)
    assert made.origin == {"kind": kind, "seed": 1}
    for row in made:
        moved = dict(zip(problem.names, problem.space.split(row), strict=True))
        for name, w in model.state_dict(keep_vars=False).items():
            if name not in moved:
                continue
            d = moved[name]
            if name in {"0.weight", "4.weight", "6.weight"}:
                axis = tuple(range(1, w.ndim)) if kind == "filter" else None
                torch.testing.assert_close(
                    d.square().sum(axis).sqrt(), w.square().sum(axis).sqrt(), rtol=1e-12, atol=0
                )
            else:
                assert torch.equal(d, torch.zeros_like(w)), name


def test_a_norm_with_a_matrix_of_weights_does_not_move_either() -> None:
    model = nn.Sequential(nn.LayerNorm((3, 4)), nn.Flatten(), nn.Linear(12, 3))
    problem = Problem(model, nn.CrossEntropyLoss(), [(torch.randn(5, 3, 4), labels(5, 3))])
    made = directions.filter_normalized(problem)
    start, stop = problem.space.ranges["0.weight"]
    assert not made.vectors[:, start:stop].any()
    with pytest.raises(Refused, match="no measured parameter has a filter"):
        directions.filter_normalized(problem.only("0"))


@pytest.mark.slow
def test_expected_curvature_of_filter_normalized_directions() -> None:
    _expected_curvature(20_000)


def test_expected_curvature_of_few_filter_normalized_directions() -> None:
    _expected_curvature(2000)


def _expected_curvature(count: int) -> None:
    """E[dᵀHd] = Σ_f ‖w_f‖² Tr(H_ff) / n_f, within 4 standard errors (fails once in 16 000 seeds)."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = Problem(model, nn.MSELoss(), [(normal(9, 3), normal(9, 2, seed=1))])
    H = landscape.hessian(problem) @ torch.eye(problem.size, dtype=torch.float64)
    expected = 0.0
    for name in ("0.weight", "2.weight"):
        w, start = dict(model.named_parameters())[name].detach(), problem.space.ranges[name][0]
        for j, row in enumerate(w):
            span = slice(start + j * len(row), start + (j + 1) * len(row))
            expected += float(row.square().sum() * H[span, span].trace()) / len(row)
    D = directions.filter_normalized(problem, count, seed=2).vectors
    found = (D @ H * D).sum(1)
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / math.sqrt(count)


def saddle(positive: int, negative: int) -> Problem:
    """L = θᵀHθ / 2 with H = diag(1, ..., -1, ...)."""
    h = torch.cat([torch.ones(positive), -torch.ones(negative)]).double()
    return Problem(
        lambda p, x: (h * p["a"] ** 2).sum() / 2 + 0 * x.sum(),
        forward=lambda m, b: m(b),
        data=[torch.ones(1).double()],
        parameters={"a": torch.zeros(len(h)).double()},
    )


def test_the_curvature_along_unit_directions_has_the_known_mean_and_variance() -> None:
    """E uᵀHu = t/N, Var = 2/(N(N+2)) (F² − t²/N); 4 standard errors, fails once in 8000 seeds."""
    problem, count, n = saddle(70, 30), 400, 100
    with problem.displaced() as at:
        found = np.array([2 * at.moved(u) for u in directions.gaussian(problem, count, seed=1).normalized()])
    t, square = 40, 100
    variance = 2 / (n * (n + 2)) * (square - t**2 / n)
    assert abs(found.mean() - t / n) < 4 * math.sqrt(variance / len(found))
    assert abs(found.var() / variance - 1) < 4 * math.sqrt(2 / len(found))


def test_the_hessian_plane_of_a_saddle_has_curvatures_one_and_minus_one() -> None:
    plane = directions.eigenvectors(saddle(13, 7), rtol=1e-12)
    with saddle(13, 7).displaced(*plane) as at:
        for h in (0.5, 2.0):
            assert at(h, 0) + at(-h, 0) - 2 * at() == pytest.approx(h**2, rel=1e-12)
            assert at(0, h) + at(0, -h) - 2 * at() == pytest.approx(-(h**2), rel=1e-12)
            assert at(h, h) == pytest.approx(0, abs=1e-12)


# --- of the loss ----------------------------------------------------------------------------------------


def test_the_gradient() -> None:
    problem = problem_of(network())
    made = directions.gradient(problem)
    assert torch.equal(made.vectors[0], problem.gradient())


def test_eigenvectors_of_both_ends_computed_or_from_a_measurement(tmp_path: Path) -> None:
    problem = problem_of(network())
    H = landscape.hessian(problem) @ torch.eye(problem.size, dtype=torch.float64)
    values, vectors = torch.linalg.eigh((H + H.T) / 2)
    landscape.measure(Eigenvalues(k=3, which="both", vectors=True, rtol=1e-9), problem, out=tmp_path)
    ends = ["largest", "smallest", "largest"]
    for source in (None, tmp_path / "eigenvalues.h5"):
        made = directions.eigenvectors(problem, ends, source=source, rtol=1e-9)
        assert made.norms == pytest.approx([1, 1, 1], rel=1e-12)
        for row, i, value in zip(made, (-1, 0, -2), made.origin["eigenvalues"], strict=True):
            assert value == pytest.approx(float(values[i]), rel=1e-9)
            assert abs(float(row @ vectors[:, i])) == pytest.approx(1, abs=1e-9)
            assert float(row[row.abs().argmax()]) > 0
    with pytest.raises(Refused, match="eigenvector 4 from the largest"):
        directions.eigenvectors(problem, ["largest"] * 4, source=tmp_path / "eigenvalues.h5")
    with torch.no_grad():
        problem.evaluator.model[4].bias[0] += 1e-9
    with pytest.raises(Refused, match="made for other weights"):
        directions.eigenvectors(problem, source=tmp_path / "eigenvalues.h5")


def test_a_measurement_without_vectors_is_refused(tmp_path: Path) -> None:
    problem = problem_of(network())
    landscape.measure(Eigenvalues(k=1, vectors=True), problem, out=tmp_path / "one")
    with pytest.raises(Refused, match="eigenvector 1 from the smallest"):
        directions.eigenvectors(problem, source=tmp_path / "one/eigenvalues.h5")
    landscape.measure(Eigenvalues(k=1), problem, out=tmp_path / "none")
    with pytest.raises(Refused, match="no eigenvectors of the Hessian"):
        directions.eigenvectors(problem, source=tmp_path / "none/eigenvalues.h5")
    landscape.measure(
        Eigenvalues(k=1, which="both", layer="4.weight", vectors=True), problem, out=tmp_path / "part"
    )
    with pytest.raises(Refused, match="another model"):
        directions.eigenvectors(problem, source=tmp_path / "part/eigenvalues.h5")


# --- between points -------------------------------------------------------------------------------------


def test_a_difference_reaches_the_other_point(tmp_path: Path) -> None:
    problem, other = problem_of(network()), network(seed=1)
    torch.save({"model": {f"module.{k}": v for k, v in other.state_dict().items()}}, tmp_path / "other.pt")
    end = torch.nn.utils.parameters_to_vector(other.parameters()).detach()
    for given in (end, other, other.state_dict(), tmp_path / "other.pt", str(tmp_path / "other.pt")):
        made = directions.difference(problem, given)
        torch.testing.assert_close(problem.parameters_vector() + made.vectors[0], end)
    with pytest.raises(Refused, match=r"4\.weight has shape \(6, 12\) there, \(5, 12\) here"):
        directions.difference(problem, network(width=6))
    with pytest.raises(Refused, match=r"has no 0\.weight"):
        directions.difference(problem, {"a": torch.ones(1)})


@pytest.mark.parametrize("centred", [False, True])
def test_a_straight_trajectory_has_explained_variance_one_and_zero(centred: bool) -> None:
    problem = problem_of(network())
    points, v = straight(problem, [-2.0, -1.0, -0.5, 0.0])
    made, path = directions.pca(problem, points, centred=centred)
    assert path.explained_variance is not None
    assert path.explained_variance.tolist() == [pytest.approx(1, abs=1e-14), 0.0]
    assert abs(float(made.vectors[0] @ v / v.norm())) == pytest.approx(1, abs=1e-12)
    assert made.labels[1] == "random direction"
    assert made.norms == pytest.approx([1, 1], abs=1e-14)
    assert abs(float(made.cosines[0, 1])) < 1e-14
    along = path.coordinates[:, 0].abs() / v.norm()
    torch.testing.assert_close(along, torch.tensor([2.0, 1.0, 0.5, 0.0]).double(), atol=1e-12, rtol=0)
    assert float(path.residuals.max()) < 1e-12


def test_principal_directions_are_the_right_singular_vectors() -> None:
    problem = problem_of(network())
    steps = normal(7, problem.size, seed=9).cumsum(0)
    points = [problem.parameters_vector() + row for row in steps]
    for centred in (False, True):
        rows = steps - steps.mean(0) if centred else steps
        _, s, right = np.linalg.svd(rows.numpy(), full_matrices=False)
        made, path = directions.pca(problem, points, centred=centred)
        cosines = np.abs((made.vectors.numpy() * right[:2]).sum(1))
        assert np.allclose(cosines, 1, atol=1e-12)
        assert np.allclose(path.explained_variance, s[:2] ** 2 / (s**2).sum(), rtol=1e-10)
        left = np.linalg.norm(steps.numpy() - path.coordinates.numpy() @ made.vectors.numpy(), axis=1)
        assert np.allclose(path.residuals, left)
    with pytest.raises(ValueError, match="no checkpoint lies apart"):
        directions.pca(problem, [problem.parameters_vector()])


def test_any_plane_takes_a_trajectory_by_least_squares() -> None:
    problem = problem_of(network())
    plane = directions.gaussian(problem)  # not orthogonal
    exact = torch.tensor([[1.0, -2.0], [0.5, 3.0]]).double()
    points = [problem.parameters_vector() + c @ plane.vectors for c in exact]
    path = directions.trajectory(problem, plane, points)
    torch.testing.assert_close(path.coordinates, exact, rtol=1e-10, atol=0)
    assert float(path.residuals.max()) < 1e-10
    assert path.explained_variance is None


# --- what can be asked of them --------------------------------------------------------------------------


def test_normalized_and_orthogonalized_on_request_only() -> None:
    plane = directions.gaussian(problem_of(network()))
    assert abs(float(plane.cosines[0, 1])) > 1e-3
    unit = plane.normalized()
    assert unit.norms == pytest.approx([1, 1], abs=1e-14)
    assert unit.origin["normalized"]
    right = plane.orthogonalized()
    assert right.norms == pytest.approx(plane.norms, rel=1e-14)
    assert abs(float(right.cosines[0, 1])) < 1e-15
    assert torch.equal(right.vectors[0], plane.vectors[0])
    assert "orthogonalized" not in plane.origin
    double = directions.Directions(plane.vectors[[0, 0]], ("a", "b"), {}, plane.ranges, "")
    with pytest.raises(ValueError, match="b lies in the span of a"):
        double.orthogonalized()
    with pytest.raises(ValueError, match="a is zero"):
        directions.Directions(0 * plane.vectors[:1], ("a",), {}, plane.ranges, "").normalized()


def test_a_file_gives_back_the_same_and_one_of_another_model_is_refused(tmp_path: Path) -> None:
    model = network()
    problem = problem_of(model)
    made = directions.filter_normalized(problem).orthogonalized()
    made.save(tmp_path / "plane.safetensors")
    back = directions.load(tmp_path / "plane.safetensors", problem)
    assert torch.equal(back.vectors, made.vectors)
    assert (back.labels, back.ranges) == (made.labels, made.ranges)
    assert back.origin == {**made.origin, "file": "plane.safetensors"}
    with pytest.raises(Refused, match=r"other parameters of it: they differ from 4\.weight on"):
        directions.load(tmp_path / "plane.safetensors", problem_of(network(width=6)))
    with pytest.raises(Refused, match="made for another model"):
        directions.load(tmp_path / "plane.safetensors", problem.only("6"))
    with pytest.raises(Refused, match="made for other weights"):
        directions.load(tmp_path / "plane.safetensors", problem_of(network(seed=1)))
    with torch.no_grad():
        model[1].running_mean += 1e-12
    with pytest.raises(Refused, match="made for other weights"):
        directions.load(tmp_path / "plane.safetensors", problem)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    problem = problem_of(network())
    path = tmp_path / "plane.safetensors"
    directions.gaussian(problem).save(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(Refused, match="differ from their hash"):
        directions.load(path, problem)
    path.write_bytes(b"nothing")
    with pytest.raises(Refused, match="cannot be read as directions"):
        directions.load(path, problem)
    from safetensors.torch import save_file

    save_file({"directions": torch.ones(2, 3)}, path)
    with pytest.raises(Refused, match="holds no directions"):
        directions.load(path, problem)
    (tmp_path / "code.pt").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(Refused, match="is no checkpoint"):
        directions.difference(problem, tmp_path / "code.pt")


def test_frozen_and_tied_parameters_keep_their_places() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    model[6].weight = nn.Parameter(model[4].weight[:3, :5].detach().clone())
    problem = problem_of(model)
    made = directions.filter_normalized(problem)
    assert "0.weight" not in made.ranges
    assert made.vectors.shape == (2, problem.size)
    with problem.displaced(*made) as at:
        at(1.0, 1.0)
    assert not model[0].weight.requires_grad
