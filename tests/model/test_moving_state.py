"""State of the base model that training moves, such as a running mean."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import adapter_files
from tests import zoo


@keras.saving.register_keras_serializable(package="tests")
class RunningMean(keras.layers.Layer):
    """Subtracts a mean of all batches that it was trained on."""

    def build(self, shape):
        self.mean = self.add_weight(
            shape=(shape[-1],), initializer="zeros", trainable=False
        )
        self.count = self.add_weight(
            shape=(), initializer="zeros", trainable=False, dtype="int32"
        )

    def call(self, x, training=False):
        if training:
            mean = keras.ops.mean(x, axis=0)
            self.mean.assign(0.5 * self.mean + 0.5 * mean)
            self.count.assign(self.count + 1)
        return x - self.mean


KINDS = {
    "running": RunningMean,
    "spectral": lambda: keras.layers.SpectralNormalization(
        keras.layers.Dense(5)
    ),
    "frozen": keras.layers.BatchNormalization,
}


def _model(kind):
    return zoo.set_weights(
        keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(5, name="hidden"),
                KINDS[kind](),
                keras.layers.Dense(3, name="head"),
            ]
        )
    )


def _values(model):
    return [np.array(keras.ops.convert_to_numpy(w)) for w in model.weights]


def _train(model, seed=0, steps=2):
    zoo.fit(model, 3 + zoo.normal(8, 6, seed=seed), steps=steps)


def _trained(kind, **arguments):
    model = _model(kind)
    kra.inject(model, kra.LoRA(2), "hidden", **arguments)
    _train(model)
    return model


X = zoo.normal(4, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_file_and_eject(kind, tmp_path):
    model = _trained(kind, keep_trainable="head")
    out = zoo.outputs(model, X)
    kra.save_adapter(model, tmp_path / "a.safetensors")
    _, metadata = adapter_files.read(tmp_path / "a.safetensors")
    moved = {"running": 2, "spectral": 2, "frozen": 0}[kind]
    assert len(metadata.get("moved", [])) == moved
    fresh = _model(kind)
    kra.load_adapter(fresh, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(zoo.outputs(fresh, X), out)
    for one in (model, fresh):
        kra.eject(one)
        for value, expected in zip(_values(one), _values(_model(kind))):
            np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("kind", ["running", "spectral"])
def test_each_adapter_has_its_own(kind, tmp_path):
    base = zoo.outputs(_model(kind), X)
    model = _trained(kind)
    first = zoo.outputs(model, X)
    with kra.disabled(model):
        np.testing.assert_array_equal(zoo.outputs(model, X), base)
    np.testing.assert_array_equal(zoo.outputs(model, X), first)
    kra.inject(model, kra.LoRA(2, seed=1), "hidden", name="b")
    kra.set_active(model, "b")
    np.testing.assert_array_equal(zoo.outputs(model, X), base)
    _train(model, seed=1, steps=3)
    second = zoo.outputs(model, X)
    with kra.active(model, "default"):
        np.testing.assert_array_equal(zoo.outputs(model, X), first)
    # An inactive adapter's file has its own state.
    kra.save_adapter(model, tmp_path / "a.safetensors", "default")
    fresh = _model(kind)
    kra.load_adapter(fresh, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(zoo.outputs(fresh, X), first)
    kra.set_active(model, "default")
    np.testing.assert_array_equal(zoo.outputs(model, X), first)
    kra.save_adapter(model, tmp_path / "b.safetensors", "b")
    kra.load_adapter(fresh, tmp_path / "b.safetensors")
    kra.set_active(fresh, "b")
    np.testing.assert_array_equal(zoo.outputs(fresh, X), second)
    kra.set_active(model, [])
    np.testing.assert_array_equal(zoo.outputs(model, X), base)


@pytest.mark.parametrize("kind", ["running", "spectral"])
def test_whole_model_file(kind, tmp_path):
    model = _trained(kind)
    kra.inject(model, kra.LoRA(2, seed=1), "hidden", name="b")
    kra.set_active(model, "b")
    _train(model, seed=1)
    out = zoo.outputs(model, X)
    model.save(tmp_path / "a.keras")
    loaded = keras.models.load_model(tmp_path / "a.keras", compile=False)
    np.testing.assert_array_equal(zoo.outputs(loaded, X), out)
    kra.set_active(model, "default")
    kra.set_active(loaded, "default")
    np.testing.assert_array_equal(zoo.outputs(loaded, X), zoo.outputs(model, X))
    kra.eject(loaded)
    for value, expected in zip(_values(loaded), _values(_model(kind))):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.one_backend
def test_merge_keeps_what_was_trained():
    model = _trained("running")
    out = zoo.outputs(model, X)
    kra.merge(model)
    np.testing.assert_allclose(zoo.outputs(model, X), out, rtol=1e-5, atol=1e-6)


@pytest.mark.one_backend
def test_base_weights_that_are_loaded_later(tmp_path):
    """They are the base model's from then on, state included."""
    other = zoo.set_weights(_model("running"), seed=5)
    other.save_weights(tmp_path / "x.weights.h5")
    model = _trained("running")
    model.load_weights(tmp_path / "x.weights.h5")
    kra.eject(model)
    for value, expected in zip(_values(model), _values(other)):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.one_backend
def test_kept_layer_with_state(tmp_path):
    """The adapter has it as a kept layer, and not twice."""
    model = _model("frozen")
    name = model.layers[1].name
    kra.inject(model, kra.LoRA(2), "hidden", keep_trainable=name)
    _train(model)
    out = zoo.outputs(model, X)
    kra.save_adapter(model, tmp_path / "a.safetensors")
    assert "moved" not in adapter_files.read(tmp_path / "a.safetensors")[1]
    fresh = _model("frozen")
    kra.load_adapter(fresh, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(zoo.outputs(fresh, X), out)
    kra.eject(model)
    for value, expected in zip(_values(model), _values(_model("frozen"))):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.one_backend
def test_file_for_a_model_without_the_state(tmp_path):
    model = _trained("running")
    kra.save_adapter(model, tmp_path / "a.safetensors")
    adapter_files.edit(
        tmp_path / "a.safetensors",
        {"moved": ["layers/dense#0"]},
        {
            "layers/dense#0": np.zeros((6, 5), "float32"),
            "layers/running_mean#0": None,
            "layers/running_mean#1": None,
        },
    )
    fresh = _model("running")
    with pytest.raises(ValueError, match="this model has no such state there"):
        kra.load_adapter(fresh, tmp_path / "a.safetensors")
    assert kra.sites(fresh) == {}


@pytest.mark.parametrize("active", ["default", "other", "third"])
@pytest.mark.parametrize("heads_from", [None, "default", "other"])
def test_combined_adapters_have_the_state_of_one(active, heads_from):
    model = _trained("running", keep_trainable="head")
    means = {"default": _values(model.layers[1])[0]}
    kra.inject(model, kra.VeRA(2), "hidden", name="third")
    kra.inject(
        model, kra.VeRA(2), "hidden", name="other", keep_trainable="head"
    )
    kra.set_active(model, "other")
    _train(model, seed=1)
    means["other"] = _values(model.layers[1])[0]
    assert not np.array_equal(means["default"], means["other"])
    kra.set_active(model, active)
    before = _values(model.layers[1])
    weights = {"third": 1.0, "other": 0.5}
    if heads_from is not None:
        weights["default"] = 0.5
    kra.combine(model, weights, "both", rank=1, heads_from=heads_from)
    np.testing.assert_array_equal(_values(model.layers[1])[0], before[0])
    kra.set_active(model, "both")
    np.testing.assert_array_equal(
        _values(model.layers[1])[0], means[heads_from or "other"]
    )
    kra.eject(model)
    base = _values(_model("running").layers[1])[0]
    np.testing.assert_array_equal(_values(model.layers[1])[0], base)


def test_a_converted_adapter_keeps_what_its_training_moved():
    model = _trained("running")
    out = zoo.outputs(model, X)
    kra.inject(model, kra.LoRA(2), "hidden", name="other")
    kra.set_active(model, "other")
    base = zoo.outputs(model, X)
    kra.to_lora(model, name="default")
    np.testing.assert_array_equal(zoo.outputs(model, X), base)
    kra.set_active(model, "default")
    np.testing.assert_allclose(zoo.outputs(model, X), out, atol=1e-6)
    assert np.abs(out - base).max() > 0.1
