"""Keras's weights files of other adapters than a model has."""

import h5py
import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo

pytestmark = pytest.mark.one_backend

X = zoo.normal(4, 6)


def _model(adapter=None, target="hidden", name="default", width=6):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(width, name="hidden"),
            keras.layers.Dense(6, name="other"),
        ]
    )
    zoo.set_weights(model)
    if adapter is not None:
        kra.inject(model, adapter, target, name=name)
    return model


def _file(tmp_path, model, kind="h5", name="default"):
    zoo.randomize(model, name)
    if kind == "keras":
        model.save(tmp_path / "x.keras")
        return tmp_path / "x.keras"
    if kind == "json":
        path = tmp_path / "x.weights.json"
        model.save_weights(path, max_shard_size=1e-6)
        return path
    model.save_weights(tmp_path / "x.weights.h5")
    return tmp_path / "x.weights.h5"


OTHERS = {
    "seed": (kra.RLoRA(4, seed=1), {"adapter": kra.RLoRA(4, seed=2)}),
    "method": (kra.VeRA(4), {"adapter": kra.RLoRA(4)}),
    "basis": (
        kra.VeRA(4, basis="uniform"),
        {"adapter": kra.VeRA(4, basis="gaussian")},
    ),
    "scale": (kra.LoRA(2, alpha=2), {"adapter": kra.LoRA(2, alpha=8)}),
    "inner": (
        kra.DoRA(kra.VeRA(4, seed=1)),
        {"adapter": kra.DoRA(kra.VeRA(4, seed=2))},
    ),
    "name": (kra.LoRA(2), {"adapter": kra.LoRA(2), "name": "b"}),
    "site": (kra.LoRA(2), {"adapter": kra.LoRA(2), "target": "other"}),
    "more sites": (
        kra.LoRA(2),
        {"adapter": kra.LoRA(2), "target": ["hidden", "other"]},
    ),
}
WORDS = {
    "seed": "seed=1 in the file and 2 here",
    "method": "a keras_randadapt>VeRA in the file, a keras_randadapt>RLoRA",
    "basis": "basis='uniform' in the file and 'gaussian' here",
    "scale": "(alpha|scaling)=.* in the file and .* here",
    "inner": "adapter=",
    "name": r"the file has \['default'\], and the model has \['b'\]",
    "site": "on other sites",
    "more sites": r"only the model has \['layers/dense_1'\]",
}


@pytest.mark.parametrize("kind", ["h5", "json", "keras"])
@pytest.mark.parametrize("what", OTHERS)
def test_refused(tmp_path, what, kind):
    adapter, ours = OTHERS[what]
    path = _file(tmp_path, _model(adapter), kind)
    model = _model(**ours)
    zoo.randomize(model, ours.get("name", "default"), seed=1)
    before = zoo.snapshot(model)
    with pytest.raises(ValueError, match=WORDS[what]):
        model.load_weights(path)
    for key, (name, value) in zoo.snapshot(model).items():
        np.testing.assert_array_equal(before[key][1], value, err_msg=name)


@pytest.mark.parametrize("kind", ["h5", "json", "keras"])
def test_the_same_adapter(tmp_path, kind):
    for adapter in (kra.RLoRA(4), kra.DoRA(kra.RandLoRA(2))):
        trained = _model(adapter)
        path = _file(tmp_path, trained, kind)
        model = _model(adapter)
        model.load_weights(path)
        np.testing.assert_array_equal(
            zoo.outputs(model, X), zoo.outputs(trained, X)
        )


def test_keras_may_skip_what_does_not_fit(tmp_path):
    """A user asks for it, and Keras tells what it skipped."""
    path = _file(tmp_path, _model(kra.RLoRA(4, seed=1)))
    model = _model(kra.RLoRA(4, seed=2))
    zoo.randomize(model, seed=1)
    out = zoo.outputs(model, X)
    with pytest.warns(UserWarning, match="could not be loaded"):
        model.load_weights(path, skip_mismatch=True)
    np.testing.assert_array_equal(zoo.outputs(model, X), out)


def test_base_model(tmp_path):
    path = tmp_path / "x.weights.h5"
    zoo.set_weights(_model(), seed=3).save_weights(path)
    model = _model(kra.RLoRA(4))
    zoo.randomize(model)
    model.load_weights(path)
    with kra.disabled(model):
        expected = zoo.set_weights(_model(), seed=3)
        np.testing.assert_array_equal(
            zoo.outputs(model, X), zoo.outputs(expected, X)
        )


def _strip(path):
    """Removes what earlier versions did not write."""
    with h5py.File(path, "a") as file:
        found = []
        file.visit(
            lambda p: found.append(p) if p.endswith("/description") else None
        )
        assert found
        for one in found:
            del file[one]


def test_file_of_the_first_version(tmp_path):
    trained = _model(kra.RLoRA(4))
    path = _file(tmp_path, trained)
    _strip(path)
    model = _model(kra.RLoRA(4))
    with pytest.warns(
        kra.AdapterWarning, match="by an earlier version"
    ) as seen:
        model.load_weights(path)
    files = {w.filename for w in seen if w.category is kra.AdapterWarning}
    assert files == {__file__}
    np.testing.assert_array_equal(
        zoo.outputs(model, X), zoo.outputs(trained, X)
    )


def test_damaged_description(tmp_path):
    path = _file(tmp_path, _model(kra.RLoRA(4)))
    with h5py.File(path, "a") as file:
        found = []
        file.visit(
            lambda p: found.append(p) if p.endswith("/description") else None
        )
        file[found[0]][:4] = 0
    with pytest.raises(ValueError, match="is damaged"):
        _model(kra.RLoRA(4)).load_weights(path)


def test_part_of_a_model(tmp_path):
    """The backbone's file of one task loads into that of another."""

    def task(adapter):
        inner = _model()
        inputs = keras.Input((6,))
        outer = keras.Model(inputs, keras.layers.Dense(2)(inner(inputs)))
        kra.inject(outer, adapter, "hidden")
        return outer, inner

    outer, inner = task(kra.RLoRA(4))
    zoo.randomize(outer)
    inner.save_weights(tmp_path / "x.weights.h5")
    alone = _model(kra.RLoRA(4))
    alone.load_weights(tmp_path / "x.weights.h5")
    np.testing.assert_array_equal(zoo.outputs(alone, X), zoo.outputs(inner, X))
    _, other = task(kra.RLoRA(4, seed=1))
    with pytest.raises(ValueError, match="weights of another adapter"):
        other.load_weights(tmp_path / "x.weights.h5")
    wrong = _model(kra.RLoRA(4), "other")
    with pytest.raises(ValueError, match="on other sites"):
        wrong.load_weights(tmp_path / "x.weights.h5")


def test_training_goes_on_from_a_checkpoint(tmp_path):
    """`ModelCheckpoint` writes such files."""
    model = _model(kra.RLoRA(4))
    path = str(tmp_path / "x.weights.h5")
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    zoo.fit(model, X, callbacks=[checkpoint])
    fresh = _model(kra.RLoRA(4))
    fresh.load_weights(path)
    np.testing.assert_array_equal(zoo.outputs(fresh, X), zoo.outputs(model, X))
