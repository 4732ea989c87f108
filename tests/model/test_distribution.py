"""Variables are created in the `tf.distribute` scope of a model only."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="tf.distribute is TensorFlow's",
)


def _model():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, name="site"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    return zoo.set_weights(model)


def _strategy():
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0"])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    model = _model()
    kra.inject(model, kra.LoRA(2), "site")
    zoo.randomize(model)
    kra.save_adapter(model, path)
    return path


@pytest.mark.parametrize("load", [False, True], ids=["inject", "load_adapter"])
def test_attaching_outside_is_refused(file, load):
    strategy = _strategy()
    with strategy.scope():
        model = _model()
    x = zoo.normal(8, 4)
    before, expected = zoo.snapshot(model), zoo.outputs(model, x)

    def attach():
        if load:
            kra.load_adapter(model, file)
        else:
            kra.inject(model, kra.LoRA(2), "site")

    with pytest.raises(ValueError, match=r"`with strategy.scope\(\):`"):
        attach()
    assert not kra.sites(model) and type(model) is keras.Sequential
    after = zoo.snapshot(model)
    assert after.keys() == before.keys()
    np.testing.assert_array_equal(zoo.outputs(model, x), expected)
    with _strategy().scope():
        with pytest.raises(ValueError, match=r"`with strategy.scope\(\):`"):
            attach()

    with strategy.scope():
        attach()
        model.compile("adam", "mse")
    weights = kra.sites(model)["layers/dense"].adapter.get("default").weights
    values = [keras.ops.convert_to_numpy(weight).copy() for weight in weights]
    model.fit(x, zoo.normal(8, 2), epochs=2, verbose=0)
    moved = [
        np.any(keras.ops.convert_to_numpy(w) != v)
        for w, v in zip(weights, values)
    ]
    assert all(moved)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: kra.eject(model),
        lambda model: kra.merge(model),
        lambda model: kra.set_active(model, []),
        lambda model: kra.truncate(model, 1),
        lambda model: kra.to_lora(model),
        lambda model: kra.combine(model, {"default": 0.5}, name="half"),
    ],
    ids=["eject", "merge", "set_active", "truncate", "to_lora", "combine"],
)
def test_a_new_optimizer_outside_is_refused(change):
    """The set of trained weights changes, so the optimizer is a new one."""
    strategy = _strategy()
    x, y = zoo.normal(8, 4), zoo.normal(8, 2)
    with strategy.scope():
        model = _model()
        kra.inject(model, kra.DyLoRA(2), "site")
        model.compile("adam", "mse")
    model.fit(x, y, verbose=0)
    expected, optimizer = zoo.outputs(model, x), model.optimizer
    with pytest.raises(ValueError, match=r"`with strategy.scope\(\):`"):
        change(model)
    assert model.optimizer is optimizer
    np.testing.assert_array_equal(zoo.outputs(model, x), expected)
    with kra.disabled(model):
        model.predict(x, verbose=0)
    model.fit(x, y, verbose=0)
    with strategy.scope():
        change(model)
        model.compile("adam", "mse")
    if model.trainable_variables:
        model.fit(x, y, verbose=0)


TWO_DEVICES = """
import tensorflow as tf

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests.model.test_distribution import _model

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
outside = _model()
with strategy.scope():
    with pytest.raises(ValueError, match="was built outside of the scope"):
        kra.inject(outside, kra.LoRA(2), "site")
    model = _model()
assert not kra.sites(outside)
with pytest.raises(ValueError, match="was built under"):
    kra.inject(model, kra.LoRA(2), "site")
with strategy.scope():
    kra.inject(model, kra.LoRA(2), "site")
    model.compile("adam", "mse")
x, y = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
losses = model.fit(x, y, epochs=3, verbose=0).history["loss"]
assert losses[-1] < losses[0]
"""


@pytest.mark.cpu_seconds(25, reason="a process with two devices")
def test_two_devices():
    result = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES],
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
