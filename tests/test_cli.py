"""The command line: what a user types, what comes back on stdout and stderr, and the exit status."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from landscape_cli import app as cli_app
from landscape_cli import flags, report

from landscape import results
from landscape.metrics import registry
from landscape.results import Record, Variable

COMMAND = [sys.executable, "-c", "from landscape_cli import main; main()"]

SOURCE = """
import torch
from torch import nn

generator = torch.Generator().manual_seed(1)
X, Y = torch.randn(20, 4, generator=generator), torch.randint(0, 3, (20,), generator=generator)
batches = [(X[:8], Y[:8]), (X[8:], Y[8:])]
dicts = [{"x": x, "y": y} for x, y in batches]
broken = [(X * float("nan"), Y)]
dataset = torch.utils.data.TensorDataset(X, Y)

def loader(shuffle: bool = False):
    return torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=shuffle)

def stream():
    return (batch for batch in batches)

def small(width: int = 6):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

def frozen():
    return small().requires_grad_(False)

def dropout():
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))

def wide_input():
    return nn.Linear(7, 3)

def per_example(output, target):
    return nn.functional.cross_entropy(output, target, reduction="none")

def step(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

def output(model, batch):
    return model(batch["x"])

def target(batch):
    return batch["y"]

def problem(width: int = 6):
    import landscape
    torch.manual_seed(0)
    return landscape.Problem(small(width), nn.CrossEntropyLoss(), batches)
"""

OWN_METRIC = '''
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from landscape.checks import Need
from landscape.metrics.base import Metric, Round, setting
from landscape.results import Record, Variable

@dataclass(frozen=True)
class GradientPower(Metric):
    """A power of the gradient's norm."""

    name: ClassVar[str] = "gradient_power"
    headline: ClassVar[str] = "gradient_power"
    unit: ClassVar[str] = "pass"
    power: float = setting(2.0, "of the norm")

    def needs(self):
        return frozenset({Need.GRADIENT})

    def prepare(self, problem, seed):
        return Record()

    def units(self, record):
        return Round(1) if record.attrs["stop"] == 0 else None

    def measure(self, problem, shared, block, generators):
        norm = float(problem.gradient().double().norm())
        return {"norm": Variable(("pass",), np.array([norm]))}

    def summarize(self, record):
        return {"gradient_power": Variable((), np.asarray(float(record["norm"][0]) ** self.power))}

    def outlook(self, problem):
        return 1, 1
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory of the user's own with code in it; what the command changes is put back."""
    import torch

    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "own_metric.py").write_text(OWN_METRIC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before, state = set(sys.modules), torch.random.get_rng_state()
    yield tmp_path
    torch.random.set_rng_state(state)
    for name in set(sys.modules) - before:
        if name in {"mine", "landscape_user_own_metric"} or name.startswith("user_file"):
            del sys.modules[name]


def landscape(*words: str) -> Result:
    return CliRunner().invoke(cli_app.app, list(words))


MINE = ("--model", "mine.py:small", "--data", "mine.py:batches", "--loss", "cross_entropy")


def measure(*words: str) -> Result:
    return landscape("measure", "--metric", "trace", *words)


def one_line(result: Result, code: int, *words: str) -> None:
    """Check the exit status, and that the last line of stderr, the only complaint, says the words."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    *before, last = result.stderr.strip().splitlines()
    assert last.startswith("landscape: ")
    for line in before:  # what is measured may be told before
        assert line.startswith("landscape: "), result.stderr
    for word in words:
        assert word in last


# --- help, and what it costs --------------------------------------------------------------------------


def test_help_answers_at_once_and_imports_no_torch():
    code = (
        "import sys; from landscape_cli import main\n"
        "try: main()\nfinally: assert not {'torch', 'h5py', 'rich'} & set(sys.modules)"
    )
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, "--help"], check=True, capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time, which a busy machine does not stretch as it does the clock's.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "measure" in done.stdout
    assert min(seconds) < 0.3


def test_show_and_plot_import_no_torch(tmp_path: Path):
    results.write(tmp_path / "mine" / "trace.h5", stored_trace())
    code = (
        "import sys; from landscape_cli import main\n"
        "try: main()\nfinally: assert not {'torch', 'xarray'} & set(sys.modules)"
    )
    for words in (["show", "mine"], ["show", "mine", "--json"], ["plot", "mine", "-o", "x.png"]):
        subprocess.run([sys.executable, "-c", code, *words], check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "x.png").exists()


def test_every_command_and_every_flag_has_help():
    for name, command in cli_app.app.commands.items():
        result = landscape(name, "--help")
        assert result.exit_code == 0
        assert command.short_help
        for param in command.params:
            if isinstance(param, click.Option):
                assert param.help, f"{name} {param.opts}"
    assert landscape("--version").output.startswith("landscape ")


def test_help_of_measure_is_in_groups():
    text = landscape("measure", "--help").output
    headings = [
        "What to measure:",
        "The model and its data:",
        "The run, and where results go:",
        "Flags of ",
    ]
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert text.index("--checkpoint") > places[1]
    for field in flags.fields_of(registry.registered()["trace"]).values():
        assert text.index(f"--{field.flag}", places[-1]) > 0
    assert "[default: 0.02]" in text


def test_every_keyword_of_problem_is_a_flag_of_the_same_name():
    import inspect

    from landscape.problem import Problem

    known = {param.name for param in cli_app.app.commands["measure"].params}
    assert set(inspect.signature(Problem).parameters) <= known


# --- measuring ----------------------------------------------------------------------------------------


def test_the_main_command_measures_the_embedded_default_and_says_so(here: Path):
    first = measure("--rtol", "0.3")
    assert first.exit_code == 0, first.output
    (told,) = first.stderr.strip().splitlines()
    assert told.startswith("landscape: no --model: measuring the embedded default, a ")
    assert "accuracy 99" in told
    assert "cross-entropy 0.0" in told
    header, line = first.stdout.strip().splitlines()
    assert header.split() == ["measure", "estimate", "error", "converged", "products", "seconds", "file"]
    record = results.read(here / "runs" / "digits_mlp" / "trace.h5")
    estimate = report.plus_minus(float(record["trace"]), float(record["trace_stderr"]))
    assert line.startswith("trace ")
    assert estimate in line
    assert line.split()[-1] == "runs/digits_mlp/trace.h5"
    assert f"yes        {int(record['matvecs'])}" in line
    assert float(record["trace_stderr"]) <= 0.3 * abs(float(record["trace"]))

    written = (here / "runs/digits_mlp/trace.h5").read_bytes()
    again = measure("--rtol", "0.3")
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert (here / "runs/digits_mlp/trace.h5").read_bytes() == written


def test_the_command_gives_the_number_that_the_library_gives(here: Path):
    import torch
    from torch import nn

    import landscape as library

    result = measure(
        *MINE, "--out", "runs/x", "--curvature", "ggn", "--dtype", "float64", "--parameters", "0.*,2.bias"
    )
    assert result.exit_code == 0, result.output
    import mine

    torch.manual_seed(0)
    problem = library.Problem(
        mine.small(), nn.CrossEntropyLoss(), mine.batches, dtype=torch.float64, parameters=["0.*", "2.bias"]
    )
    expected = sum(float(problem.ggn_vp(row)[i]) for i, row in enumerate(torch.eye(problem.size).double()))
    assert float(results.read(Path("runs/x/trace.h5"))["trace"]) == pytest.approx(expected, rel=1e-12)


def test_a_larger_demand_goes_on_from_what_is_there(here: Path):
    words = (*MINE, "--method", "hutchinson", "--rtol", "1e-9", "--out", "runs/x")
    short = measure(*words, "--max-probes", "16")
    one_line(short, 4, "trace did not reach its tolerance", "--rtol or --max-probes")
    assert "NO" in short.stdout
    before = results.read(Path("runs/x/trace.h5"))
    assert measure(*words, "--max_probes", "16").stdout == short.stdout
    assert measure(*words, "--trace.max-probes=32").exit_code == 4
    after = results.read(Path("runs/x/trace.h5"))
    assert len(after["samples"]) == 32
    np.testing.assert_array_equal(after["samples"][:16], before["samples"])


def test_json(here: Path):
    result = measure(*MINE, "--json", "--frobenius")
    (found,) = json.loads(result.stdout)
    record = results.read(Path("runs/small/trace.h5"))
    assert found["file"] == "runs/small/trace.h5"
    assert found["estimates"]["trace"] == {"value": float(record["trace"]), "stderr": 0.0}
    assert found["estimates"]["frobenius_norm"]["value"] == float(record["frobenius_norm"])
    assert found["converged"] is True
    assert found["attributes"]["configuration"]["frobenius"] is True
    assert found["attributes"]["microbatch"] is None
    assert found["variables"]["layer_trace"]["data"] == record["layer_trace"].tolist()
    assert "data" not in found["variables"]["samples"]


def test_dry_run_measures_nothing(here: Path):
    result = measure(*MINE, "--dry-run", "--max-probes", "10")
    assert result.exit_code == 0, result.output
    assert "51 parameters" in result.stdout
    assert "trace: 10 products" in result.stdout
    assert "runs/small/trace.h5 (new)" in result.stdout
    assert not Path("runs").exists()


def test_the_first_examples_only(here: Path):
    assert measure(*MINE, "--examples", "11", "--out", "runs/a").exit_code == 0
    (here / "cut.py").write_text("from mine import X, Y\nbatches = [(X[:8], Y[:8]), (X[8:11], Y[8:11])]\n")
    assert measure(*MINE, "--data", "cut.py:batches", "--out", "runs/b").exit_code == 0
    a, b = (results.read(Path(f"runs/{name}/trace.h5")) for name in "ab")
    assert float(a["trace"]) == float(b["trace"])
    assert a.attrs["data_fingerprint"] == b.attrs["data_fingerprint"]
    assert float(a["trace"]) != float(_trace(*MINE, "--out", "runs/c")["trace"])


def _trace(*words: str) -> Record:
    result = measure(*words)
    assert result.exit_code == 0, result.output
    return results.read(Path(words[words.index("--out") + 1]) / "trace.h5")


def test_three_forms_of_a_problem_give_one_number(here: Path):
    plain = _trace(*MINE, "--out", "runs/a")
    model = ("--model", "mine:small", "--data", "mine:dicts")
    parts = ("--loss", "cross_entropy", "--output", "mine:output", "--target", "mine:target")
    named = _trace(*model, *parts, "--out", "runs/b")
    black_box = _trace(*model, "--forward", "mine:step", "--out", "runs/c")
    own = _trace("--problem", "mine.py:problem", "--out", "runs/d")
    for other in (named, black_box, own):
        assert float(other["trace"]) == pytest.approx(float(plain["trace"]), rel=1e-6)
    assert measure("--problem", "mine:problem", "--problem-arg", "width=5", "--out", "runs/e").exit_code == 0
    assert len(results.read(Path("runs/e/trace.h5"))["samples"]) == 4 * 5 + 5 + 5 * 3 + 3


def test_several_checkpoints_make_one_run_each(here: Path):
    import torch

    sys.path.insert(0, str(here))
    import mine

    for i in (1, 2, 10):
        torch.manual_seed(i)
        torch.save(
            {"state_dict": {f"module.{k}": v for k, v in mine.small().state_dict().items()}}, f"epoch{i}.pt"
        )
    result = measure(*MINE, "--checkpoint", "epoch*.pt", "--out", "runs/e")
    assert result.exit_code == 0, result.output
    files = [line.split()[-1] for line in result.stdout.strip().splitlines()[1:]]
    assert files == [f"runs/e/epoch{i}/trace.h5" for i in (1, 2, 10)]
    assert result.stderr.count("the prefix 'module.' of every key was taken off") == 3
    found = {float(results.read(Path(name))["trace"]) for name in files}
    assert len(found) == 3
    single = _trace(*MINE, "--checkpoint", "epoch2.pt", "--out", "runs/one")
    assert float(single["trace"]) == float(results.read(Path("runs/e/epoch2/trace.h5"))["trace"])
    one_line(
        measure(*MINE, "--checkpoint", "epoch*.pt", "--out", "x.h5"),
        2,
        "several checkpoints need a directory",
    )
    shown = landscape("show", "runs/e")
    assert shown.stdout.count("trace.h5") == 3
    assert "holds 3 measurements; name one" in landscape("plot", "runs/e").stderr


def test_a_metric_of_the_users_own(here: Path):
    words = ("--problem", "mine.py:problem", "--out", "runs/x")
    result = landscape("measure", "--metric", "./own_metric.py", "--metric", "trace", "--power", "3", *words)
    assert result.exit_code == 0, result.output
    record = results.read(Path("runs/x/gradient_power.h5"))
    assert float(record["gradient_power"]) == pytest.approx(float(record["norm"][0]) ** 3)
    assert Path("runs/x/trace.h5").exists()
    assert "Flags of gradient_power" in landscape("measure", "--metric", "./own_metric.py", "--help").stdout


def test_out_may_name_the_file(here: Path):
    assert measure(*MINE, "--out", "deep/x.h5").exit_code == 0
    assert results.read(Path("deep/x.h5")).attrs["metric"] == "trace"
    words = ("--metric", "./own_metric.py", *MINE, "--out", "deep/x.h5")
    one_line(measure(*words), 2, "several metrics need a directory")


# --- everything a user can get wrong ------------------------------------------------------------------

USAGE = {
    "no metric": (("measure",), "name what to measure: --metric adaptive_spectral_norm or"),
    "unknown metric": (("measure", "--metric", "tracce"), "did you mean trace?"),
    "metric file missing": (("measure", "--metric", "./nowhere.py"), "does not exist"),
    "metric twice": (("measure", "--metric", "trace", "--metric", "trace"), "named twice"),
    "unknown command": (("mesure",), "did you mean measure?"),
    "typo in a flag": (("measure", "--metric", "trace", "--rtoll", "1"), "did you mean --rtol?"),
    "typo in an own flag": (("measure", "--metric", "trace", "--chekpoint", "1"), "did you mean --checkpoint?"),
    "typo after a dot": (("measure", "--metric", "trace", "--trace.rtl", "1"), "did you mean rtol?"),
    "flag of no named metric": (("measure", "--metric", "trace", "--density.probes", "1"), "density is not among"),
    "no number": (("measure", "--metric", "trace", "--rtol", "small"), "--rtol: 'small' is no number"),
    "no choice": (("measure", "--metric", "trace", "--curvature", "gnn"), "did you mean ggn?"),
    "value out of range": (("measure", "--metric", "trace", "--max-probes", "0"), "max_probes is 0; allowed"),
    "missing value": (("measure", "--metric", "trace", "--rtol"), "--rtol"),
    "no amount of memory": (("measure", "--metric", "trace", "--memory", "lots"), "write for example 8GiB"),
    "no dtype": (("measure", "--metric", "trace", "--dtype", "float63"), "did you mean float64"),
    "no device": (("measure", "--metric", "trace", "--device", "gpu"), "--device gpu cannot be used here"),
    "zero examples": (("measure", "--metric", "trace", "--examples", "0"), "examples"),
    "no pattern fits": (("measure", "--metric", "trace", "--parameters", "layer*"), "layer*"),
    "data without model": (("measure", "--metric", "trace", "--data", "mine:batches"), "it needs --model"),
    "model without data": (("measure", "--metric", "trace", "--model", "mine:small"), "needs --data"),
    "problem and model": (("measure", "--metric", "trace", "--problem", "mine:problem", *MINE), "brings its own"),
    "no problem": (("measure", "--metric", "trace", "--problem", "mine:small"), "gave a Sequential; allowed is"),
    "picture of no format": (("plot", "mine.py", "-o", "x.jpg"), "allowed are .png, .pdf, .svg, .html"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", USAGE)
def test_usage_errors(here: Path, mistake: str):
    words, expected = USAGE[mistake]
    one_line(landscape(*words), 2, expected)
    assert not Path("runs").exists()


MISTAKES = {
    "no such model": (("--model", "mine.py:smal"), 2, "did you mean small?"),
    "model is no module": (("--model", "mine.py:X"), 2, "gave a Tensor; allowed is a torch.nn.Module"),
    "model argument": (("--model-arg", "widht=3"), 2, "did you mean width?"),
    "no such loss": (("--loss", "cross_entorpy"), 2, "did you mean cross_entropy"),
    "no loss": (("--loss", ""), 2, "needs --loss"),
    "two ways to the loss": (("--forward", "mine:step"), 2, "--forward computes the loss itself"),
    "missing checkpoint": (("--checkpoint", "nowhere.pt"), 2, "nowhere.pt: no such file"),
    "misfitting checkpoint": (
        ("--checkpoint", "other.pt"),
        3,
        "missing: 0.weight, 0.bias, 2.weight and 1 more",
    ),
    "wrong shapes": (("--checkpoint", "wide.pt"), 3, "0.weight is (9, 4) in the file, (6, 4) in the model"),
    "hostile checkpoint": (("--checkpoint", "hostile.pt"), 3, "running code from a checkpoint is refused"),
    "shuffling loader": (("--data", "mine:loader", "--data-arg", "shuffle=True"), 3, "shuffle=False"),
    "generator": (("--data", "mine:stream"), 2, "can be read only once"),
    "dataset": (("--data", "mine:dataset"), 2, "DataLoader(dataset"),
    "dataset, cut": (("--data", "mine:dataset", "--examples", "3"), 2, "DataLoader(dataset"),
    "dropout in train mode": (("--model", "mine:dropout", "--mode", "train"), 3, "mode='eval'"),
    "NaN loss": (("--data", "mine:broken"), 3, "not finite"),
    "loss is no scalar": (("--loss", "mine:per_example"), 3, "one number per batch"),
    "nothing to measure": (("--model", "mine:frozen"), 2, "requires grad"),
    "shapes inside the model": (("--model", "mine:wide_input"), 2, "cannot be multiplied"),
    "unwritable directory": (("--out", "mine.py/x"), 3, "cannot write"),
    "not our file": (("--out", "foreign.h5"), 3, "foreign.h5"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_about_model_data_and_files(here: Path, mistake: str):
    import torch

    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, ("EXECUTED",)

    torch.save({"a": torch.zeros(2)}, "other.pt")
    torch.save(
        torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).state_dict(),
        "wide.pt",
    )
    torch.save({"state_dict": Hostile()}, "hostile.pt")
    Path("foreign.h5").write_bytes(b"something else")
    words, code, expected = MISTAKES[mistake]
    one_line(measure(*MINE, *words), code, expected)
    assert not Path("EXECUTED").exists()
    assert not list(Path().rglob("trace.h5"))


def test_another_models_run_is_refused_and_kept(here: Path):
    assert measure(*MINE, "--out", "runs/x").exit_code == 0
    before = Path("runs/x/trace.h5").read_bytes()
    one_line(
        measure(*MINE, "--model-arg", "width=5", "--out", "runs/x"),
        3,
        "the model's parameters",
        "--overwrite",
    )
    one_line(measure(*MINE, "--curvature", "ggn", "--out", "runs/x"), 3, "settings")
    one_line(measure(*MINE, "--examples", "9", "--out", "runs/x"), 3, "the data")
    one_line(measure(*MINE, "--seed", "1", "--out", "runs/x"), 3, "the seed")
    assert Path("runs/x/trace.h5").read_bytes() == before
    assert measure(*MINE, "--model-arg", "width=5", "--out", "runs/x", "--overwrite").exit_code == 0
    assert Path("runs/x/trace.h5").read_bytes() != before


def test_debug_shows_the_trace_of_a_mistake():
    result = landscape("measure", "--metric", "trace", "--rtol", "small", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.strip().splitlines()[-1] == "landscape: --rtol: 'small' is no number"


def test_a_bug_of_ours_shows_its_trace(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("landscape.run.measure", lambda *a, **k: divmod(1, 0))
    result = measure("--problem", "mine.py:problem")
    # the patched function stands in this file, which is user code to the command
    assert result.exit_code == 2
    assert "your code raised ZeroDivisionError" in result.stderr
    code, line = cli_app.explain(_raised_by_library())
    assert (code, line) == (1, "")


def _raised_by_library() -> Exception:
    try:
        json.loads("{")
    except ValueError as error:
        # cut our own frame off: what is left came out of an installed library
        return error.with_traceback(error.__traceback__.tb_next)
    raise AssertionError


ENDLESS = ("--method", "hutchinson", "--rtol", "1e-6", "--examples", "64", "--max-probes", "64")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_how_to_go_on_and_goes_on_to_the_same_bits(here: Path, sent: signal.Signals):
    command = [*COMMAND, "measure", "--metric", "trace", *ENDLESS, "--out", "x"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        stored = here / "x" / "trace.h5"
        deadline = time.monotonic() + 60
        while not stored.exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        running.send_signal(sent)
        assert running.stderr is not None
        last = running.stderr.read().strip().splitlines()[-1]
    if running.returncode != 4:  # the machine may have been fast enough to finish first
        assert running.returncode == 130
        assert "interrupted; what is done is kept in x/trace.h5; run the same command again" in last
        assert results.read(stored).attrs["complete"] is False
    assert measure(*ENDLESS, "--out", "x").exit_code == 4
    assert measure(*ENDLESS, "--out", "whole").exit_code == 4
    a, b = results.read(stored), results.read(here / "whole" / "trace.h5")
    np.testing.assert_array_equal(a["samples"], b["samples"])
    assert float(a["trace"]) == float(b["trace"])
    assert float(a["trace_stderr"]) == float(b["trace_stderr"])


# --- show, plot, metrics ------------------------------------------------------------------------------


def stored_trace() -> Record:
    return Record(
        {
            "trace": Variable((), np.asarray(42.53)),
            "trace_stderr": Variable((), np.asarray(0.61)),
            "frobenius_norm": Variable((), np.asarray(9.5)),
            "frobenius_norm_stderr": Variable((), np.asarray(np.nan)),
            "converged": Variable((), np.asarray(False)),
            "matvecs": Variable((), np.asarray(48)),
            "wall_seconds": Variable((), np.asarray(3.21), "s"),
            "layer": Variable(("layer",), np.array(["a.weight"])),
            "layer_trace": Variable(("layer",), np.array([42.53])),
            "layer_trace_stderr": Variable(("layer",), np.array([np.inf])),
            "done": Variable(("probe",), np.array([True] * 48 + [False] * 16)),
        },
        {
            "metric": "trace", "headline": "trace", "unit": "probe", "seed": 5, "complete": False,
            "method": "hutchinson",
            "configuration": json.dumps({"rtol": 0.02, "curvature": "hessian", "epsilon": [0.1, 0.2], "prior": None}),
            "parameters_fingerprint": "0123456789abcdef", "parameters": 1234, "data_fingerprint": "fedcba9876543210",
            "device": "cpu", "dtype": "float32", "threads": 2, "landscape_version": "9.9", "torch_version": "2.x",
            "git_commit": "cafe" * 10, "git_dirty": True, "command": "landscape measure --metric trace", "check": None,
        },
    )  # fmt: skip


def test_show_tells_what_is_known(tmp_path: Path):
    results.write(tmp_path / "trace.h5", stored_trace())
    result = landscape("show", str(tmp_path))
    assert result.exit_code == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in result.stdout.splitlines()[1:]}
    assert result.stdout.splitlines()[0] == str(tmp_path / "trace.h5")
    assert lines["trace"] == "42.53 ± 0.61 (1.4 %), tolerance NOT reached"
    assert lines["frobenius_norm"] == "9.5"
    assert lines["configuration"] == "rtol=0.02 curvature=hessian epsilon=0.1,0.2 prior=none"
    assert lines["done"] == "48 of 64 probes, not finished; the same command goes on"
    assert lines["model"] == "1234 parameters, fingerprint 01234567"
    assert lines["seed"] == "5"
    assert lines["cost"] == "48 products, 3.2 s"
    assert lines["versions"] == "landscape 9.9, torch 2.x"
    assert "cafecafecafe, with changes" in lines["your"]
    assert lines["check"] == "skipped (--no-check)"


def test_show_as_json_has_null_for_nan(tmp_path: Path):
    results.write(tmp_path / "trace.h5", stored_trace())

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (found,) = json.loads(landscape("show", str(tmp_path), "--json").stdout, parse_constant=refuse)
    assert found["estimates"]["frobenius_norm"] == {"value": 9.5, "stderr": None}
    assert found["variables"]["layer_trace_stderr"]["data"] == ["inf"]
    assert found["complete"] is False
    assert found["attributes"]["configuration"]["epsilon"] == [0.1, 0.2]


def test_show_of_what_cannot_be_read(tmp_path: Path):
    one_line(landscape("show", str(tmp_path / "nowhere")), 3, "no such file or directory")
    one_line(landscape("show", str(tmp_path)), 3, "holds no measurement")
    results.write(tmp_path / "trace.h5", stored_trace())
    (tmp_path / "broken.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"junk" * 100)
    result = landscape("show", str(tmp_path))
    one_line(result, 3, "broken.h5")
    assert "42.53" in result.stdout  # the other measurement is shown all the same


def test_a_closed_pipe_is_no_error(tmp_path: Path):
    results.write(tmp_path / "trace.h5", stored_trace())
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, "show", "trace.h5"], cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_plot_draws_beside_the_measurement_or_where_it_is_told(tmp_path: Path):
    results.write(tmp_path / "trace.h5", stored_trace())
    assert landscape("plot", str(tmp_path)).exit_code == 0
    assert (tmp_path / "trace.png").read_bytes()[:4] == b"\x89PNG"
    result = landscape("plot", str(tmp_path / "trace.h5"), "-o", str(tmp_path / "x.svg"), "--width", "3.4")
    assert result.stderr == f"landscape: wrote {tmp_path / 'x.svg'}\n"
    other = Record({}, {"metric": "no_picture"})
    results.write(tmp_path / "other.h5", other)
    one_line(landscape("plot", str(tmp_path / "other.h5")), 3, "no picture of metric 'no_picture'")


def test_metrics_lists_every_metric_and_field():
    text = landscape("metrics").output
    known = json.loads(landscape("metrics", "--json").output)
    assert [entry["name"] for entry in known] == list(registry.registered())
    for name, metric in registry.registered().items():
        assert f"\n{name}" in f"\n{text}"
        for field in dataclasses.fields(metric):
            assert f"--{field.name.replace('_', '-')}" in text
    (trace,) = (entry for entry in known if entry["name"] == "trace")
    assert {
        key: value for key, value in trace["fields"][2].items() if key in {"name", "default", "grows"}
    } == {"name": "rtol", "default": 0.02, "grows": True}
