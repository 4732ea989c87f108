"""Keras's NumPy backend: it can't train, but it loads, computes and merges."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.one_backend("torch")

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import sys

import keras
import numpy as np

import keras_randadapt as kra
from tests import zoo
from tests.model.test_files_of_before import ADAPTERS, FOLDER, _model

assert keras.config.backend() == "numpy"
expected = np.load(FOLDER / "outputs.npz")
for name in ADAPTERS:
    model = _model()
    base = zoo.outputs(model, expected["x"])
    kra.load_adapter(model, FOLDER / f"{name}.safetensors")
    out = zoo.outputs(model, expected["x"])
    np.testing.assert_allclose(out, expected[name], rtol=1e-5, atol=1e-6)
    with kra.disabled(model):
        np.testing.assert_array_equal(zoo.outputs(model, expected["x"]), base)
    if name.startswith("bottleneck"):
        continue
    kra.merge(model)
    merged = zoo.outputs(model, expected["x"])
    np.testing.assert_allclose(merged, out, rtol=1e-5, atol=1e-5)
np.testing.assert_array_equal(kra.ops.fwht(np.eye(4)[0]), 0.5)
print(len(ADAPTERS), "files")
"""


@pytest.mark.cpu_seconds(20, reason="a process that imports Keras")
def test_files_load_compute_and_merge():
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            **os.environ,
            "KERAS_BACKEND": "numpy",
            "PYTHONPATH": str(ROOT),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "files" in process.stdout
