"""The counter-based generator against NumPy and published vectors."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_randadapt.ops import counter

pytestmark = pytest.mark.needs_optimizer

BACKEND = keras.config.backend()

#: `(key, counter, result)` from the known-answer tests of the authors'
#: library Random123.
PUBLISHED = [
    ((0x0, 0x0), (0x0, 0x0), (0x6B200159, 0x99BA4EFE)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x1CB996FC, 0xBB002BE7),
    ),
    (
        (0x13198A2E, 0x03707344),
        (0x243F6A88, 0x85A308D3),
        (0xC4923A9C, 0x483DF7A0),
    ),
]


def reference(key, block):
    """Threefry-2x32-20 as the paper's appendix has it, in uint32 NumPy."""
    k0, k1 = np.uint32(key[0]), np.uint32(key[1])
    schedule = [k0, k1, np.uint32(0x1BD11BDA) ^ k0 ^ k1]
    x = np.array(block, np.uint32)
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    with np.errstate(over="ignore"):
        x += np.array([k0, k1])
        for i in range(20):
            x[0] += x[1]
            r = np.uint32(rotations[i % 8])
            x[1] = (x[1] << r) | (x[1] >> (np.uint32(32) - r))
            x[1] ^= x[0]
            if i % 4 == 3:
                j = i // 4 + 1
                x[0] += schedule[j % 3]
                x[1] += schedule[(j + 1) % 3] + np.uint32(j)
    return int(x[0]), int(x[1])


def reference_words(seed, stream, step, n):
    key = reference((seed % 2**32, seed >> 32), (stream, 0))
    blocks = [reference(key, (step % 2**32, i)) for i in range(n // 2 + 1)]
    return np.array(blocks, np.uint32).ravel()[:n].view(np.int32)


def compiled(function):
    """The function under the backend's compiler."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    import torch

    # Inductor takes minutes to compile this; the graph is the same.
    # And static, because on Keras 3.13 the seeds would become symbols.
    return torch.compile(function, backend="aot_eager", dynamic=False)


def _numpy(x):
    return np.array(ops.convert_to_numpy(x))


def _int32(word):
    return ops.convert_to_tensor(np.array([[word]], np.uint32).view(np.int32))


@pytest.mark.parametrize("key, block, expected", PUBLISHED)
def test_published_vectors(key, block, expected):
    assert reference(key, block) == expected
    assert counter._threefry_ints(key, block) == expected
    words = counter._threefry(map(_int32, key), tuple(map(_int32, block)))
    got = [int(_numpy(word).view(np.uint32)[0, 0]) for word in words]
    assert tuple(got) == expected


@pytest.mark.parametrize("jit", [False, True])
def test_words(jit):
    """Words of every size of number, wrapped around as uint32 would."""
    seeds = [0, 1, 2**31, 2**32 - 1, 2**64 - 1, 0x9E3779B97F4A7C15]
    if jit:
        # Each is traced, and the words do not differ from the eager ones.
        seeds = seeds[-2:]
    streams = [0, 1, 2**31, 2**32 - 1]
    steps = [0, 1, 2**31 - 1]

    def draw(step):
        return [counter.random_words(s, streams, step, 9) for s in seeds]

    draw = compiled(draw) if jit else draw
    for step in steps:
        got = draw(ops.convert_to_tensor(step, "int32"))
        for seed, words in zip(seeds, got, strict=True):
            assert keras.backend.standardize_dtype(words.dtype) == "int32"
            for stream, row in zip(streams, _numpy(words), strict=True):
                np.testing.assert_array_equal(
                    row, reference_words(seed, stream, step, 9)
                )


def test_one_stream_and_many():
    many = _numpy(counter.random_words(5, (7, 8), 3, 6))
    for row, stream in zip(many, (7, 8), strict=True):
        one = counter.random_words(5, stream, 3, 6)
        np.testing.assert_array_equal(_numpy(one), row)
    # A longer draw begins with the shorter one.
    longer = counter.random_words(5, 7, 3, 11)
    np.testing.assert_array_equal(_numpy(longer)[:6], many[0])
    # A step that counts in int64 draws what one in int32 does.
    wide = counter.random_words(5, 7, ops.cast(3, "int64"), 6)
    np.testing.assert_array_equal(_numpy(wide), many[0])


def test_draws_differ():
    draws = [
        tuple(_numpy(counter.random_words(seed, stream, step, 4)))
        for seed in (0, 1, 2**32)
        for stream in (0, 1)
        for step in (0, 1)
    ]
    assert len({word for draw in draws for word in draw}) == 4 * len(draws)


@pytest.mark.parametrize(
    "n, k, jit",
    [
        (1, 0, False),
        (1, 1, False),
        (5, 2, False),
        (8, 8, False),
        (64, 33, False),
        pytest.param(1, 0, True, marks=pytest.mark.slow),
        pytest.param(1, 1, True, marks=pytest.mark.slow),
        (5, 2, True),
        pytest.param(8, 8, True, marks=pytest.mark.slow),
        (64, 33, True),
    ],
)
def test_subset_is_the_k_smallest(n, k, jit):
    def draw(step):
        words = counter.random_words(1, [0, 1, 2], step, n)
        return words, counter.random_subset(words, k)

    draw = compiled(draw) if jit else draw
    words, subset = map(_numpy, draw(ops.convert_to_tensor(4, "int32")))
    assert subset.dtype == bool
    assert subset.shape == (3, n)
    for row, chosen in zip(words, subset, strict=True):
        expected = np.argsort(row, kind="stable")[:k]
        np.testing.assert_array_equal(np.flatnonzero(chosen), sorted(expected))


def test_ties_are_broken_by_place():
    words = np.array([3 << 8, -5 << 8, 3 << 8, -5 << 8, 3 << 8], np.int32)
    for k, expected in ((1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2])):
        subset = _numpy(counter.random_subset(ops.convert_to_tensor(words), k))
        assert subset.sum() == k
        assert set(expected) <= set(np.flatnonzero(subset))


def test_subsets_are_uniform():
    """Chi-square over all 15 pairs of 6 places, for streams and for steps."""
    words = counter.random_words(11, range(3000), 5, 6)
    by_stream = _numpy(counter.random_subset(words, 2))
    words = [counter.random_words(11, 2, step, 6) for step in range(150)]
    by_step = _numpy(counter.random_subset(ops.stack(words), 2))
    for sample in (by_stream, by_step):
        assert np.all(sample.sum(-1) == 2)
        pairs = [tuple(np.flatnonzero(row)) for row in sample]
        counts = np.array(
            [pairs.count((i, j)) for i in range(6) for j in range(i + 1, 6)]
        )
        expected = len(sample) / 15
        # 36.1 is the 99.9 % quantile of chi-square with 14 degrees of
        # freedom; the draw is fixed, so this passes always or never.
        assert ((counts - expected) ** 2 / expected).sum() < 36.1


def test_below():
    words = counter.random_words(3, 0, 0, 3000)
    assert np.any(_numpy(words) < 0)
    for bound in (1, 7, ops.convert_to_tensor(7, "int32")):
        values = _numpy(counter.random_below(words, bound))
        top = int(_numpy(bound)) if not isinstance(bound, int) else bound
        assert values.min() == 0 and values.max() == top - 1
        counts = np.bincount(values, minlength=top)
        expected = 3000 / top
        # The 99.9 % quantile of chi-square with 6 degrees of freedom.
        assert ((counts - expected) ** 2 / expected).sum() < 22.5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: counter.random_words(-1, 0, 0, 2), "`seed` must be in"),
        (lambda: counter.random_words(0, 2**32, 0, 2), "`stream` must be"),
        (lambda: counter.random_words(0, [], 0, 2), "`stream` must be"),
        (lambda: counter.random_words(0, 0, 0, 0), "`n` must be at least 1"),
        (
            lambda: counter.random_subset(counter.random_words(0, 0, 0, 3), 4),
            "`k` must be in the range 0 <= k <= 3",
        ),
        (lambda: counter.random_below(np.zeros(1), 0), "`bound` must be in"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
