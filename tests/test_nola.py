"""NOLA against dense matrices written from the paper."""

import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import random
from tests import gradients
from tests import methods
from tests import zoo
from tests.methods import site_of

pytestmark = pytest.mark.one_backend


def _built(view=(12, 20), rank=4, **arguments):
    adapter = kra.NOLA(rank, seed=3, **{"num_bases": 6, **arguments})
    adapter.build_at(site_of(view))
    return adapter


def dense_factors(adapter, nola_alpha, nola_beta):
    """Equation 3, with entries of variance 1 / 3 over sqrt(num_bases)."""
    rows, columns = adapter.input_dim, adapter.output_dim
    key = (adapter.seed, "NOLA//A0", (rows, adapter.rank))
    first = (2.0 * random.uniforms(*key) - 1) / np.sqrt(rows)
    k = adapter.num_bases
    a = adapter.bases_a.dense().reshape(k, rows, adapter.rank) / np.sqrt(k)
    b = adapter.bases_b.dense().reshape(k, adapter.rank, columns) / np.sqrt(k)
    a = first + np.einsum("i,iab->ab", nola_alpha, a.astype("float64"))
    return a, np.einsum("i,iab->ab", nola_beta, b.astype("float64"))


def dense_delta(adapter, **values):
    a, b = dense_factors(adapter, **values)
    return adapter.scaling * a @ b


class TestNOLA:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("view", [(12, 20), (20, 12)], ids=str)
    def test_against_dense_reference(self, view):
        adapter = _built(view, alpha=6)
        values = methods.randomize(adapter)
        methods.check_products(adapter, dense_delta(adapter, **values))

    def test_first_values(self):
        adapter = _built()
        for weight in adapter.trainable_variables:
            assert not methods.numpy(weight).any()
        assert not methods.numpy(adapter.delta_kernel()).any()

    @pytest.mark.every_backend
    def test_gradients(self):
        """That of alpha_i is <dl / dA, A_i>: checked by differences."""
        adapter = _built(scaling=0.5)
        values = methods.randomize(adapter)
        x, upstream = zoo.normal(6, 12), zoo.normal(6, 20, seed=4)
        names = ["nola_alpha", "nola_beta"]
        found = gradients.gradients(
            lambda x: adapter.delta(x, True),
            x,
            [getattr(adapter, name) for name in names],
            upstream,
        )
        dense = dense_delta(adapter, **values)
        methods.close(found[0], upstream @ dense.T, 2e-5)
        for name, got in zip(names, found[1:]):
            expected = gradients.numeric_gradient(
                lambda v, name=name: np.sum(
                    upstream * (x @ dense_delta(adapter, **{**values, name: v}))
                ),
                values[name],
            )
            methods.close(got, expected, 2e-5)

    def test_beta_learns_first(self):
        """Through A_0: with both factors zero nothing would."""
        adapter = _built()
        _, of_alpha, of_beta = gradients.gradients(
            lambda x: adapter.delta(x, True),
            zoo.normal(6, 12),
            [adapter.nola_alpha, adapter.nola_beta],
            zoo.normal(6, 20),
        )
        assert not of_alpha.any() and of_beta.all()

    @pytest.mark.every_backend
    def test_memory_is_bounded(self):
        """The bases would take 40 times what is kept and more."""
        adapter = _built((40, 60), 8, num_bases=300)
        methods.randomize(adapter)
        kept = gradients.kept_for_backward(
            lambda x: adapter.delta(x, True),
            zoo.normal(3, 40),
            [adapter.nola_alpha, adapter.nola_beta],
        )
        assert sum(np.prod(shape) for shape, _ in kept) < 300 * 8 * 100 / 40

    def test_count_depends_on_the_bases_alone(self):
        for rank, view in ((1, (12, 20)), (4, (12, 20)), (4, (30, 9))):
            adapter = _built(view, rank)
            count = sum(np.prod(w.shape) for w in adapter.trainable_variables)
            assert count == 2 * 6
            assert len(adapter.stored_weights()) == 2

    @pytest.mark.every_backend
    def test_golden_digest(self):
        assert _built().basis_digest() == GOLDEN_DIGEST

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"rank": 0}, "`rank` must be at least 1"),
            ({"num_bases": 0}, "`num_bases` must be at least 1"),
            ({"alpha": 1, "scaling": 1}, "say the same thing"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            kra.NOLA(**arguments)

    def test_config_round_trip(self):
        config = kra.NOLA(7, num_bases=9, alpha=14, dropout=0.1).get_config()
        assert kra.NOLA.from_config(config).get_config() == config


GOLDEN_DIGEST = "2be8c4b2972fa287499d242d4674a6e9b7b9ed7bd6928436"
