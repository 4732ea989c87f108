"""The speed benchmarks run to their end, on sizes that say nothing."""

import json
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
        milliseconds, over_floor, over_keras = map(float, table[method])
        assert milliseconds > 0 and over_floor > 0 and over_keras > 0


@pytest.mark.slow
def test_memory_of_a_training_step():
    output = _run(
        "training_step.py",
        *"--model tiny --tokens 128 --memory --one LoRA(8)".split(),
    )
    peak, own = json.loads(output.splitlines()[-1])
    # A process that has a framework, and a step of a tiny model.
    assert peak > 1e8 and 0 <= own < peak


@pytest.mark.slow
def test_scaling(tmp_path):
    picture = tmp_path / "scaling.png"
    output = _run(
        "scaling.py", "--quick", "--repeats", "1", "--picture", picture
    )
    table = _table(output)
    for what in ("Dense: inject", "Llama: merge", "LoRA(8), 512 tokens"):
        assert table[what][1].count(",") >= 1
        assert float(table[what][3]) == float(table[what][4])
    assert picture.stat().st_size > 1000


@pytest.mark.slow
def test_pac_bayes():
    table = _table(_run("pac_bayes.py", "--quick", "--repeats", "1"))
    without, with_term, estimation, share, size = map(
        float, table["RLoRA(384)"][2:]
    )
    assert min(without, with_term, estimation, share, size) > 0


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


@pytest.mark.slow
def test_masked_gradients():
    output = _run(
        "masked_gradients.py",
        *"--tokens 16 --dim 32 --ranks 4 8 --repeats 1".split(),
    )
    for rank in ("4", "8"):
        *times, saved, floor, most = _table(output)[rank]
        assert all(float(time) >= 0 for time in times)
        # Half of two of the eight thin products is left out.
        thin = 32 * int(rank)
        share = thin / (2 * 32 * 32 + 6 * thin)
        assert float(floor.rstrip("%")) == pytest.approx(100 * share, abs=0.1)


@pytest.mark.slow
def test_ways_of_masked_gradients_agree():
    """What the benchmark times computes the same gradients."""
    import numpy as np

    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import masked_gradients
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    tensors = masked_gradients.weights(6, 4)
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 5, 6), dtype="float32")
    found = {
        way: [
            keras.ops.convert_to_numpy(one)
            for one in masked_gradients.gradients(way, x, g, *tensors, 2)
        ]
        for way in ("all", "zeroed", "skipped", "none")
    }
    for one, two in zip(found["zeroed"], found["skipped"], strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    whole = found["all"]
    np.testing.assert_allclose(found["zeroed"][2][:, :2], whole[2][:, :2], 1e-5)
    assert not found["zeroed"][2][:, 2:].any()
    assert not found["zeroed"][3][2:].any()
