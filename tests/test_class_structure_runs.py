"""Metric `class_structure`: what it refuses, that it can be interrupted, and what the command line makes of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from landscape_cli import app
from test_class_structure import Conv, close, cut, data, mlp, problem_of
from torch import nn

import landscape
from landscape import Problem, Refused, testbeds
from landscape.class_structure import embedding, grams
from landscape.class_structure.grams import Weights
from landscape.metrics import ClassStructure
from landscape.metrics.base import Journal
from landscape.record import Record

CE = nn.CrossEntropyLoss()
FEW = {"spectra": ("hessian", "G-G012", "hessian/G1"), "probes": 1, "steps": 6, "k": 4}


def refused(problem: Problem, **settings) -> str:
    with pytest.raises(Refused) as caught:
        landscape.measure(ClassStructure(**settings), problem)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_regression_problem_is_refused() -> None:
    x, y = data((6, 6, 6))
    message = refused(Problem(mlp(), nn.MSELoss(), cut(x, torch.randn(18, 3).double())))
    assert "float64" in message
    assert "regression" in message
    assert "integer label" in message
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).double()
    one_hot = nn.functional.one_hot(y, 3)
    assert "54 labels" in refused(
        Problem(net, lambda f, t: ((f - t) ** 2).mean(), cut(x, one_hot), weight=len)
    )


def test_one_class_is_refused() -> None:
    x, y = data((6, 6, 6))
    one = nn.Linear(4, 1).double()
    assert "1 logit" in refused(Problem(one, CE, cut(x, 0 * y)))
    assert "only class 1 has examples" in refused(Problem(mlp(), CE, cut(x, 0 * y + 1)))
    assert "classes names 1 class" in refused(Problem(mlp(), CE, cut(x, y)), classes=(1,))


def test_a_class_without_examples_is_refused() -> None:
    x, y = data((6, 6, 0))
    message = refused(Problem(mlp(), CE, cut(x, y)))
    assert message == (
        "there is no example of class 2 in the data, so it has no mean; give some, or measure the others: classes=0,1"
    )
    assert landscape.measure(ClassStructure(classes=(0, 1), **FEW), Problem(mlp(), CE, cut(x, y)))
    assert "classes names 7; allowed are labels from 0 to 2" in refused(
        Problem(mlp(), CE, cut(x, y)), classes=(0, 7)
    )


@pytest.mark.parametrize("label", [-1, 3, 99])
def test_labels_out_of_range_are_refused(label: int) -> None:
    x, y = data((6, 6, 6))
    y[4] = label
    message = refused(Problem(mlp(), CE, cut(x, y)))
    assert re.search(rf"from (0 to {label}|{label} to 2)", message)
    assert "3 logits, for the labels 0 to 2" in message


def test_other_losses_and_outputs_are_refused() -> None:
    x, y = data((6, 6, 6))
    for loss, word in (
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double()), "class weights"),
        (nn.NLLLoss(), "nll_loss"),
        (nn.MultiMarginLoss(), "another"),
    ):
        options = {} if word != "another" else {"weight": lambda batch: len(batch[1])}
        assert word in refused(Problem(mlp(), loss, cut(x, y), **options))
    pair = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2))).double()
    over = Problem(pair, CE, cut(x, torch.stack([y, y], 1)))
    assert "(4, 3, 2)" in refused(over)
    whole = Problem(mlp(), forward=lambda model, batch: CE(model(batch[0]), batch[1]), data=cut(x, y))
    assert "output=" in refused(whole)


@pytest.mark.parametrize("place", [3, 11])
def test_an_example_without_finite_logits_is_refused(place: int) -> None:
    x, y = data((6, 6, 6))
    x[place] = torch.nan
    with pytest.raises(Refused, match=f"an example of class {int(y[place])} are not finite"):
        landscape.measure(ClassStructure(), Problem(mlp(), CE, cut(x, y)), check=False)
    assert "nan" in refused(Problem(mlp(), CE, cut(x, y)))


@pytest.mark.parametrize("weighting", ["2019", "2020"])
def test_two_classes_of_one_example_each(weighting: str) -> None:
    """G2 and G3 vanish: there is one other output, and nothing scatters."""
    x, y = data((1, 1))
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    record = landscape.evaluate(ClassStructure(weighting), Problem(net, CE, cut(x, y)))
    assert record["converged"]
    top = record["eigenvalues_G"]
    assert close(record["eigenvalues_G012"][:2], top[:2])
    assert abs(record["eigenvalues_G2"]).max() <= 1e-12 * top[0]
    assert abs(record["within"]).max() <= 1e-12 * top[0]
    assert np.isfinite(record["tsne"]).all()


def test_examples_that_meet_in_a_batch_are_refused() -> None:
    x, y = data((6, 6, 6), (1, 6, 6))
    problem = Problem(Conv().double(), CE, cut(x, y, 9), mode="train")
    assert "training mode" in refused(problem)
    with pytest.raises(Refused, match="mode='eval'"):
        landscape.measure(ClassStructure(), problem, check=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weighting": "2021"}, "weighting is '2021'; allowed is '2019' or '2020'"),
        ({"per_class": 0}, "per_class is 0; allowed is a number >= 1"),
        ({"spectra": ("hesian",)}, "spectra names 'hesian'; allowed are hessian, G"),
        ({"rtol": 1.0}, "rtol is 1.0"),
    ],
)
def test_settings_out_of_range_say_what_is_allowed(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ClassStructure(**settings)


def test_other_numbers_of_names_than_outputs_are_refused() -> None:
    problem, *_ = problem_of()
    assert "class_names has 2 names; allowed is one for each of 3 logits" in refused(
        problem, class_names=("a", "b")
    )


def test_names_come_from_the_setting_the_data_set_or_the_labels() -> None:
    x, y = data((6, 6, 6))

    class Named(torch.utils.data.TensorDataset):
        classes = ["cat", "dog", "owl"]  # noqa: RUF012

    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(Named(x, y), range(18)), batch_size=6)
    expected = {("cat", "dog", "owl"): loader, ("0", "1", "2"): cut(x, y)}
    for names, batches in expected.items():
        record = landscape.evaluate(ClassStructure(**FEW), Problem(mlp(), CE, batches))
        assert tuple(record["class_name"]) == names
        assert any(name in record["made_by"][0] for name in names)
    given = landscape.evaluate(ClassStructure(class_names=("x", "y", "z"), **FEW), Problem(mlp(), CE, loader))
    assert tuple(given["class_name"]) == ("x", "y", "z")


def test_what_does_not_fit_is_left_out_and_said_or_refused() -> None:
    net = testbeds.mlp([4, 200, 3], nn.Tanh).double()
    x, y = data((6, 6, 6))
    problem = Problem(net, CE, cut(x, y))
    n = problem.size
    memory = 4 * 8 * n * 8  # a quarter holds 8 vectors, and G012 has 9
    record = landscape.evaluate(ClassStructure(k=1, steps=1, rtol=0.5), problem, memory=memory)
    assert "G-G012" not in record["spectrum"]
    assert record.attrs["warning"] == "left out, their vectors do not fit into the memory: G-G012"
    with pytest.raises(Refused, match="9 vectors"):
        landscape.evaluate(ClassStructure(k=1, steps=1, spectra=("G-G012",)), problem, memory=memory)


class StoppedError(Exception):
    pass


class Stops(Journal):
    """Keeps states, and stops after so many steps."""

    def __init__(self, after: int):
        self.after, self.left, self.states = after, after, {}

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise StoppedError

    def commit(self, record: Record, *, final: bool = False) -> None:
        if not final:
            self._count()

    def load_state(self, block: range):
        found = self.states.get(block.start)
        return None if found is None else dict(found)

    def save_state(self, block: range, state) -> None:
        self.states[block.start] = {key: np.array(value) for key, value in state().items()}
        self._count()


@pytest.mark.parametrize("after", [1, 2, 7])
@pytest.mark.parametrize("settings", [{}, {"sketch": 8, "weighting": "2020"}], ids=["exact", "sketched"])
def test_interrupted_runs_end_with_the_same_bits(settings: dict, after: int) -> None:
    problem, *_ = problem_of("mlp", (5, 3, 4))
    metric, memory = ClassStructure(**FEW, **settings), 1 << 16
    whole = landscape.evaluate(metric, problem, 3, memory=memory)
    record, journal, stops = Record(), Stops(after), 0
    while True:
        try:
            landscape.evaluate(metric, problem, 3, memory=memory, journal=journal, record=record)
            break
        except StoppedError:
            stops += 1
            journal.left = journal.after
    assert stops > 3
    for key, variable in whole.variables.items():
        if key == "wall_seconds":
            continue
        assert variable.data.dtype == record[key].dtype, key
        assert np.array_equal(variable.data, record[key], equal_nan=variable.data.dtype.kind == "f"), key


def test_a_file_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    problem, *_ = problem_of("mlp", (5, 3, 4))
    metric, seen = ClassStructure(**FEW), []

    def stop(progress) -> None:
        seen.append(progress.done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        landscape.measure(metric, problem, out=tmp_path, progress=stop)
    assert seen == [3]
    ds = landscape.measure(metric, problem, out=tmp_path)
    whole = landscape.measure(metric, problem)
    for name in ("gram", "eigenvalues_hessian", "tsne", "spectrum_density", "within"):
        assert np.array_equal(ds[name], whole[name], equal_nan=True), name
    assert ds.attrs["exit_code"] == 0


def test_the_model_is_untouched() -> None:
    problem, model, *_ = problem_of("cnn")
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    landscape.evaluate(ClassStructure(**FEW), problem)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_clusters_stand_apart_in_the_embedding() -> None:
    """Ten points around each of three far centres: a point's neighbours in the plane are its own cluster."""
    draws = np.random.default_rng(0)
    x = np.repeat(np.eye(3) * 100, 10, axis=0) + draws.normal(size=(30, 3))
    place = embedding.embed(x @ x.T, 5.0)
    assert np.array_equal(place, embedding.embed(x @ x.T, 5.0))
    centres = place.reshape(3, 10, 2).mean(axis=1)
    nearest = np.linalg.norm(place[:, None] - centres, axis=2).argmin(axis=1)
    assert nearest.tolist() == np.repeat(range(3), 10).tolist()
    assert np.isfinite(embedding.embed(np.zeros((6, 6)), 2.0)).all()


def test_distances_and_cosines_are_those_of_the_vectors() -> None:
    draws = torch.Generator().manual_seed(0)
    V = torch.randn(2 * 3, 7, generator=draws, dtype=torch.float64)
    gram = (V @ V.T).numpy()
    assert close(grams.distances(gram), torch.cdist(V, V))
    unit = V / V.norm(dim=1, keepdim=True)
    assert close(grams.cosines(gram), unit @ unit.T)
    weights = Weights.of("2019", np.full((2, 3), 1 / 3), np.array([0, 2]))
    m = torch.stack([(V[1] + V[2]) / 2, (V[3] + V[4]) / 2])
    every = torch.cat([m, V])
    assert close(grams.with_means(weights, gram), every @ every.T)


def test_the_command_line_measures_shows_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("setup.py").write_text(_SETUP)
    run = CliRunner().invoke
    settings = [
        "--spectra",
        "hessian,G,hessian/G1",
        "--probes",
        "1",
        "--steps",
        "8",
        "--k",
        "6",
        "--class-names",
        "a,b,c",
    ]
    arguments = [
        "measure",
        "--metric",
        "class_structure",
        "--problem",
        "setup.py:make",
        *settings,
        "--out",
        "one",
    ]
    done = run(app.app, arguments)
    assert done.exit_code == 0, done.output
    assert re.search(
        r"eigenvalue +eigenvalues_hessian +eigenvalues_G +share_G +share_G1 +made_by", done.output
    )
    assert re.search(r"[abc] (as [abc]|kept) \d+ %", done.output)
    shown = run(app.app, ["show", "one"])
    assert "spectrum_outliers(spectrum=hessian/G1)" in shown.output
    assert "7 of 7 tasks" in shown.output
    assert run(app.app, ["show", "--json", "one"]).exit_code == 0
    drawn = run(app.app, ["plot", "one", "-o", "one.png"])
    assert drawn.exit_code == 0, drawn.output
    typo = run(app.app, [*arguments, "--weightin", "2020"])
    assert typo.exit_code == 2
    assert "--weighting" in typo.output
    wrong = run(app.app, [*arguments, "--spectra", "G-G9"])
    assert wrong.exit_code == 2
    assert "G-G9" in wrong.output


_SETUP = """
import torch, landscape
def make():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    y = torch.arange(18) % 3
    x = torch.randn(18, 4) + y[:, None]
    return landscape.Problem(net, torch.nn.CrossEntropyLoss(), [(x, y)])
"""


def test_a_model_with_one_parameter_tensor_frozen() -> None:
    x, y = data((6, 6, 6))
    model: nn.Module = mlp()
    next(model.parameters()).requires_grad_(False)
    problem = Problem(model, CE, cut(x, y))
    record = landscape.evaluate(ClassStructure(**FEW), problem)
    assert record.attrs["order"] == problem.size == 23
