"""Sites whose kernel or bias a layer around them reads instead of calling."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_randadapt as kra
from tests import methods
from tests import zoo

pytestmark = pytest.mark.every_backend


class _Reader(keras.layers.Layer):
    """Attention of libraries does so, to call a fused product."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.layers.Dense(6, name="inner")
        self.norm = keras.layers.LayerNormalization(name="norm")

    def build(self, shape):
        self.inner.build(shape)
        self.norm.build(shape)

    def call(self, x, training=None):
        y = ops.matmul(x, self.inner.kernel) + self.inner.bias
        return y * self.norm.gamma + self.norm.beta


class _Tied(keras.Model):
    """Its own `call` reads the table, which on JAX is in no layer's call."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def build(self, shape):
        self.inner.build((None, 6))

    def call(self, x, training=None):
        return ops.matmul(x, self.inner.kernel)


def _model():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, _Reader()(inputs))
    return zoo.set_weights(model), zoo.normal(8, 6)


@pytest.mark.parametrize(
    "template",
    [
        lambda: kra.BitFit(),
        lambda: kra.Hydra(2),
        lambda: kra.IA3(),
        lambda: kra.LoRA(2),
    ],
    ids=["bitfit", "hydra", "ia3", "lora"],
)
def test_what_is_read_is_adapted(template):
    model, x = _model()
    base = zoo.outputs(model, x)
    kra.inject(model, template(), "inner")
    np.testing.assert_array_equal(zoo.outputs(model, x), base)
    zoo.randomize(model)
    live = zoo.outputs(model, x)
    assert np.abs(live - base).max() > 1e-3
    before = [methods.numpy(w) for w in model.trainable_variables]
    zoo.fit(model, x)
    for one, two in zip(before, model.trainable_variables, strict=True):
        assert not np.array_equal(one, methods.numpy(two)), two.path
    trained = zoo.outputs(model, x)
    with kra.disabled(model):
        np.testing.assert_array_equal(zoo.outputs(model, x), base)
    kra.merge(model)
    methods.close(zoo.outputs(model, x), trained)


def test_offsets_of_normalizations():
    model, x = _model()
    base = zoo.outputs(model, x)
    kra.inject(model, kra.BitFit(), "norm")
    (adapter,) = model._randadapt.adapters("default").values()
    d = zoo.normal(6, seed=4)
    adapter.bias_delta.assign(d)
    methods.close(zoo.outputs(model, x), (base.reshape(8, 6) + d).ravel())


def test_weights_files_hold_the_base_bias(tmp_path):
    model, x = _model()
    kra.inject(model, kra.BitFit(), ["inner", "norm"])
    zoo.randomize(model)
    out = zoo.outputs(model, x)
    model.save_weights(tmp_path / "a.weights.h5")
    other, _ = _model()
    kra.inject(other, kra.BitFit(), ["inner", "norm"])
    zoo.randomize(other, seed=7)
    other.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(zoo.outputs(other, x), out)
    kra.eject(other)
    plain, _ = _model()
    np.testing.assert_array_equal(zoo.outputs(other, x), zoo.outputs(plain, x))


def test_updates_of_training_steps():
    """DyLoRA trains another rank in each step, here always the first."""
    model, x = _model()
    kra.inject(model, kra.DyLoRA(4), "inner")
    zoo.randomize(model)
    (adapter,) = model._randadapt.adapters("default").values()
    kernels = []
    adapter.drawn_rank = lambda: ops.convert_to_tensor(1, dtype="int32")
    layer = model.layers[1]
    layer.inner._check_read = lambda adapters: kernels.append(
        methods.numpy(adapter.training_delta_kernel())
    )
    y = methods.numpy(model(x, training=True))
    assert len(kernels) == 1
    kernel = methods.numpy(layer.inner._kernel) + kernels[0]
    wanted = x @ kernel + methods.numpy(layer.inner.bias)
    wanted = wanted * methods.numpy(layer.norm.gamma)
    methods.close(y, wanted + methods.numpy(layer.norm.beta))


@pytest.mark.parametrize(
    "template, match",
    [
        (lambda: kra.LoRA(2, dropout=0.5), "the adapter's `dropout` would be"),
        (lambda: kra.Bottleneck(2), "would miss it"),
    ],
    ids=["dropout", "bottleneck"],
)
def test_what_a_kernel_cannot_show(template, match):
    model, x = _model()
    kra.inject(model, template(), "inner")
    with pytest.raises(ValueError, match=match):
        model(x)
    with kra.disabled(model):
        model(x)


def test_quantized_kernel():
    inner = keras.layers.Dense(6, name="inner")
    model = _Tied(inner)
    model.build((None, 6))
    inner.quantize("int8")
    kra.inject(model, kra.LoRA(2), "inner")
    with pytest.raises(ValueError, match="kernel in 'int8' can't show it"):
        model(zoo.normal(8, 6))
    # Nothing computes with it here.
    assert "int8" in str(inner.kernel.dtype)


def test_reader_that_is_the_model_itself():
    model = _Tied(keras.layers.Dense(6, name="inner"))
    model.build((None, 6))
    x = zoo.normal(8, 6)
    kra.inject(model, kra.LoRA(2, dropout=0.5), "inner")
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match="the adapter's `dropout` would be"):
        model.fit(x, x, verbose=0)


def test_reading_outside_of_a_call():
    """Exporters and users read kernels too."""
    model, x = _model()
    kra.inject(model, kra.LoRA(2, dropout=0.5), "inner")
    zoo.randomize(model)
    inner = model.layers[1].inner
    kernel, bias = methods.numpy(inner.kernel), methods.numpy(inner.bias)
    kra.merge(model)
    methods.close(kernel, methods.numpy(inner.kernel))
    methods.close(bias, methods.numpy(inner.bias))
