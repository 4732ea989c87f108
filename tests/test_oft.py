"""OFT against dense matrices written from the paper."""

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


def rotation(entries, dim):
    """The orthogonal matrix, with an inverse and a loop over blocks."""
    count = entries.shape[1]
    size = int((1 + (1 + 8 * count) ** 0.5) / 2)
    whole = np.zeros((dim, dim))
    for block in range(dim // size):
        q = np.zeros((size, size))
        of_block = entries[block % len(entries)]
        q[np.triu_indices(size, 1)] = of_block
        q -= q.T
        eye = np.eye(size)
        r = (eye - q) @ np.linalg.inv(eye + q)
        place = slice(block * size, (block + 1) * size)
        whole[place, place] = r
    return whole


class TestOFT:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("share", [False, True])
    @pytest.mark.parametrize("others", [False, True])
    def test_against_dense_reference(self, others, share):
        model, x = _model(), zoo.normal(6, 12)
        layer, kernel, bias = _site(model)
        kra.inject(model, kra.OFT(4, share_blocks=share), "site")
        values = methods.randomize(layer.adapter.get("default"))["oft_q"]
        assert values.shape == (1 if share else 3, 6)
        r = rotation(values, 12)
        whole = r @ kernel
        np.testing.assert_allclose(r @ r.T, np.eye(12), atol=1e-12)
        if others:
            # The update is one of the base kernel, and not of LoRA's.
            kra.inject(model, kra.LoRA(2), "site", name="b")
            kra.set_active(model, ["b", "default"], train="b")
            lora = methods.randomize(layer.adapter.get("b"), seed=5)
            whole = whole + lora["lora_a"] @ lora["lora_b"]
        methods.close(model(x), x @ whole + bias, 3e-5)
        kra.merge(model)
        methods.close(layer.kernel, whole, 3e-5)

    @pytest.mark.every_backend
    @pytest.mark.parametrize("others", [False, True])
    def test_gradients(self, others):
        model = _model()
        layer, kernel, _ = _site(model)
        kra.inject(model, kra.OFT(4), "site")
        adapter = layer.adapter.get("default")
        values = methods.randomize(adapter)["oft_q"]
        if others:
            kra.inject(model, kra.LoRA(2), "site", name="b")
            kra.set_active(model, ["b", "default"])
        x, upstream = zoo.normal(2, 3, 12), zoo.normal(2, 3, 20, seed=4)
        of_x, of_q = gradients.gradients(
            lambda x: layer(x, training=True), x, [adapter.oft_q], upstream
        )
        methods.close(of_x, upstream @ (rotation(values, 12) @ kernel).T, 4e-5)

        def loss(entries):
            y = x.astype("float64") @ rotation(entries, 12) @ kernel
            return np.sum(y * upstream)

        # Central differences are exact to ten digits here.
        expected = np.zeros_like(values)
        for place in np.ndindex(*values.shape):
            step = np.zeros_like(values)
            step[place] = 1e-5
            expected[place] = (loss(values + step) - loss(values - step)) / 2e-5
        methods.close(of_q, expected, 5e-5)

    def test_lengths_and_angles_of_columns_stay(self):
        model = _model()
        layer, kernel, _ = _site(model)
        kra.inject(model, kra.OFT(6), "site")
        methods.randomize(layer.adapter.get("default"))
        kra.merge(model)
        merged = methods.numpy(layer.kernel).astype("float64")
        assert np.abs(merged - kernel).max() > 0.1
        methods.close(merged.T @ merged, kernel.T @ kernel, 1e-5)

    def test_start_is_exact(self):
        model, x = _model(), zoo.normal(6, 12)
        base = zoo.outputs(model, x)
        kra.inject(model, kra.OFT(4), "site")
        np.testing.assert_array_equal(zoo.outputs(model, x), base)

    @pytest.mark.parametrize(
        "dim, size", [(768, 32), (588, 28), (27, 27), (33, 11), (16, 16)]
    )
    def test_blocks_are_of_one_size(self, dim, size):
        adapter = kra.OFT(32)
        adapter.build_at(methods.site_of((dim, 4)))
        count = (dim // size) * size * (size - 1) // 2
        assert adapter.size == size
        assert np.prod(adapter.oft_q.shape) == count == dim * (size - 1) // 2

    def test_inputs_without_blocks(self):
        model = _model((37, 4))
        with pytest.raises(ValueError, match="at least 37, the smallest div"):
            kra.inject(model, kra.OFT(32), "site")
        assert kra.sites(model) == {}
        kra.inject(model, kra.OFT(37), "site")

    @pytest.mark.every_backend
    def test_quantized_base(self):
        model, x = _model(), zoo.normal(6, 12)
        model.quantize("int8")
        layer = model.get_layer("site")
        kra.inject(model, kra.OFT(4), "site")
        values = methods.randomize(layer.adapter.get("default"))["oft_q"]
        kernel = supported.as_view(layer, quantized.dequantized_kernel(layer))
        kernel = methods.numpy(kernel).astype("float64")
        expected = x @ rotation(values, 12) @ kernel
        bias = methods.numpy(layer.bias)
        # Keras rounds the rotated inputs to 8 bits.
        found = methods.numpy(model(x)) - bias
        methods.close(found, expected, 0.02)

    @pytest.mark.every_backend
    def test_16_bits_do_not_round_the_identity(self):
        model, x = _model(dtype="mixed_bfloat16"), zoo.normal(6, 12)
        layer, kernel, _ = _site(model)
        base = methods.numpy(keras.ops.cast(model(x), "float32"))
        kra.inject(model, kra.OFT(4), "site")
        layer.adapter.get("default").oft_q.assign(np.full((3, 6), 1e-4))
        found = methods.numpy(keras.ops.cast(model(x), "float32"))
        methods.close(found, base, 0.02)

    def test_embeddings_are_refused(self):
        layer = keras.layers.Embedding(12, 4, name="site")
        model = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
        with pytest.raises(ValueError, match="does not adapt"):
            kra.inject(model, kra.OFT(4), "site")

    def test_dora_refuses_it(self):
        with pytest.raises(ValueError, match="does not depend on the base"):
            kra.DoRA(kra.OFT(4))

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"block_size": 1}, ValueError, "`block_size` must be at least 2"),
            ({"block_size": "a"}, TypeError, "`block_size` must be an integer"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            kra.OFT(**arguments)

    def test_config_round_trip(self):
        for template in (kra.OFT(7), kra.OFT(8, share_blocks=True)):
            config = template.get_config()
            assert kra.OFT.from_config(config).get_config() == config
        assert config["share_blocks"] is True
