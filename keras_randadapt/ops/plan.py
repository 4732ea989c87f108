"""`RandomizedTransform`: the signs and the coordinates of a transform."""

import numpy as np

from keras_randadapt.hadamard import _check_positive
from keras_randadapt.ops import numpy as numpy_backend
from keras_randadapt.ops import program as steps


class RandomizedTransform:
    """A frozen random matrix that is applied without being formed.

    The matrix is `T = Select H B_k ... H B_1 Embed`, of shape `(output_dim,
    input_dim)`. The input coordinates are placed among `order` coordinates,
    `k` stages of random signs `B_i` and the orthonormal Hadamard transform `H`
    mix them, and `output_dim` coordinates are kept (Lei, Qian and Cheung,
    RLoRA, 2024, Eq. 4, with `k=2`). `T` has orthonormal columns if all
    coordinates are kept, and orthonormal rows if all are used.

    `order` may be any positive integer. If it has a prime factor too large
    for a Hadamard transform, such as 30522 = 6 * 5087, `H` is a product of
    two transforms of order `m > order / 2`, on the first `m` coordinates and
    then on the last `m`. This product is orthogonal too.

    Args:
        order: Integer, the number of coordinates that are mixed.
        signs: Array of +-1, shape `(k, order)`, one row a stage; the first
            row is applied first.
        input_dim: Integer, at most `order`.
        output_dim: Integer, at most `order`.
        input_index: `None` to place the input in the first coordinates, or
            `input_dim` distinct positions in `0, ..., order - 1`. The others
            are zero.
        output_index: `None` to keep the first coordinates, or `output_dim`
            distinct positions in `0, ..., order - 1`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, or of a wrong shape.

    Example:

    >>> signs = keras_randadapt.random.signs(0, "example", (2, 768))
    >>> plan = RandomizedTransform(768, signs, input_dim=768, output_dim=64)
    >>> randomized_transform(np.ones((3, 768), "float32"), plan).shape
    (3, 64)
    """

    def __init__(
        self,
        order: int,
        signs: np.ndarray,
        input_dim: int,
        output_dim: int,
        input_index: np.ndarray | None = None,
        output_index: np.ndarray | None = None,
    ):
        self._order = _check_positive(order)
        self._signs = _check_signs(signs, self._order)
        self._input_dim = self._check_dim(input_dim, "input_dim")
        self._output_dim = self._check_dim(output_dim, "output_dim")
        self._input_index = self._check_index(
            input_index, self._input_dim, "input_index"
        )
        self._output_index = self._check_index(
            output_index, self._output_dim, "output_index"
        )
        self._program = steps.randomized_steps(
            self._signs,
            self._selection(self._input_index, self._input_dim).transpose,
            self._selection(self._output_index, self._output_dim),
        )
        # The adjoint is made here, since compilers that trace Python should
        # not meet NumPy.
        self._adjoint_program = self._program.transpose

    @property
    def order(self) -> int:
        return self._order

    @property
    def signs(self) -> np.ndarray:
        return self._signs

    @property
    def input_dim(self) -> int:
        return self._input_dim

    @property
    def output_dim(self) -> int:
        return self._output_dim

    @property
    def input_index(self) -> np.ndarray | None:
        return self._input_index

    @property
    def output_index(self) -> np.ndarray | None:
        return self._output_index

    @property
    def program(self) -> steps.Program:
        """The `Program` that applies the transform."""
        return self._program

    @property
    def adjoint_program(self) -> steps.Program:
        return self._adjoint_program

    def dense(self) -> np.ndarray:
        """The matrix `T`, `float64`, of shape `(output_dim, input_dim)`."""
        identity = np.eye(self._input_dim)
        return numpy_backend.apply(identity, self.program).T

    def __repr__(self):
        return (
            f"RandomizedTransform(order={self._order}, "
            f"stages={len(self._signs)}, input_dim={self._input_dim}, "
            f"output_dim={self._output_dim})"
        )

    def _selection(self, index, size):
        if index is None:
            return steps.Resize(self._order, size)
        return steps.Take(index.astype(np.int32), self._order)

    def _check_dim(self, dim, name):
        if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)):
            raise TypeError(
                f"`{name}` must be an integer. Received: {name}={dim!r} of "
                f"type {type(dim).__name__}"
            )
        if not 1 <= dim <= self._order:
            raise ValueError(
                f"`{name}` must be in the range 1 to order={self._order}; "
                "choose a larger `order` to mix more coordinates. "
                f"Received: {name}={dim}"
            )
        return int(dim)

    def _check_index(self, index, size, name):
        if index is None:
            return None
        index = np.array(index)
        if index.dtype.kind not in "iu":
            raise TypeError(
                f"`{name}` must be an array of integers. "
                f"Received: dtype={index.dtype}"
            )
        if index.shape != (size,):
            raise ValueError(
                f"`{name}` must have one position a coordinate, shape "
                f"({size},). Received: shape={index.shape}"
            )
        outside = index[(index < 0) | (index >= self._order)]
        if outside.size or len(np.unique(index)) != size:
            raise ValueError(
                f"`{name}` must hold distinct positions in the range 0 to "
                f"{self._order - 1}. Received: "
                + (f"{outside[0]}" if outside.size else "repeated positions")
            )
        index = index.astype(np.int64)
        index.flags.writeable = False
        return index


def _check_signs(signs, order):
    signs = np.array(signs)
    if signs.ndim != 2 or signs.shape[1] != order or not len(signs):
        raise ValueError(
            "`signs` must have one row of `order` signs a stage, shape "
            f"(stages, {order}) with at least one stage. "
            f"Received: shape={signs.shape}"
        )
    if signs.dtype.kind not in "if" or not np.all(np.abs(signs) == 1):
        raise ValueError(
            "`signs` must hold -1 and +1 only; "
            "`keras_randadapt.random.signs` makes them. "
            f"Received: dtype={signs.dtype}, values from {signs.min()} to "
            f"{signs.max()}"
        )
    signs = signs.astype(np.int8)
    signs.flags.writeable = False
    return signs
