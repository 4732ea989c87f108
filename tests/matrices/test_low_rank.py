"""Products of thin matrices against decompositions by NumPy in float64."""

import numpy as np
import pytest

from keras_randadapt.matrices import low_rank

# It is NumPy, which is the same on every backend.
pytestmark = pytest.mark.one_backend


def _normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def _with_values(shape, values, seed=0):
    """A matrix with these singular values."""
    k = len(values)
    u, _ = np.linalg.qr(_normal(shape[0], k, seed=seed))
    v, _ = np.linalg.qr(_normal(shape[1], k, seed=seed + 1))
    return u * np.asarray(values) @ v.T


def _error(found, matrix):
    difference = found.left @ found.right - matrix
    return np.linalg.norm(difference) / np.linalg.norm(matrix)


class TestShortest:
    @pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99])
    @pytest.mark.parametrize("thin", [True, False])
    def test_smallest_rank_that_keeps_the_energy(self, energy, thin):
        left, right = _normal(12, 5), _normal(5, 9)
        parts = (left, right) if thin else (left @ right,)
        found = low_rank.shortest(parts, energy)
        u, s, v = np.linalg.svd(left @ right)
        shares = np.cumsum(s**2) / np.sum(s**2)
        rank = int(np.argmax(shares >= energy)) + 1
        assert found.rank == rank
        np.testing.assert_allclose(
            found.left @ found.right,
            (u[:, :rank] * s[:rank]) @ v[:rank],
            atol=1e-12,
        )
        assert found.lost == pytest.approx(1 - shares[rank - 1], abs=1e-12)

    @pytest.mark.parametrize("shape", [(12, 9), (9, 12)], ids=str)
    def test_all_but_rounding(self, shape):
        values = [1.0, 1e-3, 3e-7, 1e-8, 3e-9]
        matrix = _with_values(shape, values)
        found = low_rank.shortest((matrix,))
        assert found.rank == 3
        assert _error(found, matrix) < 2e-8 and found.lost < 1e-14

    def test_factors_that_cancel(self):
        left, right = _normal(30, 4), _normal(4, 20)
        found = low_rank.shortest(
            low_rank.added([(0.1, (left, right)), (-0.1, (left, right))])
        )
        assert found.rank == 0 and found.lost == 0
        assert found.left.shape == (30, 0) and found.right.shape == (0, 20)

    def test_equal_factors_need_no_more_ranks(self):
        left = _normal(30, 4)
        first, second = _normal(4, 20), _normal(4, 20, seed=1)
        found = low_rank.shortest(
            low_rank.added([(2.0, (left, first)), (-0.5, (left, second))])
        )
        assert found.rank == 4
        assert _error(found, left @ (2 * first - 0.5 * second)) < 1e-14

    def test_sizes_far_from_one(self):
        """Neither factor leaves the range of float32."""
        for size in (1e-30, 1e30):
            matrix = size * _with_values((12, 9), [1.0, 0.5])
            found = low_rank.shortest((matrix,))
            with np.errstate(all="raise"):
                left = found.left.astype("float32").astype("float64")
                right = found.right.astype("float32")
            np.testing.assert_allclose(
                left @ right, matrix, rtol=0, atol=1e-6 * size
            )


class TestClosest:
    @pytest.mark.parametrize("thin", [True, False])
    @pytest.mark.parametrize("rank", [1, 3])
    def test_is_the_truncated_decomposition(self, rank, thin):
        left, right = _normal(12, 5), _normal(5, 9)
        parts = (left, right) if thin else (left @ right,)
        found = low_rank.closest(parts, rank)
        u, s, v = np.linalg.svd(left @ right)
        np.testing.assert_allclose(
            found.left @ found.right,
            (u[:, :rank] * s[:rank]) @ v[:rank],
            atol=1e-12,
        )
        lost = np.sum(s[rank:] ** 2) / np.sum(s**2)
        assert found.lost == pytest.approx(lost)

    def test_no_rank_is_rounding_noise(self):
        matrix = _with_values((12, 9), [1.0, 0.1])
        assert low_rank.closest((matrix,), 5).rank == 2

    def test_thin_factors_of_a_lower_rank_stay(self):
        left, right = _normal(12, 5), _normal(5, 9)
        right[2] = 0
        found = low_rank.closest((left, right), 5)
        on = [0, 1, 3, 4]
        np.testing.assert_array_equal(found.left, left[:, on])
        np.testing.assert_array_equal(found.right, right[on])

    def test_vectors_that_differ_much_in_size(self):
        """Powers of two do not change the product by a bit."""
        left = _normal(12, 4).astype("float32").astype("float64")
        right = _normal(4, 9).astype("float32").astype("float64")
        scale = np.array([1e-6, 30.0, 1e7, 1.0], "float32").astype("float64")
        found = low_rank.without_zeros((left * scale, right))
        np.testing.assert_array_equal(
            found.left @ found.right, (left * scale) @ right
        )
        sizes = [
            np.abs(found.left).max(axis=0),
            np.abs(found.right).max(axis=1),
        ]
        assert np.abs(np.log2(sizes[0] / sizes[1])).max() < 8
        # The other vectors stay as they are.
        np.testing.assert_array_equal(found.right[[1, 3]], right[[1, 3]])

    @pytest.mark.parametrize("shape", [(120, 150), (150, 120)], ids=str)
    def test_large_matrices(self, shape, monkeypatch):
        """The randomized decomposition nearly reaches the smallest loss."""
        monkeypatch.setattr(low_rank, "_LARGE", 100)
        rank = 8
        # A steep beginning and a flat end, as trained updates have.
        values = 1 / (1 + np.arange(120.0)) + 0.02
        matrix = _with_values(shape, values)
        smallest = np.sum(values[rank:] ** 2) / np.sum(values**2)

        def fail(parts):
            raise AssertionError("a large matrix was decomposed as a whole")

        monkeypatch.setattr(low_rank, "_svd", fail)
        found = low_rank.closest((matrix,), rank)
        assert found.rank == rank
        assert smallest <= found.lost < 1.001 * smallest
        # The loss is told as it is.
        assert _error(found, matrix) ** 2 == pytest.approx(found.lost)
        again = low_rank.closest((matrix,), rank)
        # BLAS with threads may round a sum in another order.
        np.testing.assert_allclose(
            again.left @ again.right, found.left @ found.right, atol=1e-10
        )

    def test_large_matrices_of_a_low_rank(self, monkeypatch):
        monkeypatch.setattr(low_rank, "_LARGE", 100)
        matrix = _with_values((130, 120), [3.0, 2.0, 1.0])
        found = low_rank.closest((matrix,), 8)
        assert found.rank == 3 and _error(found, matrix) < 1e-12


class TestSums:
    def test_thin_factors_form_no_matrix(self):
        terms = [(0.5, (_normal(12, 2), _normal(2, 9)))] * 2
        assert len(low_rank.added(terms)) == 2
        assert len(low_rank.added(terms * 3)) == 1

    def test_sum_of_factors_and_matrices(self):
        left, right, matrix = _normal(12, 2), _normal(2, 9), _normal(12, 9)
        (total,) = low_rank.added([(0.5, (left, right)), (-2.0, (matrix,))])
        np.testing.assert_allclose(
            total, 0.5 * (left @ right) - 2 * matrix, atol=1e-13
        )
