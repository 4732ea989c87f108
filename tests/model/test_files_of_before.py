"""Files that earlier versions wrote still load, bit for bit."""

import pathlib

import keras
import numpy as np
import pytest
import safetensors.numpy

import keras_randadapt as kra
from tests import adapter_files
from tests import zoo

FOLDER = pathlib.Path(__file__).parents[1] / "data" / "version_1"
ADAPTERS = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
MODELS = sorted(path.stem for path in FOLDER.glob("*.keras"))


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "outputs.npz") as archive:
        return dict(archive)


def _model():
    return zoo.set_weights(
        keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8, activation="tanh", name="hidden"),
                keras.layers.Dense(3, name="head"),
            ]
        )
    )


def _check_weights(model, name):
    """Every trained weight is the stored one, to the last bit."""
    stored = safetensors.numpy.load_file(FOLDER / f"{name}.safetensors")
    for address, adapter in model._randadapt.adapters("default").items():
        found = [
            np.ravel(keras.ops.convert_to_numpy(weight))
            for weight in adapter.stored_weights()
        ]
        np.testing.assert_array_equal(np.concatenate(found), stored[address])


def test_there_are_files_of_every_kind_of_method():
    assert len(ADAPTERS) >= 28 and len(MODELS) == 3


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_file(name, expected, tmp_path):
    model = _model()
    path = FOLDER / f"{name}.safetensors"
    with pytest.warns(kra.AdapterWarning, match="by an earlier version"):
        kra.load_adapter(model, path)
    _check_weights(model, name)
    np.testing.assert_allclose(
        zoo.outputs(model, expected["x"]), expected[name], rtol=1e-5, atol=1e-6
    )
    # The new version holds the same, and what the old one did not have.
    kra.save_adapter(model, tmp_path / "again.safetensors")
    tensors, metadata = adapter_files.read(tmp_path / "again.safetensors")
    old_tensors, old_metadata = adapter_files.read(path)
    assert tensors.pop("#base").shape == (1, 16)
    assert tensors.keys() == old_tensors.keys()
    for key, old in old_tensors.items():
        np.testing.assert_array_equal(tensors[key], old)
    del metadata["digest"], metadata["precisions"]
    assert metadata == {**old_metadata, "version": 2}


@pytest.mark.parametrize("name", MODELS)
def test_whole_model_file(name, expected):
    model = keras.models.load_model(FOLDER / f"{name}.keras")
    _check_weights(model, name)
    np.testing.assert_allclose(
        zoo.outputs(model, expected["x"]), expected[name], rtol=1e-5, atol=1e-6
    )
    kra.eject(model)
    base = _model()
    np.testing.assert_allclose(
        zoo.outputs(model, expected["x"]),
        zoo.outputs(base, expected["x"]),
        rtol=1e-5,
        atol=1e-6,
    )
