"""The driver's side: worker processes, and the search for the honest time to 1 % of the trace."""

from __future__ import annotations

import itertools
import json
import math
import os
import select
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().parent / "peers_worker.py"
TOLERANCE = 0.01
PROBES_PER_DRAW = 4
# Products per estimate: all divisible by 6, as Hutch++ and XTrace ask for.
GRID = (12, 24, 30, 48, 60, 90, 120, 180, 240)


class PeerFailedError(Exception):
    """A worker died, hung or raised; the message says which."""


class Process:
    """A worker in its own interpreter."""

    def __init__(
        self, name: str, python: Path, problem: str, folder: Path, *,
        package: Path, threads: int, clock: str, timeout: float,
    ) -> None:  # fmt: skip
        self.name, self.timeout = name, timeout
        # No site-packages of ours on a peer's path: only a folder that holds `landscape` and nothing else.
        environment = os.environ | {
            "PYTHONPATH": str(package), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip
        command = [str(python), str(WORKER), name, problem, str(folder), str(threads), clock]
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
            )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            PeerFailedError: if the worker says so, or is gone, or takes longer than the limit.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        try:
            stdin.write((json.dumps({"do": do} | request) + "\n").encode())
            stdin.flush()
        except BrokenPipeError:
            raise PeerFailedError(self._ending()) from None
        if not select.select([stdout], [], [], self.timeout)[0]:
            self.close()
            raise PeerFailedError(f"no answer to {do!r} within {self.timeout:.0f} s")
        line = stdout.readline()
        if not line:
            raise PeerFailedError(self._ending())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerFailedError(reply["error"])
        return reply

    def _ending(self) -> str:
        status = self.process.wait(timeout=60)
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"ended with status {status}: {''.join(last) or 'no message (killed?)'}"[:200]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Drawn:
    """Estimates made with one request; `taken` is the number of products where the method chose it."""

    matvecs: int
    seconds: float
    values: list[float]
    taken: int | None


@dataclass(frozen=True)
class Finding:
    """What it takes to know the trace to 1 %.

    Attributes:
        seconds: setup and all products; NaN where there is no way to it.
        matvecs: products that this takes, or that PyHessian's own rule takes on average; 0 is not known.
        error: root mean square relative error of one estimate; for Hutchinson, of one probe.
        repeats: how many estimates must be averaged; 1 if one is good enough.
        draws: how many independent estimates `error` was found from.
    """

    seconds: float
    matvecs: float
    error: float
    repeats: float
    draws: int


@dataclass
class Search:
    """One method of one peer on one problem: it draws until the smallest sufficient estimate is known.

    `same` lists the searches, this one among them, whose estimates are statistically the same: their errors
    are pooled, their times are not.
    """

    process: Process
    method: str
    setup: float
    product: float
    least_draws: int
    most_draws: int
    most_probes: int
    budget: float
    counter: Iterable[int]
    drawn: list[Drawn] = field(default_factory=list)
    failure: str = ""
    done: bool = False
    same: list[Search] = field(default_factory=list)
    _place: int = 0
    _allowance: float = 0.0

    def __post_init__(self) -> None:
        grids = {"hutch++": GRID, "xtrace": GRID, "hutchinson": (PROBES_PER_DRAW,)}
        self.grid = grids.get(self.method, (0,))
        self._allowance = self._third()
        if self.method == "own stop" and 100 * self.product * self.least_draws > self.budget:
            self.done, self.failure = True, "not run: 100 probes take too long for --budget"

    def _spent(self) -> float:
        return sum(d.seconds for d in self.drawn)

    def _third(self) -> float:
        """Return what the draws at one place of the grid may take: the rest is for the larger ones."""
        share = 1 if len(self.grid) == 1 else 3
        return max(0.0, self.budget - self._spent()) / share

    def here(self, matvecs: int) -> list[Drawn]:
        return [d for d in self.drawn if d.matvecs == matvecs]

    def estimates(self, matvecs: int) -> list[float]:
        return [v for search in self.same for d in search.here(matvecs) for v in d.values]

    def step(self, truth: tuple[float, float]) -> None:
        """Draw once, then decide whether to go on here, go on with more products, or end."""
        matvecs = self.grid[self._place]
        try:
            reply = self.process.ask(
                "draw", method=self.method, matvecs=matvecs, seed=next(iter(self.counter))
            )
        except PeerFailedError as error:
            self.done, self.failure = True, str(error)
            return
        self.drawn.append(Drawn(matvecs, reply["seconds"], reply["values"], reply["taken"]))
        here = self.here(matvecs)
        spent = sum(d.seconds for d in here)
        most = math.ceil(self.most_probes / matvecs) if self.method == "hutchinson" else self.most_draws
        tired = spent + here[-1].seconds > self._allowance
        if len(here) < self.least_draws or (len(here) < most and not tired):
            return
        following = self.grid[self._place + 1 :]
        if not following or self.error(matvecs, truth) <= TOLERANCE:
            self.done = True
            return
        expected = self.least_draws * here[-1].seconds * following[0] / matvecs
        self.done = self._spent() + expected > self.budget
        self._place += 1
        self._allowance = self._third()

    def error(self, matvecs: int, truth: tuple[float, float]) -> float:
        """Return the relative RMSE of the estimates, freed of the error of the reference."""
        value, stderr = truth
        misses = [(v - value) ** 2 for v in self.estimates(matvecs)]
        return math.sqrt(max(0.0, statistics.fmean(misses) - stderr**2)) / abs(value)

    def finding(self, truth: tuple[float, float], deviation: tuple[float, int]) -> Finding | None:
        """Return the time to 1 %: the smallest estimate that is good enough, or the cheapest average.

        Args:
            truth: the trace and its standard error.
            deviation: relative standard deviation of one Hutchinson probe, and from how many it was found.
        """
        if not self.drawn:
            return None
        if self.method == "hutchinson":
            probes = max((deviation[0] / TOLERANCE) ** 2, 1.0)  # NaN stays NaN
            each = statistics.median(d.seconds / d.matvecs for d in self.drawn)
            return Finding(self.setup + each * probes, probes, deviation[0], probes, deviation[1])
        if self.method == "own stop":
            taken = statistics.fmean(d.taken or math.nan for d in self.drawn)
            return Finding(math.nan, taken, self.error(0, truth), math.nan, len(self.drawn))
        found = []
        for matvecs in sorted({d.matvecs for d in self.drawn}):
            error, count = self.error(matvecs, truth), len(self.estimates(matvecs))
            repeats = max(1.0, (error / TOLERANCE) ** 2)
            each = statistics.median(d.seconds for d in self.here(matvecs))
            found.append(Finding(self.setup + each * repeats, matvecs * repeats, error, repeats, count))
            if repeats == 1:
                return found[-1]
        return min(found, key=lambda f: f.seconds)


def run_all(searches: list[Search], truth: tuple[float, float]) -> None:
    """Let all searches draw in turn, so that all see the same noise of the machine."""
    for search in searches:
        search.same = [other for other in searches if other.method == search.method]
    while any(not s.done for s in searches):
        for search in searches:
            if not search.done:
                search.step(truth)


def pooled_deviation(searches: list[Search], truth: tuple[float, float]) -> tuple[float, int]:
    """Return the relative standard deviation of a Hutchinson probe and the number of probes behind it.

    All peers draw the same: independent signs, one vector for all of the data. NaN for fewer than 8.
    """
    probes = [v for s in searches if s.method == "hutchinson" for d in s.drawn for v in d.values]
    deviation = statistics.stdev(probes) / abs(truth[0]) if len(probes) >= 8 else math.nan
    return deviation, len(probes)


def timings(
    processes: dict[str, Process], rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Time gradient, product and block of all workers in turn, after one round of warming up.

    Returns:
        Seconds per task and worker, one entry per round (empty where a worker has no such task), and what
        failed, by worker.
    """
    tasks = ("gradient", "product", "block")
    seconds: dict[str, dict[str, list[float]]] = {name: {t: [] for t in tasks} for name in processes}
    failures: dict[str, str] = {}
    for turn, (name, process), task in itertools.product(range(rounds + 1), processes.items(), tasks):
        if name in failures:
            continue
        try:
            reply = process.ask(task)
        except PeerFailedError as error:
            failures[name] = f"{task}: {error}"
            continue
        if turn and reply["seconds"] is not None:
            seconds[name][task].append(reply["seconds"])
    return seconds, failures
