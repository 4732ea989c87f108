"""The Triton kernel in JAX programs: interpreted, and compiled for GPUs.

Neither needs a GPU. What only one can tell is told by benchmarks/gpu.py.
"""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

if keras.config.backend() != "jax":
    pytest.skip("tests JAX", allow_module_level=True)

pytest.importorskip("triton", reason="there is no Triton for this platform")

HERE = pathlib.Path(__file__).parent
# Where `make` puts what JAX needs to compile for a GPU: not beside the other
# packages, as JAX looks for a GPU then whenever it is imported.
CUDA = pathlib.Path(sys.prefix) / "cuda"


def run(name, **environment):
    """Runs a file of tests in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", HERE / name],
        env={**os.environ, **environment},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    assert " passed" in process.stdout
    assert "skipped" not in process.stdout


def test_in_the_interpreter():
    run(
        "triton_jax_interpreter.py",
        TRITON_INTERPRET="1",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )


@pytest.mark.skipif(
    not CUDA.exists(), reason="`make test` installs jax_triton for this test"
)
def test_compiled_for_gpus():
    path = [str(CUDA), os.environ.get("PYTHONPATH")]
    run(
        "triton_jax_compiler.py",
        PYTHONPATH=os.pathsep.join(filter(None, path)),
        JAX_PLATFORMS="cpu",
    )
