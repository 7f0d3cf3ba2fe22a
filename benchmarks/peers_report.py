"""What the side-by-side found: a table for the eye, a record for the file."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from peers_search import Finding, Search

from landscape.results import Record, Variable

OURS = "ours"
TASKS = ("gradient", "product", "block")
# Longer than this and nobody waits for it: the figure is then cost times count, and says so.
_HOUR = 3600.0


@dataclass
class Outcome:
    """One problem: seconds[worker][task] per round, findings by (worker, method), what failed by worker."""

    problem: str
    parameters: int
    examples: int
    truth: tuple[float, float]
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    products: dict[str, float] = field(default_factory=dict)
    deviation: float = math.nan
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)
    searches: list[Search] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def per_product(self, worker: str) -> float:
        """Return the seconds of one product, the cheaper of alone and in a block; NaN without."""
        taken = self.seconds.get(worker, {})
        medians = [statistics.median(taken[task]) for task in TASKS[1:] if taken.get(task)]
        return min(medians, default=math.nan)

    def best(self, ours: bool, methods: set[str] | None = None) -> tuple[str, str, float]:
        """Return worker, method and seconds of the fastest way to 1 %, of us or of the peers."""
        times = [
            (*key, f.seconds)
            for key, f in self.findings.items()
            if (key[0] == OURS) is ours and (methods is None or key[1] in methods)
            and not math.isnan(f.seconds)
        ]  # fmt: skip
        return min(times, key=lambda entry: entry[2], default=("", "", math.nan))


def table(outcome: Outcome, versions: dict[str, dict[str, str]]) -> str:
    """Return the lines of one problem."""
    value, stderr = outcome.truth
    known = "exact" if stderr == 0 else f"± {stderr:.2g}"
    lines = [
        "",
        f"{outcome.problem}: {outcome.parameters:,} parameters, {outcome.examples} examples, "
        f"trace {value:.6g} ({known})"
        + ("" if math.isnan(outcome.deviation) else f", one Hutchinson probe ± {outcome.deviation:.0%}"),
        f"  {'':24} {'gradient':>10} {'product':>20} {'per vector in 16':>20}   v·Hv off",
    ]
    middle = statistics.median(outcome.products.values()) if outcome.products else math.nan
    for worker, taken in outcome.seconds.items():
        label = f"{worker} {versions.get(worker, {}).get('peer', '')}"
        off = abs(outcome.products.get(worker, math.nan) / middle - 1)
        cells = [_ratio(taken[task], taken["gradient"]) for task in TASKS[1:]]
        unit = f"{statistics.median(taken['gradient']) * 1e3:7.1f} ms" if taken["gradient"] else ""
        lines.append(f"  {label:24} {unit:>10} " + " ".join(f"{c:>20}" for c in cells) + f"   {off:8.1g}")
    lines.append(
        f"  {'time to 1 % of the trace':40} {'seconds':>9} {'x ours':>8} {'products':>9}   how it is known"
    )
    own = outcome.best(ours=True, methods={"trace"})[2]
    order = sorted(outcome.findings.items(), key=lambda item: (math.isnan(item[1].seconds), item[1].seconds))
    for (worker, method), found in order:
        lines.append(
            f"  {worker + ' ' + method:40} {_number(found.seconds):>9} {_number(found.seconds / own):>8} "
            f"{_number(found.matvecs):>9}   {_how(method, found)}"
        )
    lines += [f"  {name}: {text}" for name, text in outcome.failures.items()]
    return "\n".join([*lines, *_summary(outcome)])


def _summary(outcome: Outcome) -> list[str]:
    """Return the ratios that are aimed at."""
    own, whole = (outcome.best(ours=True, methods={method})[2] for method in ("trace", "measure()"))
    averaging = outcome.findings.get(("pyhessian", "hutchinson"))
    worker, method, best = outcome.best(ours=False)
    names = {peer: outcome.per_product(peer) for peer in outcome.seconds if peer != OURS}
    cheapest = min((s for s in names.values() if not math.isnan(s)), default=math.nan)
    lines = []
    if averaging:
        lines.append(f"  PyHessian's averaging / our estimator      {_number(averaging.seconds / own)}")
    if worker:
        lines += [
            f"  best peer ({worker} {method}) / our estimator   {_number(best / own)}",
            f"  best peer / our whole measure()             {_number(best / whole)}",
        ]
    if not math.isnan(cheapest):
        lines.append(
            f"  our product / the cheapest peer's           {_number(outcome.per_product(OURS) / cheapest)}"
        )
    return lines


def _ratio(times: list[float], base: list[float]) -> str:
    if not times:
        return "-"
    relative = [t / b for t, b in zip(times, base, strict=True)]
    if len(relative) < 2:
        return f"{relative[0]:.2f}x"
    low, middle, high = statistics.quantiles(relative, n=4, method="inclusive")
    return f"{middle:.2f}x [{low:.2f}, {high:.2f}]"


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.3g}" if x < 1e4 else f"{x:,.0f}"


def _how(method: str, found: Finding) -> str:
    if method == "hutchinson":
        words = (
            f"not run: seconds per probe x {_number(found.repeats)} probes that ± {found.error:.0%} demand"
        )
        hours = f" ({found.seconds / _HOUR:.1f} hours)" if found.seconds > _HOUR else ""
        return f"{words}{hours}; from {found.draws} probes of all peers"
    if method == "own stop":
        return f"stops by its own rule {found.error:.1%} off (RMSE of {found.draws} runs): no way to 1 %"
    # Of normal errors, the RMSE of n draws scatters by this much.
    words = f"RMSE {found.error:.2%} (known to ± {1 / math.sqrt(2 * found.draws):.0%}) of {found.draws} draws"
    if found.repeats > 1:
        words += f"; not run: x {_number(found.repeats)} draws to average"
    return words


def record(outcomes: list[Outcome], attrs: dict[str, Any]) -> Record:
    """Return everything as one record: medians by problem and worker, findings, and every single draw."""
    workers = attrs["workers"]
    variables = {
        "problem": _labels("problem", [o.problem for o in outcomes], "network and data"),
        "worker": _labels("worker", workers, "ours or a peer"),
        "trace": _column("problem", [o.truth[0] for o in outcomes], "1", "reference trace of the Hessian"),
        "trace_stderr": _column(
            "problem", [o.truth[1] for o in outcomes], "1", "of the reference; 0 is exact"
        ),
        "probe_deviation": _column(
            "problem",
            [o.deviation for o in outcomes],
            "1",
            "relative standard deviation of a Hutchinson probe",
        ),
    }
    for task in TASKS:
        rounds = max((len(t[task]) for o in outcomes for t in o.seconds.values()), default=0) or 1
        data = np.full((len(outcomes), len(workers), rounds), np.nan)
        for i, outcome in enumerate(outcomes):
            for name, taken in outcome.seconds.items():
                data[i, workers.index(name), : len(taken[task])] = taken[task]
        words = {"block": "seconds per vector in a block of 16"}.get(task, f"seconds of one {task}")
        variables[f"{task}_seconds"] = Variable(("problem", "worker", f"{task}_round"), data, "s", words)
    return Record(variables | _findings(outcomes) | _draws(outcomes), attrs)


def _findings(outcomes: list[Outcome]) -> dict[str, Variable]:
    found = [(o.problem, *key, f) for o in outcomes for key, f in o.findings.items()]
    if not found:
        return {}
    variables = {}
    for place, name in enumerate(("problem", "worker", "method")):
        variables[f"found_{name}"] = _labels(
            "found", [str(row[place]) for row in found], f"{name} of a finding"
        )
    meanings = {
        "seconds": ("s", "time to a relative RMSE of 1 %; NaN where there is no way to it"),
        "matvecs": ("1", "products that this takes"),
        "error": ("1", "relative RMSE of one estimate; of one probe for hutchinson"),
        "repeats": ("1", "estimates to average; where above 1, the seconds are an extrapolation"),
        "draws": ("1", "independent estimates behind the error"),
    }
    for name, (units, words) in meanings.items():
        data = [float(getattr(row[3], name)) for row in found]
        variables[f"found_{name}"] = _column("found", data, units, words)
    return variables


def _draws(outcomes: list[Outcome]) -> dict[str, Variable]:
    rows = [
        (o.problem, s.process.name, s.method, d.matvecs, d.seconds / len(d.values), value)
        for o in outcomes for s in o.searches for d in s.drawn for value in d.values
    ]  # fmt: skip
    if not rows:
        return {}
    problem, worker, method, matvecs, seconds, value = zip(*rows, strict=True)
    return {
        "draw_problem": _labels("draw", problem, "problem of a draw"),
        "draw_worker": _labels("draw", worker, "who drew"),
        "draw_method": _labels("draw", method, "estimator"),
        "draw_matvecs": _column("draw", matvecs, "1", "products of the request; 0 where the method chooses"),
        "draw_seconds": _column("draw", seconds, "s", "time of the estimate or probe"),
        "draw_value": _column("draw", value, "1", "estimated trace, or the sample of one probe"),
    }


def _labels(dim: str, texts: Any, words: str) -> Variable:
    return Variable((dim,), np.array(list(texts), dtype=str), "1", words)


def _column(dim: str, data: Any, units: str, words: str) -> Variable:
    return Variable((dim,), np.array(list(data), dtype=float), units, words)
