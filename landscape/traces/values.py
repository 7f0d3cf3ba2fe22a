"""Probes as variables of a record: how what was measured is stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from landscape.estimators import hutchpp, xtrace
from landscape.estimators.calibration import block_moments
from landscape.estimators.probes import Operator
from landscape.problem import Problem
from landscape.record import Variable
from landscape.traces import probing
from landscape.traces.pilot import Pilot
from landscape.traces.plan import PAIRS, Plan

Values = dict[str, Variable]


def planned(problem: Problem, plan: Plan, block: range, generators: Sequence[torch.Generator]) -> Values:
    """A block of probes that are drawn anew for each micro-batch."""
    if plan.matrix == "ggn" and plan.outputs:
        return samples(probing.output_samples(problem, plan, generators))
    if plan.form == "products":
        values = with_moments(probing.independent(problem, plan, generators))
    else:
        found = probing.differences(problem, plan, generators)
        values = {"totals": Variable(("probe",), found, "1", "v·Av by second differences")}
    if plan.outputs:
        found = probing.output_samples(problem, plan, generators)
        values["output_samples"] = Variable(("probe", "layer"), found, "1", "output-space probes of G")
    if plan.pair_examples:
        paired = [g for i, g in zip(block, generators, strict=True) if i < PAIRS]
        width = 1 if plan.form == "differences" else len(problem.names)
        missed = np.full((len(block), width), np.nan)
        if paired:
            missed[: len(paired)] = probing.corrections(problem, plan, paired)
        words = "what an exact probe of a drawn micro-batch adds to the cheap one"
        along = "whole" if plan.form == "differences" else "layer"
        values["corrections"] = Variable(("probe", along), missed, "1", words)
    return values


def samples(rows: np.ndarray) -> Values:
    """v·Av within the rows of each tensor, (probes, layers)."""
    return {"samples": Variable(("probe", "layer"), rows, "1", "v·Av within the rows of a tensor")}


def with_moments(grams: Tensor) -> Values:
    """Samples, and the U-statistics from which their errors are made, from Gram matrices (layers, b, b)."""
    words = "U-statistics of tr B², tr B³, tr B⁴ for the error of samples"
    layers = grams.cpu().numpy()
    return {
        **samples(np.diagonal(layers, axis1=1, axis2=2).T.copy()),
        "layer_moments": Variable(("probe", "layer", "order"), block_moments(layers), "1", words),
        "moments": Variable(("probe", "order"), block_moments(layers.sum(axis=0)), "1", words),
    }


def whole_estimates(A: Operator, method: str, matvecs: int, generators: Sequence[torch.Generator]) -> Values:
    """Estimates by Hutch++ or XTrace, of `matvecs` products each."""
    estimator = hutchpp if method == "hutchpp" else xtrace
    seeds = [int(torch.randint(2**62, (), generator=g)) for g in generators]
    found = [estimator(A, matvecs=matvecs, seed=seed) for seed in seeds]
    return {
        "estimates": Variable(("probe",), np.array([f.value for f in found]), "1", "estimate of the trace"),
        "estimates_stderr": Variable(("probe",), np.array([f.stderr for f in found]), "1", "its own error"),
    }


def of_pilot(measured: Pilot) -> Values:
    """What a pilot measured."""
    probe, compared, differences = ("pilot_probe",), ("pilot_comparison",), "by second differences"
    found = {
        "pilot_residual": Variable(probe, measured.residual, "1", f"v·Rv {differences}"),
        "pilot_ggn": Variable(probe, measured.ggn, "1", f"v·Gv {differences}"),
        "pilot_products": Variable(compared, measured.products, "1", "v·Hv by products"),
        "pilot_differences": Variable(compared, measured.differences, "1", f"v·Hv {differences}"),
    }
    if measured.output is not None:
        found["pilot_output"] = Variable(probe, measured.output, "1", "output-space probes of G")
    return found
