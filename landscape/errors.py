"""The few exceptions of our own; everything else is a `ValueError` or a `TypeError`."""

from __future__ import annotations

from collections.abc import Sequence

# Exit codes of the command line that are written into a run, too: some launchers lose them.
TOLERANCE_MISSED, INTERRUPTED = 4, 130


class Refused(Exception):  # noqa: N818  (the contract's name)
    """A measurement that would give a wrong number, or destroy one, was not made.

    The message says what was found, what is allowed and what to do.
    """


class UnknownMetric(ValueError):  # noqa: N818
    """No metric of that name; the message lists the known ones."""


class RankLost(Exception):  # noqa: N818
    """Another rank of this job died, stopped or failed; what is done is kept, on any number of ranks it goes on.

    Args:
        message: which rank, in one line.
        ranks: their numbers, where it was they who died.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()):
        super().__init__(message)
        self.ranks = list(ranks)
