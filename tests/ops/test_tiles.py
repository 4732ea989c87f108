"""Programs as the kernel wants them, against the matrices that they mean."""

import functools

import numpy as np
import pytest

from keras_randadapt import random
from keras_randadapt.hadamard import hadamard_cores
from keras_randadapt.ops import RandomizedTransform
from keras_randadapt.ops import tiles

pytestmark = pytest.mark.one_backend


def make(order, stages, inputs, outputs, scatter=False, gather=False):
    def index(name, dim, wanted):
        return random.permutation(0, name, order)[:dim] if wanted else None

    return RandomizedTransform(
        order,
        random.signs(0, "test", (stages, order)),
        inputs,
        outputs,
        index("in", inputs, scatter),
        index("out", outputs, gather),
    )


def dense(tiled):
    """The matrix that the kernel applies, step by step."""
    ends = np.cumsum([0, *(size**2 for size in tiled.sizes)])
    factors = [
        tiled.factors[start:stop].reshape(size, size).astype("float64")
        for start, stop, size in zip(ends, ends[1:], tiled.sizes)
    ]
    transform = tiled.scale * functools.reduce(np.kron, factors)
    size = len(transform)
    signs = tiled.signs
    if signs is None:
        signs = np.ones((tiled.stages + 1, size))
    inputs, outputs = (
        selection(table, dim, size)
        for table, dim in zip(tiled.tables.arrays, tiled.dims)
    )
    matrix = signs[0][:, None] * inputs
    for sign in signs[1:]:
        matrix = sign[:, None] * (transform @ matrix)
    return outputs.T @ matrix


def selection(table, dim, size):
    """From `dim` columns to `size` positions."""
    if table is None:
        return np.eye(size, dim)
    return (table[:, None] == np.arange(dim)).astype("float64")


@pytest.mark.parametrize("scatter, gather", [(False, False), (True, True)])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("largest", [128, 64, 32])
@pytest.mark.parametrize("order", [7, 44, 48, 256, 304, 768])
def test_the_matrix(order, largest, stages, scatter, gather):
    """Also where the first and the last stage have fewer rows and columns."""
    plan = make(order, stages, order * 2 // 3, order // 2, scatter, gather)
    tiled = tiles._describe(plan.program, largest)
    if tiled is None:
        # A core is not taken apart.
        assert len(hadamard_cores(order)[0]) > largest
        return
    assert max(tiled.sizes) <= largest
    np.testing.assert_allclose(dense(tiled), plan.dense(), atol=1e-6)


def test_factors_are_read_once_for_all_stages():
    plan = make(768, 3, 768, 100)
    tiled = tiles.fitting(plan.program, 4, 232448)
    assert len(tiled.factors) == sum(size**2 for size in tiled.sizes)
    assert tiled.shared_bytes(4) == 4 * (4096 + len(tiled.factors))


def test_nothing_where_there_is_no_room():
    assert tiles.fitting(make(768, 1, 768, 768).program, 4, 1000) is None


@pytest.mark.parametrize("told", [None, "0", "1"])
@pytest.mark.parametrize("is_installed", [True, False])
def test_where_the_kernel_is_wanted(told, is_installed, monkeypatch):
    """The kernel runs where Triton is installed, unless it is turned off."""
    monkeypatch.delenv("KERAS_RANDADAPT_TRITON", raising=False)
    if told:
        monkeypatch.setenv("KERAS_RANDADAPT_TRITON", told)
    monkeypatch.setattr(
        tiles.importlib.util,
        "find_spec",
        lambda package: object() if is_installed else None,
    )
    assert tiles.kernel_is_wanted() == (is_installed and told != "0")
