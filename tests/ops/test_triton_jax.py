"""The Triton kernel in JAX programs: interpreted, and compiled for GPUs.

Neither needs a GPU. What only one can tell is told by benchmarks/gpu.py.
"""

import importlib.util
import os
import pathlib
import sys

import keras
import pytest

from tests.plans import run_apart

if keras.config.backend() != "jax":
    pytest.skip("tests JAX", allow_module_level=True)

# Not imported: TensorFlow may have been, see `ops/triton.py`.
if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton for this platform", allow_module_level=True)

HERE = pathlib.Path(__file__).parent
# Where `make` puts what JAX needs to compile for a GPU: not beside the other
# packages, as JAX looks for a GPU then whenever it is imported.
CUDA = pathlib.Path(sys.prefix) / "cuda"


def test_in_the_interpreter():
    run_apart(
        HERE / "triton_jax_interpreter.py",
        TRITON_INTERPRET="1",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )


@pytest.mark.skipif(
    not CUDA.exists(), reason="`make test` installs jax_triton for this test"
)
# After TensorFlow, which KerasHub imports, `import triton` alone crashes.
@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(
            ["-p", "tensorflow", "-k", "768"], marks=pytest.mark.slow
        ),
    ],
)
def test_compiled_for_gpus(options):
    path = [str(CUDA), os.environ.get("PYTHONPATH")]
    run_apart(
        HERE / "triton_jax_compiler.py",
        *options,
        PYTHONPATH=os.pathsep.join(filter(None, path)),
        KERAS_RANDADAPT_TRITON="1",
        JAX_PLATFORMS="cpu",
    )
