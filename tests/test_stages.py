"""Stages of a piece of work: what is kept of them, and what it goes on from."""

from __future__ import annotations

from collections.abc import Callable

import every
import numpy as np
import pytest
import torch

import landscape
from landscape import seeds, stages
from landscape.estimators import eigsh
from landscape.estimators.power import power_iteration
from landscape.stages import Arrays, Stages


class Kept:
    """Holds what was kept last; raises after so many times."""

    def __init__(self, held: Arrays | None = None, after: int | None = None):
        self.held, self.left = held or {}, after

    def __call__(self, arrays: Callable[[], Arrays]) -> None:
        self.held = arrays()
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise InterruptedError


def resumed(work: Callable[[], object], after: int) -> object:
    """What the work returns when it is interrupted every so many times."""
    held: Arrays = {}
    for _ in range(200):
        kept = Kept(held, after)
        try:
            with stages.within(Stages(held, kept)):
                return work()
        except InterruptedError:
            held = kept.held
    raise AssertionError("it does not get on")


def matrix(n: int = 60) -> torch.Tensor:
    A = torch.randn(n, n, generator=seeds.generator(0, "test", 0), dtype=torch.float64)
    return A + A.T


def test_outside_of_an_evaluation_nothing_is_kept() -> None:
    stage = stages.begin()
    assert not stage.is_kept
    stage.save(lambda: pytest.fail("nobody asked for a state"))
    assert stages.kept(lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("after", [1, 2, 5])
def test_solves_go_on_and_end_with_the_same_bits(after: int) -> None:
    A = matrix()

    def work() -> list[torch.Tensor]:
        low = eigsh(A, k=2, which="smallest", seed=1)
        far = power_iteration(A, rtol=1e-2, seed=2, max_matvecs=40)
        high = eigsh(A + torch.outer(low.vectors[:, 0], low.vectors[:, 0]), k=3, seed=3)
        numbers = [
            far.value,
            far.residual_norm,
            far.converged,
            far.opposite,
            far.matvecs,
            low.matvecs,
            high.matvecs,
        ]
        return [low.values, low.vectors, far.vector, torch.tensor(numbers), high.values, high.vectors]

    assert all(torch.equal(a, b) for a, b in zip(work(), resumed(work, after), strict=True))
    assert power_iteration(A, max_matvecs=40).message == resumed(
        lambda: power_iteration(A, max_matvecs=40).message, after
    )


def test_what_is_finished_is_not_computed_again_nested_stages_too() -> None:
    calls: list[str] = []

    def inner(name: str) -> Arrays:
        calls.append(name)
        return {"x": np.array(float(len(name)))}

    def outer() -> Arrays:
        return {"sum": stages.kept(lambda: inner("a"))["x"] + stages.kept(lambda: inner("bb"))["x"]}

    def work() -> float:
        return float(stages.kept(outer)["sum"] + stages.kept(lambda: inner("ccc"))["x"])

    assert resumed(work, 0) == 6.0
    assert calls == ["a", "bb", "ccc"]


def test_arrays_come_back_as_they_would_from_a_file() -> None:
    turned = np.arange(6.0).reshape(2, 3).T
    with stages.within(Stages({}, Kept())):
        assert stages.kept(lambda: {"x": turned})["x"].flags.c_contiguous
    assert stages.kept(lambda: {"x": turned})["x"].flags.c_contiguous


def test_a_kept_solve_makes_no_products_again_but_counts_them() -> None:
    metric = every.tiny("density", deflate=2)
    whole = landscape.evaluate(metric, every.problem(), 3)
    interrupted = every.Memory(6)  # in the middle of the deflation's solve
    with pytest.raises(every.StoppedError):
        landscape.evaluate(metric, every.problem(), 3, journal=interrupted)
    assert interrupted.record is None
    assert interrupted.states
    interrupted.left = None
    again = every.problem()
    found = landscape.evaluate(metric, again, 3, journal=interrupted)
    assert not every.differing(whole, found)
    assert int(found["matvecs"]) == int(whole["matvecs"])
