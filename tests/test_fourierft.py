"""FourierFT against dense matrices written from the paper."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import random
from tests import gradients
from tests import methods
from tests import zoo
from tests.methods import site_of

pytestmark = pytest.mark.one_backend

#: Even and odd dimensions, and one that is no product of small primes.
VIEWS = [(12, 20), (11, 9), (3, 8)]


def _built(view=(12, 20), count=7, address="a/query", **arguments):
    adapter = kra.FourierFT(count, **{"scaling": 20.0, **arguments})
    adapter.build_at(site_of(view, address))
    return adapter


def _waves(adapter):
    """The delta of each coefficient, one cosine each, written entry by entry.

    Returns:
        float64 array `(count, input_dim, output_dim)`.
    """
    rows, columns = adapter.input_dim, adapter.output_dim
    role = f"FourierFT/{rows}x{columns}"
    order = random.permutation(adapter.seed, role, rows * columns)
    places = np.sort(order[: adapter.count])
    p, q = np.mgrid[:rows, :columns]
    phases = [
        (place // columns) * p / rows + (place % columns) * q / columns
        for place in places
    ]
    scale = adapter.scaling / (rows * columns)
    return scale * np.cos(2 * np.pi * np.array(phases))


def dense_delta(adapter, coefficients):
    return np.einsum("k,kpq->pq", coefficients, _waves(adapter))


class TestFourierFT:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("view", VIEWS, ids=str)
    def test_against_dense_reference(self, view):
        adapter = _built(view)
        values = methods.randomize(adapter)["coefficients"]
        assert values.shape == (7,)
        methods.check_products(adapter, dense_delta(adapter, values), 2e-5)

    @pytest.mark.every_backend
    @pytest.mark.parametrize("view", VIEWS, ids=str)
    def test_gradients(self, view):
        adapter = _built(view)
        values = methods.randomize(adapter)["coefficients"]
        x, upstream = zoo.normal(6, view[0]), zoo.normal(6, view[1], seed=4)
        of_x, of_values = gradients.gradients(
            lambda x: adapter.delta(x, True),
            x,
            [adapter.coefficients],
            upstream,
        )
        delta = dense_delta(adapter, values)
        methods.close(of_x, upstream @ delta.T, 3e-5)
        of_kernel = x.T.astype("float64") @ upstream
        expected = np.einsum("kpq,pq->k", _waves(adapter), of_kernel)
        methods.close(of_values, expected, 3e-5)

    def test_all_places_are_the_inverse_transform(self):
        """With every entry trained it is NumPy's transform of any matrix."""
        adapter = _built((4, 6), count=24, scaling=1.0)
        values = methods.randomize(adapter)["coefficients"]
        expected = np.fft.ifft2(values.reshape(4, 6)).real
        methods.close(adapter.delta_kernel(), expected)

    def test_places_are_part_of_the_file_format(self):
        places = _built((64, 48), count=6, address="any").trained_places()
        assert places.tolist() == GOLDEN
        other = _built((64, 48), count=6, seed=1).trained_places()
        assert other.tolist() != GOLDEN

    def test_sites_of_one_shape_share_their_places(self):
        model, _, _ = zoo.bert()
        kra.inject(model, kra.FourierFT(5), ["query", "value"])
        adapters = list(model._randadapt.adapters("default").values())
        assert len({a.basis_digest() for a in adapters}) == 1
        assert len({id(a.places_values) for a in adapters}) == 1

    def test_first_values(self):
        adapter = _built()
        (weight,) = adapter.trainable_variables
        assert adapter.stored_weights() == [weight]
        assert not methods.numpy(adapter.delta_kernel()).any()
        started = _built(initializer="normal", count=50)
        values = methods.numpy(started.coefficients)
        assert 0.5 < values.std() < 1.5

    @pytest.mark.every_backend
    def test_a_formed_kernel_is_not_kept_for_the_backward_pass(self):
        adapter = _built((40, 60))
        kept = gradients.kept_for_backward(
            lambda x: adapter.delta(x, True),
            zoo.normal(3, 40),
            [adapter.coefficients],
        )
        assert all(np.prod(shape) < 40 * 60 for shape, _ in kept)

    def test_counts(self):
        model, _, _ = zoo.bert()
        report = kra.inject(model, kra.FourierFT(9), ["query", "value"])
        assert report.adapter_parameters == 9 * len(report.sites)

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"count": 0}, ValueError, "`count` must be at least 1"),
            ({"count": 1.5}, TypeError, "`count` must be an integer"),
            ({"scaling": float("nan")}, ValueError, "`scaling` must be"),
            ({"initializer": "no"}, ValueError, "`initializer` must be one"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            kra.FourierFT(**arguments)

    def test_more_coefficients_than_entries(self):
        model, _, targets = zoo.dense()
        size = int(np.prod(model.get_layer("site").kernel.shape))
        with pytest.raises(ValueError, match=f"at most {size}, the number of"):
            kra.inject(model, kra.FourierFT(size + 1), targets)
        assert kra.sites(model) == {}

    def test_config_round_trip(self):
        config = kra.FourierFT(7, scaling=2.0, initializer="ones").get_config()
        assert kra.FourierFT.from_config(config).get_config() == config

    @pytest.mark.every_backend
    def test_16_bits(self):
        """The delta is formed in float32, which transforms need."""
        layer = keras.layers.Dense(20, name="site", dtype="mixed_bfloat16")
        model = keras.Sequential([keras.Input((12,)), layer])
        kra.inject(model, kra.FourierFT(7, scaling=200.0), "site")
        adapter = layer.adapter.get("default")
        values = methods.randomize(adapter)["coefficients"]
        x = zoo.normal(3, 12)
        with kra.disabled(model):
            base = methods.numpy(keras.ops.cast(model(x), "float32"))
        change = methods.numpy(keras.ops.cast(model(x), "float32")) - base
        methods.close(change, x @ dense_delta(adapter, values), 0.03)


#: The first places of seed 0 in a matrix of 64 rows and 48 columns.
GOLDEN = [83, 339, 470, 808, 1794, 2801]
