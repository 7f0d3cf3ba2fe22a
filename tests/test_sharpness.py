"""Sharpness against closed forms, dense derivatives, and what it must not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, reference
from torch import Tensor, nn

import landscape
from landscape.errors import Refused
from landscape.estimators.stopping import stopping_counts
from landscape.metrics import Sharpness
from landscape.metrics.base import Journal
from landscape.results import Record
from landscape.sharpness import function
from landscape.sharpness.scaling import coordinates, parameter_scale, subspace_matrix

F64 = torch.float64
KESKAR = {"definition": "keskar", "epsilon": (1e-3,)}


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def analytic(f: Callable[[Tensor], Tensor], at: Tensor) -> landscape.Problem:
    """A function of one parameter vector as a problem."""
    data = [torch.zeros(1, dtype=F64)]

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(at.clone())

    return landscape.Problem(Point(), forward=lambda model, _: f(model.x), data=data)


def quadratic(H: Tensor, at: Tensor, floor: float = 0.25, g: Tensor | None = None) -> landscape.Problem:
    slope = torch.zeros(len(at), dtype=F64) if g is None else g
    return analytic(lambda x: floor + slope @ (x - at) + 0.5 * (x - at) @ H @ (x - at), at)


def psd(n: int, seed: int = 0) -> Tensor:
    A = normal(n, n, seed=seed)
    return A @ A.T / n


def classifier(seed: int = 0, width: int = 7) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 4)).double()


X, Y = normal(60, 5, seed=8), torch.arange(60) % 4


def cut(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(sizes), Y.split(sizes), strict=True))


def problem(data: Any = None, **options: Any) -> landscape.Problem:
    return landscape.Problem(classifier(), nn.CrossEntropyLoss(), data or cut(60), **options)


def problem_of(width: int) -> landscape.Problem:
    return landscape.Problem(classifier(width=width), nn.CrossEntropyLoss(), cut(60))


def evaluated(on: landscape.Problem, seed: int = 0, **fields: Any) -> Record:
    return landscape.evaluate(Sharpness(**fields), on, seed)


def value(on: landscape.Problem, **fields: Any) -> float:
    return float(evaluated(on, **fields)["sharpness"][0])


# --- closed forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximizer", ["ascent", "apgd", "lbfgsb"])
def test_keskar_on_a_diagonal_quadratic_at_its_exact_minimum_with_a_zero_weight(maximizer: str):
    on = quadratic(torch.diag(vector(1, 2, 3, 4)), vector(0, 1, -2, 0.5))
    for seed in range(5):
        found = evaluated(on, seed, maximizer=maximizer, **KESKAR)
        assert float(found["sharpness"][0]) == pytest.approx(1.8e-3, rel=1e-9)
        assert float(found["gradient_norm"]) == 0
        assert bool(found["at_minimum"])


def test_keskar_on_a_linear_function_is_the_dual_norm_of_the_slope():
    g, at = vector(0.3, -0.2, 0.1), vector(1, 0, -3)
    on = analytic(lambda x: 1.0 + g @ (x - at), at)
    found = evaluated(on, epsilon=(1e-3, 5e-4))
    expected = 100 * np.array([5e-4, 1e-3]) * float((g.abs() * (at.abs() + 1)).sum()) / 2
    np.testing.assert_allclose(found["sharpness"], expected, rtol=1e-9)
    np.testing.assert_allclose(found["first_order"], expected, rtol=1e-9)
    assert not bool(found["at_minimum"])


def test_the_ball_on_a_convex_quadratic_is_the_second_order_value():
    H = psd(12)
    found = evaluated(quadratic(H, normal(12, seed=1)), definition="ball", epsilon=(0.1, 0.7), steps=60)
    expected = 0.5 * np.array([0.01, 0.49]) * float(torch.linalg.eigvalsh(H)[-1]) / 1.25
    np.testing.assert_allclose(found["sharpness"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["second_order"], expected, rtol=1e-5)
    assert (found["sharpness"] <= expected * (1 + 1e-12)).all()


@pytest.mark.parametrize("scaling", ["element", "none"])
def test_adaptive_worst_cases_at_a_critical_point(scaling: str):
    H, at = psd(8, seed=2), normal(8, seed=3)
    c = at.abs() if scaling == "element" else torch.ones(8, dtype=F64)
    top = float(torch.linalg.eigvalsh(c * H * c[:, None])[-1])
    fields = {"definition": "adaptive", "scaling": scaling, "epsilon": (0.2,), "steps": 60}
    assert value(quadratic(H, at), norm=2, **fields) == pytest.approx(0.02 * top, rel=1e-5)
    diagonal = torch.diag(H.diagonal())
    assert value(quadratic(diagonal, at), norm="inf", **fields) == pytest.approx(
        0.02 * float((c**2 * H.diagonal()).sum()), rel=1e-9
    )
    bound = 0.02 * float((c[:, None] * c * H.abs()).sum())
    assert 0 < value(quadratic(H, at), norm="inf", **fields) <= bound


@pytest.mark.parametrize("norm", [2, "inf"])
def test_adaptive_worst_cases_off_a_critical_point_are_the_dual_norm(norm: Any):
    g, at = normal(8, seed=4), normal(8, seed=5)
    q = at.abs() * g
    expected = 0.1 * float(q.norm() if norm == 2 else q.abs().sum())
    on = analytic(lambda x: -3.0 + g @ (x - at), at)  # the loss may be negative here
    assert value(on, definition="adaptive", norm=norm, epsilon=(0.1,)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("noise", "factor"), [("gaussian", 1 / 2), ("uniform", 1 / 6)])
@pytest.mark.parametrize("scaling", ["element", "none"])
def test_average_sharpness_has_its_closed_form_and_an_honest_error(noise: str, factor: float, scaling: str):
    H, at, g = psd(10, seed=6), normal(10, seed=7), normal(10, seed=8)
    c = at.abs() if scaling == "element" else torch.ones(10, dtype=F64)
    truth = factor * 0.09 * float((c**2 * H.diagonal()).sum())
    on, inside = quadratic(H, at, g=g), 0
    runs = 150
    for seed in range(runs):
        found = evaluated(
            on, seed, definition="average", noise=noise, scaling=scaling, epsilon=(0.3,), samples=16, rtol=0
        )
        off = abs(float(found["sharpness"][0]) - truth)
        inside += off <= 1.96 * float(found["sharpness_stderr"][0])
    # a coverage of 95 % falls below 88 % of 150 with probability 3e-4
    assert inside >= 0.88 * runs


def test_average_draws_until_it_is_sure():
    on = quadratic(psd(10), normal(10, seed=1))
    found = evaluated(on, definition="average", epsilon=(0.1, 0.2), samples=4096, rtol=0.03)
    assert bool(found["converged"])
    assert (found["sharpness_stderr"] <= 0.03 * found["sharpness"]).all()
    assert len(found["done"]) in stopping_counts(16, 4096)
    assert not bool(evaluated(on, definition="average", samples=16, rtol=1e-6)["converged"])


def test_adaptive_sharpness_of_a_scalar_network_does_not_move_along_its_symmetry():
    x, y = 1.3, 0.7

    def net(alpha: float) -> landscape.Problem:
        w = vector(0.9 * alpha, y / (0.9 * x) / alpha)
        return analytic(lambda p: 0.5 * (p[1] * p[0] * x - y) ** 2, w)

    for norm in (2, "inf"):
        fields = {"definition": "adaptive", "norm": norm, "epsilon": (0.2,), "steps": 60}
        found = [value(net(alpha), **fields) for alpha in (0.1, 1.0, 7.0)]
        np.testing.assert_allclose(found, found[1], rtol=1e-6)
    # w₁, w₂ moved by ±20 % each: the product by 44 %
    assert found[1] == pytest.approx(0.5 * (0.44 * y) ** 2, rel=1e-9)
    plain = [value(net(a), definition="adaptive", scaling="none", epsilon=(0.1,)) for a in (0.1, 1.0)]
    assert plain[0] > 2 * plain[1]


# --- random subspaces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "length"), [("gaussian", 1.0), ("rademacher", 1.0), ("orthonormal", 1 / 2000**0.5)]
)
def test_the_matrix_of_a_subspace_follows_its_law_and_seed(law: Any, length: float):
    A = subspace_matrix(2000, 5, law, 3.0, seed=4)
    assert torch.equal(A, subspace_matrix(2000, 5, law, 3.0, seed=4))
    assert not torch.equal(A, subspace_matrix(2000, 5, law, 3.0, seed=5))
    lengths = A.norm(dim=0) / (3 * 2000**0.5 * length)
    assert torch.allclose(lengths, torch.ones(5, dtype=F64), atol=0.08 if law == "gaussian" else 1e-12)
    assert abs(float(A.mean())) < 3 * 5 * length / 10_000**0.5
    if law != "orthonormal":  # a column does not depend on how many there are
        assert torch.equal(A[:, :2], subspace_matrix(2000, 2, law, 3.0, seed=4))


def test_coordinates_are_those_of_the_pseudoinverse():
    A, theta = subspace_matrix(40, 6, "gaussian", 2.0, 0), normal(40)
    torch.testing.assert_close(coordinates(A, theta), torch.linalg.pinv(A) @ theta)


def test_keskar_on_a_subspace_of_a_linear_function():
    g, at = normal(40, seed=1), normal(40, seed=2)
    on = analytic(lambda x: 1.0 + g @ (x - at), at)
    for law in ("gaussian", "orthonormal"):
        found = evaluated(on, 3, subspace=6, law=law, column_scale=0.5, epsilon=(1e-3,))
        A = subspace_matrix(40, 6, law, 0.5, 3)  # type: ignore[arg-type]
        box = (torch.linalg.pinv(A) @ at).abs() + 1
        expected = 100 * 1e-3 * float(((A.T @ g).abs() * box).sum()) / 2
        assert float(found["sharpness"][0]) == pytest.approx(expected, rel=1e-9)
        assert found.attrs["dimensions"] == 6


# --- normalized logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "floor"), [(2, 0.21762), (10, 1.41987), (100, 3.61730)])
def test_cross_entropy_of_normalized_logits_has_its_floor_and_its_ceiling(classes: int, floor: float):
    model = nn.Linear(classes, classes, bias=False).double()
    targets = torch.arange(classes)
    losses = {}
    for sign in (1, -1):
        with torch.no_grad():
            model.weight.copy_(sign * 5 * torch.eye(classes, dtype=F64))
        raw = landscape.Problem(model, nn.CrossEntropyLoss(), [(torch.eye(classes, dtype=F64), targets)])
        on = function.with_normalized_logits(raw)
        losses[sign] = float(on.value())
        top = function.ceiling(on)
    assert losses[1] == pytest.approx(floor, abs=5e-6)
    assert losses[-1] == pytest.approx(top, rel=1e-12)


def test_with_normalized_logits_scaling_the_last_layer_changes_nothing():
    model = classifier()
    fields = {"definition": "adaptive", "logit_normalized": True, "epsilon": (0.05, 0.2), "norm": "inf"}
    before = evaluated(landscape.Problem(model, nn.CrossEntropyLoss(), cut(60)), **fields)
    with torch.no_grad():
        for p in model[2].parameters():
            p.mul_(4.0)
    after = evaluated(landscape.Problem(model, nn.CrossEntropyLoss(), cut(60)), **fields)
    np.testing.assert_allclose(after["sharpness"], before["sharpness"], rtol=1e-9)
    assert (after["sharpness"] < after["upper_bound"]).all()
    assert float(before["loss"]) >= math.log1p(3 * math.exp(-math.sqrt(4 / 3)))


def test_no_bound_is_claimed_for_another_loss():
    on = landscape.Problem(classifier(), nn.CrossEntropyLoss(label_smoothing=0.1), cut(60))
    assert "upper_bound" not in evaluated(
        on, definition="adaptive", logit_normalized=True, norm="inf", steps=2
    )
    assert "upper_bound" not in evaluated(on, **KESKAR)


# --- what it must not depend on -----------------------------------------------------------------------------


SOME = [
    {"epsilon": (1e-3, 1e-2)},
    {"epsilon": (1e-3,), "subspace": 5},
    {"definition": "ball", "epsilon": (0.3,)},
    {"definition": "adaptive", "epsilon": (0.1,), "m": 16, "norm": "inf"},
    {"definition": "adaptive", "epsilon": (0.1,), "m": 16, "scaling": "filter", "maximizer": "apgd"},
    {"definition": "average", "epsilon": (0.1,), "samples": 16},
]


@pytest.mark.parametrize("fields", SOME, ids=str)
def test_no_value_depends_on_the_cut_of_the_data_or_the_microbatch(fields: dict[str, Any]):
    whole = evaluated(problem(), **fields)["sharpness"]
    for other in (problem(cut(25, 25, 10)), problem(cut(59, 1)), problem(microbatch=7)):
        np.testing.assert_allclose(evaluated(other, **fields)["sharpness"], whole, rtol=1e-9)


def test_groups_are_averaged_by_their_weight():
    found = evaluated(
        problem(cut(25, 35)), definition="adaptive", m=16, norm="inf", scaling="none", epsilon=(1e-7,)
    )
    slopes = []
    for start in range(0, 60, 16):
        part = problem([(X[start : start + 16], Y[start : start + 16])])
        slopes.append((1e-7 * float(part.gradient().abs().sum()), len(X[start : start + 16])))
    expected = sum(s * w for s, w in slopes) / 60
    assert float(found["sharpness"][0]) == pytest.approx(expected, rel=1e-4)
    assert float(found["first_order"][0]) == pytest.approx(expected, rel=1e-12)
    assert found.attrs["batches"] == 4
    # a maximum for each group is no less than one for all
    assert value(problem(), definition="adaptive", norm="inf", scaling="none", epsilon=(1e-7,)) <= expected


def test_groups_without_a_valid_target_weigh_nothing():
    targets = Y.clone()
    targets[16:32] = -100
    fields = {"definition": "adaptive", "m": 16, "norm": "inf", "epsilon": (0.05,)}
    whole = value(problem([(X, targets)]), **fields)
    keep = targets != -100
    assert whole == pytest.approx(value(problem([(X[keep], targets[keep])]), **fields), rel=1e-9)


def test_filters_move_by_their_lengths():
    on = landscape.Problem(
        nn.Conv2d(2, 3, 2), nn.MSELoss(), [(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 2, 2))]
    )
    c, theta = parameter_scale(on, "filter"), on.parameters_vector()
    lengths = theta[:24].reshape(3, 8).norm(dim=1)
    torch.testing.assert_close(c[:24], lengths.repeat_interleave(8))
    assert torch.equal(c[24:], theta[24:].abs())
    assert torch.equal(parameter_scale(on, "none"), torch.ones(27))


# --- models of all kinds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_rise_lies_between_the_first_vertex_and_the_second_order_bound(case: Case):
    truth = reference(case)
    on = landscape.Problem(**case.arguments())
    epsilon = 1e-5
    found = evaluated(on, definition="adaptive", norm="inf", scaling="none", epsilon=(epsilon,), steps=6)
    rise = float(found["sharpness"][0])
    vertex = float(truth.loss_of(truth.theta + epsilon * truth.gradient.sign()) - truth.value)
    bound = epsilon * float(truth.gradient.abs().sum()) + 0.5 * epsilon**2 * float(truth.hessian.abs().sum())
    rounding = 1e-13 * (1 + abs(float(truth.value)))
    # a kink may add to what its derivatives say
    assert vertex * (1 - 1e-3) - rounding <= rise <= bound * (1 + 2e-2) + rounding


def test_a_search_in_float32_of_a_recurrent_network_and_one_with_buffers():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.norm, self.head = (
                nn.LSTM(3, 4, batch_first=True),
                nn.BatchNorm1d(4),
                nn.Linear(4, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.lstm(x)[0][:, -1]))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Recurrent(), torch.randn(12, 5, 3)
    on = landscape.Problem(model, nn.CrossEntropyLoss(), [(x, torch.arange(12) % 2)])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for fields in SOME:
        assert (evaluated(on, **{**fields, **({"m": 5} if "m" in fields else {})})["sharpness"] > 0).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"epsilon": (0.0,)}, "epsilon is 0; allowed are numbers > 0"),
        ({"epsilon": (-1e-3, 1e-3)}, "allowed are numbers > 0"),
        ({"epsilon": ()}, "a tuple of one size or more"),
        ({"epsilon": 1e-3}, "a tuple of one size or more"),
        ({"epsilon": (math.nan,)}, "allowed are numbers > 0"),
        ({"epsilon": (1e-3, 1e-3)}, "twice"),
        ({"definition": "sharp"}, "allowed is 'keskar', 'ball', 'adaptive' or 'average'"),
        ({"subspace": 0}, "subspace is 0; allowed is a number >= 1"),
        ({"definition": "ball", "subspace": 5}, "subspace goes with definition keskar"),
        ({"norm": "inf"}, "norm goes with definition adaptive"),
        (
            {"definition": "average", "restarts": 5},
            "restarts goes with definition adaptive or ball or keskar",
        ),
        ({"definition": "ball", "maximizer": "lbfgsb"}, "searches boxes"),
        ({"preset": "paper", "steps": 5}, "preset 'paper' sets"),
        ({"steps": 0}, "steps is 0"),
        ({"column_scale": 0.0, "subspace": 3}, "column_scale is 0.0; allowed is a number > 0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        Sharpness(**fields)


@pytest.mark.parametrize("definition", ["keskar", "ball"])
def test_a_negative_loss_is_refused_where_one_plus_the_loss_divides(definition: Any):
    on = quadratic(psd(3), normal(3), floor=-0.5)
    with pytest.raises(Refused, match=r"divides by 1 \+ L.*definition='adaptive'"):
        evaluated(on, definition=definition)
    assert value(on, definition="adaptive", scaling="none") > 0


def test_a_subspace_larger_than_the_space_is_refused():
    with pytest.raises(Refused, match="subspace is 9, but there are 3 parameters"):
        evaluated(quadratic(psd(3), normal(3)), subspace=9)
    with pytest.raises(Refused, match=r"takes 31\.4 MiB, and memory allows 1 MiB"):
        landscape.measure(Sharpness(subspace=1000), problem_of(137), memory=1 << 20)
    with pytest.raises(Refused, match="output="):
        evaluated(quadratic(psd(3), normal(3)), logit_normalized=True)


def test_values_that_are_not_finite_are_stored_and_counted():
    at = vector(0.5, 0.5)
    on = analytic(lambda x: 1.0 + (x - at).square().sum() + 0 * (0.52 - x).sqrt().sum(), at)
    searched = evaluated(on, definition="adaptive", scaling="none", norm="inf", epsilon=(0.01, 0.1), steps=30)
    assert searched["nonfinite"][0] == 0
    assert searched["nonfinite"][1] > 0
    # beyond 0.02 to one side there is no loss; at best both coordinates stand at the other end
    assert searched["sharpness"][0] < searched["sharpness"][1] <= 0.02 * (1 + 1e-9)
    drawn = evaluated(on, definition="average", scaling="none", epsilon=(1e-3, 0.1), samples=16)
    assert np.isfinite(drawn["sharpness"][0])
    assert np.isnan(drawn["sharpness"][1])
    assert drawn["nonfinite"].tolist()[0] == 0
    assert drawn["nonfinite"][1] == np.isnan(drawn["rises"][:, 1]).sum() > 0
    assert not bool(drawn["converged"])


def test_a_place_that_is_no_minimum_is_measured_and_told():
    H, at = psd(6), normal(6)
    slope = evaluated(quadratic(H, at, g=10 * normal(6, seed=1)), **KESKAR)
    assert not bool(slope["at_minimum"])
    assert slope["first_order"][0] > 0.5 * slope["sharpness"][0]
    assert float(slope["slope_share"]) == slope["first_order"][0] / slope["sharpness"][0]
    top = evaluated(quadratic(-H, at), definition="adaptive", scaling="none", epsilon=(0.1,))
    assert top["sharpness"].tolist() == [0.0]  # θ itself is in the set
    assert top["lowest"][0] < 0
    assert not bool(top["at_minimum"])
    saddle = evaluated(quadratic(torch.diag(vector(1.0, -3.0)), vector(0.3, 0.2)), **KESKAR)
    assert saddle["sharpness"][0] > 0
    assert not bool(saddle["at_minimum"])


# --- runs ---------------------------------------------------------------------------------------------------


class Stopping(Journal):
    """Keeps every state, and stops the run after some."""

    def __init__(self, after: int):
        self.left, self.states, self.record = after, {}, None

    def commit(self, record: Record, *, final: bool = False) -> None:
        self.record = record

    def load_state(self, block: range) -> Any:
        found = self.states.get(block.start)
        return None if found is None else {k: np.array(v) for k, v in found.items()}

    def save_state(self, block: range, state: Any) -> None:
        self.states[block.start] = state()
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("fields", [*SOME, {"epsilon": (1e-3, 1e-2), "preset": "paper"}], ids=str)
def test_an_interrupted_run_ends_with_the_same_bits(fields: dict[str, Any]):
    whole = evaluated(problem(), **fields)
    journal, record = Stopping(after=1), None
    for stop in (1, 5, 9, 30, 10_000):
        journal.left = stop
        try:
            record = landscape.evaluate(
                Sharpness(**fields), problem(), journal=journal, record=journal.record
            )
            break
        except KeyboardInterrupt:
            continue
    assert record is not None
    for name in ("sharpness", "rises", "evaluations"):
        np.testing.assert_array_equal(record[name], whole[name])
    assert record["gradients"] == whole["gradients"]


def test_more_restarts_keep_those_that_are_done(tmp_path: Path):
    path = tmp_path / "run"
    landscape.measure(Sharpness(epsilon=(1e-3,), restarts=1), problem(), out=path)
    more = landscape.measure(Sharpness(epsilon=(1e-3,), restarts=3), problem(), out=path)
    fresh = landscape.measure(Sharpness(epsilon=(1e-3,), restarts=3), problem())
    np.testing.assert_array_equal(more["restart_sharpness"], fresh["restart_sharpness"])
    assert float(more["sharpness"][0]) == float(more["restart_sharpness"].max())


def test_a_larger_set_is_never_less_sharp_and_warm_starts_know_the_smaller_one():
    found = evaluated(problem(), epsilon=(5e-3, 1e-4, 5e-4, 1e-3))
    assert found["epsilon"].tolist() == [1e-4, 5e-4, 1e-3, 5e-3]
    assert (np.diff(found["sharpness"]) > 0).all()
    assert (found["spread"] >= 0).all()


def test_value_and_gradient_are_those_of_two_passes():
    for on in (problem(), problem(cut(25, 25, 10)), problem(microbatch=7)):
        both = on.value_and_gradient()
        assert both[0].dtype == F64
        assert float(both[0]) == pytest.approx(float(on.value()), rel=1e-14)
        assert torch.equal(both[1], on.gradient())
