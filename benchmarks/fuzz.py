"""Whether any damaged file can crash, hang or bloat the process that reads it, or be answered by a stray error.

    python benchmarks/fuzz.py [--cases 10000] [--seed 0] [--keep FOLDER]

Each case is a file of ours (every kind: results of each metric, sidecars, states, directions, checkpoints) with
some bytes changed, or one whose form is right and whose values are nonsense; each is read, as the commands read
it, in a forked process. Printed are counts by kind and outcome; the exit status is 0 if there is no failure.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))

OUTCOMES = ("read", "refused", "reader killed at its limit", "reader crashed")
FAILURES = ("another error", "out of memory", "crashed", "hang")
SPARE_MEMORY = 1 << 30  # bytes that reading may take beside what the process has
LIMIT = 90.0  # seconds; a reader that hangs is killed after its own limit, which is shorter
_NONSENSE, _DRAWN = 0.3, 0.1  # shares of the cases; of those that are drawn too


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the files of failures go")
    parser.add_argument(
        "--metrics", nargs="*", default=[], help="whose results are damaged [default: eleven]"
    )
    parser.add_argument("--torch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.torch:
        counts = fuzz(options.torch, options.cases, options.seed, options.keep, with_torch=True)
        print(json.dumps([[*key, count] for key, count in counts.items()]))
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = both(Path(folder), options)
    print(table(counts))
    print(f"{sum(counts.values())} cases in {time.monotonic() - began:.0f} s")
    sys.exit(bool(failures(counts)))


def both(folder: Path, options: argparse.Namespace) -> Counter[tuple[str, str]]:
    """Make the files, then read the damaged ones: those that need torch in a process that has it.

    A process with torch takes five times as long to fork.
    """
    make = [sys.executable, str(Path(__file__).with_name("fuzz_make.py")), str(folder), *options.metrics]
    subprocess.run(make, check=True)
    words = ["--cases", str(options.cases), "--seed", str(options.seed), "--torch", str(folder)]
    words += ["--keep", str(options.keep)] if options.keep else []
    with subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True) as other:
        counts = fuzz(folder, options.cases, options.seed, options.keep, with_torch=False)
        said, _ = other.communicate()
    if other.returncode:
        raise SystemExit("the process with torch failed")
    return counts + Counter({(kind, outcome): count for kind, outcome, count in json.loads(said)})


def fuzz(
    folder: Path, cases: int, seed: int, keep: Path | None, *, with_torch: bool
) -> Counter[tuple[str, str]]:
    """Count (kind of file, outcome).

    Args:
        folder: of the sound files.
        cases: how many, of all kinds.
        seed: of the damage; a case is the same whatever the number of cases.
        keep: where the files of failures go.
        with_torch: whether the kinds that need torch are read, or the others.
    """
    import fuzz_damage as damage
    import fuzz_read

    paths = {place.name: _file(place) for place in sorted(folder.iterdir())}
    kinds, contents = list(paths), {kind: path.read_bytes() for kind, path in paths.items()}
    records = warm_up({k: p for k, p in paths.items() if (k in fuzz_read.WITH_TORCH) == with_torch})
    counts: Counter[tuple[str, str]] = Counter()
    for case in range(cases):
        random, kind = Random(f"{seed} {case}"), kinds[case % len(kinds)]
        if (kind in fuzz_read.WITH_TORCH) != with_torch:
            continue
        path, read, title = paths[kind], fuzz_read.reader(kind), kind
        if kind in records and random.random() < _NONSENSE:
            title = "nonsense"
            damage.write_nonsense(path, records[kind], random)
        else:
            path.write_bytes(damage.damaged(contents[kind], list(contents.values()), random))
        if fuzz_read.has_picture(kind) and random.random() < _DRAWN:
            read = fuzz_read.draw
        outcome = run(functools.partial(read, path))
        counts[title, outcome] += 1
        if outcome in FAILURES:
            print(f"case {case}, {title}: {outcome}", file=sys.stderr)
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{case}-{kind}{path.suffix}").write_bytes(path.read_bytes())
    return counts


def _file(place: Path) -> Path:
    """The file of a kind that is damaged; of a result with a sidecar, one kind is the one, one the other."""
    names = (
        ("result.arrays.safetensors",) if place.name == "sidecar" else ("result.h5", "*.pt", "*.safetensors")
    )
    return next(path for name in names for path in place.glob(name))


def warm_up(paths: dict[str, Path]) -> dict[str, Any]:
    """Read the sound files here, so that what is imported on the way is there for all; return the measurements."""
    import fuzz_read

    from landscape import results

    for kind, path in paths.items():
        if kind != "latest layout":  # which is refused
            fuzz_read.reader(kind)(path)
        if fuzz_read.has_picture(kind):
            fuzz_read.draw(path)
    return {
        kind: results.read(path) for kind, path in paths.items() if path.suffix == ".h5" and " " not in kind
    }


def run(action: Callable[[], None]) -> str:
    """Return what comes of an action in a forked process."""
    alive, held = os.pipe()
    child = os.fork()
    if child == 0:
        _act(action)
    os.close(held)
    ended = bool(select.select([alive], [], [], LIMIT)[0])
    os.close(alive)
    if not ended:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    names = dict(enumerate((*OUTCOMES, *FAILURES[:2])))
    return names.get(code, "crashed") if ended else "hang"


def _act(action: Callable[[], None]) -> None:
    import fuzz_read

    from landscape.errors import Refused
    from landscape.plots import PlotError
    from landscape.results import ResultsError

    code = 4
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + SPARE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        action()
        code = 0
    except (Refused, ResultsError, PlotError, fuzz_read.Nothing) as error:
        code = 2 if "took more than" in str(error) else 3 if "crashed the reader" in str(error) else 1
    except MemoryError:
        code = 5
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(code)


def failures(counts: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Return the counts of what must not happen."""
    return {key: count for key, count in counts.items() if key[1] in FAILURES}


def table(counts: Counter[tuple[str, str]]) -> str:
    """Return the counts as text."""
    shown = (*OUTCOMES, *FAILURES)
    rows = [["kind of file", *shown]]
    rows += [
        [k, *(str(counts[k, outcome]) for outcome in shown)] for k in sorted({kind for kind, _ in counts})
    ]
    rows.append(["all", *(str(sum(n for (_, o), n in counts.items() if o == outcome)) for outcome in shown)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
    main()
