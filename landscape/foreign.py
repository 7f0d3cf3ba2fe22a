"""Making sense of a file that was read safely, but may say anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from landscape.atomic import ResultsError


@contextmanager
def understood(path: Path | str | None) -> Iterator[None]:
    """Turn whatever a nonsensical value in a file leads to into our error.

    Args:
        path: of the file; None where what was read has none.

    Raises:
        ResultsError: in place of an exception that is neither ours nor the machine's.
    """
    try:
        yield
    except (MemoryError, ImportError, OSError):
        raise
    except Exception as error:
        if type(error).__module__.startswith("landscape"):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ResultsError(
            f"{path or 'this measurement'} holds what landscape does not write ({type(error).__name__}: {reason}); "
            "restore it from a copy, or measure again; if it was not changed, this is a bug of landscape"
        ) from error
