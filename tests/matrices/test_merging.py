"""TIES and DARE, entry by entry, as their papers say."""

import numpy as np
import pytest

from keras_randadapt.matrices import merging

# It is NumPy, which is the same on every backend.
pytestmark = pytest.mark.one_backend


def ties(deltas, weights, density):
    """Algorithm 1, in loops; weights multiply what is averaged."""
    kept = max(1, int(density * deltas[0].size))
    trimmed = []
    for delta in deltas:
        smallest = sorted(abs(v) for v in delta.ravel())[-kept]
        trimmed.append(np.where(np.abs(delta) >= smallest, delta, 0.0))
    merged = np.zeros(deltas[0].shape)
    for place in np.ndindex(*merged.shape):
        entries = [delta[place] for delta in trimmed]
        # The elected sign has the larger total mass.
        mass = {
            sign: sum(abs(v) for v in entries if np.sign(v) == sign)
            for sign in (1, -1)
        }
        sign = 1 if mass[1] >= mass[-1] else -1
        agreeing = [
            weight * v
            for weight, v in zip(weights, entries)
            if np.sign(v) == sign
        ]
        if agreeing:
            merged[place] = sum(agreeing) / len(agreeing)
    return merged


def _deltas(number):
    generator = np.random.default_rng(number)
    return list(generator.normal(size=(number, 7, 5)))


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    "weights", [(1.0, 1.0), (0.7, 0.3), (1.0, -0.5, 0.2), (0.4,)], ids=str
)
def test_ties(weights, density):
    deltas = _deltas(len(weights))
    np.testing.assert_allclose(
        merging.ties(deltas, weights, density),
        ties(deltas, weights, density),
        atol=1e-14,
    )


def test_ties_by_hand():
    deltas = [
        np.array([[3.0, -2.0, 0.1, 0.0]]),
        np.array([[1.0, 5.0, 0.2, -1.0]]),
        np.array([[-1.5, 1.0, 0.3, -4.0]]),
    ]
    # Half of the entries stay: [3 -2 0 0], [1 5 0 0], [-1.5 0 0 -4].
    np.testing.assert_allclose(
        merging.ties(deltas, (1.0, 1.0, 1.0), 0.5), [[2.0, 5.0, 0.0, -4.0]]
    )


def test_trim_keeps_the_first_of_equal_entries():
    np.testing.assert_array_equal(
        merging.trim(np.array([1.0, -1.0, 1.0, 0.5]), 0.5), [1, -1, 0, 0]
    )


def test_dare_keeps_the_mean():
    generator = np.random.default_rng(0)
    delta = generator.normal(size=(4, 3))
    uniforms = generator.uniform(size=(20000, 4, 3))
    found = merging.drop_and_rescale(delta, 0.25, uniforms)
    # Either an entry is dropped, or it is divided by the density.
    kept = found != 0
    np.testing.assert_allclose(kept.mean(), 0.25, atol=0.003)
    np.testing.assert_allclose(
        found[kept], np.broadcast_to(4 * delta, found.shape)[kept]
    )
    np.testing.assert_allclose(found.mean(axis=0), delta, atol=0.08)


def test_dare_of_all_entries():
    delta = np.random.default_rng(0).normal(size=(4, 3))
    uniforms = np.random.default_rng(1).uniform(size=(4, 3))
    np.testing.assert_array_equal(
        merging.drop_and_rescale(delta, 1.0, uniforms), delta
    )
