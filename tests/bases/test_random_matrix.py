"""Dense random bases: draws, scales, products, and what they keep."""

import keras
import numpy as np
import pytest

from keras_randadapt import bases
from keras_randadapt import random
from tests import gradients
from tests import sparse
from tests import zoo

#: `digest()` of every kind, shape (20, 6), seed 7, role "golden".
GOLDEN = {
    "gaussian": "61f771c41b1e1b19",
    "uniform": "651991e58b24e3bc",
    "sparse": "dfc3c0960c83d3ab",
    "very_sparse": "d212e55820c38fe1",
    "hadamard": "b594127bb48d3b74",
}


def _make(kind, dim, rank, seed=0, role="test", **kwargs):
    return bases.make_basis(kind, dim, rank, seed, role, **kwargs)


def _unit(basis):
    """The matrix with entries of variance 1."""
    dense = basis.dense()
    if isinstance(basis, bases.RandomizedHadamard):
        return dense * basis.scale
    return dense


class TestValues:
    def test_are_the_documented_draws(self):
        shape, key = (20, 6), (3, "role")
        expected = {
            bases.Gaussian: random.normals(*key, shape),
            bases.Uniform: 2 * random.uniforms(*key, shape) - 1,
            bases.SparseTernary: random.ternaries(*key, shape, 3),
        }
        for cls, values in expected.items():
            basis = cls(*shape, *key)
            assert basis.values().dtype == basis.dtype == values.dtype
            np.testing.assert_array_equal(basis.values(), values)

    @pytest.mark.parametrize("kind", bases.KINDS)
    @pytest.mark.parametrize("expand", [False, True])
    def test_unit_variance_and_shape(self, kind, expand):
        basis = _make(kind, 256, 128, expand=expand)
        dense = _unit(basis)
        assert dense.shape == basis.shape
        assert basis.shape == ((256, 128) if expand else (128, 256))
        # Standard errors: of the mean 1/181, of the variance below
        # sqrt(kurtosis / 32768), which is 0.022 at sparsity 16.
        assert abs(dense.mean()) < 0.03
        assert abs(dense.var() - 1) < 0.1
        if kind == "uniform":
            assert np.abs(dense).max() <= np.sqrt(3)
            assert np.abs(dense).max() > 1.72

    @pytest.mark.parametrize("kind", bases.KINDS)
    def test_depends_on_seed_role_and_shape_alone(self, kind):
        a = _make(kind, 24, 10)
        same = _make(kind, 24, 10)
        np.testing.assert_array_equal(a.dense(), same.dense())
        assert a.digest() == same.digest()
        for other in (
            _make(kind, 24, 10, seed=1),
            _make(kind, 24, 10, role="other"),
            _make(kind, 24, 9),
        ):
            assert other.digest() != a.digest()

    @pytest.mark.parametrize("kind", bases.KINDS)
    def test_golden(self, kind):
        basis = _make(kind, 20, 6, seed=7, role="golden", expand=True)
        assert basis.digest() == GOLDEN[kind]

    def test_very_sparse(self):
        basis = _make("very_sparse", 400, 100, smaller_dim=256)
        assert basis.sparsity == 16
        share = np.mean(basis.values() != 0)
        assert abs(share - 1 / 16) < 0.005
        assert _make("very_sparse", 400, 100).sparsity == 20

    @pytest.mark.parametrize("rows, columns", [(3, 20), (32, 768), (8, 8)])
    def test_fill_leans_columns_on_rows_evenly(self, rows, columns):
        """A matching of columns to rows, at most ceil(columns / rows) to one,
        exists afterwards: found here by augmenting paths."""
        plain = bases.SparseTernary(rows, columns, 0, "x", 28)
        filled = bases.SparseTernary(rows, columns, 0, "x", 28, fill=True)
        before, after = plain.values(), filled.values()
        assert before.any(axis=0).sum() < columns
        np.testing.assert_array_equal(after[before != 0], before[before != 0])
        assert set(np.unique(after)) <= {-1, 0, 1}
        capacity = -(-columns // rows)
        held = [[] for _ in range(rows)]

        def place(column, seen):
            for row in np.flatnonzero(after[:, column]):
                if row in seen:
                    continue
                seen.add(row)
                if len(held[row]) < capacity:
                    held[row].append(column)
                    return True
                for i, other in enumerate(held[row]):
                    if place(other, seen):
                        held[row][i] = column
                        return True
            return False

        assert all(place(column, set()) for column in range(columns))
        # No more than one entry a column was added.
        assert ((after != 0).sum(0) - (before != 0).sum(0)).max() <= 1

    def test_unknown_fill(self):
        with pytest.raises(ValueError, match="`fill` must be"):
            bases.SparseTernary(4, 2, 0, "x", fill="rank")

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="`basis` must be one of"):
            _make("normal", 4, 2)


@pytest.mark.one_backend
class TestFullRank:
    """`fill="full_rank"`, in exact arithmetic."""

    #: `digest()` for shape, sparsity 3 or `sqrt` of the smaller dimension.
    GOLDEN = {
        ((20, 6), 9.0): "c5806b49aa1af51c",
        ((6, 20), 3.0): "9c52df9f12653f82",
        ((8, 8), 8**0.5): "329be4f833a6e583",
        ((70, 150), 70**0.5): "dba18123f8432b87",
    }

    @pytest.mark.parametrize("shape, sparsity", GOLDEN, ids=str)
    def test_golden(self, shape, sparsity):
        basis = self._filled(shape, sparsity, 7)
        assert basis.digest() == self.GOLDEN[shape, sparsity]

    def _filled(self, shape, sparsity, seed=0):
        return bases.SparseTernary(
            *shape, seed, "golden", sparsity, fill="full_rank"
        )

    @pytest.mark.parametrize(
        "shape",
        [(1, 1), (1, 7), (7, 1), (4, 8), (8, 4), (5, 12), (12, 5), (16, 16)],
        ids=str,
    )
    @pytest.mark.parametrize("sparsity", [1.0, 3.0, 9.0, 1e6])
    def test_every_block_is_regular(self, shape, sparsity):
        short, long = sorted(shape)
        for seed in range(20):
            values = self._filled(shape, sparsity, seed).values()
            lines = values if shape[0] == short else values.T
            for start in range(0, long, short):
                size = min(short, long - start)
                block = lines[:size, start : start + size]
                assert sparse.rank_of(block) == size
            assert values.any(axis=0).all() and values.any(axis=1).all()
            assert set(np.unique(values)) <= {-1, 0, 1}
            drawn = random.ternaries(seed, "golden", shape, sparsity)
            changed = drawn != values
            assert changed.sum(axis=0 if shape[0] == short else 1).max() <= 1

    @pytest.mark.parametrize(
        "shape, sparsity",
        [((5, 12), 9.0), ((12, 5), 3.0), ((70, 150), 12.0), ((9, 9), 1.0)],
        ids=str,
    )
    def test_against_plain_elimination(self, shape, sparsity):
        for seed in range(5):
            basis = self._filled(shape, sparsity, seed)
            expected = sparse.filled(shape, seed, "golden", sparsity)
            np.testing.assert_array_equal(basis.values(), expected)
            np.testing.assert_allclose(
                basis.dense(), sparse.unit(shape, seed, "golden", sparsity)
            )

    @pytest.mark.parametrize(
        "shape, sparsity", [((6, 768), 768**0.5), ((768, 4), 3.0), ((8, 8), 3)]
    )
    def test_mean_square_is_one(self, shape, sparsity):
        for seed in range(5):
            basis = self._filled(shape, sparsity, seed)
            # The scale is known without the values, and the same with them.
            assert self._filled(shape, sparsity, seed).scale == basis.scale
            assert np.mean(basis.dense() ** 2) == pytest.approx(1)

    def test_few_entries_change_where_the_draw_is_nearly_regular(self):
        filled = self._filled((300, 300), 3.0).values()
        drawn = random.ternaries(0, "golden", (300, 300), 3.0)
        assert np.sum(filled != drawn) < 10


class TestProducts:
    @pytest.mark.parametrize("kind", bases.KINDS)
    @pytest.mark.parametrize("bound", [False, True])
    def test_against_dense(self, kind, bound):
        basis = _make(kind, 20, 6, expand=True)
        dense = basis.dense() / (1 if kind == "hadamard" else basis.scale)
        if bound and hasattr(basis, "bind"):
            variable = keras.Variable(
                basis.values(), dtype=basis.dtype, trainable=False
            )
            basis.bind(variable)
            assert variable.dtype == basis.dtype
        x, y = zoo.normal(2, 3, 6), zoo.normal(2, 3, 20)
        tensor = keras.ops.convert_to_tensor
        for got, expected in (
            (basis.matvec(tensor(x)), x @ dense.T),
            (basis.adjoint(tensor(y)), y @ dense),
            (basis.matrix(), dense),
        ):
            got = keras.ops.convert_to_numpy(got)
            assert got.dtype == "float32"
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("kind", ["gaussian", "sparse"])
    def test_take(self, kind):
        basis = _make(kind, 20, 6, expand=True)
        values = basis.values().astype("float32")
        ids = np.array([[3, 1], [0, 3]])
        rows = basis.take(keras.ops.convert_to_tensor(ids), "float32", 0)
        columns = basis.take(keras.ops.convert_to_tensor(ids), "float32", 1)
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(rows), values[ids]
        )
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(columns), values.T[ids]
        )

    @pytest.mark.parametrize("kind", bases.KINDS)
    def test_gradient_keeps_the_values_only(self, kind):
        basis = _make(kind, 40, 30, expand=True)
        if hasattr(basis, "bind"):
            basis.bind(
                keras.Variable(
                    basis.values(), dtype=basis.dtype, trainable=False
                )
            )
        dense = basis.dense() / (1 if kind == "hadamard" else basis.scale)
        x, upstream = zoo.normal(5, 30), zoo.normal(5, 40, seed=1)
        (of_x,) = gradients.gradients(basis.matvec, x, [], upstream)
        np.testing.assert_allclose(of_x, upstream @ dense, rtol=1e-4, atol=1e-5)
        kept = gradients.kept_for_backward(basis.matvec, x, [])
        allowed = {((40, 30), basis.dtype)} if kind != "hadamard" else set()
        # What is handed on besides is the input or the output, at most.
        assert {k for k in kept if np.prod(k[0]) > 5 * 40} <= allowed


def test_cost_counts_multiply_adds():
    assert _make("gaussian", 20, 6).cost == 120
    # Two stages of order 1024, from 2 ** 10 to 32 * 32 as factors.
    cost = _make("hadamard", 1024, 1024).cost
    assert 2 * 1024 * 20 <= cost <= 2 * 1024 * 64
