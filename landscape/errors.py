"""The few exceptions of our own; everything else is a `ValueError` or a `TypeError`."""

from __future__ import annotations


class Refused(Exception):  # noqa: N818  (the contract's name)
    """A measurement that would give a wrong number, or destroy one, was not made.

    The message says what was found, what is allowed and what to do.
    """


class UnknownMetric(ValueError):  # noqa: N818
    """No metric of that name; the message lists the known ones."""
