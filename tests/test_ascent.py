"""Searches on boxes and ellipsoids, against dense algebra and enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from landscape.estimators.apgd import Apgd, checkpoints
from landscape.estimators.ascent import Ascent
from landscape.estimators.lbfgsb import lbfgsb
from landscape.estimators.regions import Region
from landscape.estimators.search import Search, State, maximize, maximum

SEARCHES = [Ascent, Apgd]
BOTH: list[Any] = [2, "inf"]


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


def quadratic(H: Tensor, g: Tensor | None = None) -> Callable[[Tensor], tuple[float, Tensor]]:
    slope = torch.zeros(len(H), dtype=H.dtype) if g is None else g
    return lambda d: (float(slope @ d + 0.5 * d @ H @ d), slope + H @ d)


def wishart(n: int, seed: int = 0) -> Tensor:
    A = normal(n, n, seed=seed)
    return A @ A.T / n


# --- sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", BOTH)
def test_the_steepest_point_attains_the_dual_norm(norm: Any):
    r, g = normal(9).abs(), normal(9, seed=1)
    region = Region(r, norm)
    top = region.steepest(g)
    assert region.size(top) == pytest.approx(1)
    dual = (r * g).abs().sum() if norm == "inf" else (r * g).norm()
    assert float(g @ top) == pytest.approx(float(dual), rel=1e-14)
    assert region.rise(g) == pytest.approx(float(dual), rel=1e-14)


@pytest.mark.parametrize("norm", BOTH)
def test_random_points_lie_inside_and_off_the_centre(norm: Any):
    region = Region(normal(50).abs(), norm)
    points = [region.draw(stream(seed)) for seed in range(50)]
    assert all(0 < region.size(point) <= 1 for point in points)


def test_the_projection_onto_an_ellipsoid_satisfies_its_optimality_conditions():
    r, d = normal(20).abs() * torch.logspace(-9, 1, 20, dtype=torch.float64), normal(20, seed=1) * 5
    p = Region(r, 2).project(d)
    assert Region(r, 2).size(p) == pytest.approx(1, abs=1e-12)
    multipliers = (d - p) * r**2 / p  # d − p = μ p/r²
    torch.testing.assert_close(multipliers, multipliers.mean().expand(20), rtol=1e-9, atol=0)
    assert (multipliers > 0).all()


def test_the_projection_agrees_with_a_general_solver():
    from scipy.optimize import minimize

    r, d = normal(6).abs().numpy() + 0.1, normal(6, seed=2).numpy() * 3
    inside = {"type": "ineq", "fun": lambda x: 1 - ((x / r) ** 2).sum()}
    found = minimize(lambda x: ((x - d) ** 2).sum(), 0 * d, constraints=[inside], options={"ftol": 1e-14})
    ours = Region(torch.from_numpy(r), 2).project(torch.from_numpy(d))
    np.testing.assert_allclose(ours, found.x, atol=1e-5)


@pytest.mark.parametrize("norm", BOTH)
def test_projecting_leaves_a_point_inside_alone_and_puts_coordinates_without_width_to_rest(norm: Any):
    r = torch.tensor([1.0, 0.0, 2.0])
    region = Region(r, norm)
    assert torch.equal(region.project(torch.tensor([0.3, 0.0, 0.5])), torch.tensor([0.3, 0.0, 0.5]))
    assert region.project(torch.tensor([5.0, 5.0, 5.0]))[1] == 0
    assert torch.equal(Region(torch.zeros(2), norm).project(torch.ones(2)), torch.zeros(2))


@pytest.mark.parametrize("radii", [torch.tensor([-1.0]), torch.tensor([math.nan]), torch.ones(2, 2)])
def test_no_set_has_such_half_widths(radii: Tensor):
    with pytest.raises(ValueError, match="radii"):
        Region(radii)
    with pytest.raises(ValueError, match="allowed is 2 or 'inf'"):
        Region(torch.ones(2), 3)  # type: ignore[arg-type]


# --- maxima that are known ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", BOTH)
@pytest.mark.parametrize("kind", SEARCHES)
def test_a_linear_function_is_maximized_exactly(kind: Any, norm: Any):
    g, region = normal(30), Region(normal(30, seed=1).abs(), norm)
    found = maximize(lambda d: (float(g @ d), g), kind(region, 12), stream())
    assert found.value == pytest.approx(region.rise(g), rel=1e-12 if kind is Ascent else 1e-8)
    assert found.gap == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_separable_convex_quadratic_is_maximized_exactly_on_a_box(kind: Any):
    h, r = normal(30).abs(), normal(30, seed=1).abs()
    found = maximize(quadratic(torch.diag(h)), kind(Region(r), 40), stream())
    assert found.value == pytest.approx(float(0.5 * (h * r**2).sum()), rel=1e-9)


@pytest.mark.parametrize("n", [3, 12, 60])
def test_a_convex_quadratic_is_maximized_on_a_ball(n: int):
    H = wishart(n)
    top = float(torch.linalg.eigvalsh(H)[-1])
    found = maximize(
        quadratic(H), Ascent(Region(torch.full((n,), 0.3, dtype=torch.float64), 2), 400), stream()
    )
    assert found.value == pytest.approx(0.5 * 0.09 * top, rel=1e-4)


def test_on_a_ball_the_largest_eigenvalue_wins_over_a_larger_negative_one():
    eigenvalues = torch.tensor([-50.0, -20.0, 1.0, 4.0, 10.0], dtype=torch.float64)
    Q = torch.linalg.qr(normal(5, 5)).Q
    H = Q @ torch.diag(eigenvalues) @ Q.T
    found = maximize(quadratic(H), Ascent(Region(torch.ones(5, dtype=torch.float64), 2), 300), stream(1))
    assert found.value == pytest.approx(5.0, rel=1e-3)


def test_on_a_box_the_best_of_several_starts_is_the_best_vertex():
    for seed in range(5):
        H, g = wishart(8, seed), 0.2 * normal(8, seed=50 + seed)
        vertices = (torch.tensor(s, dtype=torch.float64) for s in itertools.product((-1, 1), repeat=8))
        best = max(float(g @ v + 0.5 * v @ H @ v) for v in vertices)
        box = Region(torch.ones(8, dtype=torch.float64))
        found = max(maximize(quadratic(H, g), Ascent(box, 40), stream(k)).value for k in range(4))
        assert found == pytest.approx(best, rel=1e-12)


def test_a_maximum_inside_the_box_is_found_where_coordinates_curve_down():
    h = torch.tensor([-1.0, -3.0, 2.0, -0.5], dtype=torch.float64)
    g = torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64)
    # coordinates that curve down have their maximum at g/|h|, the other at the edge
    best = float((g[[0, 1, 3]] ** 2 / (2 * h[[0, 1, 3]].abs())).sum() + 0.1 + 1.0)
    box = Region(torch.ones(4, dtype=torch.float64))
    found = max(maximize(quadratic(torch.diag(h), g), Ascent(box, 60), stream(k)).value for k in range(3))
    assert found == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("norm", BOTH)
@pytest.mark.parametrize("kind", SEARCHES)
def test_scaling_the_function_or_a_coordinate_changes_nothing(kind: Any, norm: Any):
    H, g, r = wishart(20), 0.1 * normal(20, seed=3), normal(20, seed=4).abs()
    whole = maximize(quadratic(H, g), kind(Region(r, norm), 15), stream())
    tiny = maximize(quadratic(H * 2.0**-40, g * 2.0**-40), kind(Region(r, norm), 15), stream())
    assert torch.equal(tiny.point, whole.point)
    assert tiny.value == whole.value * 2.0**-40
    s = 2.0 ** torch.arange(-10, 10, dtype=torch.float64)
    other = maximize(quadratic(H / s / s[:, None], g / s), kind(Region(r * s, norm), 15), stream())
    assert other.value == pytest.approx(whole.value, rel=1e-12)


@pytest.mark.parametrize("norm", BOTH)
@pytest.mark.parametrize("kind", SEARCHES)
def test_every_point_lies_in_the_set_and_coordinates_without_width_stay(kind: Any, norm: Any):
    r = normal(15).abs()
    r[3] = 0
    region, seen = Region(r, norm), []
    value = quadratic(normal(15, 15) + normal(15, 15).T)

    def watched(d: Tensor) -> tuple[float, Tensor]:
        seen.append(d)
        return value(d)

    maximize(watched, kind(region, 25), stream())
    assert len(seen) == 26
    assert all(region.size(d) <= 1 + 1e-12 and d[3] == 0 and bool(d.isfinite().all()) for d in seen)


@pytest.mark.parametrize("norm", BOTH)
@pytest.mark.parametrize("kind", SEARCHES)
def test_values_that_are_not_finite_are_counted_and_gone_around(kind: Any, norm: Any):
    H, region = wishart(10), Region(torch.ones(10, dtype=torch.float64), norm)
    inner = quadratic(H)

    def broken(d: Tensor) -> tuple[float, Tensor]:
        value, slope = inner(d)
        return (math.nan, slope * math.nan) if float(d.norm()) > 0.5 else (value, slope)

    found = maximize(broken, kind(region, 30), stream())
    assert found.nonfinite > 0
    assert found.evaluations == 31
    assert 0 < found.value <= 0.5 * 0.25 * float(torch.linalg.eigvalsh(H)[-1])
    hopeless = maximize(lambda d: (math.nan, d), kind(region, 5), stream())
    assert math.isnan(hopeless.value)
    assert hopeless.nonfinite == 6


def test_a_constant_function_gives_its_value():
    found = maximize(lambda d: (2.5, 0 * d), Ascent(Region(torch.ones(4)), 10), stream())
    assert (found.value, found.gap) == (2.5, 0)


# --- states, and the published settings ---------------------------------------------------------------------


def run(search: Search, function: Any, state: State, steps: int) -> State:
    for _ in range(steps):
        state = search.observe(state, *function(search.point(state)))
    return state


@pytest.mark.parametrize("norm", BOTH)
@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize("at", [1, 4, 9, 17])
def test_a_state_that_was_stored_goes_on_to_the_same_bits(kind: Any, norm: Any, at: int):
    function = quadratic((normal(12, 12) + normal(12, 12).T).float().double(), normal(12, seed=1))
    search = kind(Region(normal(12, seed=2).abs(), norm), 25)
    whole = run(search, function, search.start(stream()), 26)
    half = run(search, function, search.start(stream()), at)
    back = {key: torch.from_numpy(np.array(t.numpy())) for key, t in half.items()}
    again = run(search, function, back, 26 - at)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert maximum(search, whole).value == maximum(search, again).value


def test_apgd_looks_back_where_andriushchenko_et_al_do():
    assert checkpoints(20) == [5, 9, 12, 15, 16, 18, 19, 20]
    assert checkpoints(1) == [1]
    assert checkpoints(100)[:2] == [22, 41]


def test_lbfgsb_stays_where_the_gradient_vanishes_and_finds_the_maximum_from_elsewhere():
    h = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    box, function = Region(torch.ones(4, dtype=torch.float64)), quadratic(torch.diag(h))
    assert lbfgsb(function, box, torch.zeros(4)).value == 0
    assert lbfgsb(function, box, box.draw(stream())).value == pytest.approx(5.0)
    with pytest.raises(ValueError, match="searches boxes"):
        lbfgsb(function, Region(torch.ones(4), 2), torch.zeros(4))


def test_lbfgsb_ends_at_a_value_that_is_not_finite():
    box = Region(torch.ones(3, dtype=torch.float64))
    found = lbfgsb(
        lambda d: (float(d.sum()) if d.max() < 0.9 else math.inf, torch.ones(3)), box, torch.zeros(3)
    )
    assert found.nonfinite == 1
    assert found.value >= 0


def test_on_the_digits_network_it_beats_lbfgsb():
    import landscape
    from landscape.testbeds import load_default

    problem = landscape.Problem(*load_default()[:3])
    theta = problem.parameters_vector()

    def loss(d: Tensor) -> tuple[Any, Tensor]:
        return problem.at(theta + d).value_and_gradient()

    with problem.session():
        for epsilon in (5e-4, 1e-3, 5e-3):
            box = Region(epsilon * (theta.abs() + 1))
            ours = maximize(loss, Ascent(box, 7), stream()).value
            assert ours >= lbfgsb(loss, box, box.draw(stream()), 10).value
