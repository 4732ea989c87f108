"""Tensors come back from files as they were, whatever their strides are."""

import ast
import pathlib

import numpy as np
import pytest
import safetensors.numpy

import keras_randadapt
from keras_randadapt.model import tensor_data

pytestmark = pytest.mark.one_backend


def test_strides_do_not_matter(tmp_path):
    plain = np.arange(24, dtype="float32").reshape(4, 6)
    tensors = {
        "transposed": plain.T,
        "sliced": plain[::2, ::3],
        "backwards": plain[::-1],
        "repeated": np.broadcast_to(plain[:1], (3, 6)),
        "scalar": np.float32(3),
    }
    tensor_data.write(tmp_path / "a", tensors, {"format": "pt"})
    for found in (
        safetensors.numpy.load(tensor_data.data_of(tensors, {"x": "y"})),
        safetensors.numpy.load_file(tmp_path / "a"),
    ):
        assert set(found) == set(tensors)
        for key, array in tensors.items():
            assert found[key].shape == array.shape
            np.testing.assert_array_equal(found[key], array, err_msg=key)


def test_nothing_else_writes_tensors():
    """The library of safetensors itself mixes up transposed arrays."""
    root = pathlib.Path(keras_randadapt.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in ("save", "save_file")
        and ast.unparse(node.value).startswith("safetensors")
    }
    assert found == {"model/tensor_data.py"}
