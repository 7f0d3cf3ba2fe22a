"""What a class structure says, from stored values of the tasks that are done; numpy only."""

from __future__ import annotations

import math

import numpy as np
import torch

from landscape.class_structure import embedding, grams
from landscape.class_structure.grams import Weights
from landscape.class_structure.outliers import LEVELS
from landscape.estimators.density import DensityEstimate, from_chains
from landscape.estimators.lanczos import Chains
from landscape.results import Record, Variable

Values = dict[str, Variable]
TASK = "task_"  # begins the names of what single tasks found
_TOLD = 2  # pairs that a line tells
_ONCE = ("gram", "cosine", "eigenvalues_G2", "eigenvalues_G012", "vector_label", "vector_output", "tsne",
         "point_label", "point_output")  # fmt: skip
_DECADE = math.log(10.0)
_WIDEST = 0.3 * _DECADE  # of the kernel of a density


def weights_of(record: Record) -> Weights:
    """The weights of the mean vectors."""
    labels, attrs = record["label"].astype(int), record.attrs
    return Weights.of(attrs["weighting"], record["mean_probability"], labels, attrs["loss_factor"])


def converged(record: Record) -> bool:
    """Whether all eigenpairs reached their residual."""
    at = len(record["label"])
    known = [
        record[f"{TASK}converged_{name}"][at]
        for name in ("G", "hessian", "ggn")
        if f"{TASK}converged_{name}" in record
    ]
    return bool(known) and all(bool(one.all()) for one in known)


def of_outliers(record: Record) -> Values:
    """The top of the spectra, what it is made of, and overlaps of spans; nothing while that task is not done."""
    at = len(record["label"])
    if f"{TASK}values_hessian" not in record or not record["done"][at]:
        return {}
    found: Values = {}
    for name, words in (
        ("G", "of G, the mean over the examples of a class, then over classes"),
        ("hessian", "of the Hessian, averaged likewise"),
        ("ggn", "of G as the mean over all examples in the data"),
    ):
        if f"{TASK}values_{name}" in record:
            values = record[f"{TASK}values_{name}"][at]
            found[f"eigenvalues_{name}"] = Variable(
                ("eigenvalue",), values, "1", f"largest eigenvalues {words}"
            )
            residuals = record[f"{TASK}residuals_{name}"][at]
            found[f"eigenvalues_{name}_residual_norm"] = Variable(
                ("eigenvalue",), residuals, "1", "‖A v - θ v‖"
            )
    count = len(found["eigenvalues_hessian"].data)
    found["eigenvalue"] = Variable(("eigenvalue",), np.arange(1, count + 1), "1", "index, from the largest")
    for a, b in (("G", "hessian"), ("G", "G1"), ("hessian", "G1")):
        words = f"‖U_rᵀ V_r‖² / r of the leading r eigenvectors of {a} and of {b}; 1 for equal spans"
        data = record[f"{TASK}overlap_{a}_{b}"][at]
        found[f"overlap_{a}_{b}"] = Variable(("rank",), data, "1", words)
    return found | _composition(record, at) | _classes(record, at)


def _composition(record: Record, at: int) -> Values:
    levels = record[f"{TASK}levels"][at]
    values = levels.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = levels / values[:, None]
    found = {
        f"share_{name}": Variable(
            ("eigenvalue",), shares[:, i], "1", f"share of {name} in the Hessian's eigenvalue"
        )
        for i, name in enumerate(LEVELS)
    }
    whole = 1 - shares[:, LEVELS.index("H")]
    found["share_G"] = Variable(("eigenvalue",), whole, "1", "share of G in the Hessian's eigenvalue")
    labels, outputs, pairs = (record[f"{TASK}pair_{key}"][at] for key in ("label", "output", "share"))
    names = [str(name) for name in record["output_name"]]
    own = [int(c) for c in record["label"]]
    told = []
    for rows in zip(labels, outputs, pairs, strict=True):
        known = [(int(c), int(j), share) for c, j, share in zip(*rows, strict=True) if math.isfinite(share)][
            :_TOLD
        ]
        told.append(", ".join(_pair(names[own[c]], names[j], share) for c, j, share in known) or "-")
    found["made_by"] = Variable(("eigenvalue",), np.array(told), "", "largest pairs of a class and an output")
    share = record[f"{TASK}label_share"][at]
    found["label_share"] = Variable(
        ("eigenvalue", "label"), share, "1", "share of each class's examples in uᵀGu"
    )
    return found


def _pair(label: str, output: str, share: float) -> str:
    what = f"{label} kept" if label == output else f"{label} as {output}"
    return f"{what} {100 * share:.0f} %"


def _classes(record: Record, at: int) -> Values:
    """What follows from the S class means alone."""
    gram, weights = record[f"{TASK}class_gram"][at], weights_of(record)
    S = len(gram) // 2
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(weights.totals > 0, 1 / np.sqrt(weights.totals), 0.0)
    means = gram[S:, S:] * scale[:, None] * scale
    vectors = "δ_c" if record.attrs["weighting"] == "2019" else "g_c"
    spectra = {
        name: np.linalg.eigvalsh(part)[::-1] for name, part in (("G0", gram[:S, :S]), ("G1", gram[S:, S:]))
    }
    return {
        "eigenvalues_G0": Variable(("rank",), np.maximum(spectra["G0"], 0), "1", "of G0, the part of c' = c"),
        "eigenvalues_G1": Variable(("rank",), np.maximum(spectra["G1"], 0), "1", "of G1, the class means"),
        "class_gram": Variable(("label", "label_"), means, "1", f"inner products of the {vectors}"),
        "class_cosine": Variable(("label", "label_"), grams.cosines(means), "1", f"cosines of the {vectors}"),
    }  # fmt: skip


def of_means(record: Record) -> Values:
    """Spectra of the parts, cosines and t-SNE, made once, when all inner products are there."""
    S, C = record["mean_probability"].shape
    if not record["done"][:S].all():
        return {}
    if "tsne" in record:
        return {name: record.variables[name] for name in _ONCE if name in record} | _within(record)
    weights, rows = weights_of(record), record[f"{TASK}rows"][:S].astype(float)
    found: Values = {}
    if record.attrs["sketch"]:
        spectra = {part: grams.eigenvalues(part, weights, rows=rows) for part in ("G2", "G012")}
    else:
        gram = grams.mirrored(rows)
        spectra = {part: grams.eigenvalues(part, weights, gram=gram) for part in ("G2", "G012")}
        found["gram"] = Variable(("vector", "vector_"), gram, "1", "inner products of the mean vectors v_cc'")
        found["cosine"] = Variable(
            ("vector", "vector_"), grams.cosines(gram), "1", "cosines of the mean vectors"
        )
    words = {"G2": "of G2, the outputs c' ≠ c about their class mean", "G012": "of G0 + G1 + G2"}
    for part, values in spectra.items():
        found[f"eigenvalues_{part}"] = Variable((f"rank_{part}",), values, "1", f"eigenvalues {words[part]}")
    places = np.divmod(np.arange(S * C), C)
    for key, data in (("label", record["label"][places[0]]), ("output", places[1])):
        found[f"vector_{key}"] = Variable(("vector",), data, "1", f"the vector's {key}")
    return found | _embedded(record, weights, rows) | _within(record)


def _embedded(record: Record, weights: Weights, rows: np.ndarray) -> Values:
    """A t-SNE of class means and mean vectors, of the first classes where they are many."""
    S, C = weights.every.shape
    taken = min(S, max(2, embedding.MOST_POINTS // (C + 1)))
    if record.attrs["sketch"]:
        flat = rows[:taken].reshape(taken * C, -1)
        gram = flat @ flat.T
    else:
        gram = grams.mirrored(rows)[: taken * C, : taken * C]
    own = Weights(weights.every[:taken], weights.own[:taken], weights.means[:taken])
    place = embedding.embed(grams.with_means(own, gram), record.attrs["perplexity"])
    labels = np.concatenate([np.arange(taken), np.repeat(np.arange(taken), C)])
    outputs = np.concatenate([np.full(taken, -1), np.tile(np.arange(C), taken)])
    return {
        "tsne": Variable(("point", "axis"), place, "1", "t-SNE coordinates, from distances"),
        "point_label": Variable(("point",), record["label"][labels], "1", "class of the point"),
        "point_output": Variable(("point",), outputs, "1", "its output c', -1 for the mean of a class"),
    }


def _within(record: Record) -> Values:
    if f"{TASK}within" not in record:
        return {}
    S = len(record["label"])
    rows, counts = record[f"{TASK}within"][:S], record["class_count"].astype(int)
    data = np.concatenate([row[:count] for row, count in zip(rows, counts, strict=True)])
    words = "its contribution to tr G3, the scatter within classes"
    return {
        "within": Variable(("example",), data, "1", words),
        "trace_G3": Variable((), np.asarray(data.sum()), "1", "trace of G3, the scatter within classes"),
    }


def of_spectra(record: Record) -> Values:
    """Densities of the matrices that are done, each on its own signed logarithmic axis, and their outliers."""
    if "spectrum" not in record:
        return {}
    first, names = len(record["label"]) + 1, [str(name) for name in record["spectrum"]]
    done = [i for i in range(len(names)) if record["done"][first + i]] if f"{TASK}alpha" in record else []
    if not done:
        return {}
    made = {i: _density(record, first + i) for i in done}
    length = max(len(one.grid) for one in made.values())
    nodes = max(one.ritz_values.shape[1] for one in made.values())
    curves = {
        key: np.full((len(names), length), np.nan) for key in ("x", "density", "density_low", "density_high")
    }
    top, above, below = (np.full((len(names), size), np.nan) for size in (nodes, 1, 1))
    for i, one in made.items():
        size = len(one.grid)
        for key, data in (("x", one.grid), ("density", one.density * _DECADE), ("density_low", one.low * _DECADE),
                          ("density_high", one.high * _DECADE)):  # fmt: skip
            curves[key][i, :size] = data
        # The i-th largest node of each chain lies below the i-th eigenvalue; the largest is nearest to it.
        ranked = -np.sort(-one.ritz_values, axis=1)
        highest = np.nanmax(np.where(np.isnan(ranked), -np.inf, ranked), axis=0)
        top[i, : len(highest)] = np.where(np.isfinite(highest), highest, np.nan)
        above[i], below[i] = len(one.outliers.above), len(one.outliers.below)
    words = {"x": "eigenvalue", "density": "share of eigenvalues per decade",
             "density_low": "lower end of the 95 % band", "density_high": "upper end of the 95 % band"}  # fmt: skip
    found = {
        f"spectrum_{key}": Variable(("spectrum", "x"), data, "1", words[key]) for key, data in curves.items()
    }
    found["spectrum_top"] = Variable(("spectrum", "node"), top, "1", "largest Ritz values, descending")
    found["spectrum_outliers"] = Variable(("spectrum",), above[:, 0], "1", "eigenvalues above the bulk")
    found["spectrum_outliers_below"] = Variable(("spectrum",), below[:, 0], "1", "eigenvalues below the bulk")
    return found


def _density(record: Record, at: int) -> DensityEstimate:
    chains = Chains(record[f"{TASK}alpha"][at], record[f"{TASK}beta"][at])
    dtype = getattr(torch, record.attrs["product_dtype"])
    found = from_chains(chains, record.attrs["order"], dtype, axis="log")
    return (
        found
        if found.width <= _WIDEST
        else from_chains(chains, record.attrs["order"], dtype, axis="log", width=_WIDEST)
    )
