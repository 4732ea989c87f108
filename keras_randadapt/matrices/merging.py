"""Merging of task vectors: TIES and DARE."""

import numpy as np


def ties(deltas, weights, density):
    """Trims updates, elects a sign for each entry, and averages what agrees.

    The sign of an entry is that of the sum of the trimmed updates. The result
    is the mean, over the updates of that sign there, of the update times its
    weight. Weights do not take part in the election.

    Args:
        deltas: list of float64 arrays of one shape.
        weights: A number for each.
        density: float in `(0, 1]`. The part of the entries that trimming
            keeps.

    Returns:
        float64 array.

    References:
        - Yadav et al., "TIES-merging", NeurIPS 2023, algorithm 1, for each
          matrix by itself. Weights are this library's and PEFT's addition.
    """
    trimmed = [trim(delta, density) for delta in deltas]
    positive = np.sum(trimmed, axis=0) >= 0
    total = np.zeros(positive.shape)
    count = np.zeros(positive.shape)
    for delta, weight in zip(trimmed, weights, strict=True):
        agrees = (delta != 0) & ((delta > 0) == positive)
        total += np.where(agrees, weight * delta, 0.0)
        count += agrees
    return total / np.maximum(count, 1)


def trim(delta, density):
    """The entries of the largest size, and zero elsewhere.

    Args:
        delta: float64 array.
        density: float in `(0, 1]`. Its product with the number of entries is
            rounded down, but at least one is kept. Of equal ones, the first
            are kept.
    """
    kept = max(1, int(density * delta.size))
    flat = delta.ravel()
    order = np.argsort(-np.abs(flat), kind="stable")
    trimmed = np.zeros_like(flat)
    trimmed[order[:kept]] = flat[order[:kept]]
    return trimmed.reshape(delta.shape)


def drop_and_rescale(delta, density, uniforms):
    """Drops random entries, and divides the others by the part that is kept.

    Args:
        delta: float64 array.
        density: float in `(0, 1]`. The probability with which an entry is
            kept.
        uniforms: Array like `delta` of independent numbers from `U(0, 1)`.

    Returns:
        float64 array, whose mean over the draws is `delta`.

    References:
        - Yu et al., "Language models are super Mario" (DARE), ICML 2024,
          equation 1, whose drop rate is `1 - density`.
    """
    return np.where(uniforms < density, delta / density, 0.0)
