"""The speed benchmarks run to their end, on sizes that say nothing."""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

ROOT = pathlib.Path(__file__).parents[2]


def _run(script, *arguments, **environment):
    process = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def _table(output):
    """The cells of the rows, by the first one."""
    rows = [line for line in output.splitlines() if line.startswith("| ")]
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in rows
    ]
    return {row[0]: row[1:] for row in rows if not row[0].startswith("---")}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "llama-tiny"])
def test_training_step(model):
    table = _table(
        _run(
            "training_step.py",
            *f"--model {model} --tokens 128 --repeats 1".split(),
        )
    )
    for method in ("one vector", "enable_lora(8)", "RLoRA(512)"):
        assert float(table[method][1]) > 0
    assert table["one vector"][1] == "1.000"


@pytest.mark.slow
@pytest.mark.skipif(
    keras.config.backend() == "tensorflow",
    reason="benchmarks/gpu.py runs PyTorch and JAX",
)
def test_gpu():
    backend = keras.config.backend()
    environment = {"TRITON_INTERPRET": "1"} if backend == "torch" else {}
    output = _run("gpu.py", "--quick", "--backend", backend, **environment)
    table = _table(output)
    for dtype in ("float32", "bfloat16", "float16"):
        assert float(table[dtype][0]) <= float(table[dtype][2])
    assert output.splitlines()[-1].startswith('{"device": "')
