"""PyTorch's launches of the Triton kernel."""

import functools
import math

import torch

from keras_randadapt.ops import triton
from keras_randadapt.ops.torch_tensors import as_tensors


def takes(program, dtype, device):
    """Whether the kernel can apply a program to tensors of a dtype.

    The program must have a `triton.tiled_program`, and the GPU must have
    tensor cores for TF32.
    """
    return _tiled(program, dtype, device) is not None


def _tiled(program, dtype, device):
    return triton.tiled_program(program, name(dtype), _room(device))


def name(dtype):
    """A dtype of PyTorch as `triton.py` knows it."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def _room(device):
    """Bytes of shared memory that a program of the kernel may have."""
    if not triton.is_supported():
        return 0
    if triton.is_interpreted():
        return math.inf
    if torch.version.hip or not torch.cuda.is_available():
        return 0
    properties = torch.cuda.get_device_properties(device)
    if properties.major < triton.FIRST_MAJOR:
        return 0
    return properties.shared_memory_per_block_optin


def apply(x, program, before=None, after=None):
    """`after * T (before * x)` for the rows of a matrix.

    Args:
        x: Tensor of shape `(rows, input_dim)`.
        program: A `Program` for which `takes` is true.
        before: `None`, or tensor of shape `(input_dim,)`.
        after: `None`, or tensor of shape `(output_dim,)`.

    Returns:
        Tensor of shape `(rows, output_dim)`, of the dtype of `x`. It has no
        gradient.
    """
    y = x.new_empty(len(x), program.output_dim)
    if len(x) == 0:
        return y
    tiled, adjoint = _tiled(program, x.dtype, x.device)
    factors, signs = as_tensors(
        tiled, (tiled.factors, tiled.signs), x.dtype, x.device
    )
    source, target = as_tensors(
        tiled.tables, tiled.tables.arrays, None, x.device
    )
    if adjoint:
        source, target = target, source
    settings, warps = triton.launch_settings(tiled, adjoint, name(x.dtype))
    if x.stride(1) != 1:
        x = x.contiguous()
    before = None if before is None else before.contiguous()
    after = None if after is None else after.contiguous()
    programs = triton.programs(len(x), settings, _multiprocessors(x.device))
    with torch.cuda.device_of(x):
        triton.kernel[programs,](
            x,
            y,
            factors,
            signs,
            source,
            target,
            before,
            after,
            len(x),
            x.stride(0),
            None if tiled.scale == 1.0 else tiled.scale,
            **settings,
            num_warps=warps,
            num_stages=triton.STAGES_AHEAD,
            # The default is given, since Triton is about to change it.
            enable_fp_fusion=True,
        )
    return y


@functools.cache
def _multiprocessors(device):
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
