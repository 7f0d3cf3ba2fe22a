"""What `eigenpairs.py` and `density.py` share: options, processes, alternating rounds, the file.

A *method* is a pair (worker, name), such as ("pyhessian", "density"). All methods of all workers answer in turn,
once per round, each round with a seed of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers_envs
from peers_search import PeerFailedError, Process

import landscape
from landscape import results
from landscape.results import Record, Variable

OURS = "ours"
Method = tuple[str, str]
Reply = dict[str, Any]


def parser(doc: str | None, problems: Sequence[str], out: str) -> argparse.ArgumentParser:
    """Return the parser of the shared options.

    Args:
        doc: the script's own words.
        problems: what may be measured.
        out: default name of the file.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--envs", type=Path, default=peers_envs.default_folder(), help="where the peers' environments are")
    add("--work", type=Path, default=None, help="where trained weights are (default: `work` in --envs)")
    add("--out", type=Path, default=Path(out), help=f"the result as HDF5 (default: ./{out})")
    add("--problem", choices=problems, action="append", help="only this one; may be repeated")
    add("--peer", choices=peers_envs.PEERS, action="append", help="only this peer; may be repeated")
    add("--pip", action="append", default=[], metavar="OPTION", help="passed on to pip install")
    add(
        "--skip", action="append", default=[], metavar="METHOD", help="a method to leave out; may be repeated"
    )
    add("--rounds", type=int, default=5, help="alternating rounds, each with a seed of its own (default: 5)")
    add("--warm-up", type=int, default=1, help="rounds before those that count (default: 1)")
    add("--threads", type=int, default=1, help="of each process (default: 1)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread on a crowded machine")
    add("--timeout", type=float, default=1800.0, help="seconds that one answer may take (default: 1800)")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and fill in what depends on other options."""
    arguments = made.parse_args()
    arguments.work = arguments.work or arguments.envs / "work"
    return arguments


@dataclass
class Rounds:
    """What the methods of one problem answered: one reply per round; what failed and versions, by worker."""

    problem: str
    replies: dict[Method, list[Reply]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    def values(self, method: Method, key: str) -> list[float]:
        """Return one number of each reply of a method."""
        return [float(reply[key]) for reply in self.replies[method]]

    def line(self, method: Method, bases: Sequence[Method]) -> str:
        """Return median, least and most seconds of a method, and their medians over those of the bases."""
        times = self.values(method, "seconds")
        middle = statistics.median(times)
        ratios = [f"{middle / statistics.median(self.values(base, 'seconds')):6.2f} x" for base in bases]
        return "  ".join(
            [f"{' '.join(method):34} {middle:8.3f} [{min(times):.3f}, {max(times):.3f}]", *ratios]
        )


def pythons(arguments: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the interpreters of us and of all peers that can be installed, and why the others cannot."""
    found, failures = {OURS: Path(sys.executable)}, {}
    for name in arguments.peer or peers_envs.PEERS:
        try:
            wanted = peers_envs.PEERS[name].requirement
            found[name] = peers_envs.python_of(arguments.envs, name, wanted, arguments.pip)
        except (peers_envs.EnvironmentFailedError, OSError) as error:
            failures[name] = f"not installed: {error}"
    return found, failures


def measure(
    network: str,
    task: str,
    arguments: argparse.Namespace,
    *,
    cut: int | None = None,
    judge: Callable[[Reply], Reply] = dict,
    **request: Any,
) -> Rounds:
    """Let all methods of all workers do a task in turn.

    Args:
        network: a problem of `peers_problems`.
        task: "eigenpairs" or "density".
        arguments: of the command line.
        cut: equal batches to cut the data into; None as it suits each worker.
        judge: turns each reply into the one that is kept.
        request: goes to the workers with the task.
    """
    interpreters, failures = pythons(arguments)
    name = network if cut is None else f"{network}, {cut} batches" if cut > 1 else f"{network}, 1 batch"
    found = Rounds(name, failures=failures)
    with contextlib.ExitStack() as stack:
        package = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (package / "landscape").symlink_to(Path(landscape.__file__).resolve().parent)
        processes: dict[Method, Process] = {}
        for worker, python in interpreters.items():
            process = Process(
                worker, python, network, arguments.work, package=package,
                threads=arguments.threads, clock=arguments.clock, timeout=arguments.timeout,
            )  # fmt: skip
            stack.callback(process.close)
            try:
                ready = process.ask("setup", cut=cut)
                process.ask("product")
            except PeerFailedError as error:
                found.failures[worker] = str(error)
                continue
            found.versions[worker] = ready["versions"]
            processes |= {(worker, m): process for m in ready[task] if m not in arguments.skip}
        for turn in range(-arguments.warm_up, arguments.rounds):
            for method, process in list(processes.items()):
                try:
                    reply = process.ask(task, method=method[1], seed=turn + arguments.warm_up, **request)
                except PeerFailedError as error:
                    found.failures[" ".join(method)] = str(error)
                    del processes[method]
                    continue
                if turn >= 0:
                    found.replies.setdefault(method, []).append(judge(reply))
    return found


def write(
    arguments: argparse.Namespace,
    title: str,
    outcomes: Sequence[Rounds],
    meanings: dict[str, tuple[str, str]],
) -> None:
    """Store every reply of every round.

    Args:
        arguments: of the command line.
        title: what was measured.
        outcomes: of the problems.
        meanings: the numbers of a reply: name -> units and words.
    """
    methods = sorted({method for o in outcomes for method in o.replies})
    rounds = max((len(r) for o in outcomes for r in o.replies.values()), default=0)
    dims, shape = ("problem", "method", "round"), (len(outcomes), len(methods), rounds)
    variables = {
        "problem": _labels("problem", [o.problem for o in outcomes], "network and batches"),
        "method": _labels("method", [" ".join(method) for method in methods], "worker and method"),
    }
    for key, (units, words) in meanings.items():
        data = np.full(shape, np.nan)
        for i, outcome in enumerate(outcomes):
            for method in outcome.replies:
                values = outcome.values(method, key)
                data[i, methods.index(method), : len(values)] = values
        variables[key] = Variable(dims, data, units, words)
    attrs = {
        "title": title,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {worker: versions for o in outcomes for worker, versions in o.versions.items()},
        "failures": {o.problem: o.failures for o in outcomes},
        "settings": {key: value for key, value in vars(arguments).items() if key not in _PLACES},
    }
    results.write(arguments.out, Record(variables, attrs))


_PLACES = {"envs", "work", "out", "pip"}


def _labels(dim: str, texts: list[str], words: str) -> Variable:
    return Variable((dim,), np.array(texts, dtype=str), "1", words)
