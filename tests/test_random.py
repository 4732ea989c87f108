import statistics

import numpy as np
import pytest

from keras_randadapt import random

pytestmark = pytest.mark.one_backend

DRAWS = {
    "signs": lambda seed, role, shape: random.signs(seed, role, shape),
    "uniforms": lambda seed, role, shape: random.uniforms(seed, role, shape),
    "normals": lambda seed, role, shape: random.normals(seed, role, shape),
    "ternaries": lambda seed, role, shape: random.ternaries(
        seed, role, shape, 3
    ),
}


# The values below are part of the adapter file format. A change here means
# that every adapter saved so far loads with other bases.
def test_golden_signs():
    assert random.signs(0, "golden", (2, 8)).tolist() == [
        [1, 1, 1, 1, -1, 1, -1, 1],
        [1, -1, 1, -1, -1, -1, -1, -1],
    ]


def test_golden_permutation():
    drawn = random.permutation(1, "golden", 10)
    assert drawn.tolist() == [1, 2, 3, 8, 9, 0, 5, 7, 6, 4]


def test_golden_uniforms():
    drawn = random.uniforms(2, "golden", 6).view(np.uint32)
    assert [hex(v) for v in drawn] == [
        "0x3e27ae3c",
        "0x3f09012f",
        "0x3df44cb0",
        "0x3eb34234",
        "0x3f4614e8",
        "0x3f791632",
    ]


def test_golden_normals():
    drawn = random.normals(3, "golden", 6).view(np.uint32)
    assert [hex(v) for v in drawn] == [
        "0x3f52b5e5",
        "0x3f605e31",
        "0x3fcbfa6c",
        "0x3f72e6be",
        "0xbee28bf6",
        "0xbf211397",
    ]


def test_golden_ternaries():
    drawn = random.ternaries(4, "golden", 16, 3)
    assert drawn.tolist() == [0] * 6 + [1, 0, -1, 1, 0, 0, 0, -1, 0, 0]


@pytest.mark.parametrize(
    "array,expected",
    [
        (lambda: random.signs(2**64 - 1, "golden", (1000, 37)), "9cbb18b6333a"),
        (lambda: random.permutation(2**63, "golden", 5000), "87f487521d1e"),
        (lambda: random.uniforms(7, "golden", (999, 3)), "8f3abfe67148"),
        # More than one chunk, and an odd number of half words.
        (lambda: random.normals(7, "golden", 70001), "bdc1fd56c246"),
        (
            lambda: random.ternaries(7, "golden", (30, 30, 30), 10.5),
            "45b3a5cbc8e9",
        ),
        (lambda: np.arange(6, dtype="int32").reshape(2, 3), "3f2912982ba6"),
        (lambda: np.array([1, 2], "float32"), "6540ffe330fb"),
    ],
)
def test_golden_digests(array, expected):
    assert random.digest(array())[:12] == expected


def test_digest_sees_values_shape_and_dtype_but_not_layout():
    array = np.arange(6.0).reshape(2, 3)
    digest = random.digest(array)
    assert len(digest) == 16
    assert random.digest(np.asfortranarray(array)) == digest
    assert random.digest(array.astype(">f8")) == digest
    assert random.digest(array.T) != digest
    assert random.digest(array.ravel()) != digest
    assert random.digest(array.astype("float32")) != digest
    assert random.digest(array + 1e-15) != digest
    with pytest.raises(TypeError, match="array"):
        random.digest(np.array([object()]))


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_functions_of_seed_role_and_shape(name):
    draw = DRAWS[name]
    first = draw(0, "a", (64, 10))
    np.testing.assert_array_equal(first, draw(0, "a", (64, 10)))
    np.testing.assert_array_equal(first, draw(0, "a", [64, 10]))
    for other in (
        draw(1, "a", (64, 10)),
        draw(0, "b", (64, 10)),
        draw(0, "a", (10, 64)).reshape(64, 10),
        draw(0, "a", 640).reshape(64, 10),
    ):
        correlation = np.corrcoef(first.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 0.2


def test_kinds_do_not_share_bits():
    uniforms = random.uniforms(0, "a", 4096)
    normals = random.normals(0, "a", 4096)
    assert abs(np.corrcoef(uniforms, normals)[0, 1]) < 0.1


@pytest.mark.parametrize("name", DRAWS)
def test_shapes_and_dtypes(name):
    dtype = {"signs": "int8", "ternaries": "int8"}.get(name, "float32")
    for shape in ((), (0,), (3, 0), (7,), (2, 3, 5)):
        drawn = DRAWS[name](0, "a", shape)
        assert drawn.shape == shape and drawn.dtype == dtype
    assert DRAWS[name](0, "a", np.int64(3)).shape == (3,)


def test_signs_statistics():
    drawn = random.signs(5, "a", 100_000).astype(float)
    assert set(drawn) == {-1.0, 1.0}
    assert abs(drawn.mean()) < 4 / 100_000**0.5
    lagged = [np.mean(drawn[lag:] * drawn[:-lag]) for lag in range(1, 130)]
    assert np.max(np.abs(lagged)) < 5 / 100_000**0.5


def test_uniforms_statistics():
    drawn = random.uniforms(5, "a", 100_000)
    assert 0 <= drawn.min() and drawn.max() < 1
    counts = np.histogram(drawn, 100, (0, 1))[0]
    # Chi-square with 99 degrees of freedom: mean 99, deviation 14.
    assert 50 < np.sum((counts - 1000.0) ** 2 / 1000) < 160
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.02


def test_normals_statistics():
    drawn = random.normals(5, "a", 200_000).astype(float)
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.var() - 1) < 0.015
    assert abs(np.mean(drawn**3)) < 0.03
    assert abs(np.mean(drawn**4) - 3) < 0.1
    edges = [-np.inf, -2, -1, -0.5, 0, 0.5, 1, 2, np.inf]
    cdf = [statistics.NormalDist().cdf(e) for e in edges[1:-1]]
    expected = np.diff([0, *cdf, 1]) * len(drawn)
    counts = np.histogram(drawn, edges)[0]
    assert np.sum((counts - expected) ** 2 / expected) < 30


def test_quantile_agrees_with_the_standard_library():
    tails = 2.0 ** -np.linspace(1, 33, 500)
    p = np.concatenate([np.linspace(0.001, 0.999, 999), tails, 1 - tails])
    exact = [statistics.NormalDist().inv_cdf(v) for v in p]
    np.testing.assert_allclose(random._quantile(p), exact, rtol=0, atol=1e-13)


def test_log_agrees_with_the_library():
    x = np.concatenate([2.0 ** -np.linspace(0.01, 40, 4001), [0.5, 0.25]])
    np.testing.assert_allclose(random._log(x), np.log(x), rtol=1e-14)


def test_normals_are_finite_at_the_ends():
    ends = (np.array([0.0, 2.0**32 - 1]) + 0.5) * 2.0**-32
    low, high = random._quantile(ends)
    assert low == -high and 6.3 < high < 6.4


@pytest.mark.parametrize("sparsity", [1, 3, 27.7, np.float32(1000)])
def test_ternaries_statistics(sparsity):
    drawn = random.ternaries(5, "a", 300_000, sparsity)
    assert set(drawn) <= {-1, 0, 1}
    expected = 300_000 / (2 * float(sparsity))
    for sign in (-1, 1):
        count = np.sum(drawn == sign)
        assert abs(count - expected) < 5 * expected**0.5
    assert (sparsity == 1) == bool(np.all(drawn != 0))


def test_sparser_ternaries_are_nested():
    dense = random.ternaries(5, "a", 10_000, 3)
    sparse = random.ternaries(5, "a", 10_000, 30)
    kept = sparse != 0
    np.testing.assert_array_equal(sparse[kept], dense[kept])


def test_permutations_are_uniform():
    drawn = random.permutation(5, "a", 1000)
    assert drawn.dtype == "int64"
    np.testing.assert_array_equal(np.sort(drawn), np.arange(1000))
    counts = np.zeros((4, 4))
    for seed in range(800):
        counts[np.arange(4), random.permutation(seed, "a", 4)] += 1
    assert np.abs(counts - 200).max() < 60
    assert random.permutation(0, "a", 0).shape == (0,)


def test_global_generator_is_untouched():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    for draw in DRAWS.values():
        draw(0, "a", 10)
    random.permutation(0, "a", 10)
    np.testing.assert_array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize(
    "arguments,error,match",
    [
        ((-1, "a", 3), ValueError, "`seed`.*-1"),
        ((2**64, "a", 3), ValueError, "`seed`.*18446744073709551616"),
        ((1.0, "a", 3), TypeError, "`seed`.*float"),
        ((None, "a", 3), TypeError, "`seed`.*None"),
        ((True, "a", 3), TypeError, "`seed`.*bool"),
        ((0, 1, 3), TypeError, "`role`.*int"),
        ((0, "a", -1), ValueError, "`shape`.*-1"),
        ((0, "a", (2, -3)), ValueError, "`shape`.*-3"),
        ((0, "a", (None, 3)), TypeError, "`shape`.*None"),
        ((0, "a", 2.5), TypeError, "`shape`.*2.5"),
    ],
)
def test_bad_input(name, arguments, error, match):
    with pytest.raises(error, match=match):
        DRAWS[name](*arguments)


def test_bad_permutation_and_sparsity():
    with pytest.raises(ValueError, match="`n`.*-1"):
        random.permutation(0, "a", -1)
    with pytest.raises(TypeError, match="`n`.*float|`n`.*3.0"):
        random.permutation(0, "a", 3.0)
    for sparsity in (0, 0.5, -3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`sparsity`"):
            random.ternaries(0, "a", 3, sparsity)
    for sparsity in ("3", None, True):
        with pytest.raises(TypeError, match="`sparsity`"):
            random.ternaries(0, "a", 3, sparsity)
