"""BitFit: biases, where there are some."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.sites import supported
from tests import methods
from tests import zoo

pytestmark = pytest.mark.one_backend


def _model():
    inputs = keras.Input((7,))
    x = keras.layers.Dense(6, activation="tanh", name="one")(inputs)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(5, use_bias=False, name="plain")(x)
    outputs = keras.layers.Dense(3, name="head")(x)
    return zoo.set_weights(keras.Model(inputs, outputs)), zoo.normal(8, 7)


def _inject(model, **kwargs):
    """Into all of `_model`, one layer of which has no bias."""
    with pytest.warns(kra.AdapterWarning, match="without a bias.*plain"):
        return kra.inject(model, kra.BitFit(), **kwargs)


class TestBitFit:
    def test_is_the_model_with_other_biases(self):
        model, x = _model()
        expected, _ = _model()
        _inject(model, keep_trainable="head")
        assert [s.name for s in kra.sites(model).values()] == ["one", "norm"]
        for name in ("one", "norm"):
            site = model.get_layer(name)
            d = zoo.normal(6, seed=3)
            site.adapter.get("default").bias_delta.assign(d)
            bias = supported.bias_variable(expected.get_layer(name))
            bias.assign(methods.numpy(bias) + d)
        out = zoo.outputs(expected, x)
        methods.close(zoo.outputs(model, x), out)
        kra.merge(model)
        methods.close(zoo.outputs(model, x), out, 1e-6)
        for one, two in zip(model.variables, expected.variables):
            methods.close(one, methods.numpy(two), 1e-6)

    def test_trains_what_training_the_biases_would(self):
        """Three steps of SGD, against the same on the biases themselves."""
        y = zoo.normal(8, 3, seed=1)
        values = []
        for adapted in (True, False):
            model, x = _model()
            if adapted:
                _inject(model)
            else:
                for layer in model.layers:
                    for weight in layer.weights:
                        weight.trainable = weight.name in ("bias", "beta")
            model.compile(keras.optimizers.SGD(0.1), "mse")
            model.fit(x, y, batch_size=8, epochs=3, verbose=0)
            if adapted:
                kra.merge(model)
            values.append([methods.numpy(v) for v in model.variables])
        for one, two in zip(*values):
            methods.close(one, two, 1e-5)

    @pytest.mark.every_backend
    def test_a_merge_in_mixed_precision_rounds_nothing(self):
        """Biases are float32 variables, whatever is computed in."""
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            model, x = _model()
        finally:
            keras.config.set_dtype_policy("float32")
        kra.inject(model, kra.BitFit(), ["one", "norm"])
        expected = []
        for name in ("one", "norm"):
            site = model.get_layer(name)
            d = 1e-4 * zoo.normal(6, seed=3)
            site.adapter.get("default").bias_delta.assign(d)
            bias = supported.bias_variable(site)
            expected.append(methods.numpy(bias) + d)
        kra.merge(model)
        for name, value in zip(("one", "norm"), expected):
            bias = supported.bias_variable(model.get_layer(name))
            np.testing.assert_allclose(methods.numpy(bias), value, rtol=1e-6)

    @pytest.mark.every_backend
    def test_offsets_are_not_rounded_to_the_dtype_of_outputs(self):
        """Keras adds them in float32, in models of 16 bits as well."""
        layer = keras.layers.LayerNormalization(dtype="mixed_bfloat16")
        inputs = keras.Input((4,))
        model = keras.Model(inputs, layer(inputs))
        kra.inject(model, kra.BitFit())
        layer.adapter.get("default").bias_delta.assign([1 + 2**-10] * 4)
        assert layer.beta.dtype == vars(layer)["beta"].value.dtype
        methods.close(layer.beta, np.full(4, 1 + 2**-10, "float32"), 1e-7)

    def test_layers_without_a_bias(self):
        model, _ = _model()
        with pytest.warns(UserWarning, match="1 of the 2 layers .* no bias"):
            report = kra.inject(model, kra.BitFit(), ["one", "plain"])
        assert len(report.sites) == 1
        kra.eject(model)
        with pytest.raises(ValueError, match="has a bias to train"):
            kra.inject(model, kra.BitFit(), "plain")
        with pytest.warns(UserWarning, match="without a bias.*plain"):
            kra.inject(model, kra.BitFit())
        kra.eject(model)
        llama, _, _ = zoo.llama()
        with pytest.raises(ValueError, match="adapts by default"):
            kra.inject(llama, kra.BitFit())
        assert kra.sites(llama) == {} and kra.sites(model) == {}

    def test_layers_that_cannot_be_adapted(self):
        model = keras.Sequential(
            [
                keras.Input((4, 4, 3)),
                keras.layers.Conv2D(2, 2),
                keras.layers.Reshape((3, 3, 2)),
                keras.layers.ConvLSTM1D(2, 2),
            ]
        )
        with pytest.warns(UserWarning, match="stay frozen: .*conv_lstm"):
            report = kra.inject(model, kra.BitFit())
        assert len(report.sites) == 1

    @pytest.mark.every_backend
    @pytest.mark.parametrize(
        "layer, shape",
        [
            (lambda: keras.layers.LayerNormalization(axis=[1, 2]), (4, 3)),
            (lambda: keras.layers.BatchNormalization(axis=1), (4, 3)),
            (lambda: keras.layers.GroupNormalization(2, axis=-1), (3, 4)),
        ],
    )
    def test_normalizations(self, layer, shape):
        inputs = keras.Input(shape)
        model = zoo.set_weights(keras.Model(inputs, layer()(inputs)))
        x = zoo.normal(8, *shape)
        kra.inject(model, kra.BitFit())
        zoo.randomize(model)
        before = zoo.outputs(model, x)
        kra.merge(model)
        methods.close(zoo.outputs(model, x), before)

    def test_other_methods_do_not_take_normalizations(self):
        model, _ = _model()
        with pytest.raises(ValueError, match="can't be adapted"):
            kra.inject(model, kra.LoRA(2), "norm")

    def test_file(self, tmp_path):
        model, x = _model()
        _inject(model)
        zoo.randomize(model)
        out = zoo.outputs(model, x)
        kra.save_adapter(model, tmp_path / "file")
        kra.eject(model)
        kra.load_adapter(model, tmp_path / "file")
        np.testing.assert_array_equal(zoo.outputs(model, x), out)

    def test_config_round_trip(self):
        assert kra.BitFit().get_config() == {}
        config = kra.BitFit(dtype="bfloat16").get_config()
        assert kra.BitFit.from_config(config).get_config() == config


class TestPaperCount:
    @pytest.mark.slow
    def test_roberta_base(self):
        """All biases and offsets: 102,144."""
        model = methods.roberta(intermediate_dim=3072)
        assert kra.inject(model, kra.BitFit()).adapter_parameters == 102_144
