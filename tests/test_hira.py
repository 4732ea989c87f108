"""HiRA against dense matrices written from the paper."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.sites import quantized
from keras_randadapt.sites import supported
from tests import gradients
from tests import methods
from tests import zoo

pytestmark = pytest.mark.one_backend


def _model(view=(12, 20), dtype=None):
    layer = keras.layers.Dense(view[1], name="site", dtype=dtype)
    return zoo.set_weights(keras.Sequential([keras.Input((view[0],)), layer]))


def _site(model):
    layer = model.get_layer("site")
    kernel = methods.numpy(layer._kernel).astype("float64")
    return layer, kernel, methods.numpy(layer.bias).astype("float64")


def _update(kernel, values, scaling=1.0):
    """`W * (A B)`, entry by entry."""
    update = np.zeros_like(kernel)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            product = values["hira_a"][i] @ values["hira_b"][:, j]
            update[i, j] = scaling * kernel[i, j] * product
    return update


class TestHiRA:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("others", [False, True])
    def test_against_dense_reference(self, others):
        model, x = _model(), zoo.normal(6, 12)
        layer, kernel, bias = _site(model)
        kra.inject(model, kra.HiRA(3, scaling=1.5), "site")
        values = methods.randomize(layer.adapter.get("default"))
        whole = kernel + _update(kernel, values, 1.5)
        if others:
            # The update is one of the base kernel, and not of LoRA's.
            kra.inject(model, kra.LoRA(2), "site", name="b")
            kra.set_active(model, ["b", "default"], train="b")
            lora = methods.randomize(layer.adapter.get("b"), seed=5)
            whole = whole + lora["lora_a"] @ lora["lora_b"]
        methods.close(model(x), x @ whole + bias, 2e-5)
        kra.merge(model)
        methods.close(layer.kernel, whole)

    @pytest.mark.every_backend
    @pytest.mark.parametrize("others", [False, True])
    def test_gradients(self, others):
        model = _model()
        layer, kernel, _ = _site(model)
        kra.inject(model, kra.HiRA(3, scaling=0.5), "site")
        adapter = layer.adapter.get("default")
        values = methods.randomize(adapter)
        if others:
            kra.inject(model, kra.LoRA(2), "site", name="b")
            kra.set_active(model, ["b", "default"])
        x, upstream = zoo.normal(2, 3, 12), zoo.normal(2, 3, 20, seed=4)
        of_x, of_a, of_b = gradients.gradients(
            lambda x: layer(x, training=True),
            x,
            [adapter.hira_a, adapter.hira_b],
            upstream,
        )
        whole = kernel + _update(kernel, values, 0.5)
        methods.close(of_x, upstream @ whole.T, 2e-5)
        of_kernel = np.einsum("abi,abj->ij", x.astype("float64"), upstream)
        of_product = 0.5 * kernel * of_kernel
        methods.close(of_a, of_product @ values["hira_b"].T, 2e-5)
        methods.close(of_b, values["hira_a"].T @ of_product, 2e-5)

    @pytest.mark.every_backend
    def test_a_formed_kernel_is_not_kept_for_the_backward_pass(self):
        model = _model((40, 60))
        layer, _, _ = _site(model)
        kra.inject(model, kra.HiRA(2), "site")
        adapter = layer.adapter.get("default")
        kept = gradients.kept_for_backward(
            lambda x: layer(x, training=True),
            zoo.normal(3, 40),
            [adapter.hira_a, adapter.hira_b],
        )
        # The base kernel is kept, which is in memory anyway.
        assert sum(np.prod(shape) >= 40 * 60 for shape, _ in kept) <= 1

    def test_the_rank_of_the_update_is_high(self):
        model = _model((20, 20))
        layer, kernel, _ = _site(model)
        kra.inject(model, kra.HiRA(2), "site")
        methods.randomize(layer.adapter.get("default"))
        kra.merge(model)
        update = methods.numpy(layer.kernel) - kernel
        assert np.linalg.matrix_rank(update, tol=1e-4) == 20

    def test_entries_that_are_zero_stay_zero(self):
        model = _model()
        layer, kernel, _ = _site(model)
        kernel[::2] = 0
        layer.kernel.assign(kernel)
        kra.inject(model, kra.HiRA(2), "site")
        methods.randomize(layer.adapter.get("default"))
        kra.merge(model)
        merged = methods.numpy(layer.kernel)
        assert not merged[::2].any() and merged[1::2].all()

    @pytest.mark.every_backend
    def test_quantized_base(self):
        model, x = _model(), zoo.normal(6, 12)
        model.quantize("int8")
        layer = model.get_layer("site")
        base = zoo.outputs(model, x)
        kra.inject(model, kra.HiRA(3), "site")
        values = methods.randomize(layer.adapter.get("default"))
        kernel = supported.as_view(layer, quantized.dequantized_kernel(layer))
        kernel = methods.numpy(kernel).astype("float64")
        update = x @ _update(kernel, values)
        # Keras rounds inputs of the base product, and no others are rounded.
        methods.close(zoo.outputs(model, x) - base, np.ravel(update), 0.02)

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"rank": 0}, ValueError, "`rank` must be at least 1"),
            ({"rank": "a"}, TypeError, "`rank` must be an integer"),
            ({"scaling": None}, ValueError, "`scaling` must be"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            kra.HiRA(**arguments)

    def test_rank_above_the_dimensions(self):
        model, _, targets = zoo.dense()
        with pytest.raises(ValueError, match="`rank` must be at most 6"):
            kra.inject(model, kra.HiRA(7), targets)

    def test_dora_refuses_it(self):
        with pytest.raises(ValueError, match="does not depend on the base"):
            kra.DoRA(kra.HiRA(2))

    def test_counts(self):
        model, _, _ = zoo.bert()
        targets = ["query", "value"]
        report = kra.inject(model, kra.HiRA(3), targets)
        of_lora = kra.inject(model, kra.LoRA(3), targets, name="lora")
        assert report.adapter_parameters == of_lora.adapter_parameters

    def test_config_round_trip(self):
        config = kra.HiRA(7, scaling=2.0, dropout=0.1).get_config()
        assert kra.HiRA.from_config(config).get_config() == config
