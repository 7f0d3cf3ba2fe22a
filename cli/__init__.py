"""The command line: `landscape measure | show | plot | metrics`.

Each command parses, calls the library and prints; importing this package, and asking for help, imports
neither torch nor the readers of results.
"""

from __future__ import annotations


def main() -> None:
    """Run the console script `landscape`; never returns (the exit status is the result)."""
    from .app import app

    app()
