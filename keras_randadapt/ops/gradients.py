"""Functions with a gradient that the caller gives."""

from collections.abc import Callable

from keras_randadapt._types import Tensor
from keras_randadapt.ops.sparse import dense
from keras_randadapt.ops.transforms import _backend


def with_gradient(
    forward: Callable[..., Tensor],
    backward: Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]],
    *arguments: Tensor,
    drop: int = 0,
) -> Tensor:
    """Computes `forward(*arguments)` with the gradient `backward`.

    The backward pass keeps only the arguments, except the first `drop` of
    them. It keeps no intermediate result of `forward`, so `backward` computes
    these again.

    It works in eager execution and under `jit`, `tf.function`,
    `torch.compile`, and `vmap` of JAX and PyTorch. For a second derivative,
    `backward` is differentiated. Forward mode (`jvp`) is not supported and
    raises an error.

    Args:
        forward: Function of tensors that gives one tensor. It must use no
            other tensor than its arguments.
        backward: Function of the tuple of kept arguments and of the gradient
            with respect to the output. It returns a tuple with a gradient for
            each argument, kept or not; the gradient may be `None`.
        *arguments: Tensors. Sparse ones are made dense.
        drop: int. The number of first arguments that are not kept. `forward`
            must be linear in them.

    Returns:
        A tensor.
    """
    return _backend.with_gradient(
        forward, backward, *map(dense, arguments), drop=drop
    )


def fence(awaited: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors unchanged, hidden from compiler optimization.

    In `backward` it prevents a compiler from keeping a result of the forward
    pass because the backward pass computes the same result. In `forward` it
    prevents a compiler from computing products that need no input long before
    they are used. The second use is for training, since a loop of inference
    should compute such products once. A fence reads and writes each tensor
    once, so fence small tensors, before they are made or cast to larger ones.

    Args:
        awaited: The tensor that the others wait for: the gradient that
            `backward` was given, or an input of `forward`.
        *tensors: Tensors.

    Returns:
        A tuple of tensors of the same values.
    """
    return _backend.fence(awaited, *tensors)
