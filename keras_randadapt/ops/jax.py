"""JAX's transforms: a linear primitive, so that all of `jax` composes."""

import functools
import math
import warnings

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir

from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.ops import native
from keras_randadapt.ops import program as steps

# The transform is its own primitive, because `custom_vjp` has no forward mode
# and JAX's own transposition turns gathers into scatters and products into
# products of another layout.
_transform = jax.extend.core.Primitive("randomized_transform")
# The name of the compiled code in XLA.
_NATIVE = "keras_randadapt_transform"
# The first version of JAX whose XLA can call the compiled code.
_FIRST_JAX = (0, 8, 0)
# The cost of a pass over the data, in multiply-adds an element
# (docs/design/transforms.md).
_PASS_COST = 36
# The elements in a block of rows, on a CPU. Smaller blocks are faster by a
# fifth on one core but leave the other cores idle.
_BLOCK = 1 << 19


def compile_time(function):
    """Marks Python that is not to be traced; JAX never traces it."""
    return function


@steps.scaled
def apply(x, program):
    """Applies a program to the last axis of an array.

    The gradient applies the transposed program, so nothing is kept for it.
    """
    return _transform.bind(x, program=program)


def _run(x, program):
    batch = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1]) if x.size else x.reshape(0, x.shape[-1])
    x = _run_rows(x, program)
    return x.reshape(*batch, x.shape[-1])


def _lower_on_cpu(ctx, x, *, program):
    run = _run_native if _takes_native(ctx, program) else _run_on_cpu
    return mlir.lower_fun(run, multiple_results=False)(ctx, x, program=program)


def _takes_native(ctx, program):
    return (
        ctx.avals_in[0].dtype == jnp.float32
        and _stays_here(ctx)
        and native.translate(program) is not None
        and _register_native()
    )


def _stays_here(ctx):
    """Whether a program may call code that XLA does not know."""
    module = ctx.module_context
    return (
        # An exported program should run wherever XLA does.
        not module.lowering_parameters.for_export
        # XLA cannot divide a call to unknown code among several devices. Under
        # `shard_map` the number of devices is unknown.
        and getattr(module.axis_context, "num_devices", None) == 1
    )


@functools.cache
def _register_native():
    """Registers the compiled code with XLA and returns whether that worked.

    It is called only when a program is lowered. If JAX has no backend yet, it
    stores a registration, and a backend that rejects it later does not start.
    """
    if jax.__version_info__ < _FIRST_JAX:
        return False
    handler = jax.ffi.pycapsule(native.library().randadapt_xla_handler)
    try:
        jax.ffi.register_ffi_target(_NATIVE, handler, platform="cpu")
    except RuntimeError as error:
        warnings.warn(
            "This version of JAX does not take the compiled transforms of "
            "`keras_randadapt`, which will be slower on a CPU. "
            f"Received: {error}",
            AdapterWarning,
        )
        return False
    return True


def _run_native(x, program):
    translated = native.translate(program)
    shape = (*x.shape[:-1], program.output_dim)
    call = jax.ffi.ffi_call(_NATIVE, jax.ShapeDtypeStruct(shape, x.dtype))
    return call(x, translated.integers, translated.floats)


def _run_on_cpu(x, program):
    """Runs a few rows at a time, so that results between steps stay in cache.

    Otherwise XLA gives each step a buffer of the whole size, and allocating
    these buffers costs more than the arithmetic.
    """
    batch = x.shape[:-1]
    rows = math.prod(batch)
    limit = max(1, _BLOCK // program.largest_dim)
    # An exported function may have a batch of unknown size.
    if not isinstance(rows, int) or rows < 2 * limit:
        return _run(x, program)
    x = x.reshape(rows, x.shape[-1])
    block = _block_of(rows, limit)
    first = _first_product(program, x.dtype)
    in_place = first is not None
    if in_place:
        # A product along the last axis needs no blocks, and its buffer can
        # receive the results of the blocks.
        y = x.reshape(rows, -1, first.shape[1])
        y = _multiply_last(y, first).reshape(x.shape)
    else:
        # Every element of `y` is overwritten. Its value depends on `x`, since
        # otherwise XLA would allocate the buffers of all transforms at the
        # start of a step.
        y = jnp.broadcast_to(x[0, 0], (rows, program.output_dim))
    run = functools.partial(_run_rows, program=program, made=int(in_place))

    def update(y, start, size):
        part = y if in_place else x
        part = run(jax.lax.dynamic_slice_in_dim(part, start, size))
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, 0)

    count, tail = divmod(rows, block)
    y = jax.lax.fori_loop(0, count, lambda i, y: update(y, i * block, block), y)
    if tail:
        y = update(y, rows - tail, tail)
    return y.reshape(*batch, program.output_dim)


def _block_of(rows, limit):
    """The rows of a block: a divisor of `rows` if one is near the limit."""
    divisors = (n for n in range(limit, limit // 2, -1) if rows % n == 0)
    return next(divisors, limit)


def _first_product(program, dtype):
    """The matrix by which a program first multiplies the last axis.

    It is `None` if there is no such matrix or if a step changes the size.
    """
    step = program.steps[0]
    dims = {program.input_dim, *(step.output_dim for step in program)}
    if not isinstance(step, steps.Kronecker) or len(dims) > 1:
        return None
    factors = _factors(step, dtype)
    if len(factors) < 2 or any(len(set(f.matrix.shape)) > 1 for f in factors):
        return None
    return factors[0].matrix.astype(dtype)


def _run_rows(x, program, made=0):
    for step in program:
        x = _apply_step(x, step, made)
        made = 0
    return x


def _apply_step(x, step, made=0):
    match step:
        case steps.Kronecker():
            return _kronecker(x, step, made)
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


def _kronecker(x, step, made=0):
    """The product of a step.

    Args:
        x: Array `(rows, input_dim)`.
        step: A `Kronecker`.
        made: The number of products that have been computed already.
    """
    rows = x.shape[0]
    factors = _factors(step, x.dtype)
    sizes = [0] * len(factors)
    for i, factor in enumerate(factors):
        sizes[factor.axis] = factor.matrix.shape[0 if i < made else 1]
    x = x.reshape(rows, *sizes)
    # Without these rotations XLA would transpose before and after a product.
    *rotations, last = step.rotations(factors)
    for (matrix, *_), axes in list(zip(factors, rotations))[made:]:
        x = x.transpose(0, *(1 + axis for axis in axes))
        x = _multiply_last(x, matrix.astype(x.dtype))
    x = x.transpose(0, *(1 + axis for axis in last))
    x = x.reshape(rows, step.output_dim)
    if x.dtype.itemsize < 4 and step.scale != 1.0:
        # The scale itself is not exact in `x.dtype`.
        x = (x.astype("float32") * step.scale).astype(x.dtype)
    return x


def _factors(step, dtype):
    return step.grouped(_PASS_COST, exact=dtype.itemsize < 4)


def _multiply_last(x, matrix):
    """The product by a matrix along the last axis."""
    *batch, dim = x.shape
    # XLA is slower with more than two axes.
    x = x.reshape(math.prod(batch), dim)
    # The default rounds float32 factors to fewer bits on TPUs and new GPUs.
    x = jnp.matmul(x, matrix.T, precision="highest")
    return x.reshape(*batch, len(matrix))


def _abstract(x, program):
    return x.update(shape=(*x.shape[:-1], program.output_dim))


def _transpose(cotangent, x, program):
    return [apply(cotangent, program.transpose)]


def _batch(args, axes, program):
    (x,), (axis,) = args, axes
    return apply(jnp.moveaxis(x, axis, 0), program), 0


# Eager calls run operation by operation, like all of Keras in JAX. A merge
# uses the program of each site twice, and compiling them would take minutes.
_transform.def_impl(_run)
_transform.def_abstract_eval(_abstract)
ad.deflinear2(_transform, _transpose)
batching.primitive_batchers[_transform] = _batch
mlir.register_lowering(_transform, mlir.lower_fun(_run, multiple_results=False))
mlir.register_lowering(_transform, _lower_on_cpu, platform="cpu")


def with_gradient(forward, backward, *arguments, drop=0):
    """See `keras_randadapt.ops.with_gradient`."""

    @jax.custom_vjp
    def function(*arguments):
        return forward(*arguments)

    def keep_arguments(*arguments):
        return forward(*arguments), arguments[drop:]

    function.defvjp(keep_arguments, backward)
    return function(*arguments)


def fence(awaited, *tensors):
    """See `keras_randadapt.ops.fence`.

    `optimization_barrier` is not enough, since XLA drops it on a CPU before it
    removes repeated computations. XLA does not know that no number is above
    infinity, so it cannot simplify the sum.
    """
    zero = jnp.sum(awaited[(slice(1),) * awaited.ndim]) > jnp.inf
    return tuple(tensor + zero.astype(tensor.dtype) for tensor in tensors)
