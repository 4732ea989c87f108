"""The public operations, the same on every backend."""

import functools
import importlib
import numbers
import operator

import keras

from keras_randadapt._types import Tensor
from keras_randadapt.ops import program as steps
from keras_randadapt.ops.plan import RandomizedTransform
from keras_randadapt.ops.sparse import dense

_BACKENDS = ("jax", "tensorflow", "torch", "numpy")
if keras.config.backend() not in _BACKENDS:
    raise NotImplementedError(
        "The transforms of `keras_randadapt` run on the Keras backends "
        f"{', '.join(_BACKENDS)}. Received: {keras.config.backend()}"
    )
_backend = importlib.import_module(
    f"keras_randadapt.ops.{keras.config.backend()}"
)
_SCALES = ("before", "after")
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def fwht(
    x: Tensor,
    axis: int = -1,
    normalize: bool = True,
    transpose: bool = False,
) -> Tensor:
    """Multiplies by a Hadamard matrix along an axis.

    The matrix is `keras_randadapt.hadamard.hadamard(d)`, where `d` is the size
    of the axis. For powers of two it is Sylvester's matrix, and this is the
    fast Walsh-Hadamard transform. For any other `d` without a prime factor
    above 1024 the matrix is orthogonal too, and nothing is padded. It is the
    Kronecker product of a few small factors and applied by these: `d = a * b`
    takes `d * (a + b)` multiply-adds a row instead of `d * d`.

    The gradient, to every order of differentiation, is the transposed
    transform and keeps nothing from the forward pass.

    Args:
        x: Tensor of a floating dtype. Its size along `axis` must be known;
            other sizes may be unknown.
        axis: Integer, the axis to transform.
        normalize: Whether to divide by `sqrt(d)`, which makes the transform
            orthogonal. Without it, results are up to `d` times as large as
            `x` and may exceed the range of `float16`.
        transpose: Whether to multiply by the transposed matrix. It is another
            matrix only if the order has a core that is not symmetric, such as
            20 or 44. If normalized, it is the inverse.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        TypeError: If `x` is not of a floating dtype.
        ValueError: If `axis` is out of range, or the size along it unknown or
            one that has no Hadamard transform.

    Example:

    >>> fwht(np.array([1.0, 0.0, 0.0, 0.0]))
    array([0.5, 0.5, 0.5, 0.5])
    """
    if keras.utils.is_keras_tensor(x):
        return FWHT(axis, normalize, transpose).symbolic_call(x)
    x = _as_tensor(x)
    axis = _check_fwht(x, axis)
    # `torch.compile` makes a size that changes from call to call symbolic;
    # this makes it a number again.
    size = operator.index(x.shape[axis])
    program = _fwht_program(size, normalize, transpose)
    if axis == len(x.shape) - 1:
        return _backend.apply(x, program)
    x = keras.ops.moveaxis(x, axis, -1)
    return keras.ops.moveaxis(_backend.apply(x, program), -1, axis)


def randomized_transform(
    x: Tensor,
    plan: RandomizedTransform,
    adjoint: bool = False,
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """Multiplies the last axis by a frozen random matrix.

    See `RandomizedTransform` for the matrix `T`. The gradient, to every order
    of differentiation, is the adjoint and keeps nothing from the forward
    pass.

    Args:
        x: Tensor of a floating dtype and shape `(..., plan.input_dim)`, or
            `(..., plan.output_dim)` with `adjoint=True`.
        plan: A `RandomizedTransform`.
        adjoint: Whether to multiply by the transpose of `T`.
        before: Optional vector of the dtype of `x`, by which `x` is multiplied
            first. If PyTorch has a kernel for the transform, this takes no
            extra pass over memory.
        after: Optional vector, by which the result is multiplied.

    Returns:
        `T x`, a tensor of the dtype of `x` and shape `(..., plan.output_dim)`;
        or `T' x` of shape `(..., plan.input_dim)` with `adjoint=True`. With
        vectors, `after * T (before * x)`.

    Raises:
        TypeError: If `plan` is not a `RandomizedTransform`, or `x` not of a
            floating dtype.
        ValueError: If the last axis of `x`, or a vector, is of another size.
    """
    if not isinstance(plan, RandomizedTransform):
        raise TypeError(
            "`plan` must be a `RandomizedTransform`. "
            f"Received: plan={plan!r} of type {type(plan).__name__}"
        )
    dims = plan.input_dim, plan.output_dim
    for vector, dim, name in zip(
        (before, after), reversed(dims) if adjoint else dims, _SCALES
    ):
        if vector is not None and tuple(vector.shape) != (dim,):
            raise ValueError(
                f"`{name}` must be a vector of {dim} numbers with "
                f"adjoint={bool(adjoint)}. Received: shape="
                f"{tuple(vector.shape)}"
            )
    if keras.utils.is_keras_tensor(x):
        operation = RandomizedTransformOperation(plan, adjoint)
        x = x if before is None else x * before
        y = operation.symbolic_call(x)
        return y if after is None else y * after
    x, before, after = (
        None if tensor is None else _as_tensor(tensor)
        for tensor in (x, before, after)
    )
    _check_input(x, plan, adjoint)
    program = plan.adjoint_program if adjoint else plan.program
    apply = _backend.apply if program.steps else _leave
    return apply(x, program, before, after)


@steps.scaled
def _leave(x, program):
    return x


@keras.saving.register_keras_serializable(package="keras_randadapt")
class FWHT(keras.Operation):
    """`fwht` as a node of a functional model."""

    def __init__(self, axis=-1, normalize=True, transpose=False, *, name=None):
        super().__init__(name=name)
        self.axis = axis
        self.normalize = normalize
        self.transpose = transpose

    def call(self, x):
        return fwht(x, self.axis, self.normalize, self.transpose)

    def compute_output_spec(self, x):
        axis = _check_fwht(x, self.axis)
        # It raises an error for a size that has no transform.
        _fwht_program(x.shape[axis], self.normalize, self.transpose)
        return keras.KerasTensor(x.shape, x.dtype)


class RandomizedTransformOperation(keras.Operation):
    """`randomized_transform` as a node of a functional model.

    A plan is not serializable, but a layer that makes one from a seed is.
    """

    def __init__(self, plan, adjoint=False, *, name=None):
        super().__init__(name=name)
        self.plan = plan
        self.adjoint = adjoint

    def call(self, x):
        return randomized_transform(x, self.plan, self.adjoint)

    def compute_output_spec(self, x):
        _check_input(x, self.plan, self.adjoint)
        dim = self.plan.input_dim if self.adjoint else self.plan.output_dim
        return keras.KerasTensor((*x.shape[:-1], dim), x.dtype)


@_backend.compile_time
def _fwht_program(order, normalize, transpose):
    return _cached_program(order, bool(normalize), bool(transpose))


@functools.lru_cache(maxsize=None)
def _cached_program(order, normalize, transpose):
    program = steps.hadamard_steps(order, normalize)
    return program.transpose if transpose else program


def _as_tensor(x):
    x = dense(x)
    if keras.ops.is_tensor(x) and not isinstance(x, keras.Variable):
        # Keras would move a PyTorch tensor to its default device.
        return x
    return keras.ops.convert_to_tensor(x)


def _check_dtype(x):
    dtype = keras.backend.standardize_dtype(x.dtype)
    if dtype not in _DTYPES:
        raise TypeError(
            f"`x` must have one of the dtypes {', '.join(_DTYPES)}; cast it "
            f"first. Received: dtype={dtype}"
        )


def _check_fwht(x, axis):
    _check_dtype(x)
    rank = len(x.shape)
    if isinstance(axis, bool) or not isinstance(axis, numbers.Integral):
        raise TypeError(f"`axis` must be an integer. Received: axis={axis!r}")
    if not -rank <= axis < rank:
        raise ValueError(
            f"`axis` must be in the range {-rank} to {rank - 1} for `x` of "
            f"shape {tuple(x.shape)}. Received: axis={axis}"
        )
    size = x.shape[axis]
    if size is None:
        raise ValueError(
            f"The size of `x` along `axis` {axis} must be known, since it "
            "chooses the matrix; give the `Input` a shape. "
            f"Received: shape={tuple(x.shape)}"
        )
    if size == 0:
        raise ValueError(
            f"`x` must not be empty along `axis` {axis}. "
            f"Received: shape={tuple(x.shape)}"
        )
    return int(axis) % rank


def _check_input(x, plan, adjoint):
    _check_dtype(x)
    name = "output_dim" if adjoint else "input_dim"
    dim = getattr(plan, name)
    if not len(x.shape) or x.shape[-1] != dim:
        raise ValueError(
            f"The last axis of `x` must have the size plan.{name}={dim} with "
            f"adjoint={bool(adjoint)}. Received: shape={tuple(x.shape)}"
        )
