"""A t-SNE of class means and of their parts, from distances alone; no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from landscape.class_structure.grams import Array, distances

MOST_POINTS = 2500
_EXACT_UP_TO = 600  # points; beyond, the approximation of Barnes and Hut
# scikit-learn scales a given start no further; it does its own to this standard deviation.
_START = 1e-4


def embed(gram: Array, perplexity: float) -> Array:
    """Embed vectors in the plane, neighbours beside neighbours (t-SNE).

    It starts from the two principal axes, so that nothing is random.

    Args:
        gram: inner products of the vectors, (points, points).
        perplexity: about how many neighbours a point has; at most a third of the points are taken.

    Returns:
        Coordinates, (points, 2).

    Source: van der Maaten & Hinton 2008 (JMLR 9, 2579); Papyan 2019 (arXiv 1901.08244) takes the number of classes.
    """
    from sklearn.manifold import TSNE

    count = len(gram)
    start = _principal(gram)
    options: dict[str, Any] = {"method": "exact" if count <= _EXACT_UP_TO else "barnes_hut"}
    taken = float(min(perplexity, max(1.0, (count - 1) / 3)))
    solver = TSNE(
        metric="precomputed", init=start.astype(np.float32), perplexity=taken, random_state=0, **options
    )
    found: Array = solver.fit_transform(distances(gram)).astype(np.float64)
    return found


def _principal(gram: Array) -> Array:
    centred = gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean()
    values, vectors = np.linalg.eigh(centred)
    axes = vectors[:, -2:][:, ::-1] * np.sqrt(np.maximum(values[-2:][::-1], 0.0))
    axes *= np.where(axes[np.abs(axes).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    size = float(axes[:, 0].std()) or 1.0
    return np.asarray(axes / size * _START)
