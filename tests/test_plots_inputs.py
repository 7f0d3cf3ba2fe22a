"""Pictures of input curvature and of robustness."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from pictures import assert_readable, drawn

from landscape.plots import PlotError, input_curvature, robustness
from landscape.results import Record, Variable


def curved(*, image: tuple[int, ...] | None = None, scale: float = 1.0, zero: int = 0) -> Record:
    draws = np.random.default_rng(0)
    values = scale * np.exp(draws.normal(size=300))
    values[:zero] = 0.0
    values[299] = np.nan
    found: dict[str, Any] = {
        "normalized_curvature": values,
        "curvature": values,
        "label": np.arange(300) % 10,
        "predicted": np.where(np.arange(300) == 5, 7, np.arange(300) % 10),
        "done": np.arange(300) < 290,
    }
    if image:
        found["image"] = draws.uniform(size=(300, *image))
    axes = ("example", *("channel", "row", "column")[-len(image or ()) :])
    variables = {k: Variable(axes[: np.ndim(v)], v) for k, v in found.items()}
    variables["mean_normalized_curvature"] = Variable((), scale * 1.6)
    variables["mean_normalized_curvature_stderr"] = Variable((), scale * 0.1)
    return Record(variables, {"metric": "input_curvature"})


def robust(*, norm: Any = 2, steps: int = 10) -> Record:
    epsilon = np.array([0.1, 0.5, 1.0])
    variables = {
        "epsilon": Variable(("epsilon",), epsilon),
        "gradient_robustness": Variable(("epsilon",), 2 * epsilon),
        "gradient_robustness_stderr": Variable(("epsilon",), 0.1 * epsilon),
        "done": Variable(("example",), np.ones(100, bool)),
    }
    if steps:
        variables |= {
            "accuracy": Variable((), 0.9),
            "adversarial_accuracy": Variable(("epsilon",), 0.9 - epsilon / 2),
            "adversarial_accuracy_stderr": Variable(("epsilon",), np.full(3, 0.02)),
        }
    fields = {"norm": norm, "steps": steps, "restarts": 1}
    return Record(variables, {"metric": "robustness", "configuration": json.dumps(fields)})


@pytest.mark.parametrize("width", [7.0, 3.4])
@pytest.mark.parametrize(
    "records",
    [
        [curved()],
        [curved(image=(8, 8))],
        [curved(image=(3, 8, 8))],
        [curved(zero=20), curved(scale=50), curved()],
    ],
    ids=["plain", "gallery", "colours", "runs"],
)
def test_curvature_can_be_read(records: list[Record], width: float) -> None:
    assert_readable(drawn(input_curvature, records, width))


@pytest.mark.parametrize("width", [7.0, 3.4])
@pytest.mark.parametrize("records", [[robust()], [robust(steps=0)], [robust(), robust(), robust(steps=0)]])
def test_robustness_can_be_read(records: list[Record], width: float) -> None:
    assert_readable(drawn(robustness, records, width))


def test_what_is_shown_is_what_is_stored() -> None:
    record = curved(image=(8, 8), zero=20)
    picture = input_curvature.prepare(record, "mine")
    values = record["normalized_curvature"][:290]
    assert (picture.values == np.sort(values)).all()
    assert picture.label.endswith("20 of 290 zero")
    assert picture.images is not None
    assert (picture.images[0, 0] == record["image"][0]).all()  # the zeros, in their order
    assert (picture.images[1, 0] == record["image"][np.argmax(values)]).all()
    assert picture.captions[0][5] == "5 as 7"
    figure = drawn(input_curvature, [record], 7)
    shares = figure.axes[-1].get_lines() or figure.axes[1].get_lines()
    assert max(line.get_ydata()[-1] for line in shares) == 1.0
    curve = robustness.prepare(robust())
    assert curve.accuracy is not None
    assert np.allclose(curve.accuracy.values, [0.9, 0.85, 0.65, 0.4])
    assert len(robustness.interactive([curve]).data) == 2
    assert len(input_curvature.interactive([picture]).data) == 1


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(PlotError, match="above zero"):
        input_curvature.prepare(curved(scale=0.0))
    with pytest.raises(PlotError, match="no example is measured"):
        robustness.prepare(Record({}, {}))
    with pytest.raises(PlotError, match="one norm"):
        drawn(robustness, [robust(), robust(norm="inf")], 7)
