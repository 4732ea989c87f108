"""PyTorch's transforms, for eager, `torch.func`, `torch.compile` and "meta"."""

import ctypes
import functools
import inspect
import os

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from keras_randadapt.ops import native
from keras_randadapt.ops import program as steps
from keras_randadapt.ops import tiles
from keras_randadapt.ops import torch_tensors

# It marks Python that must not be traced: `torch.compile` would follow the
# construction of the matrices down to NumPy.
compile_time = torch.compiler.assume_constant_result

# The cost of a pass over the data, in multiply-adds an element
# (docs/design/transforms.md).
_PASS_COST = 36
# The elements in a block of rows, on a CPU. In a block, results between steps
# stay in cache; allocating larger ones costs more than the arithmetic.
_BLOCK = 1 << 19
_HAS_TRITON = tiles.kernel_is_wanted()

# `torch.autograd.Function.apply` uses these too.
try:
    from torch._C import _are_functorch_transforms_active
    from torch._functorch.utils import unwrap_dead_wrappers

    forward_ad._current_level
except (ImportError, AttributeError):
    # Another version of PyTorch has other names; `Function` is then always
    # used.
    def _are_functorch_transforms_active():
        return True


def _unwrapped(*tensors):
    """The tensors without the wrappers of transforms that have ended."""
    return unwrap_dead_wrappers(tensors)


def apply(x, program, before=None, after=None):
    """Applies a program to the last axis of a tensor.

    Args:
        x: Tensor `(..., input_dim)`.
        program: A `program.Program`.
        before: Optional tensor `(input_dim,)` to multiply by first.
        after: Optional tensor `(output_dim,)` to multiply by last.
    """
    if torch.compiler.is_dynamo_compiling():
        # `+ ""` computes a string, because `torch.compile` treats computed
        # strings as guarded constants, but not attributes.
        return _apply_by_key(x, before, after, program.key + "")
    return _apply(x, before, after, program)


@torch.compiler.allow_in_graph
def _apply_by_key(x, before, after, key):
    """A call that `torch.compile` puts into its graph and traces later."""
    return _apply(x, before, after, steps.Program.from_key(key))


def _apply(x, before, after, program):
    scales = [scale for scale in (before, after) if scale is not None]
    if not scales:
        return _linear(x, program)
    alike = all((s.dtype, s.device) == (x.dtype, x.device) for s in scales)
    if not alike or _kernel(program, x) is None:
        return _apply_around(x, program, before, after)
    if _is_untracked(x, *scales):
        return _run(*_unwrapped(x), program, *_unwrapped(before, after))
    return _Scaled.apply(x, before, after, program)


def _linear(x, program):
    if torch.jit.is_tracing():
        # ONNX knows PyTorch's operations, and no autograd function.
        return _run(x, program)
    if _is_untracked(x):
        return _run(*_unwrapped(x), program)
    return _Linear.apply(x, program)


_apply_around = steps.scaled(_linear)


def _is_untracked(*tensors):
    """Whether no derivative with respect to these tensors can be asked for.

    This is so in the gradients of `with_gradient`. For a few rows, an autograd
    function takes longer than the compiled code, so it is skipped there.
    """
    return (
        not _are_functorch_transforms_active()
        # The level is negative outside of forward mode.
        and forward_ad._current_level < 0
        and not (
            torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        )
    )


def _with_signature(function):
    """Stores the signature, which PyTorch would inspect in every call."""
    function.__signature__ = inspect.signature(function)
    return function


class _Linear(torch.autograd.Function):
    """A program; its gradient is the transposed program and keeps nothing."""

    @staticmethod
    @_with_signature
    def forward(x, program):
        return _run(x, program)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.program = inputs[1]

    @staticmethod
    def backward(ctx, upstream):
        return apply(upstream, ctx.program.transpose), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return apply(tangent, ctx.program)

    @staticmethod
    def vmap(info, in_dims, x, program):
        return apply(x.movedim(in_dims[0], 0), program), 0


class _Scaled(torch.autograd.Function):
    """`after * T (before * x)`, computed by a kernel in one pass."""

    @staticmethod
    @_with_signature
    def forward(x, before, after, program):
        return _run(x, program, before, after)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, before, after, ctx.program = inputs
        ctx.save_for_forward(x, before, after)
        # The data are kept only if a scale is trained.
        x = x if any(ctx.needs_input_grad[1:3]) else None
        ctx.save_for_backward(x, before, after)

    @staticmethod
    def backward(ctx, upstream):
        x, before, after = ctx.saved_tensors
        adjoint = ctx.program.transpose
        gradients = [None] * 4
        if ctx.needs_input_grad[0]:
            gradients[0] = apply(upstream, adjoint, after, before)
        if ctx.needs_input_grad[1]:
            pulled = apply(upstream, adjoint, after) * x
            gradients[1] = _sum_of_rows(pulled)
        if ctx.needs_input_grad[2]:
            pushed = apply(x, ctx.program, before) * upstream
            gradients[2] = _sum_of_rows(pushed)
        return tuple(gradients)

    @staticmethod
    def jvp(ctx, x_tangent, before_tangent, after_tangent, _):
        x, before, after = ctx.saved_tensors
        parts = []
        if x_tangent is not None:
            parts.append(apply(x_tangent, ctx.program, before, after))
        if before_tangent is not None:
            scaled = x * before_tangent
            parts.append(apply(scaled, ctx.program, after=after))
        if after_tangent is not None:
            parts.append(apply(x, ctx.program, before) * after_tangent)
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info, in_dims, x, before, after, program):
        x_dim, before_dim, after_dim, _ = in_dims
        if x_dim is None:
            x = x.expand(info.batch_size, *x.shape)
        else:
            x = x.movedim(x_dim, 0)

        def first(scale, dim):
            if dim is None:
                return scale
            scale = scale.movedim(dim, 0)
            return scale.reshape(len(scale), *[1] * (x.ndim - 2), -1)

        if before_dim is None and after_dim is None:
            return apply(x, program, before, after), 0
        before, after = first(before, before_dim), first(after, after_dim)
        return _apply_around(x, program, before, after), 0


def _sum_of_rows(x):
    return x.reshape(-1, x.shape[-1]).sum(0)


def _kernel(program, x):
    """The kernel that applies a program in one pass over memory, or `None`.

    It is a function of `(x, program, before, after)` without a gradient.
    """
    # An exported program should run wherever PyTorch does, and one in ONNX
    # also without PyTorch.
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if _HAS_TRITON and (x.device.type == "cuda" or interpreted):
        from keras_randadapt.ops import triton_torch

        if triton_torch.takes(program, x.dtype, x.device):
            return triton_torch.apply
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _apply_native if native.translate(program) else None
    return None


def _apply_native(x, program, before, after):
    y = x.new_empty(len(x), program.output_dim)
    x, before, after = (
        None if tensor is None else tensor.contiguous()
        for tensor in (x, before, after)
    )
    native.apply(
        native.translate(program),
        x.data_ptr(),
        y.data_ptr(),
        len(x),
        None if before is None else before.data_ptr(),
        None if after is None else after.data_ptr(),
        torch.get_num_threads(),
        _parallel(),
    )
    return y


@functools.cache
def _parallel():
    """OpenMP's function that runs code in PyTorch's threads, if it has some.

    PyTorch's threads keep spinning for a while after an operation, so other
    threads would compete with them for the processors.
    """
    return getattr(ctypes.CDLL(None), "GOMP_parallel", None)


@torch.library.custom_op("keras_randadapt::transform", mutates_args=())
def _transform(
    x: torch.Tensor,
    key: str,
    before: torch.Tensor | None,
    after: torch.Tensor | None,
) -> torch.Tensor:
    """A kernel, as one node of the graph that `torch.compile` makes.

    The program's arrays are neither constants of that graph nor arguments: the
    key of the program finds them at run time.
    """
    program = steps.Program.from_key(key)
    return _kernel(program, x)(x, program, before, after)


# A compiled graph knows programs only by their keys, so this keeps them alive.
_compiled_programs = set()


@_transform.register_fake
def _(x, key, before, after):
    program = steps.Program.from_key(key)
    _compiled_programs.add(program)
    return x.new_empty(x.shape[0], program.output_dim)


def _run(x, program, before=None, after=None):
    batch = x.shape[:-1]
    if torch.jit.is_tracing():
        # No operation may depend on the size of the batch, because the trace
        # would take that of its example for all batches.
        y = _run_rows(x.reshape(-1, x.shape[-1]), program)
        return y.reshape(*batch, y.shape[-1])
    if len(batch) != 1:
        x = x.reshape(batch.numel(), x.shape[-1])
    block = max(1, _BLOCK // program.largest_dim)
    kernel = _kernel(program, x)
    if kernel is not None and all(map(_is_in_memory, (x, before, after))):
        y = kernel(x, program, before, after)
    elif kernel is not None:
        y = _transform(x, program.key, before, after)
    elif x.device.type == "cpu" and _is_plain(x) and len(x) >= 2 * block:
        y = x.new_empty(len(x), program.output_dim)
        *head, last = program
        for part, out in zip(x.split(block), y.split(block)):
            part = _run_rows(part, head)
            if isinstance(last, steps.Kronecker):
                _kronecker(part, last, out)
            else:
                out.copy_(_apply_step(part, last))
    else:
        y = _run_rows(x, program)
    return y.reshape(*batch, y.shape[-1])


def _is_plain(x):
    # A plain tensor is not traced and not of a subclass with its own rules.
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )


def _is_in_memory(x):
    """Whether a kernel may read a tensor at its address."""
    return x is None or (
        _is_plain(x)
        and x.layout == torch.strided
        # PyTorch has zeros without memory, and tensors whose sign is still to
        # be changed.
        and not x._is_zerotensor()
        and not x.is_neg()
        # A dispatch mode must see every operation.
        and not torch._C._len_torch_dispatch_stack()
    )


def _run_rows(x, program):
    for step in program:
        x = _apply_step(x, step)
    return x


def _apply_step(x, step):
    match step:
        case steps.Kronecker():
            return _kronecker(x, step)
        case steps.Multiply():
            return x * _constants(step, x)[0]
        case steps.Take():
            if step.has_zeros:
                x = F.pad(x, (0, 1))
            return x.index_select(1, _constants(step, x)[0])
        case steps.Resize():
            if step.output_dim < step.input_dim:
                return x[:, : step.output_dim]
            return F.pad(x, (0, step.output_dim - step.input_dim))
        case steps.Window():
            window = _kronecker(x[:, step.start : step.stop], step.step)
            return torch.cat(
                [x[:, : step.start], window, x[:, step.stop :]], dim=1
            )


def _kronecker(x, step, out=None):
    rows = x.shape[0]
    rights = [factor.right for factor in _grouped(step, x.dtype)]
    matrices = _constants(step, x)
    for matrix, right in zip(matrices[:-1], rights):
        x = _product(x, matrix, right)
    x = _product(x, matrices[-1], rights[-1], out)
    x = x.reshape(rows, step.output_dim)
    if x.dtype.itemsize < 4 and step.scale != 1.0:
        # The product is in place, since `x` may be `out`. No other tensor
        # shares its memory.
        x *= step.scale
    return x


def _grouped(step, dtype):
    return step.grouped(_PASS_COST, exact=dtype.itemsize < 4)


def _product(x, matrix, right, out=None):
    rows, columns = matrix.shape
    if right == 1:
        out = None if out is None else out.view(-1, rows)
        return torch.matmul(x.reshape(-1, columns), matrix.T, out=out)
    out = None if out is None else out.view(-1, rows, right)
    return torch.matmul(matrix, x.reshape(-1, columns, right), out=out)


def _constants(step, x):
    """The arrays of a step as tensors."""
    match step:
        case steps.Kronecker():
            matrices = [factor.matrix for factor in _grouped(step, x.dtype)]
            return torch_tensors.as_tensors(step, matrices, x.dtype, x.device)
        case steps.Multiply():
            return torch_tensors.as_tensors(
                step, (step.vector,), x.dtype, x.device
            )
        case steps.Take():
            return torch_tensors.as_tensors(
                step, (step.index,), torch.int32, x.device
            )


def with_gradient(forward, backward, *arguments, drop=0):
    """See `keras_randadapt.ops.with_gradient`."""
    if torch.jit.is_tracing():
        # ONNX knows PyTorch's operations, and no autograd function.
        return forward(*arguments)
    return _WithGradient.apply(forward, backward, drop, *arguments)


class _WithGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @_with_signature
    def forward(forward, backward, drop, *arguments):
        return forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.gradient, drop, *arguments = inputs
        ctx.save_for_backward(*arguments[drop:])

    @staticmethod
    def backward(ctx, upstream):
        return None, None, None, *ctx.gradient(ctx.saved_tensors, upstream)


def fence(awaited, *tensors):
    """See `keras_randadapt.ops.fence`; eager execution needs none."""
    return tensors
