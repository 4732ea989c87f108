"""`KernelView`, and the kernel views of einsum equations."""

import functools
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_randadapt.ops.fast_products import reshape


class KernelView(NamedTuple):
    """The shape of a kernel seen as a matrix."""

    input_dim: int
    output_dim: int


class EinsumPlan:
    """The kernel view of one einsum equation.

    Kernel axes are sorted by their labels, never by their positions. Axes that
    are contracted with the input make the rows of the view, and axes that are
    present in the output make the columns. A rank-r update of the view is
    therefore a rank-r update of the linear map for every equation, also for
    Gemma's `"btd,ndh->btnh"`.
    """

    @staticmethod
    @functools.lru_cache(maxsize=512)
    def of(equation, kernel_shape, input_rank):
        return EinsumPlan(equation, kernel_shape, input_rank)

    def __init__(self, equation, kernel_shape, input_rank):
        x, kernel, y = _parse_equation(equation, len(kernel_shape), input_rank)
        sizes = dict(zip(kernel, kernel_shape))
        rows = [label for label in kernel if label not in y]
        columns = [label for label in kernel if label in y]
        #: The kernel's axes in the order of the view: its rows, its columns.
        self.view_axes = [kernel.index(a) for a in rows + columns]
        self._view_to_kernel = _inverse(self.view_axes)
        self._kernel_shape = tuple(int(size) for size in kernel_shape)
        self._row_sizes = [int(sizes[label]) for label in rows]
        self._column_sizes = [int(sizes[label]) for label in columns]
        self.view_shape = KernelView(
            int(np.prod(self._row_sizes)), int(np.prod(self._column_sizes))
        )
        # The equation is one matrix product if the input has every row label
        # and no column label, and no other label is summed over.
        batch = [label for label in x if label not in kernel]
        self.is_matrix_product = (
            set(rows) <= set(x)
            and not set(columns) & set(x)
            and set(batch) <= set(y)
            and set(y) == set(batch) | set(columns)
        )
        if not self.is_matrix_product:
            return
        self._flatten_x = [x.index(label) for label in batch + rows]
        self._unflatten_x = _inverse(self._flatten_x)
        self._flatten_y = [y.index(label) for label in batch + columns]
        self._unflatten_y = _inverse(self._flatten_y)
        self._batch_axes = [x.index(label) for label in batch]
        self._output_rank = len(y)

    def to_view(self, kernel):
        """The matrix of shape `view_shape` of a kernel."""
        return reshape(_transpose(kernel, self.view_axes), self.view_shape)

    def from_view(self, view):
        """Undoes `to_view`."""
        shape = [self._kernel_shape[axis] for axis in self.view_axes]
        return _transpose(reshape(view, shape), self._view_to_kernel)

    def flatten_input(self, x):
        """The layer's input as `(tokens, input_dim)`."""
        x = _transpose(x, self._flatten_x)
        return reshape(x, (-1, self.view_shape.input_dim))

    def unflatten_input(self, z, inputs):
        """Undoes `flatten_input`; `inputs` gives the batch axes."""
        z = reshape(z, (*self._batch(inputs), *self._row_sizes))
        return _transpose(z, self._unflatten_x)

    def _batch(self, inputs):
        shape = ops.shape(inputs)
        return [shape[axis] for axis in self._batch_axes]

    def multiply(self, rows, product):
        """A matrix times the view, computed by the layer's own product.

        Args:
            rows: Tensor `(n, input_dim)`.
            product: Function of the layer's input.

        Returns:
            Tensor `(n, output_dim)`.
        """
        ones = [1] * (len(self._batch_axes) - 1)
        z = reshape(rows, (*ones, -1, *self._row_sizes))
        return self.flatten_output(product(_transpose(z, self._unflatten_x)))

    def flatten_output(self, y):
        """The layer's output as `(tokens, output_dim)`."""
        y = _transpose(y, self._flatten_y)
        return reshape(y, (-1, self.view_shape.output_dim))

    def flatten_bias(self, bias):
        """A bias with a number for each column, as a vector in that order."""
        ones = [1] * (self._output_rank - len(bias.shape))
        y = _transpose(reshape(bias, (*ones, *bias.shape)), self._flatten_y)
        return reshape(y, (self.view_shape.output_dim,))

    def unflatten_bias(self, columns, bias_shape):
        """Undoes `flatten_bias`."""
        ones = [1] * len(self._batch_axes)
        y = reshape(columns, (*ones, *self._column_sizes))
        return reshape(_transpose(y, self._unflatten_y), bias_shape)

    def unflatten_output(self, y, inputs):
        """Undoes `flatten_output`; `inputs` gives the batch axes."""
        y = reshape(y, (*self._batch(inputs), *self._column_sizes))
        return _transpose(y, self._unflatten_y)


def _parse_equation(equation, kernel_rank, input_rank):
    """An equation's three lists of labels, with the ellipsis expanded."""
    left, y = equation.replace(" ", "").split("->")
    x, kernel = left.split(",")
    dots = input_rank - len(x.replace("...", ""))
    # These labels cannot occur in an einsum equation.
    ellipsis = [f"...{i}" for i in range(dots)]

    def labels(term):
        before, _, after = term.partition("...")
        middle = ellipsis if "..." in term else []
        return [*before, *middle, *after]

    x, kernel, y = labels(x), labels(kernel), labels(y)
    for term in (x, kernel, y):
        if len(set(term)) != len(term):
            raise ValueError(
                f"The equation {equation!r} repeats a label within one term; "
                "such a kernel has no kernel view."
            )
    if len(kernel) != kernel_rank:
        raise ValueError(
            f"The equation {equation!r} does not fit a kernel of "
            f"{kernel_rank} axes."
        )
    return x, kernel, y


def _inverse(axes):
    return [axes.index(i) for i in range(len(axes))]


def _transpose(x, axes):
    if list(axes) == list(range(len(axes))):
        return x
    return ops.transpose(x, axes)
