"""Sums up stored trials: the largest rise of all searches, the mean of all draws; numpy only."""

from __future__ import annotations

import numpy as np

from landscape.estimators.calibration import calibrated_stderr
from landscape.record import Record, Variable

Array = np.ndarray
Values = dict[str, Variable]

# By what the rise is multiplied: at L(θ).
_PER_CENT_OF = {"keskar": 100.0, "ball": 1.0}
# Share of a rise that the slope may explain, or a fall may have, at what is called a minimum.
_MINIMUM = 0.1


def factor(record: Record) -> float:
    """What turns a rise of the loss into sharpness."""
    scale = _PER_CENT_OF.get(record.attrs["definition"])
    return 1.0 if scale is None else scale / (1.0 + float(record["loss"]))


def searched(record: Record) -> Values:
    """Sharpness from searches, with its bounds and what it took."""
    batches, done = record.attrs["batches"], record["done"]
    whole = len(done) // batches * batches
    shape = (whole // batches, batches, len(record["epsilon"]))
    if not done.any() or not whole:
        return {}
    # θ itself lies in every set, so that no rise is negative; what is not measured stays NaN.
    rises = np.where(done[:whole, None], np.maximum(record["rises"][:whole], 0.0), np.nan).reshape(shape)
    weights = record["trial_weight"].reshape(-1)[:whole].reshape(shape[:2])
    weights = np.where(done[:whole].reshape(shape[:2]), weights, np.nan)[0]
    scale = factor(record)
    each = scale * _mean(rises, weights)
    best = scale * _mean(np.fmax.reduce(rises, axis=0)[None], weights)[0]
    slopes = record["trial_slopes"][:batches][None]
    first = scale * _mean(slopes, weights)[0]
    dims = ("epsilon",)
    result = {
        "sharpness": Variable(dims, best, "1", "largest rise found, a lower bound"),
        "restart_sharpness": Variable(("restart", "epsilon"), each, "1", "of each restart"),
        "spread": Variable(dims, np.nanmax(each, 0) - np.nanmin(each, 0) if np.isfinite(each).any(0).all()
                           else np.full(shape[2], np.nan), "1", "best restart less the worst"),
        "gap": Variable(dims, scale * _gap(record, rises, weights), "1", "what the linear model there could gain"),
        "evaluations": Variable(dims, record["trial_evaluations"][done].sum(0), "1", "evaluations"),
        "nonfinite": Variable(dims, record["trial_nonfinite"][done].sum(0), "1", "of them not finite"),
        "first_order": Variable(dims, first, "1", "rise of the linear model at θ"),
    }  # fmt: skip
    lowest = scale * np.fmin.reduce(record["lowest_rises"][done], axis=0)
    return result | _place(first, best, lowest) | _beside(record, scale)


def _beside(record: Record, scale: float) -> Values:
    """An approximation, and a bound, where there is one."""
    result: Values = {}
    sizes = record["epsilon"]
    if "scaled_eigenvalue" in record:
        second = scale * 0.5 * sizes**2 * float(record["scaled_eigenvalue"])
        words = "½ε² times the largest eigenvalue: an approximation at a minimum, no bound"
        result["second_order"] = Variable(("epsilon",), second, "1", words)
    if "ceiling" in record and np.isfinite(record["ceiling"]):
        bound = np.full(len(sizes), scale * (float(record["ceiling"]) - float(record["loss"])))
        words = "no normalized logits have a larger loss: a certain bound"
        result["upper_bound"] = Variable(("epsilon",), bound, "1", words)
    return result


def average(record: Record, converged: bool) -> Values:
    """Sharpness from draws, with its standard error."""
    value, error = mean_and_error(record)
    rises, dims = record["rises"][record["done"]], ("epsilon",)
    return {
        "sharpness": Variable(dims, value, "1", "mean rise over noise"),
        "sharpness_stderr": Variable(dims, error, "1", "standard error over draws"),
        "converged": Variable((), np.asarray(converged), "1", "whether rtol was reached"),
        "evaluations": Variable(dims, np.full(len(value), 2 * len(rises)), "1", "evaluations"),
        "nonfinite": Variable(dims, (~np.isfinite(rises)).sum(0), "1", "draws that were not finite"),
    }


def mean_and_error(record: Record) -> tuple[Array, Array]:
    """The mean of all draws and its standard error, for each size; NaN or infinite where a draw was."""
    rises = record["rises"][record["done"]]
    value, error = np.full(rises.shape[1], np.nan), np.full(rises.shape[1], np.nan)
    if len(rises):
        fine = np.isfinite(rises).all(0)
        with np.errstate(invalid="ignore"):
            value = rises.mean(0)
        if fine.any():
            error[fine] = calibrated_stderr(rises[:, fine])
    return value, error


def _mean(rises: Array, weights: Array) -> Array:
    """The mean over groups (axis 1); NaN where one is missing."""
    return np.asarray((rises * weights[:, None]).sum(1) / weights.sum())


def _gap(record: Record, rises: Array, weights: Array) -> Array:
    """Of the search that found the most, on each group."""
    gaps = record["gaps"][: rises.shape[0] * rises.shape[1]].reshape(rises.shape)
    chosen = np.argmax(np.where(np.isnan(rises), -np.inf, rises), axis=0)
    of_best: Array = _mean(np.take_along_axis(gaps, chosen[None], axis=0), weights)[0]
    return of_best


def _place(first: Array, best: Array, lowest: Array) -> Values:
    """Whether θ is a minimum, as far as was seen: by its slope, and by how low the loss was around it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = float(np.max(np.where(first == 0, 0.0, first / best)))
    low = bool(np.all(lowest >= -_MINIMUM * best))
    words = "largest share of a rise that the slope at θ explains"
    return {
        "lowest": Variable(("epsilon",), lowest, "1", "like sharpness, of the lowest loss seen on the way"),
        "slope_share": Variable((), np.asarray(share), "1", words),
        "at_minimum": Variable((), np.asarray(share <= _MINIMUM and low), "1",
                               "whether neither the slope nor a fall is more than a tenth of each rise"),
    }  # fmt: skip
