"""JAX: a linear primitive, so that every transformation composes."""

import math

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir

from keras_randadapt.ops import steps

# A primitive of our own rather than `custom_vjp`, which has no forward mode,
# and rather than JAX's own transposition, which turns gathers into scatters
# and products into ones of another layout.
_transform = jax.extend.core.Primitive("randomized_transform")
# In multiply-adds an element, see benchmarks/README.md.
_PASS_COST = 20
# Elements a block of rows, on a CPU. Smaller is faster on one core, by a
# fifth, but leaves the other cores idle.
_BLOCK = 1 << 19


def compile_time(function):
    """Marks Python that is not to be traced; JAX never traces it."""
    return function


@steps.scaled
def apply(x, program):
    """Applies a program to the last axis of an array.

    Its transpose is the transposed program, so nothing is kept for the
    gradient.
    """
    return _transform.bind(x, program=program)


def _run(x, program):
    batch = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1]) if x.size else x.reshape(0, x.shape[-1])
    x = _run_rows(x, program)
    return x.reshape(*batch, x.shape[-1])


def _run_on_cpu(x, program):
    """Runs a few rows at a time, so that what is between steps is in cache.

    XLA gives each step a buffer of the whole size otherwise; getting those
    from the system costs more than the arithmetic.
    """
    batch = x.shape[:-1]
    rows = math.prod(batch)
    block = max(1, _BLOCK // program.largest_dim)
    # An exported function may have a batch of unknown size.
    if not isinstance(rows, int) or rows < 2 * block:
        return _run(x, program)
    x = x.reshape(rows, x.shape[-1])

    def body(i, y):
        # The last block overlaps the one before rather than be a short one.
        start = jnp.minimum(i * block, rows - block)
        part = jax.lax.dynamic_slice_in_dim(x, start, block)
        part = _run_rows(part, program)
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, 0)

    dim = program.output_dim
    y = jnp.empty((rows, dim), x.dtype)
    y = jax.lax.fori_loop(0, -(-rows // block), body, y)
    return y.reshape(*batch, dim)


def _run_rows(x, program):
    for step in program:
        x = _apply_step(x, step)
    return x


def _apply_step(x, step):
    match step:
        case steps.Kronecker():
            return _kronecker(x, step)
        case steps.Multiply():
            return x * step.vector.astype(x.dtype)
        case steps.Take():
            if step.has_zeros:
                x = jnp.pad(x, ((0, 0), (0, 1)))
            return jnp.take(x, step.index, axis=1, mode="clip")
        case steps.Resize():
            missing = max(0, step.output_dim - step.input_dim)
            return jnp.pad(x[:, : step.output_dim], ((0, 0), (0, missing)))
        case steps.Window():
            window = _kronecker(x[:, step.start : step.stop], step.step)
            return jnp.concatenate(
                [x[:, : step.start], window, x[:, step.stop :]], axis=1
            )


def _kronecker(x, step):
    low_precision = x.dtype.itemsize < 4
    rows = x.shape[0]
    for matrix, right in step.grouped(_PASS_COST, exact=low_precision):
        matrix = matrix.astype(x.dtype)
        dim = matrix.shape[1]
        if right == 1:
            x = _dot(x.reshape(-1, dim), matrix.T)
        else:
            x = _dot(matrix, x.reshape(-1, dim, right))
    x = x.reshape(rows, step.output_dim)
    if low_precision and step.scale != 1.0:
        # The scale itself is not exact in `x.dtype`.
        x = (x.astype("float32") * step.scale).astype(x.dtype)
    return x


def _dot(a, b):
    # The default rounds float32 factors to fewer bits on TPUs and new GPUs.
    return jnp.matmul(a, b, precision="highest")


def _abstract(x, program):
    return x.update(shape=(*x.shape[:-1], program.output_dim))


def _transpose(cotangent, x, program):
    return [apply(cotangent, program.transpose)]


def _batch(args, axes, program):
    (x,), (axis,) = args, axes
    return apply(jnp.moveaxis(x, axis, 0), program), 0


_transform.def_impl(jax.jit(apply, static_argnames="program"))
_transform.def_abstract_eval(_abstract)
ad.deflinear2(_transform, _transpose)
batching.primitive_batchers[_transform] = _batch
mlir.register_lowering(_transform, mlir.lower_fun(_run, multiple_results=False))
mlir.register_lowering(
    _transform,
    mlir.lower_fun(_run_on_cpu, multiple_results=False),
    platform="cpu",
)


def with_gradient(forward, backward, *arguments, drop=0):
    """See `keras_randadapt.ops.with_gradient`."""

    @jax.custom_vjp
    def function(*arguments):
        return forward(*arguments)

    def keep_arguments(*arguments):
        return forward(*arguments), arguments[drop:]

    function.defvjp(keep_arguments, backward)
    return function(*arguments)


def fence(upstream, *tensors):
    """See `keras_randadapt.ops.fence`.

    Not `optimization_barrier`: XLA drops that on a CPU before it looks for
    what is computed twice. A product with zero it keeps, which of infinity is
    NaN.
    """
    zero = 0 * jnp.sum(upstream[(slice(1),) * upstream.ndim])
    return tuple(tensor + zero.astype(tensor.dtype) for tensor in tensors)
