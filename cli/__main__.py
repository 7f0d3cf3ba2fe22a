"""`python -m landscape_cli` and `torchrun -m landscape_cli`: the console script `landscape`."""

from . import main

main()
