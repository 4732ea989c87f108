"""TensorFlow's transforms, for eager, `tf.function`, XLA and SavedModel."""

import contextlib
import itertools
import os
import threading

import tensorflow as tf

# TensorFlow's public API does not tell whether an operation is registered or
# whether XLA compiles, and cannot add operations to `tf.vectorized_map`.
from tensorflow.python.framework import op_def_registry
from tensorflow.python.ops import control_flow_util
from tensorflow.python.ops.parallel_for import pfor

from keras_randadapt.ops import native
from keras_randadapt.ops import program as steps

# Costs in multiply-adds an element (docs/design/transforms.md).
_PASS_COST = 60
_LEFT_COST = 3
_PASS_COST_OF_XLA = 36
# The elements in a block of rows, on a CPU.
_BLOCK = 1 << 19
_MAX_BLOCKS = 16
# The attribute in which a graph keeps its constants.
_CONSTANTS = "_keras_randadapt_constants"
# The operation of `_native.c`, and the variable of the environment that makes
# it register itself.
_OPERATION = "KerasRandadaptTransform"
_REGISTER = "_KERAS_RANDADAPT_REGISTER"
# Functions of Keras's `fit`, `evaluate` and `predict`, and of a bank's
# `predict` (`serving/computation.py`).
_FUNCTIONS_NOT_SAVED = frozenset(
    (
        "one_step_on_data",
        "one_step_on_data_distributed",
        "multi_step_on_data",
        "one_batch_of_tenants",
    )
)


def _load_operation():
    """TensorFlow's operation that runs the compiled code, or `None`.

    It registers itself while TensorFlow loads the file, so TensorFlow must
    load the file first.
    """
    path = native.path()
    if path is None:
        return None
    # Another copy of the package or an earlier import may have registered it.
    if op_def_registry.get(_OPERATION) is None:
        os.environ[_REGISTER] = "1"
    try:
        operations = tf.load_op_library(path)
    except tf.errors.NotFoundError:
        # `native.library` will warn.
        return None
    finally:
        os.environ.pop(_REGISTER, None)
    return getattr(operations, "keras_randadapt_transform", None)


_operation = _load_operation()


def compile_time(function):
    """Marks Python that is not to be traced; TensorFlow never traces it."""
    return function


# AutoGraph has nothing to convert here and would warn of syntax that it does
# not know.
@tf.autograph.experimental.do_not_convert
@steps.scaled
def apply(x, program):
    """Applies a program to the last axis of a tensor.

    The gradient applies the transposed program, so nothing is kept for it.
    """

    @tf.custom_gradient
    def linear(x):
        y = _run(x, program)
        dim = y.shape[-1]

        def gradient(upstream):
            # The gradient of `tf.split` has no static shape.
            batch = [None] * (upstream.shape.rank - 1)
            upstream = tf.ensure_shape(upstream, [*batch, dim])
            with _in_gradient():
                return apply(upstream, program.transpose)

        return y, gradient

    # Keras passes variables on without converting them.
    x = tf.convert_to_tensor(x)
    if getattr(_local, "in_gradient", False):
        return _run(x, program)
    return linear(x)


# What the thread is computing.
_local = threading.local()


@contextlib.contextmanager
def _in_gradient():
    """A block that computes a gradient, in which no function has its own.

    A SavedModel has the gradients of the functions that it was traced from,
    but no gradients of these gradients, and loading it would warn of each that
    is missing. TensorFlow can differentiate the operations by itself.
    """
    before = getattr(_local, "in_gradient", False)
    try:
        _local.in_gradient = True
        yield
    finally:
        _local.in_gradient = before


def _run(x, program):
    batch = x.shape[:-1]
    dynamic_batch = None
    if batch.rank != 1:
        dynamic_batch = tf.shape(x)[:-1]
        x = tf.reshape(x, [-1, x.shape[-1]])
    run = _run_native if _takes_native(x, program) else _run_in_blocks
    x = run(x, program)
    if dynamic_batch is not None:
        dim = x.shape[-1]
        x = tf.reshape(x, tf.concat([dynamic_batch, [dim]], 0))
        x.set_shape([*batch, dim])
    return x


def _takes_native(x, program):
    return (
        _operation is not None
        and x.dtype == tf.float32
        and _stays_here()
        and native.translate(program) is not None
        and native.translate(program.transpose) is not None
    )


def _stays_here():
    """Whether the traced function runs on this CPU and will not be saved.

    A SavedModel should run wherever TensorFlow does. Keras saves no functions
    of its trainer, but it may save functions that these call. A bank traces
    its model anew for an export.
    """
    devices = tf.config.list_logical_devices()
    if not all(map(_is_own_processor, devices)):
        return False
    if tf.distribute.has_strategy() or _in_xla():
        return False
    if tf.executing_eagerly():
        return True
    graph = tf.compat.v1.get_default_graph()
    return getattr(graph, "name", None) in _FUNCTIONS_NOT_SAVED


def _is_own_processor(device):
    job = device.name.startswith("/job:")
    here = not job or device.name.startswith("/job:localhost/")
    return here and device.device_type == "CPU"


def _run_native(x, program):
    constants = []
    for one in (program, program.transpose):
        translated = native.translate(one)
        constants.append(_constant(translated.integers, tf.int32))
        constants.append(_constant(translated.floats, tf.float32))
    y = _operation(x, *constants, threads=_threads())
    y.set_shape([x.shape[0], program.output_dim])
    return y


def _gradient_of_operation(operation, upstream):
    """The operation's gradient.

    Forward mode needs it, because it looks into functions with a gradient.
    """
    x, *constants = operation.inputs
    y = _operation(
        upstream,
        *constants[2:],
        *constants[:2],
        threads=operation.get_attr("threads"),
    )
    y.set_shape([None, x.shape[1]])
    return y, None, None, None, None


def _vectorize_operation(pfor_input):
    """The operation in `tf.vectorized_map`: all iterations' rows at once."""
    x = pfor_input.stacked_input(0)
    sizes = tf.shape(x)
    constants = [pfor_input.unstacked_input(i) for i in range(1, 5)]
    y = _operation(
        tf.reshape(x, [-1, sizes[2]]),
        *constants,
        threads=pfor_input.get_attr("threads"),
    )
    y = tf.reshape(y, tf.stack([sizes[0], sizes[1], tf.shape(y)[1]]))
    return pfor.wrap(y, True)


# A `KeyError` means that an earlier import of the package has registered them,
# which is as good.
with contextlib.suppress(KeyError):
    tf.RegisterGradient(_OPERATION)(_gradient_of_operation)
    pfor.RegisterPFor(_OPERATION)(_vectorize_operation)


def _threads():
    limit = tf.config.threading.get_intra_op_parallelism_threads()
    if limit:
        return limit
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _run_in_blocks(x, program):
    starts = _blocks(x.shape[0], program)
    if len(starts) == 1:
        return _run_rows(x, program)
    parts = [x[a:b] for a, b in itertools.pairwise([*starts, x.shape[0]])]
    return tf.concat([_run_rows(part, program) for part in parts], 0)


def _blocks(rows, program):
    """The first rows of blocks that are small enough to stay in cache.

    The blocks are unrolled into the graph, so there are few. There is only
    one if the batch size is unknown, under XLA, and with an accelerator.
    """
    if rows is None or _in_xla() or tf.config.list_logical_devices("GPU"):
        return [0]
    blocks = min(rows * program.largest_dim // _BLOCK, _MAX_BLOCKS)
    return list(range(0, rows, -(-rows // blocks))) if blocks > 1 else [0]


def _run_rows(x, program):
    for step in program:
        x = _apply_step(x, step)
    return x


def _apply_step(x, step):
    match step:
        case steps.Kronecker():
            return _kronecker(x, step)
        case steps.Multiply():
            return x * _constant(step.vector, x.dtype)
        case steps.Take():
            if step.has_zeros:
                x = tf.pad(x, [[0, 0], [0, 1]])
            return tf.gather(x, _constant(step.index, tf.int32), axis=1)
        case steps.Resize():
            if step.output_dim < step.input_dim:
                return x[:, : step.output_dim]
            missing = step.output_dim - step.input_dim
            return tf.pad(x, [[0, 0], [0, missing]])
        case steps.Window():
            window = _kronecker(x[:, step.start : step.stop], step.step)
            return tf.concat(
                [x[:, : step.start], window, x[:, step.stop :]], axis=1
            )


def _in_xla():
    """Whether this is traced for a function with `jit_compile=True`."""
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def _kronecker(x, step):
    low_precision = x.dtype.size < 4
    products = _products_of_xla if _in_xla() else _products
    x = tf.reshape(products(x, step, low_precision), [-1, step.output_dim])
    if low_precision and step.scale != 1.0:
        # The scale itself is not exact in `x.dtype`.
        x = tf.cast(tf.cast(x, tf.float32) * step.scale, x.dtype)
    return x


def _products(x, step, exact):
    """The products of a step, by matrices from the left but the last.

    TensorFlow's transpose is slow, so axes are not moved.
    """
    for matrix, _, right in step.grouped(_PASS_COST, exact, _LEFT_COST):
        dim = matrix.shape[1]
        if right == 1:
            x = tf.reshape(x, [-1, dim])
            x = tf.matmul(x, _constant(matrix, x.dtype, transposed=True))
        else:
            x = tf.reshape(x, [-1, dim, right])
            x = tf.matmul(_constant(matrix, x.dtype), x)
    return x


def _products_of_xla(x, step, exact):
    """The products of a step, along the last axis.

    XLA would transpose twice for a product from the left.
    """
    factors = step.grouped(_PASS_COST_OF_XLA, exact)
    *rotations, last = step.rotations(factors)
    sizes = [0] * len(factors)
    for factor in factors:
        sizes[factor.axis] = factor.matrix.shape[1]
    x = tf.reshape(x, [-1, *sizes])
    for (matrix, *_), axes in zip(factors, rotations):
        x = tf.transpose(x, [0, *(1 + axis for axis in axes)])
        batch = x.shape[1:-1]
        x = tf.reshape(x, [-1, matrix.shape[1]])
        x = tf.matmul(x, _constant(matrix, x.dtype, transposed=True))
        x = tf.reshape(x, [-1, *batch, len(matrix)])
    return tf.transpose(x, [0, *(1 + axis for axis in last)])


def _constant(array, dtype, transposed=False):
    """An array as a tensor, which a graph has only once.

    The layers of a model share bases, and all blocks of rows share steps.
    With a constant for each use, a training step of a RoBERTa-base took 430 MB
    more.
    """
    if tf.executing_eagerly():
        return tf.constant(array.T if transposed else array, dtype)
    graph = tf.compat.v1.get_default_graph()
    known = getattr(graph, _CONSTANTS, None)
    if known is None:
        known = {}
        setattr(graph, _CONSTANTS, known)
    key = id(array), dtype, transposed
    if key not in known:
        tensor = tf.constant(array.T if transposed else array, dtype)
        # The array is kept too, so that no other object gets its id.
        known[key] = tensor, array
    return known[key][0]


def with_gradient(forward, backward, *arguments, drop=0):
    """See `keras_randadapt.ops.with_gradient`."""
    if getattr(_local, "in_gradient", False):
        return forward(*map(tf.convert_to_tensor, arguments))

    @tf.custom_gradient
    def function(*arguments):
        # Without `stop_gradient`, an eager tape would also record `forward`.
        y = forward(*map(tf.stop_gradient, arguments))
        shape = y.shape
        kept = arguments[drop:]

        def gradient(upstream):
            # The gradient of `tf.split` has no static shape.
            with _in_gradient():
                return backward(kept, tf.ensure_shape(upstream, shape))

        return y, gradient

    return function(*map(tf.convert_to_tensor, arguments))


def fence(awaited, *tensors):
    """See `keras_randadapt.ops.fence`.

    Neither TensorFlow's graph optimizer nor XLA knows that no number is both
    below and above zero, so they cannot simplify the sum. (A comparison with
    infinity would also do, but `enable_check_numerics` would report it.)
    """
    if tf.executing_eagerly():
        return tensors
    first = tf.reduce_sum(awaited[(slice(1),) * awaited.shape.rank])
    zero = tf.logical_and(first < 0, first > 0)
    return tuple(tensor + tf.cast(zero, tensor.dtype) for tensor in tensors)
