"""Pictures of the spectrum of the embedded default's Hessian: its 20 largest eigenvalues, and the density of all.

python figures/spectrum.py [--out figures/spectrum.png] [--density figures/density.png]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import landscape
from landscape import plots, testbeds
from landscape.metrics import Density, Eigenvalues


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--density", type=Path, default=Path(__file__).with_name("density.png"))
    arguments = parser.parse_args()
    model, loss, batches, _ = testbeds.load_default()
    problem = landscape.Problem(model, loss, batches)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "digits_mlp"  # the pictures' titles name the run
        landscape.measure(Eigenvalues(k=20), problem, out=run)
        plots.plot(run / "eigenvalues.h5", arguments.out)
        landscape.measure(Density(), problem, out=run)
        plots.plot(run / "density.h5", arguments.density)


if __name__ == "__main__":
    main()
