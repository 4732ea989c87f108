"""NumPy's transforms: `dense` uses them, and they test the other backends."""

import numpy as np

from keras_randadapt.hadamard import PASS_COST
from keras_randadapt.ops import program as steps


def compile_time(function):
    """Marks Python that is not to be traced; NumPy never traces it."""
    return function


@steps.scaled
def apply(x, program):
    """Applies a program to the last axis of an array."""
    batch = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1]) if x.size else x.reshape(0, x.shape[-1])
    for step in program:
        x = _apply_step(x, step)
    return x.reshape(*batch, x.shape[-1])


def _apply_step(x, step):
    match step:
        case steps.Kronecker():
            return _kronecker(x, step)
        case steps.Multiply():
            return x * step.vector.astype(x.dtype)
        case steps.Take():
            zero = np.zeros((len(x), 1), x.dtype)
            return np.concatenate([x, zero], -1)[:, step.index]
        case steps.Resize():
            missing = max(0, step.output_dim - step.input_dim)
            return np.pad(x[:, : step.output_dim], ((0, 0), (0, missing)))
        case steps.Window():
            x = x.copy()
            window = x[:, step.start : step.stop]
            x[:, step.start : step.stop] = _kronecker(window, step.step)
            return x


def _kronecker(x, step):
    dtype, rows = x.dtype, len(x)
    if dtype.itemsize < 4:
        # NumPy sums half precision in half precision.
        x = x.astype(np.float32)
    for matrix, _, right in step.grouped(PASS_COST, exact=False):
        matrix = matrix.astype(x.dtype)
        x = matrix @ x.reshape(-1, matrix.shape[1], right)
    return x.reshape(rows, step.output_dim).astype(dtype)


def with_gradient(forward, backward, *arguments, drop=0):
    """See `keras_randadapt.ops.with_gradient`; NumPy has no gradients."""
    return forward(*arguments)


def fence(upstream, *tensors):
    """See `keras_randadapt.ops.fence`."""
    return tensors
