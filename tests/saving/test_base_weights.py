"""The fingerprint of the base weights that an adapter file was trained on."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import random
from keras_randadapt.model import fingerprint
from tests import adapter_files
from tests import zoo

#: Methods that compute their update from the base kernels, and others.
DEPENDENT = {
    "pissa": lambda: kra.LoRA(2, initialization="pissa"),
    "olora": lambda: kra.LoRA(2, initialization="olora"),
    "dora": lambda: kra.DoRA(kra.LoRA(2)),
    "dvora": lambda: kra.DoRA(kra.VeRA(4)),
    "hira": lambda: kra.HiRA(2),
    "hydra": lambda: kra.Hydra(2),
    "oft": lambda: kra.OFT(3),
}
INDEPENDENT = {
    "lora": lambda: kra.LoRA(2),
    "rlora": lambda: kra.RLoRA(4),
    "bottleneck": lambda: kra.Bottleneck(2),
}


def _model(seed=0, dtype="float32"):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="hidden", dtype=dtype),
            keras.layers.Dense(3, name="head", dtype=dtype),
        ]
    )
    return zoo.set_weights(model, seed)


def _saved(make, path, seed=0):
    model = _model(seed)
    kra.inject(model, make(), "hidden")
    zoo.randomize(model)
    kra.save_adapter(model, path)
    return model


def test_formula():
    """Four random combinations of the rows, by four of the columns."""
    view = zoo.normal(9, 5)
    rows = random.signs(0, "fingerprint rows", (4, 9)).astype("float64")
    columns = random.signs(0, "fingerprint columns", (5, 4)).astype("float64")
    expected = np.einsum("ki,ij,jl->kl", rows, view.astype("float64"), columns)
    found = fingerprint.of_kernel(view)
    assert found.dtype == "float32" and found.shape == (16,)
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-6)


def test_golden_values():
    """Files hold these numbers, so they are the same for ever."""
    view = np.arange(12, dtype="float32").reshape(4, 3)
    np.testing.assert_array_equal(fingerprint.of_kernel(view), GOLDEN)


GOLDEN = [6, -18, -18, 6, -22, 66, 66, -22, 2, -6, -6, 2, 8, -24, -24, 8]


@pytest.mark.parametrize("rows", [1, 4095, 4096, 4097])
def test_kernels_of_many_rows(rows):
    view = zoo.normal(rows, 3)
    signs = random.signs(0, "fingerprint rows", (4, rows)).astype("float64")
    columns = random.signs(0, "fingerprint columns", (3, 4)).astype("float64")
    np.testing.assert_allclose(
        fingerprint.of_kernel(view).reshape(4, 4),
        signs @ view.astype("float64") @ columns,
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", [*DEPENDENT, *INDEPENDENT])
def test_other_base(name, tmp_path):
    make = {**DEPENDENT, **INDEPENDENT}[name]
    path = tmp_path / "a.safetensors"
    trained = _saved(make, path)
    same = _model()
    kra.load_adapter(same, path)
    x = zoo.normal(4, 6)
    np.testing.assert_array_equal(zoo.outputs(same, x), zoo.outputs(trained, x))
    other = _model(seed=1)
    before, classes = zoo.snapshot(other), [type(x) for x in other.layers]
    match = r"other base weights: the kernels of 1 of its 1 sites differ"
    if name in DEPENDENT:
        with pytest.raises(ValueError, match=match):
            kra.load_adapter(other, path)
        after = zoo.snapshot(other)
        assert after.keys() == before.keys()
        assert [type(x) for x in other.layers] == classes
        assert kra.sites(other) == {} and type(other) is keras.Sequential
        with pytest.warns(kra.AdapterWarning, match=match) as caught:
            kra.load_adapter(other, path, check_base="warn")
    else:
        with pytest.raises(ValueError, match=match):
            kra.load_adapter(other, path, check_base="error")
        assert kra.sites(other) == {}
        with pytest.warns(kra.AdapterWarning, match=match) as caught:
            kra.load_adapter(other, path)
    files = {w.filename for w in caught if w.category is kra.AdapterWarning}
    assert files == {__file__}
    kra.eject(other)
    kra.load_adapter(other, path, check_base="ignore")


def test_adapter_in_place(tmp_path):
    """The base may have changed since the adapter was attached."""
    path = tmp_path / "a.safetensors"
    model = _saved(DEPENDENT["dora"], path)
    kernel = keras.ops.convert_to_numpy(model.layers[0]._kernel)
    model.layers[0]._kernel.assign(kernel + 1)
    before = zoo.snapshot(model)
    with pytest.raises(ValueError, match="other base weights"):
        kra.load_adapter(model, path)
    for key, (name, value) in zoo.snapshot(model).items():
        np.testing.assert_array_equal(before[key][1], value, err_msg=name)


@pytest.mark.parametrize("mode", ["bfloat16", "float16", "int8", "int4"])
def test_copies_of_the_same_weights(mode, tmp_path):
    """Rounded copies are the same base, and rounded others are not."""

    def model(seed):
        if not mode.startswith("int"):
            return _rounded(_wide(seed), mode)
        model = _wide(seed)
        model.quantize(mode)
        return model

    path, back = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    trained = _wide(0)
    kra.inject(trained, kra.DoRA(kra.LoRA(2)), "hidden")
    kra.save_adapter(trained, path)
    copy = model(0)
    kra.load_adapter(copy, path)
    kra.save_adapter(copy, back)
    kra.eject(trained)
    kra.load_adapter(trained, back)
    with pytest.raises(ValueError, match="other base weights"):
        kra.load_adapter(model(1), path)


def _wide(seed, dtype="float32"):
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(48, name="hidden", dtype=dtype),
        ]
    )
    return zoo.set_weights(model, seed)


def _rounded(model, dtype):
    copy = _wide(0, dtype)
    for one, other in zip(copy.weights, model.weights):
        one.assign(keras.ops.cast(other, dtype))
    return copy


def test_precisions_are_told(tmp_path):
    model = _wide(0, "bfloat16")
    kra.inject(model, kra.LoRA(2), "hidden")
    kra.save_adapter(model, tmp_path / "a.safetensors")
    _, metadata = adapter_files.read(tmp_path / "a.safetensors")
    assert metadata["precisions"] == [["bfloat16", 1]]


@pytest.mark.one_backend
def test_file_of_the_first_version(tmp_path):
    path = tmp_path / "a.safetensors"
    _saved(DEPENDENT["dora"], path)
    adapter_files.as_version_1(path)
    with pytest.raises(ValueError, match="no fingerprint of the base"):
        kra.load_adapter(_model(), path, check_base="error")
    with pytest.warns(kra.AdapterWarning, match="no fingerprint of the base"):
        kra.load_adapter(_model(1), path)
    kra.load_adapter(_model(1), path, check_base="ignore")


@pytest.mark.one_backend
def test_bad_argument(tmp_path):
    path = tmp_path / "a.safetensors"
    _saved(INDEPENDENT["lora"], path)
    with pytest.raises(ValueError, match="`check_base` must be"):
        kra.load_adapter(_model(), path, check_base=True)


@pytest.mark.one_backend
def test_kernels_that_hold_the_delta_have_no_fingerprint(tmp_path):
    model = _saved(INDEPENDENT["lora"], tmp_path / "a.safetensors")
    with kra.merged(model):
        with pytest.raises(ValueError, match="inside a `merged` block"):
            kra.save_adapter(model, tmp_path / "b.safetensors")
    kra.save_adapter(model, tmp_path / "b.safetensors")
