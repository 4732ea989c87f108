"""Products with matrices that are formed in every step."""

from collections.abc import Callable

from keras import ops

from keras_randadapt._types import Tensor
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.ops.fast_products import reshape
from keras_randadapt.ops.gradients import fence
from keras_randadapt.ops.gradients import with_gradient
from keras_randadapt.ops.sparse import dense

_Tensors = tuple[Tensor, ...]


def formed_product(
    x: Tensor,
    form: Callable[..., Tensor],
    gradients: Callable[[_Tensors, Tensor], tuple[Tensor | None, ...]],
    large: _Tensors,
    small: _Tensors,
) -> Tensor:
    """Computes `x form(*large, *small)`.

    The backward pass keeps the arguments and forms the matrix again, so that
    no step holds the formed matrices of all sites.

    Args:
        x: Tensor `(..., rows)`.
        form: Function of tensors that gives a matrix `(rows, columns)` of
            `x`'s dtype.
        gradients: Function of the tuple of arguments of `form` and of the
            gradient with respect to the matrix. It returns a tuple with a
            gradient for each argument, which may be `None`.
        large: Arguments of the matrix's size, or that need no gradient.
        small: Arguments that are small beside the matrix.

    Returns:
        Tensor `(..., columns)`.
    """
    x = dense(x)
    shape = ops.shape(x)[:-1]

    def forward(rows, *arguments):
        return matmul(rows, form(*arguments))

    def backward(arguments, upstream):
        rows, *others = arguments
        fixed = others[: len(large)]
        # A compiler would keep the matrix of the forward pass otherwise.
        others = (*fixed, *fence(upstream, *others[len(large) :]))
        of_rows = matmul(upstream, ops.transpose(form(*others)))
        of_matrix = matmul(ops.transpose(rows), upstream)
        return (of_rows, *gradients(others, of_matrix))

    rows = reshape(x, (-1, x.shape[-1]))
    y = with_gradient(forward, backward, rows, *large, *small)
    return reshape(y, (*shape, y.shape[-1]))
