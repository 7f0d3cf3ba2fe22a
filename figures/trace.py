"""The picture of the README: the Hessian trace of the embedded default by probes, to 1 %.

python figures/trace.py [--out figures/trace.png]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import landscape
from landscape import plots, testbeds


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()
    model, loss, batches, _ = testbeds.load_default()
    metric = landscape.metrics.Trace(method="hutchinson", rtol=0.01)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "digits_mlp"  # the picture's title names the run
        landscape.measure(metric, landscape.Problem(model, loss, batches), out=run)
        plots.plot(run / "trace.h5", arguments.out)


if __name__ == "__main__":
    main()
