"""Products and reshapes of Keras, without what they cost beyond arithmetic.

In eager PyTorch Keras spends ten microseconds of a call on looking for symbolic
tensors, devices and dtypes, and PyTorch one or two on the operation. On a GPU
that is the time that a training step of small batches waits for.

A product with a tall matrix of few columns has the gradient `x' g`, as tall,
which JAX and PyTorch compute on a CPU several times slower than `(g' x)'`, the
same numbers (benchmarks/README.md). `thin_product` makes that of it.
"""

import keras

_BACKEND = keras.config.backend()

if _BACKEND == "torch":
    import torch

    # Keras computes products of float16 in float32 on a CPU.
    _DIRECT = (torch.float32, torch.bfloat16)
    # Others, such as "meta", have no autocast to ask about.
    _DEVICES = ("cpu", "cuda")

    def matmul(x, y):
        if isinstance(y, keras.Variable):
            y = y.value
        if (
            isinstance(x, torch.Tensor)
            and isinstance(y, torch.Tensor)
            and x.dtype == y.dtype
            and x.dtype in _DIRECT
            # What is elsewhere Keras moves to its default device.
            and x.device == y.device
            and x.device.type in _DEVICES
            # Keras gives the dtype of the arguments there.
            and not torch.is_autocast_enabled(x.device.type)
        ):
            return torch.matmul(x, y)
        return keras.ops.matmul(x, y)

    def reshape(x, shape):
        if isinstance(x, torch.Tensor):
            return x.reshape(shape)
        return keras.ops.reshape(x, shape)

    def placed(x):
        """A tensor on Keras's default device, where layers expect it."""
        return keras.ops.convert_to_tensor(x)

    def _columns_first(matrix):
        # The gradient of a matrix that lies in memory by columns does too.
        if matrix.device.type != "cpu" or torch.compiler.is_compiling():
            return matrix
        return matrix.t().contiguous().t()

else:
    matmul = keras.ops.matmul
    reshape = keras.ops.reshape

    def placed(x):
        return x


if _BACKEND == "jax":
    import jax

    def _columns_first(matrix):
        # XLA makes one product of a product and a transposition, of which it
        # does not see both then. The gradient of a barrier is a barrier.
        if jax.default_backend() != "cpu":
            return matrix
        return jax.lax.optimization_barrier(matrix.T).T


def thin_product(x, matrix, training=None):
    """`x matrix`, for a matrix `(dim, rank)` that may be taller than wide.

    Args:
        x: Tensor `(..., dim)`.
        matrix: Tensor `(dim, rank)` of the same dtype.
        training: Whether a gradient may be asked for.
    """
    rows, columns = matrix.shape
    if training and rows > columns and _BACKEND in ("jax", "torch"):
        matrix = _columns_first(matrix)
    return matmul(x, matrix)
