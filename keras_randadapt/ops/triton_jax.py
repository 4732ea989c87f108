"""JAX's launches of the Triton kernel, by `jax_triton`.

Importing `jax_triton` needs a JAX with GPU support.
"""

import contextlib
import inspect
import os

import jax
import numpy as np

from keras_randadapt.ops import triton as kernels
from keras_randadapt.ops.triton import tl
from keras_randadapt.ops.triton import triton


@contextlib.contextmanager
def _unchanged(name):
    """Restores a variable of the environment."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


# Importing `jax_triton` takes away the folder of compiled kernels, which others
# in this process and its children need, such as `torch.compile`.
with _unchanged("TRITON_CACHE_DIR"):
    import jax_triton

if (
    "compute_capability"
    not in inspect.signature(jax_triton.triton_call).parameters
):
    raise ImportError("`jax_triton` 0.3.1 or newer is needed")

# Generations for which Triton writes what JAX's assembler reads. From 100 on it
# writes for a newer one.
_CAPABILITIES = range(10 * kernels.FIRST_MAJOR, 100)


def takes(program, dtype, gpu):
    """Whether the kernel can apply a program to arrays of a dtype.

    See `triton.tiled_program`; and on no GPU without tensor cores for TF32, nor
    one after Hopper, nor one of which JAX does not tell what has to be known.
    """
    return _tiled(program, dtype, gpu) is not None


def _tiled(program, dtype, gpu):
    return kernels.tiled_program(program, str(dtype), _room(gpu))


def _room(gpu):
    """Bytes of shared memory that a program of the kernel may have."""
    if not kernels.is_supported() or not hasattr(gpu, "core_count"):
        return 0
    if _capability(gpu) not in _CAPABILITIES:
        return 0
    return getattr(gpu, "shared_memory_per_block_optin", 0)


def _capability(gpu):
    major, minor = gpu.compute_capability.split(".")
    return 10 * int(major) + int(minor)


def apply(x, program, gpu):
    """`T x` for the rows of a matrix.

    Args:
        x: Array of shape `(rows, input_dim)`.
        program: One that `takes` takes.
        gpu: Device of JAX.

    Returns:
        Array of shape `(rows, output_dim)`, of the dtype of `x`. It has no
        gradient.
    """
    rows = len(x)
    tiled, adjoint = _tiled(program, x.dtype, gpu)
    settings, warps = kernels.launch_settings(tiled, adjoint, str(x.dtype))
    # In NumPy, as what is put on a device now would have to be fetched again.
    factors = tiled.factors.astype(x.dtype)
    # A byte each, since every call has constants of its own.
    signs = factors if tiled.signs is None else tiled.signs.astype(np.int8)
    tables = tiled.tables.arrays[:: -1 if adjoint else 1]
    return jax_triton.triton_call(
        x,
        factors,
        signs,
        # Something has to be in the place of what is missing.
        *(factors if table is None else table for table in tables),
        rows,
        kernel=_entry,
        out_shape=jax.ShapeDtypeStruct((rows, program.output_dim), x.dtype),
        grid=kernels.programs(rows, settings, gpu.core_count),
        name="keras_randadapt_transform",
        num_warps=warps,
        num_stages=kernels.STAGES_AHEAD,
        compute_capability=_capability(gpu),
        HAS_SOURCE=tables[0] is not None,
        HAS_TARGET=tables[1] is not None,
        SCALE=float(tiled.scale),
        **settings,
    )


@triton.jit(do_not_specialize=["rows"])
def _entry(
    x_pointer,
    factors,
    signs,
    source,
    target,
    rows,
    y_pointer,
    HAS_SOURCE: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    SCALE: tl.constexpr,
    INPUT_DIM: tl.constexpr,
    OUTPUT_DIM: tl.constexpr,
    STAGES: tl.constexpr,
    SIGNED: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    SIZE_3: tl.constexpr,
    ROWS: tl.constexpr,
    ADJOINT: tl.constexpr,
    PRODUCTS: tl.constexpr,
    LOOP: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """The kernel with arguments in the order that `jax_triton` gives them.

    Those are arrays that cannot be missing, numbers, then results.
    """
    kernels.kernel(
        x_pointer,
        y_pointer,
        factors,
        signs,
        source if HAS_SOURCE else None,
        target if HAS_TARGET else None,
        None,
        None,
        rows,
        INPUT_DIM,
        None if SCALE == 1.0 else SCALE,
        INPUT_DIM,
        OUTPUT_DIM,
        STAGES,
        SIGNED,
        SIZE_1,
        SIZE_2,
        SIZE_3,
        ROWS,
        ADJOINT,
        PRODUCTS,
        LOOP,
        EMULATED,
    )
