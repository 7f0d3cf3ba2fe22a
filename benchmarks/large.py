"""What a GPT of 124 M parameters asks of one machine: its trace, and its top eigenvalue, interrupted once.

    python benchmarks/large.py                       # takes 30 to 90 minutes, 7 GiB of memory, 9 GiB of disk
    python benchmarks/large.py --size small          # 3 M parameters, a minute
    python benchmarks/large.py --reference           # also without an interruption, and compares every bit

16 sequences of 128 tokens, a model that was briefly trained before (`large_problem.py`; its weights are kept in
the working folder). `landscape measure` runs in fresh processes: the Gauss-Newton trace by sampled outputs,
then the largest eigenvalue of the Hessian from 8 stored vectors; Ctrl-C is sent once its state was written,
and the same command goes on. Memory is the highest that a process ever held, everything included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

PROBLEM = Path(__file__).with_name("large_problem.py")
TRACE = ("--metric=trace", "--curvature=ggn", "--method=hutchinson", "--rtol=0.05", "--max-probes=64")
EIGENVALUE = ("--metric=eigenvalues", "--k=1", "--rtol=1e-2", "--max-matvecs=30")
VECTORS = 8


@dataclass(frozen=True)
class Ran:
    """One process.

    Attributes:
        code: exit code.
        seconds: wall seconds, imports included.
        peak: highest resident memory in GiB.
        writings: seconds that each writing of a state took.
    """

    code: int
    seconds: float
    peak: float
    writings: list[float]

    def __str__(self) -> str:
        share = sum(self.writings) / self.seconds
        states = f", {len(self.writings)} states written in {share:.1%} of the time" if self.writings else ""
        return f"exit {self.code}, {self.seconds:.0f} s, peak {self.peak:.2f} GiB{states}"


def inside(told: Path, command: list[str]) -> None:
    """Run the command line in this process, and note what writing states takes."""
    import torch
    from landscape_cli import main

    from landscape import results

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    write, spent = results.write_state, []

    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        write(*arguments)
        spent.append(time.perf_counter() - began)
        told.write_text(json.dumps(spent))

    results.write_state = timed
    sys.argv = ["landscape", "measure", *command]
    sys.exit(main())


def run(told: Path, command: list[str], *, interrupted: bool = False) -> Ran:
    """Measure in a fresh process; interrupt it once its state is written, if asked to."""
    told.unlink(missing_ok=True)
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "--inside", str(told), *command])
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        time.sleep(0.1)
        if interrupted and _spent(told):
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            interrupted = False
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    peak = ended[2].ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    return Ran(process.returncode, time.perf_counter() - began, peak, _spent(told))


def _spent(told: Path) -> list[float]:
    try:
        return list(json.loads(told.read_text()))
    except (OSError, ValueError):  # not there yet, or half written
        return []


def trace(command: list[str], folder: Path) -> None:
    """The trace by sampled outputs."""
    import landscape

    ran = run(folder / "told.json", [*command, *TRACE, "--out", str(folder / "trace.h5"), "--overwrite"])
    found = landscape.open(folder / "trace.h5")
    error = float(found["trace_stderr"] / found["trace"])
    print(
        f"trace        {float(found['trace']):.5g}, standard error {error:.1%} (goal 5 %), way {found.attrs['way']}"
    )
    print(f"             {ran} (goal 3 GiB)", flush=True)


def eigenvalue(command: list[str], folder: Path, *, reference: bool) -> None:
    """The largest eigenvalue with an interruption, and without one as the reference."""
    import landscape

    path = folder / "eigenvalues.h5"
    command = [*command, *EIGENVALUE]
    path.unlink(missing_ok=True)
    shutil.rmtree(folder / ".parts", ignore_errors=True)
    for interrupted in (True, False):
        ran = run(folder / "told.json", [*command, "--out", str(path)], interrupted=interrupted)
        print(f"eigenvalue   {ran} (goals 8 GiB, 5 %)", flush=True)
    found = landscape.open(path)
    value, residual = float(found["eigenvalues"][0]), float(found["residual_norm"][0])
    products = int(found["matvecs"])
    print(
        f"             {value:.6g}, residual {residual / value:.1e} (goal 1e-2) after {products} products (goal 30)"
    )
    if reference:
        other = path.with_name("uninterrupted.h5")
        print(f"without      {run(folder / 'told.json', [*command, '--out', str(other), '--overwrite'])}")
        names = ("eigenvalues", "residual_norm")
        same = all(found[name].equals(landscape.open(other)[name]) for name in names)
        print(f"             {'the same to the last bit' if same else 'NOT THE SAME'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("full", "small", "tiny"), default="full")
    parser.add_argument("--work", type=Path, default=Path("large-work"), help="where weights and results go")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("trace", "eigenvalue"), help="one of the two")
    parser.add_argument("--reference", action="store_true", help="also measure without an interruption")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    folder = arguments.work / arguments.size
    folder.mkdir(parents=True, exist_ok=True)
    code = f"import sys, pathlib; sys.path.insert(0, {str(PROBLEM.parent)!r}); import large_problem; "
    code += f"large_problem.trained({arguments.size!r}, pathlib.Path({str(arguments.work)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    command = [f"--problem={PROBLEM}:make_problem", f"--problem-arg=name={arguments.size}"]
    command += [f"--problem-arg=work={arguments.work}"]
    # The basis gets half of the memory.
    if arguments.only != "eigenvalue":
        trace(command, folder)
    if arguments.only != "trace":
        eigenvalue(command, folder, reference=arguments.reference)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
