"""LoHa against dense matrices written from the papers."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import gradients
from tests import methods
from tests import zoo
from tests.methods import site_of

pytestmark = pytest.mark.one_backend

VIEWS = [(12, 20), (11, 9), (3, 8)]


def _built(view=(12, 20), rank=3, facts=None, **arguments):
    adapter = kra.LoHa(rank, **arguments)
    adapter.build_at(site_of(view, **(facts or {})))
    return adapter


def dense_delta(adapter, values):
    """The product of two sums over ranks, written entry by entry."""
    delta = np.zeros((adapter.input_dim, adapter.output_dim))
    for i in range(adapter.input_dim):
        for j in range(adapter.output_dim):
            first = values["loha_a1"][i] @ values["loha_b1"][:, j]
            second = values["loha_a2"][i] @ values["loha_b2"][:, j]
            delta[i, j] = adapter.scaling * first * second
    return delta


class TestLoHa:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("view", VIEWS, ids=str)
    def test_against_dense_reference(self, view):
        adapter = _built(view, scaling=1.5)
        values = methods.randomize(adapter)
        methods.check_products(adapter, dense_delta(adapter, values), 2e-5)

    @pytest.mark.every_backend
    def test_gradients(self):
        adapter = _built(scaling=0.5)
        values = methods.randomize(adapter)
        names = list(values)
        x, upstream = zoo.normal(6, 12), zoo.normal(6, 20, seed=4)
        of_x, *found = gradients.gradients(
            lambda x: adapter.delta(x, True),
            x,
            [getattr(adapter, name) for name in names],
            upstream,
        )
        methods.close(of_x, upstream @ dense_delta(adapter, values).T, 3e-5)
        of_kernel = 0.5 * x.T.astype("float64") @ upstream
        first = values["loha_a1"] @ values["loha_b1"]
        second = values["loha_a2"] @ values["loha_b2"]
        expected = {
            "loha_a1": (of_kernel * second) @ values["loha_b1"].T,
            "loha_b1": values["loha_a1"].T @ (of_kernel * second),
            "loha_a2": (of_kernel * first) @ values["loha_b2"].T,
            "loha_b2": values["loha_a2"].T @ (of_kernel * first),
        }
        for name, gradient in zip(names, found):
            methods.close(gradient, expected[name], 3e-5)

    def test_start_and_rank(self):
        adapter = _built((30, 30), rank=4)
        assert not methods.numpy(adapter.delta_kernel()).any()
        zeros = [w for w in adapter.weights if not methods.numpy(w).any()]
        assert zeros == [adapter.loha_a2]
        values = methods.randomize(adapter)
        assert np.linalg.matrix_rank(dense_delta(adapter, values)) == 16
        assert adapter.factors()[0].shape == (30, 16)

    @pytest.mark.every_backend
    @pytest.mark.parametrize(
        "view, facts, places",
        [
            ((6 * 5, 7), {"input_channels": 5}, "rows"),
            ((5, 6 * 7), {"output_channels": 7}, "columns"),
        ],
    )
    def test_windows_are_left_whole(self, view, facts, places):
        """A kernel of each position is `(A1 C1 B1) * (A2 C2 B2)`."""
        adapter = _built(view, 3, facts, tucker=True, scaling=2.0)
        values = methods.randomize(adapter)
        assert values["loha_a1"].shape == (5, 3)
        assert values["loha_c1"].shape == (6, 3, 3)
        assert values["loha_b1"].shape == (3, 7)
        kernels = np.ones((6, 5, 7)) * 2.0
        for number in (1, 2):
            a, c, b = (values[f"loha_{n}{number}"] for n in "acb")
            kernels *= np.einsum("ia,pab,bj->pij", a, c, b)
        if places == "rows":
            dense = kernels.reshape(view)
        else:
            dense = np.concatenate(kernels, axis=1)
        methods.check_products(adapter, dense, 2e-5)
        assert adapter.factors() is None

    @pytest.mark.every_backend
    def test_a_convolution_is_convolved_with_the_delta(self):
        layer = keras.layers.Conv2D(7, 3, name="site")
        model = keras.Sequential([keras.Input((6, 6, 5)), layer])
        zoo.set_weights(model)
        kernel = methods.numpy(layer.kernel).astype("float64")
        report = kra.inject(model, kra.LoHa(2, tucker=True), "site")
        assert report.adapter_parameters == 2 * 2 * (5 + 7 + 2 * 9)
        adapter = layer.adapter.get("default")
        assert not methods.numpy(adapter.delta_kernel()).any()
        values = methods.randomize(adapter)
        kernels = np.ones((9, 5, 7))
        for number in (1, 2):
            a, c, b = (values[f"loha_{n}{number}"] for n in "acb")
            kernels *= np.einsum("ia,pab,bj->pij", a, c, b)
        whole = kernel + kernels.reshape(3, 3, 5, 7)
        x = zoo.normal(1, 6, 6, 5)
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
        y = np.einsum("nhwcij,ijcf->nhwf", windows, whole)
        methods.close(model(x), y + methods.numpy(layer.bias), 2e-5)

    @pytest.mark.every_backend
    def test_a_formed_kernel_is_not_kept_for_the_backward_pass(self):
        adapter = _built((40, 60), 2)
        kept = gradients.kept_for_backward(
            lambda x: adapter.delta(x, True),
            zoo.normal(3, 40),
            adapter.trainable_variables,
        )
        assert all(np.prod(shape) < 40 * 60 for shape, _ in kept)

    def test_counts(self):
        model, _, _ = zoo.bert()
        targets = ["query", "value"]
        report = kra.inject(model, kra.LoHa(2), targets)
        of_lora = kra.inject(model, kra.LoRA(4), targets, name="lora")
        assert report.adapter_parameters == of_lora.adapter_parameters

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"rank": 0}, ValueError, "`rank` must be at least 1"),
            ({"rank": True}, TypeError, "`rank` must be an integer"),
            ({"scaling": float("inf")}, ValueError, "`scaling` must be"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            kra.LoHa(**arguments)

    def test_rank_above_the_dimensions(self):
        model, _, targets = zoo.dense()
        with pytest.raises(ValueError, match="`rank` must be at most 6"):
            kra.inject(model, kra.LoHa(7), targets)

    def test_config_round_trip(self):
        for template in (kra.LoHa(7, dropout=0.1), kra.LoHa(2, tucker=True)):
            config = template.get_config()
            assert kra.LoHa.from_config(config).get_config() == config
        assert config["tucker"] is True
