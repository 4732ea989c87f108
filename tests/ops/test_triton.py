"""The Triton kernel: in Triton's interpreter, and compiled for GPUs.

Neither needs a GPU. What only one can tell is told by benchmarks/gpu.py.
"""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_randadapt import random
from keras_randadapt.ops import RandomizedTransform
from keras_randadapt.ops import fwht
from keras_randadapt.ops.transforms import _cached_program

if keras.config.backend() != "torch":
    pytest.skip("tests PyTorch", allow_module_level=True)

pytest.importorskip("triton", reason="there is no Triton for this platform")

import torch  # noqa: E402

from keras_randadapt.ops import torch as torch_backend  # noqa: E402
from keras_randadapt.ops import triton as kernels  # noqa: E402


def test_in_the_interpreter():
    """`triton_interpreter.py`, in a process that has the interpreter."""
    here = pathlib.Path(__file__).parent
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", here / "triton_interpreter.py"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    assert " passed" in process.stdout
    assert "skipped" not in process.stdout


def plan(order, stages=2):
    signs = random.signs(0, "test", (stages, order))
    index = np.sort(random.permutation(0, "out", order)[: order // 2])
    return RandomizedTransform(order, signs, order, order // 2, None, index)


class TestWhatItTakes:
    # Of models there are.
    @pytest.mark.parametrize(
        "order",
        [1, 12, 768, 1536, 2304, 3584, 8192, 11008, 14336, 28672],
    )
    def test_orders(self, order, monkeypatch):
        monkeypatch.setattr(kernels, "_room", lambda: 32768)
        assert kernels.takes(_cached_program(order, True, False), torch.float16)

    def test_not_what_does_not_fit(self, monkeypatch):
        program = _cached_program(32768, True, False)
        # 99 KB of shared memory a block, as GPUs for games have.
        monkeypatch.setattr(kernels, "_room", lambda: 101376 // 5)
        assert not kernels.takes(program, torch.float32)
        assert kernels.takes(_cached_program(16384, True, False), torch.float32)
        monkeypatch.undo()
        for order in (25600, 65536):
            program = _cached_program(order, True, False)
            assert not kernels.takes(program, torch.float32)

    def test_not_windows(self, monkeypatch):
        monkeypatch.setattr(kernels, "_room", lambda: 32768)
        # Of a dimension with a large prime: two transforms that overlap.
        assert not kernels.takes(plan(2 * 1031).program, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
    def test_not_other_dtypes(self, dtype):
        assert not kernels.takes(_cached_program(64, True, False), dtype)

    @pytest.mark.parametrize(
        "hip, capability", [("6.4", (9, 0)), (None, (7, 5))]
    )
    def test_not_on_other_gpus(self, hip, capability, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda: capability
        )
        kernels._room.cache_clear()
        program = _cached_program(64, True, False)
        assert not kernels.takes(program, torch.float32)
        kernels._room.cache_clear()

    def test_nothing_without_triton(self, monkeypatch):
        key = _cached_program(64, True, False).key
        takes = torch_backend._kernel_takes
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(kernels, "_room", lambda: 32768)
        assert takes(key, "cpu", torch.float32)
        monkeypatch.setattr(torch_backend, "_HAS_TRITON", False)
        assert not takes(key, "cpu", torch.float32)
        assert not takes(key, "cuda", torch.float32)

    def test_not_on_a_cpu(self, monkeypatch):
        assert os.environ.get("TRITON_INTERPRET") != "1"

        def fail(*arguments):
            raise AssertionError("the kernel was launched")

        monkeypatch.setattr(kernels, "transform", fail)
        monkeypatch.setattr(kernels, "_room", lambda: 32768)
        fwht(torch.ones(3, 64))
        assert torch_backend._kernel_takes(
            _cached_program(64, True, False).key, "cuda", torch.float32
        )


#: Bytes of shared memory that a block may have, by compute capability.
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448}


def compiled(program, dtype, capability, scaled=False):
    """The kernel for a GPU, down to PTX, as a launch would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    description, adjoint = kernels._description(program)
    settings, warps = kernels.launch_settings(
        len(description.matrices),
        description.sizes,
        description.dims,
        description.exact,
        adjoint,
        dtype,
    )
    data = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    signature = {
        "x_pointer": data,
        "y_pointer": data,
        "matrices": "*fp32",
        "signs": "*i8",
        "source": "*i32",
        "target": "*i32",
        "before": data if scaled else "constexpr",
        "after": data if scaled else "constexpr",
        "rows": "i32",
        "row_stride": "i32",
        "scale": "fp32",
        **dict.fromkeys(settings, "constexpr"),
    }
    constants = dict(settings)
    for name in ("signs", "source", "target"):
        if getattr(description, name) is None:
            signature[name], constants[name] = "constexpr", None
    if not scaled:
        constants.update(before=None, after=None)
    names = kernels._kernel.arg_names
    aligned = [name for name in names if signature[name] != "constexpr"]
    aligned = set(aligned) - {"rows", "scale"}
    source = ASTSource(
        kernels._kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )


@pytest.mark.parametrize(
    "program, dtype, capability",
    [
        (_cached_program(1024, True, False), torch.float32, 90),
        (plan(768).program, torch.bfloat16, 80),
        *[
            pytest.param(program, dtype, capability, marks=pytest.mark.slow)
            for program in (
                _cached_program(11008, True, False),
                plan(4096).adjoint_program,
                _cached_program(32768, True, False),
            )
            for dtype in (torch.float32, torch.bfloat16)
            for capability in SHARED_MEMORY
        ],
    ],
)
def test_compiles_for_gpus(program, dtype, capability, tmp_path, monkeypatch):
    """With tensor cores, and in the shared memory that `takes` counts on."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    description, _ = kernels._description(program)
    tile = int(np.prod(description.sizes))
    kernel = compiled(program, dtype, capability, scaled=True)
    # Products of TF32: warp groups have them on Hopper, warps before.
    assert "tf32" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 5 * max(tile, 4096)
    if tile <= SHARED_MEMORY[capability] // 5:
        assert kernel.metadata.shared <= SHARED_MEMORY[capability]
