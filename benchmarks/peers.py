"""Side by side with PyHessian, curvlinops and hessian-eigenthings: products, and the honest time to 1 % of Tr H.

    python benchmarks/peers.py [--problem MLP] [--budget 120] ...

Each peer is installed into an environment of its own and runs as its own process there; the processes work
in turn. See benchmarks/README.md for what is measured and what the columns mean.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import datetime
import itertools
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers_envs
import peers_problems
import torch
from peers_report import OURS, Outcome, record, table
from peers_search import PeerFailedError, Process, Search, pooled_deviation, run_all, timings

import landscape
from landscape import results


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--envs", type=Path, default=peers_envs.default_folder(),
        help="where the peers' environments are, or are made, about 1 GB each (default: the user's cache)")  # fmt: skip
    add("--work", type=Path, default=None,
        help="where trained weights, reference traces and the workers' messages are kept "
        "(default: a subfolder `work` of --envs)")  # fmt: skip
    add("--out", type=Path, default=Path("peers.h5"), help="the result as HDF5 (default: ./peers.h5)")
    add(
        "--problem",
        choices=peers_problems.SPECS,
        action="append",
        help="measure only this one; may be repeated",
    )
    add("--peer", choices=peers_envs.PEERS, action="append", help="only this peer; may be repeated")
    add("--requirement", action="append", default=[], metavar="PEER=REQUIREMENT",
        help="another version of a peer, such as pyhessian=PyHessian==0.0.1 or a git address")  # fmt: skip
    add("--pip", action="append", default=[], metavar="OPTION",
        help="passed on to pip install, such as "
        "--pip=--extra-index-url=https://download.pytorch.org/whl/cpu")  # fmt: skip
    add("--rounds", type=int, default=5, help="alternating rounds of gradient and products (default: 5)")
    add("--least-draws", type=int, default=8,
        help="fewest independent estimates per method and size, also beyond --budget: from 3 draws an RMSE of "
        "6 %% looked like 1.6 %% (default: 8)")  # fmt: skip
    add("--draws", type=int, default=16, help="most independent estimates per method and size (default: 16)")
    add("--probes", type=int, default=64, help="most Hutchinson probes per peer (default: 64)")
    add("--budget", type=float, default=120.0,
        help="seconds of drawing per peer, method and problem; what does not fit is extrapolated "
        "(default: 120)")  # fmt: skip
    add("--reference-probes", type=int, default=150,
        help="probes of the reference trace of the GPT, computed once (default: 150)")  # fmt: skip
    add("--threads", type=int, default=1, help="of each process (default: 1)")
    add("--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: time of the process on its cores; for one thread on a crowded machine (default: wall)")  # fmt: skip
    add("--timeout", type=float, default=1800.0, help="seconds that one answer may take (default: 1800)")
    return parser.parse_args()


def interpreters(arguments: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the interpreters of us and of all peers that can be installed, and why the others cannot."""
    chosen = {name: peers_envs.PEERS[name].requirement for name in arguments.peer or peers_envs.PEERS}
    replaced = dict(entry.split("=", 1) for entry in arguments.requirement)
    if unknown := set(replaced) - set(peers_envs.PEERS):
        raise SystemExit(f"--requirement: no peer {sorted(unknown)}; there are {', '.join(peers_envs.PEERS)}")
    found, failures = {OURS: Path(sys.executable)}, {}
    for name, requirement in chosen.items():
        wanted = replaced.get(name, requirement)
        print(f"environment of {name} ({wanted}) ...", flush=True)
        try:
            found[name] = peers_envs.python_of(arguments.envs, name, wanted, arguments.pip)
        except (peers_envs.EnvironmentFailedError, OSError) as error:
            failures[name] = f"not installed: {error}"
    return found, failures


def measure(
    problem: str, pythons: dict[str, Path], package: Path, arguments: argparse.Namespace
) -> tuple[Outcome, dict[str, dict[str, str]]]:
    """Measure one problem with all workers in turn; return the outcome and their versions."""
    folder = arguments.work
    peers_problems.prepare(folder, problem)
    truth = peers_problems.reference(folder, problem, arguments.reference_probes)
    case = peers_problems.load(folder, problem)
    outcome = Outcome(problem, case.parameters, len(case.inputs), truth)
    with contextlib.ExitStack() as stack:
        processes, ready = {}, {}
        for name, python in pythons.items():
            process = Process(
                name,
                python,
                problem,
                folder,
                package=package,
                threads=arguments.threads,
                clock=arguments.clock,
                timeout=arguments.timeout,
            )
            stack.callback(process.close)
            try:
                ready[name] = process.ask("setup")
                outcome.products[name] = process.ask("product")["values"][0]
                processes[name] = process
            except PeerFailedError as error:
                outcome.failures[name] = str(error)
        outcome.seconds, failures = timings(processes, arguments.rounds)
        outcome.failures |= failures
        counter = itertools.count(1)
        outcome.searches = [
            Search(
                processes[name], method, ready[name]["seconds"], outcome.per_product(name),
                arguments.least_draws, max(arguments.least_draws, arguments.draws), arguments.probes,
                arguments.budget, counter,
            )
            for name in processes if name not in failures for method in ready[name]["methods"]
        ]  # fmt: skip
        run_all(outcome.searches, truth)
    deviation = pooled_deviation(outcome.searches, truth)
    outcome.deviation = deviation[0]
    for search in outcome.searches:
        finding = search.finding(truth, deviation)
        if finding:
            outcome.findings[search.process.name, search.method] = finding
        if search.failure:
            outcome.failures[f"{search.process.name} {search.method}"] = search.failure
    return outcome, {name: reply["versions"] for name, reply in ready.items()}


def main() -> None:
    arguments = options()
    arguments.work = arguments.work or arguments.envs / "work"
    torch.set_num_threads(arguments.threads)
    pythons, failures = interpreters(arguments)
    outcomes, versions = [], {}
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder)
        # With its bytecode, as pip would install it: the peers have theirs.
        source, own = Path(landscape.__file__).resolve().parent, package / "landscape"
        shutil.copytree(source, own, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(own, quiet=1)
        for problem in arguments.problem or peers_problems.SPECS:
            print(f"{problem} ...", flush=True)
            outcome, found = measure(problem, pythons, package, arguments)
            outcome.failures = failures | outcome.failures
            versions |= found
            outcomes.append(outcome)
            print(table(outcome, versions) + "\n", flush=True)
            # After each problem: an hour's work is not lost with the next one.
            results.write(arguments.out, record(outcomes, attributes(arguments, outcomes, versions)))


def attributes(
    arguments: argparse.Namespace, outcomes: list[Outcome], versions: dict[str, dict[str, str]]
) -> dict[str, Any]:
    kept = ("rounds", "least_draws", "draws", "probes", "budget", "reference_probes", "threads", "clock")
    return {
        "title": "products and time to 1 % of the trace of the Hessian, ours and peers'",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "workers": [OURS, *(arguments.peer or peers_envs.PEERS)],
        "versions": versions,
        "failures": {o.problem: o.failures for o in outcomes},
        "settings": {key: getattr(arguments, key) for key in kept},
    }


if __name__ == "__main__":
    main()
