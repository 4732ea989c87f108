"""The Triton kernel in JAX programs for a GPU, compiled by `jax_triton`.

Run by test_triton_jax.py in a process of its own, with JAX's plugin for GPUs.
"""

import importlib
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import random
from keras_randadapt.ops import RandomizedTransform
from keras_randadapt.ops import fwht
from keras_randadapt.ops import jax as jax_backend
from keras_randadapt.ops import randomized_transform
from keras_randadapt.ops import triton as kernels
from keras_randadapt.ops import triton_jax  # noqa: F401
from tests import methods

# After the module that imports it too.
triton_lib = importlib.import_module("jax_triton.triton_lib")

#: Bytes of shared memory that a block may have, by compute capability.
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448}


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """What the kernel was compiled to: name, warps, bytes shared, code."""
    found = []
    make = triton_lib.triton_kernel_call_lib.TritonKernel

    def record(name, warps, blocks, shared, code, *more):
        found.append(
            types.SimpleNamespace(warps=warps, shared=shared, ptx=code)
        )
        return make(name, warps, blocks, shared, code, *more)

    library = types.SimpleNamespace(
        **vars(triton_lib.triton_kernel_call_lib) | {"TritonKernel": record}
    )
    monkeypatch.setattr(triton_lib, "triton_kernel_call_lib", library)
    monkeypatch.setattr(triton_lib, "_COMPILED_KERNEL_CACHE", {})
    set_gpu(monkeypatch, 90)
    return found


def set_gpu(monkeypatch, capability):
    gpu = types.SimpleNamespace(
        compute_capability=f"{capability // 10}.{capability % 10}",
        core_count=108,
        shared_memory_per_block_optin=SHARED_MEMORY[capability],
    )
    monkeypatch.setattr(jax_backend, "_gpu", lambda: gpu)


def lowered(function, *shapes, dtype="float32"):
    """A function as a program for a GPU."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    traced = jax.jit(function).trace(*arrays)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def plan(order):
    signs = random.signs(0, "test", (2, order))
    index = np.sort(random.permutation(0, "out", order)[: order // 2])
    return RandomizedTransform(order, signs, order, order // 2, None, index)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", [768, 1024])
def test_compiles(order, dtype, capability, compiled, monkeypatch):
    """With tensor cores, and in the shared memory that `takes` counts on."""
    set_gpu(monkeypatch, capability)
    transform = plan(order)
    text = lowered(
        lambda x: randomized_transform(x, transform),
        (4, 128, order),
        dtype=dtype,
    )
    assert text.count("triton_kernel_call") == 1
    assert "dot_general" not in text
    (kernel,) = compiled
    kind = {"float32": "tf32", "bfloat16": "bf16"}[dtype]
    products = [line for line in kernel.ptx.splitlines() if "mma." in line]
    products = [line for line in products if "sync.aligned.m" in line]
    assert products and all(kind in line for line in products)
    tiled, _ = kernels.tiled_program(
        transform.program, dtype, SHARED_MEMORY[capability]
    )
    itemsize = jnp.dtype(dtype).itemsize
    assert kernel.shared <= tiled.shared_bytes(itemsize)


@pytest.mark.parametrize(
    "order, dtype",
    [
        (1024, "float32"),
        # Where a program of the kernel goes through many rows.
        (8192, "bfloat16"),
    ],
)
def test_one_kernel_for_batches_of_any_size(order, dtype, compiled):
    for rows in (1, 2, 16, 1000, 4096):
        text = lowered(fwht, (rows, order), dtype=dtype)
        assert "triton_kernel_call" in text
    # Triton compiles anew for the number 1, which `jax_triton` gives it so.
    assert len(compiled) == 2


def test_a_training_step_of_rlora(compiled):
    adapter = kra.RLoRA(8)
    adapter.build((48, 40))
    methods.randomize(adapter)
    text = lowered(
        jax.grad(lambda x: jnp.sum(adapter.delta(x, True) ** 2)), (64, 48)
    )
    # Two projections, and back through both.
    assert text.count("triton_kernel_call") == 4
    assert "gather" not in text


def test_compiled_kernels_of_others_have_their_folder():
    """Triton fails where `jax_triton` has set it to nothing."""
    assert jax_backend._launcher() is not None
    assert os.environ.get("TRITON_CACHE_DIR") != ""


def test_exported_programs_have_no_kernel():
    exported = jax.export.export(jax.jit(fwht), platforms=("cuda", "cpu"))
    program = exported(jax.ShapeDtypeStruct((16, 64), "float32"))
    assert "triton_kernel_call" not in program.mlir_module()


def test_programs_for_gpus_that_are_not_here(monkeypatch):
    monkeypatch.undo()
    jax_backend._gpu.cache_clear()
    assert "triton_kernel_call" not in lowered(fwht, (16, 64))
