"""Separable convolutions and recurrent layers beside sums in NumPy."""

import re

import keras
import numpy as np
import pytest
from keras import layers

import keras_randadapt as kra
from tests import methods
from tests import zoo

pytestmark = pytest.mark.every_backend


def _around(layer, x):
    inputs = keras.Input(x.shape[1:])
    return zoo.set_weights(keras.Model(inputs, layer(inputs))), x


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _lstm(x, kernel, recurrent, bias):
    h = c = np.zeros((len(x), recurrent.shape[0]))
    for t in range(x.shape[1]):
        z = x[:, t] @ kernel + h @ recurrent + bias
        i, f, g, o = np.split(z, 4, axis=1)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
    return h


def _gru(x, kernel, recurrent, bias):
    h = np.zeros((len(x), recurrent.shape[0]))
    for t in range(x.shape[1]):
        a = np.split(x[:, t] @ kernel + bias[0], 3, axis=1)
        b = np.split(h @ recurrent + bias[1], 3, axis=1)
        z, r = _sigmoid(a[0] + b[0]), _sigmoid(a[1] + b[1])
        h = z * h + (1 - z) * np.tanh(a[2] + r * b[2])
    return h


def _simple(x, kernel, recurrent, bias):
    h = np.zeros((len(x), recurrent.shape[0]))
    for t in range(x.shape[1]):
        h = np.tanh(x[:, t] @ kernel + h @ recurrent + bias)
    return h


RECURRENT = {
    "lstm": (lambda: layers.LSTM(6, name="site"), _lstm, 4),
    "gru": (lambda: layers.GRU(6, name="site"), _gru, 3),
    "simple": (lambda: layers.SimpleRNN(6, name="site"), _simple, 1),
    "rnn_of_cell": (
        lambda: layers.RNN(layers.LSTMCell(6), name="site"),
        _lstm,
        4,
    ),
}


def _float64(variable):
    return methods.numpy(variable).astype("float64")


def _deltas(model, scaling):
    """By name of the kernel, `scaling a b` of each adapter."""
    found = {}
    for address, adapter in model._randadapt.adapters("default").items():
        delta = scaling * _float64(adapter.lora_a) @ _float64(adapter.lora_b)
        found[address.rpartition("/")[2]] = delta
    return found


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent(name):
    build, product, gates = RECURRENT[name]
    layer = build()
    model, x = _around(layer, zoo.normal(3, 5, 4))
    cell = layer.cell
    base = zoo.outputs(model, x)
    before = zoo.snapshot(model)
    kra.inject(model, kra.LoRA(2, alpha=3), "site")
    np.testing.assert_array_equal(zoo.outputs(model, x), base)
    zoo.randomize(model)
    deltas = _deltas(model, 1.5)
    assert {k: d.shape for k, d in deltas.items()} == {
        "kernel": (4, gates * 6),
        "recurrent_kernel": (6, gates * 6),
    }
    wanted = product(
        x.astype("float64"),
        _float64(cell.kernel) + deltas["kernel"],
        _float64(cell.recurrent_kernel) + deltas["recurrent_kernel"],
        _float64(cell.bias),
    )
    methods.close(methods.numpy(model(x)), wanted)
    methods.close(model.predict(x, verbose=0), wanted)
    assert list(kra.sites(model).values()) == [layer, layer]
    with kra.merged(model):
        methods.close(methods.numpy(model(x)), wanted)
    methods.close(methods.numpy(model(x)), wanted)
    kra.eject(model)
    for key, (path, value) in zoo.snapshot(model).items():
        np.testing.assert_array_equal(value, before[key][1], err_msg=path)
    np.testing.assert_array_equal(zoo.outputs(model, x), base)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_bias(name):
    build, product, _ = RECURRENT[name]
    layer = build()
    model, x = _around(layer, zoo.normal(3, 5, 4))
    kra.inject(model, kra.BitFit())
    (adapter,) = model._randadapt.adapters("default").values()
    zoo.randomize(model)
    bias = _float64(layer.cell.bias)
    wanted = product(
        x.astype("float64"),
        _float64(layer.cell.kernel),
        _float64(layer.cell.recurrent_kernel),
        bias + _float64(adapter.bias_delta).reshape(bias.shape),
    )
    methods.close(methods.numpy(model(x)), wanted)
    kra.merge(model)
    methods.close(methods.numpy(model(x)), wanted)


def test_training_trains_adapters_and_nothing_else():
    inputs = keras.Input((5, 4))
    both = layers.Bidirectional(layers.LSTM(3, dropout=0.2), name="both")
    model = zoo.set_weights(keras.Model(inputs, both(inputs)))
    x = zoo.normal(4, 5, 4)
    before = zoo.snapshot(model)
    kra.inject(model, kra.DoRA(kra.LoRA(2)), re.compile("both/.*lstm"))
    assert len(kra.sites(model)) == 4
    both.forward_layer.trainable = True
    first = {v.path: methods.numpy(v) for v in model.trainable_variables}
    assert len(first) == 12
    zoo.fit(model, x)
    for variable in model.trainable_variables:
        changed = methods.numpy(variable) != first[variable.path]
        assert np.any(changed), variable.path
    after = zoo.snapshot(model)
    for key, (path, value) in before.items():
        if "seed" not in path:
            np.testing.assert_array_equal(after[key][1], value, err_msg=path)
    out = zoo.outputs(model, x)
    kra.merge(model)
    np.testing.assert_allclose(zoo.outputs(model, x), out, atol=1e-5)


def test_the_kernels_are_formed_once_a_call():
    """A loop over time that formed them in each step would be slow."""
    layer = layers.LSTM(6, recurrent_dropout=0.5, name="site")
    model, x = _around(layer, zoo.normal(3, 7, 4))
    kra.inject(model, kra.LoRA(2), "site")
    zoo.randomize(model)
    formed = []
    for adapter in model._randadapt.adapters("default").values():
        own = adapter.delta_kernel
        adapter.delta_kernel = lambda own=own: formed.append(1) or own()
    layer(x)
    assert len(formed) == 2


def test_files(tmp_path):
    def build():
        layer = layers.GRU(6, name="site")
        return _around(layer, zoo.normal(3, 5, 4))

    model, x = build()
    kra.inject(model, kra.RLoRA(3, seed=3), ["site/recurrent_kernel"])
    zoo.randomize(model)
    out = zoo.outputs(model, x)
    kra.save_adapter(model, tmp_path / "x.safetensors")
    model.save(tmp_path / "x.keras")
    other, _ = build()
    kra.load_adapter(other, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(zoo.outputs(other, x), out)
    assert [a.rpartition("/")[2] for a in kra.sites(other)] == [
        "recurrent_kernel"
    ]
    loaded = keras.models.load_model(tmp_path / "x.keras")
    np.testing.assert_allclose(zoo.outputs(loaded, x), out, atol=1e-6)


def _separable():
    layer = layers.SeparableConv2D(
        5, (3, 2), strides=2, depth_multiplier=2, name="site"
    )
    return (layer, *_around(layer, zoo.normal(2, 7, 6, 3)))


def _separable_product(x, depthwise, pointwise, bias):
    n, height, width, channels = x.shape
    rows, columns = (height - 3) // 2 + 1, (width - 2) // 2 + 1
    y = np.zeros((n, rows, columns, pointwise.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            part = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 2]
            inner = np.einsum("nhwc,hwcm->ncm", part, depthwise)
            y[:, i, j] = inner.reshape(n, -1) @ pointwise[0, 0]
    return y + bias


def test_separable():
    layer, model, x = _separable()
    base = zoo.outputs(model, x)
    kra.inject(model, kra.LoRA(2, alpha=3), "site")
    np.testing.assert_allclose(zoo.outputs(model, x), base, atol=1e-6)
    zoo.randomize(model)
    deltas = _deltas(model, 1.5)
    depthwise = _float64(vars(layer)["depthwise_kernel"])
    pointwise = _float64(vars(layer)["pointwise_kernel"])
    assert deltas["depthwise_kernel"].shape == (6, 6)
    assert deltas["pointwise_kernel"].shape == (6, 5)
    depthwise = depthwise + deltas["depthwise_kernel"].reshape(3, 2, 3, 2)
    pointwise = pointwise + deltas["pointwise_kernel"]
    wanted = _separable_product(
        x.astype("float64"), depthwise, pointwise, _float64(layer.bias)
    )
    methods.close(methods.numpy(model(x)), wanted)
    # A layer around it may read its kernels.
    methods.close(methods.numpy(layer.depthwise_kernel), depthwise)
    methods.close(methods.numpy(layer.pointwise_kernel), pointwise)
    kra.merge(model)
    methods.close(methods.numpy(model(x)), wanted)


def test_separable_bias_and_scales():
    layer, model, x = _separable()
    base = methods.numpy(model(x))
    kra.inject(model, kra.BitFit())
    (adapter,) = model._randadapt.adapters("default").values()
    zoo.randomize(model)
    change = methods.numpy(adapter.bias_delta)
    methods.close(methods.numpy(model(x)), base + change)
    kra.eject(model)
    kra.inject(model, kra.IA3(), "site/pointwise_kernel")
    (adapter,) = model._randadapt.adapters("default").values()
    zoo.randomize(model)
    methods.close(methods.numpy(model(x)), base * methods.numpy(adapter.ia3_l))


def test_separable_dropout():
    _, model, x = _separable()
    kra.inject(model, kra.LoRA(2, dropout=0.9), "site")
    zoo.randomize(model)
    once = methods.numpy(model(x, training=True))
    assert np.abs(once - methods.numpy(model(x, training=True))).max() > 1e-3
    out = zoo.outputs(model, x)
    kra.merge(model)
    np.testing.assert_allclose(zoo.outputs(model, x), out, atol=1e-5)


@pytest.mark.parametrize(
    "build, template, match",
    [
        (RECURRENT["lstm"][0], kra.LoRA(2, dropout=0.1), "loop over time"),
        (RECURRENT["lstm"][0], kra.LoRA(7), "`rank` must be at most"),
        (RECURRENT["lstm"][0], kra.Bottleneck(2), "of matrix products"),
        (RECURRENT["gru"][0], kra.IA3(), "a bias of 36 numbers"),
    ],
    ids=["dropout", "rank", "bottleneck", "gru_bias"],
)
def test_what_is_refused(build, template, match):
    layer = build()
    model, x = _around(layer, zoo.normal(3, 5, 4))
    before = zoo.outputs(model, x)
    with pytest.raises(ValueError, match=match):
        kra.inject(model, template, "site")
    assert not kra.sites(model) and type(layer).__mro__[1] is not type(layer)
    np.testing.assert_array_equal(zoo.outputs(model, x), before)
