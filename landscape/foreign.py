"""Making sense of a file that was read safely, but may say anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landscape.atomic import ResultsError

if TYPE_CHECKING:
    from landscape.record import Record


def require_usable(path: Path, record: Record, metric: Any) -> None:
    """Refuse to go on from a measurement that its metric cannot make sense of.

    Args:
        path: of the file.
        record: what it holds.
        metric: a `landscape.metrics.base.Metric`.

    Raises:
        ResultsError: if its values cannot be summarized.
    """
    with understood(path):
        if "block_size" in record.attrs and "done" in record and record["done"].any():
            metric.summarize(record)
        if record.attrs.get("complete"):
            metric.units(record)


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
