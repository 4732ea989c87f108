"""Keras's products and reshapes with less overhead a call.

In eager PyTorch, Keras spends ten microseconds of a call on looking for
symbolic tensors, devices and dtypes; PyTorch spends one or two on the
operation. On a GPU, a training step of small batches waits for this overhead.

A product with a tall matrix of few columns has a gradient `x' g` of the same
shape. On a CPU, JAX and PyTorch compute it several times slower than
`(g' x)'`, which is equal (docs/design/training-step.md). `thin_product` makes
them compute the second form.
"""

import itertools

import keras

_BACKEND = keras.config.backend()


def _split(x, sizes):
    ends = list(itertools.accumulate(sizes))
    return keras.ops.split(x, ends[:-1], axis=-1)


if _BACKEND == "torch":
    import torch

    # Keras computes products of float16 in float32 on a CPU.
    _DIRECT = (torch.float32, torch.bfloat16)
    # Other devices, such as "meta", have no autocast state to query.
    _DEVICES = ("cpu", "cuda")

    def _are_direct(first, *others):
        """Whether PyTorch's products of tensors are those of Keras."""
        return (
            isinstance(first, torch.Tensor)
            and first.dtype in _DIRECT
            and first.device.type in _DEVICES
            and all(
                isinstance(other, torch.Tensor)
                and other.dtype == first.dtype
                # Keras moves tensors of other devices to its default device.
                and other.device == first.device
                for other in others
            )
            # Under autocast Keras returns the dtype of the arguments.
            and not torch.is_autocast_enabled(first.device.type)
        )

    def matmul(x, y):
        if isinstance(y, keras.Variable):
            y = y.value
        if _are_direct(x, y):
            return torch.matmul(x, y)
        return keras.ops.matmul(x, y)

    def plus_products(y, x, matrices):
        if _are_direct(y, x, matrices):
            # A sum of its own would write and read `y` once more.
            return torch.baddbmm(y, x, matrices)
        return y + matmul(x, matrices)

    def reshape(x, shape):
        if isinstance(x, torch.Tensor):
            return x.reshape(shape)
        return keras.ops.reshape(x, shape)

    def split_last(x, sizes):
        """Parts of these sizes of the last axis.

        Keras reads the sizes from a tensor, which no exporter can follow.
        """
        if isinstance(x, torch.Tensor):
            return torch.split(x, sizes, -1)
        return _split(x, sizes)

    def placed(x):
        """A tensor on Keras's default device, where layers expect it."""
        return keras.ops.convert_to_tensor(x)

    def _columns_first(matrix):
        # If a matrix lies in memory by columns, so does its gradient.
        if matrix.device.type != "cpu" or torch.compiler.is_compiling():
            return matrix
        return matrix.mT.contiguous().mT

else:
    matmul = keras.ops.matmul
    reshape = keras.ops.reshape

    def plus_products(y, x, matrices):
        """`y + x matrices`, for three stacks of matrices of one dtype.

        Args:
            y: Tensor `(n, rows, columns)`.
            x: Tensor `(n, rows, inner)`.
            matrices: Tensor `(n, inner, columns)`.
        """
        return y + keras.ops.matmul(x, matrices)

    def split_last(x, sizes):
        return _split(x, sizes)

    def placed(x):
        return x


if _BACKEND == "jax":
    import jax

    def _columns_first(matrix):
        # XLA would fuse the product with the transposition; the barrier
        # separates them. The gradient of a barrier is a barrier too.
        if jax.default_backend() != "cpu":
            return matrix
        return jax.lax.optimization_barrier(matrix.mT).mT


def thin_product(x, matrix, training=None):
    """`x matrix`, for a matrix `(dim, rank)` that may be taller than wide.

    Args:
        x: Tensor `(..., dim)`.
        matrix: Tensor `(dim, rank)` of the same dtype.
        training: Whether a gradient may be asked for.
    """
    *_, rows, columns = matrix.shape
    if training and rows > columns and _BACKEND in ("jax", "torch"):
        matrix = _columns_first(matrix)
    return matmul(x, matrix)


def thin_products(x, matrices, training=None):
    """The products with several thin matrices, such as one an expert.

    Args:
        x: Tensor `(tokens, dim)`, or `(n, tokens, dim)` with an input for each
            matrix.
        matrices: Tensor `(n, dim, rank)` of the same dtype.
        training: Whether a gradient may be asked for.

    Returns:
        Tensor `(n, tokens, rank)`.
    """
    if len(x.shape) == 3:
        return thin_product(x, matrices, training)
    n, dim, rank = matrices.shape
    # Side by side they are one matrix, which is not thin.
    whole = keras.ops.transpose(matrices, (1, 0, 2))
    y = thin_product(x, reshape(whole, (dim, n * rank)), training)
    return keras.ops.transpose(reshape(y, (-1, n, rank)), (1, 0, 2))
