"""Functions with a gradient of their own."""

from collections.abc import Callable
from typing import Any

from keras_randadapt.ops.transforms import _backend


def with_gradient(
    forward: Callable[..., Any],
    backward: Callable[[tuple[Any, ...], Any], tuple[Any, ...]],
    *arguments: Any,
    drop: int = 0,
) -> Any:
    """Computes `forward(*arguments)` with a gradient of one's own.

    For the backward pass the arguments but the first `drop` are kept and
    nothing else: what `forward` computes on the way is gone, and `backward`
    computes it anew.

    It works in eager execution and under `jit`, `tf.function`,
    `torch.compile`, and `vmap` of JAX and PyTorch; `backward` is
    differentiated in turn where a second derivative is asked for. There is no
    forward mode (`jvp`): asking for it is an error.

    Args:
        forward: Function of tensors that gives one tensor. It must use no
            other tensor than its arguments.
        backward: Function of the tuple of arguments that were kept and of the
            gradient with respect to the output. Gives a tuple of gradients,
            one an argument, kept or not; `None` for those that have none.
        *arguments: Tensors.
        drop: int. How many arguments not to keep: what the function is linear
            in.

    Returns:
        A tensor.
    """
    return _backend.with_gradient(forward, backward, *arguments, drop=drop)


def fence(awaited: Any, *tensors: Any) -> tuple[Any, ...]:
    """The tensors, but not to a compiler's knowledge.

    A compiler that sees the forward and the backward pass compute the same
    thing would compute it once, and keep it between the two. In `forward` it
    keeps a compiler from computing what needs no input long before its turn;
    that is for training, since a loop of inference should compute it once. Each
    tensor is passed over once, so fence what is small, or is cast to
    something large.

    Args:
        awaited: What the tensors wait for: the gradient that `backward` was
            given, or an input of `forward`.
        *tensors: Tensors.

    Returns:
        A tuple of tensors of the same values.
    """
    return _backend.fence(awaited, *tensors)
