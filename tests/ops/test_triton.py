"""The Triton kernel: in Triton's interpreter, and compiled for GPUs.

Neither needs a GPU. What only one can tell is told by benchmarks/gpu.py.
"""

import os
import pathlib

import keras
import numpy as np
import pytest

from keras_randadapt import random
from keras_randadapt.ops import RandomizedTransform
from keras_randadapt.ops.transforms import _cached_program
from tests.plans import run_apart

if keras.config.backend() != "torch":
    pytest.skip("tests PyTorch", allow_module_level=True)

pytest.importorskip("triton", reason="there is no Triton for this platform")

import torch  # noqa: E402

from keras_randadapt.ops import tiles  # noqa: E402
from keras_randadapt.ops import torch as torch_backend  # noqa: E402
from keras_randadapt.ops import triton as kernels  # noqa: E402
from keras_randadapt.ops import triton_torch  # noqa: E402

#: Bytes of shared memory that a block may have, by compute capability.
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448}


@pytest.mark.cpu_seconds(
    25, reason="a process with PyTorch; nothing else runs the kernel here"
)
def test_in_the_interpreter():
    """`triton_interpreter.py`, in a process that has the interpreter."""
    here = pathlib.Path(__file__).parent
    run_apart(here / "triton_interpreter.py", TRITON_INTERPRET="1")


def takes(program, dtype=torch.float32):
    return triton_torch.takes(program, dtype, torch.device("cuda", 0))


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
        monkeypatch.setattr(
            triton_torch, "_room", lambda device: SHARED_MEMORY[90]
        )
        assert takes(_cached_program(order, True, False), torch.float16)

    def test_not_what_does_not_fit(self, monkeypatch):
        # As GPUs for games have.
        monkeypatch.setattr(
            triton_torch, "_room", lambda device: SHARED_MEMORY[86]
        )
        program = _cached_program(32768, True, False)
        assert not takes(program, torch.float32)
        assert takes(program, torch.float16)
        assert takes(_cached_program(16384, True, False), torch.float32)
        monkeypatch.undo()
        # Tiles beyond 32768, and factors too large for shared memory.
        monkeypatch.setattr(
            triton_torch, "_room", lambda device: SHARED_MEMORY[90]
        )
        for order in (25600, 65536, 18944, 251):
            program = _cached_program(order, True, False)
            assert not takes(program, torch.float32)

    def test_factors_are_smaller_where_there_is_less_room(self):
        program = _cached_program(8192, True, False)
        assert describe(program, torch.float32, 90)[0].sizes == (1, 128, 64)
        assert describe(program, torch.float32, 86)[0].sizes == (32, 16, 16)
        assert describe(program, torch.float16, 86)[0].sizes == (1, 128, 64)

    def test_not_windows(self, monkeypatch):
        monkeypatch.setattr(
            triton_torch, "_room", lambda device: SHARED_MEMORY[90]
        )
        # Of a dimension with a large prime: two transforms that overlap.
        assert not takes(plan(2 * 1031).program, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
    def test_not_other_dtypes(self, dtype):
        assert not takes(_cached_program(64, True, False), dtype)

    @pytest.mark.parametrize("hip, major", [("6.4", 9), (None, 7)])
    def test_not_on_other_gpus(self, hip, major, monkeypatch):
        class Properties:
            shared_memory_per_block_optin = 232448

        program = _cached_program(64, True, False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: Properties
        )
        for version, generation, expected in (
            (None, 9, True),
            (hip, major, False),
        ):
            triton_torch._room.cache_clear()
            monkeypatch.setattr(torch.version, "hip", version)
            Properties.major = generation
            assert takes(program) is expected
        triton_torch._room.cache_clear()

    def test_not_without_a_gpu(self):
        assert not takes(_cached_program(64, True, False))

    def test_nothing_without_triton(self, monkeypatch):
        program, x = _cached_program(64, True, False), torch.ones(3, 64)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(
            triton_torch, "_room", lambda device: SHARED_MEMORY[90]
        )
        assert torch_backend._kernel(program, x) is triton_torch.apply
        monkeypatch.setattr(torch_backend, "_HAS_TRITON", False)
        assert torch_backend._kernel(program, x) is not triton_torch.apply

    def test_not_on_a_cpu(self, monkeypatch):
        assert os.environ.get("TRITON_INTERPRET") != "1"
        monkeypatch.setattr(
            triton_torch, "_room", lambda device: SHARED_MEMORY[90]
        )
        program, x = _cached_program(64, True, False), torch.ones(3, 64)
        assert torch_backend._kernel(program, x) is not triton_torch.apply


def describe(program, dtype, capability):
    room = SHARED_MEMORY[capability]
    adjoint = program.key.endswith("'")
    forward = program.transpose if adjoint else program
    description = tiles.fitting(forward, dtype.itemsize, room)
    return description, adjoint


def compiled(program, dtype, capability, scaled=False):
    """The kernel for a GPU, down to PTX, as a launch would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    description, adjoint = describe(program, dtype, capability)
    settings, warps = kernels.launch_settings(
        description, adjoint, triton_torch.name(dtype)
    )
    data = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    signature = {
        "x_pointer": data,
        "y_pointer": data,
        "factors": data,
        "signs": data,
        "source": "*i32",
        "target": "*i32",
        "before": data if scaled else "constexpr",
        "after": data if scaled else "constexpr",
        "rows": "i32",
        "row_stride": "i32",
        "scale": "constexpr" if description.scale == 1.0 else "fp32",
        **dict.fromkeys(settings, "constexpr"),
    }
    constants = dict(settings)
    tables = description.tables.arrays[:: -1 if adjoint else 1]
    optional = {"signs": description.signs, "scale": description.scale}
    optional |= dict(zip(("source", "target"), tables))
    for name, value in optional.items():
        if value is None or name == "scale" and value == 1.0:
            signature[name], constants[name] = "constexpr", None
    if not scaled:
        constants.update(before=None, after=None)
    names = kernels.kernel.arg_names
    aligned = [name for name in names if signature[name] != "constexpr"]
    aligned = set(aligned) - {"rows", "scale"}
    source = ASTSource(
        kernels.kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": warps,
            "num_stages": 1,
            "enable_fp_fusion": True,
        },
    )


#: For the factors of Hartley cores in two parts, or for the largest tile.
NO_ROOM = {
    *((13696, capability) for capability in SHARED_MEMORY),
    *((11008, 86), (27648, 80), (27648, 86), (32768, 86)),
}


@pytest.mark.parametrize(
    "program, dtype, capability",
    [
        (_cached_program(1024, True, False), torch.float32, 90),
        (plan(768).program, torch.bfloat16, 80),
        *[
            pytest.param(program, dtype, capability, marks=pytest.mark.slow)
            for program in (
                _cached_program(11008, True, False),
                _cached_program(13696, True, False),
                _cached_program(27648, True, False),
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
    description, _ = describe(program, dtype, capability)
    if description is None:
        assert (program.input_dim, capability) in NO_ROOM
        assert dtype == torch.float32
        return
    kernel = compiled(program, dtype, capability, scaled=True)
    # Products of warp groups on Hopper, of warps before.
    kind = {torch.float32: "tf32", torch.bfloat16: "bf16"}[dtype]
    products = [
        line for line in kernel.asm["ptx"].splitlines() if "mma." in line
    ]
    products = [line for line in products if "sync.aligned.m" in line]
    assert products and all(kind in line for line in products)
    assert kernel.metadata.shared <= description.shared_bytes(dtype.itemsize)
    assert kernel.metadata.shared <= SHARED_MEMORY[capability]
