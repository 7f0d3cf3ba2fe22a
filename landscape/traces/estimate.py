"""Sums up stored probes: traces and their standard errors, as a whole and per parameter tensor; numpy only.

An estimate is a sum of independent parts: probes, output-space probes, what cheap probes miss, and what is known
exactly. Their means add up, and so do the squares of their calibrated standard errors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from landscape.estimators.calibration import calibrated_stderr
from landscape.estimators.stopping import stopping_counts
from landscape.record import Record, Variable
from landscape.traces.plan import PAIRS

Array = np.ndarray
Values = dict[str, Variable]
# What only the first units carry.
_FEW = {"output_samples": None, "corrections": PAIRS}


def total(record: Record, count: int) -> tuple[float, float]:
    """The trace and its standard error from those of the first `count` units that are done."""
    done = record["done"][:count]
    if not done.any():
        return float("nan"), float("nan")
    if "estimates" in record:
        errors = record["estimates_stderr"][:count][done]
        return float(record["estimates"][:count][done].mean()), float(np.sqrt((errors**2).sum()) / done.sum())
    if record.attrs["method"] == "exact":
        return float(exact_layers(record, done).sum()), 0.0
    value = float(record["exact_layer_part"].sum()) if "exact_layer_part" in record else 0.0
    square = 0.0
    for samples, moments in _parts(record, done):
        value += float(samples.mean())
        square += float(calibrated_stderr(samples, moments, block=record.attrs["block_size"])) ** 2
    return value, square**0.5


def layers(record: Record) -> tuple[Array, Array] | None:
    """The traces of the diagonal blocks with standard errors; None where no probe tells them apart."""
    done = record["done"]
    if "samples" not in record:
        return None
    if record.attrs["method"] == "exact":
        values = exact_layers(record, done)
        return values, np.zeros(len(values))
    values = np.zeros(record["samples"].shape[1])
    squares = np.zeros_like(values)
    if "exact_layer_part" in record:
        values += record["exact_layer_part"]
    for samples, moments in _layer_parts(record, done):
        values += samples.mean(axis=0)
        squares += calibrated_stderr(samples, moments, block=record.attrs["block_size"]) ** 2
    return values, np.sqrt(squares)


def exact_layers(record: Record, done: Array) -> Array:
    """The traces of the blocks: Σ over batches / Σ weights, or Σ of diagonal entries."""
    sums = record["samples"][: len(done)][done].sum(axis=0)
    if "weight" in record:
        sums = sums / record["weight"][: len(done)][done].sum()
    return np.asarray(sums)


def frobenius(squares: Array, exact: bool) -> Values:
    """‖A‖_F from E‖Av‖² = ‖A‖_F²; the error by the delta method."""
    square = squares.sum() if exact else squares.mean()
    error = 0.0 if exact else float(calibrated_stderr(squares))
    norm = np.sqrt(square)
    return {
        "frobenius_norm": Variable((), norm, "1", "Frobenius norm"),
        "frobenius_norm_stderr": Variable(
            (), np.asarray(error / (2 * norm) if norm else 0.0), "1", "standard error of the Frobenius norm"
        ),
    }


def running(record: Record, first: int) -> Values:
    """The estimate as it stood after each round, the first one after `first` units."""
    done = record["done"]
    counts = [c for c in stopping_counts(first, len(done)) if done[:c].all()]
    found = np.array([total(record, c) for c in counts]).reshape(-1, 2)
    return {
        "round": Variable(("round",), np.array(counts, dtype=np.int64), "1", "number of units"),
        "running_trace": Variable(("round",), found[:, 0], "1", "trace after that many"),
        "running_trace_stderr": Variable(("round",), found[:, 1], "1", "its standard error"),
    }


def _parts(record: Record, done: Array) -> Iterator[tuple[Array, Array | None]]:
    """Samples of the whole trace, with their moments where mixed products were made."""
    count = len(done)
    if "totals" in record:
        yield record["totals"][:count][done], None
    if "samples" in record:
        moments = record["moments"][:count][done] if "moments" in record else None
        yield record["samples"][:count][done].sum(axis=1), moments
    for samples in _further(record, done):
        yield samples.sum(axis=1), None


def _layer_parts(record: Record, done: Array) -> Iterator[tuple[Array, Array | None]]:
    yield record["samples"][done], record["layer_moments"][done] if "layer_moments" in record else None
    for samples in _further(record, done):
        yield samples, None


def _further(record: Record, done: Array) -> Iterator[Array]:
    for name, limit in _FEW.items():
        if name in record:
            chosen = done[:limit]
            yield record[name][: len(chosen)][chosen]
