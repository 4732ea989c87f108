"""Bases with independent entries: Gaussian, uniform and sparse ternary."""

import math
from collections.abc import Hashable

import keras
import numpy as np
from keras import ops

from keras_randadapt import arguments
from keras_randadapt import random
from keras_randadapt._types import Tensor
from keras_randadapt.ops import fence
from keras_randadapt.ops import with_gradient
from keras_randadapt.ops.fast_products import matmul

# Digests by what a basis is: they are taken while the values are at hand.
_digests = {}


class RandomMatrix:
    """A frozen random matrix `(rows, columns)`, drawn entry by entry.

    `values()` are what a seed gives and what is kept in memory, in a dtype as
    small as they allow; `scale * values()` has entries of mean 0 and variance
    1. Products are with the values: whoever uses a basis folds `scale` into
    something smaller.

    `matvec` and `adjoint` read the values from a tensor if `bind` was called,
    and otherwise draw them anew. Neither keeps anything for the backward pass
    but the values, not cast to another dtype.

    Args:
        rows: int.
        columns: int.
        seed: int in `[0, 2**64)`.
        role: string. What the basis is for; other roles, other values.
    """

    scale = 1.0
    dtype = "float32"

    def __init__(self, rows: int, columns: int, seed: int, role: str):
        self.shape = (
            arguments.check_rank(rows, "rows"),
            arguments.check_rank(columns, "columns"),
        )
        self.seed = random.check_seed(seed)
        self.role = role
        self._variable = None

    def values(self) -> np.ndarray:
        """The matrix without its scale, as a NumPy array of `dtype`."""
        values = self._draw()
        if self.key not in _digests:
            _digests[self.key] = random.digest(values)
        return values

    def dense(self) -> np.ndarray:
        """`scale * values()` as a float64 array, for tests and analysis."""
        return self.scale * self.values().astype("float64")

    def digest(self) -> str:
        """A short hash of the values."""
        if self.key not in _digests:
            self.values()
        return _digests[self.key]

    @property
    def key(self) -> Hashable:
        """What tells this basis from all others, hashable."""
        return (type(self).__name__, *self.shape, self.seed, self.role)

    @property
    def cost(self) -> int:
        """Multiply-adds of one `matvec` of one vector."""
        return math.prod(self.shape)

    def bind(self, variable: keras.Variable) -> None:
        """Makes products read the values from this variable."""
        self._variable = variable

    def operands(self) -> tuple[Tensor, ...]:
        """The tensors that products take as `operands`: the values.

        Functions with a gradient of their own, and compiled ones, must be
        given every tensor that they use.
        """
        if self._variable is not None:
            return (ops.convert_to_tensor(self._variable),)
        return (ops.convert_to_tensor(self.values()),)

    def matvec(
        self, x: Tensor, operands: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """The product of the values with `x`, on its last axis.

        Args:
            x: Tensor of a floating dtype and shape `(..., columns)`.
            operands: Optional: what `operands()` gave.

        Returns:
            Tensor `(..., rows)` of `x`'s dtype.
        """
        (values,) = self.operands() if operands is None else operands
        return with_gradient(
            _times_transpose, _times_transpose_vjp, x, values, drop=1
        )

    def adjoint(
        self, x: Tensor, operands: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """The product with the transpose; shapes of `matvec` swapped."""
        (values,) = self.operands() if operands is None else operands
        return with_gradient(_times, _times_vjp, x, values, drop=1)

    def matrix(self, operands: tuple[Tensor, ...] | None = None) -> Tensor:
        """The values as a float32 tensor."""
        (values,) = self.operands() if operands is None else operands
        return ops.cast(values, "float32")

    def take(self, ids: Tensor, dtype: str, axis: int) -> Tensor:
        """The rows, `axis=0`, or columns, `axis=1`, of these indices.

        Returns:
            Tensor of dtype `dtype`, `ids.shape` and the size of the other
            axis.
        """
        (values,) = self.operands()
        found = ops.cast(ops.take(values, ids, axis=axis), dtype)
        return found if axis == 0 else ops.moveaxis(found, 0, -1)

    def _draw(self):
        raise NotImplementedError


def fence_operands(
    upstream: Tensor, operands: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Keeps compilers from keeping small values that were cast to float.

    See `keras_randadapt.ops.fence`. Floats are used as they are.
    """
    if any(keras.backend.is_int_dtype(values.dtype) for values in operands):
        return fence(upstream, *operands)
    return tuple(operands)


def _times(x, values):
    return matmul(x, ops.cast(values, x.dtype))


def _times_vjp(kept, upstream):
    return _times_transpose(upstream, *fence_operands(upstream, kept)), None


def _times_transpose(x, values):
    return matmul(x, ops.transpose(ops.cast(values, x.dtype)))


def _times_transpose_vjp(kept, upstream):
    return _times(upstream, *fence_operands(upstream, kept)), None


class Gaussian(RandomMatrix):
    """Independent standard normal entries. See `RandomMatrix`."""

    def _draw(self):
        return random.normals(self.seed, self.role, self.shape)


class Uniform(RandomMatrix):
    """Independent entries from `U(-1, 1)`; its scale is `sqrt(3)`.

    With the scale: `U(-sqrt(3), sqrt(3))`, of variance 1. See
    `RandomMatrix`.
    """

    scale = math.sqrt(3.0)

    def _draw(self):
        # Exact in float32: multiples of 2**-23.
        return 2 * random.uniforms(self.seed, self.role, self.shape) - 1


class SparseTernary(RandomMatrix):
    """Independent entries in -1, 0 and 1, kept as int8, mostly 0.

    `P(+1) = P(-1) = 1 / (2 sparsity)`, and the scale is `sqrt(sparsity)`
    (Achlioptas, 2003, at `sparsity=3`; Li, Hastie and Church, 2006). See
    `RandomMatrix`.

    Args:
        rows: int.
        columns: int.
        seed: int in `[0, 2**64)`.
        role: string.
        sparsity: Number, at least 1: one entry in so many is not 0.
        fill: Whether columns are made to lean on rows evenly: each on a row
            where it has an entry, at most `ceil(columns / rows)` columns on
            one row. A column that finds no such row is given one more entry,
            with a random sign. Of a thin matrix most columns may be empty
            otherwise, `(1 - 1 / sparsity) ** rows` of them.
    """

    dtype = "int8"

    def __init__(
        self,
        rows: int,
        columns: int,
        seed: int,
        role: str,
        sparsity: float = 3.0,
        fill: bool = False,
    ):
        super().__init__(rows, columns, seed, role)
        self.sparsity = float(sparsity)
        self.fill = bool(fill)
        self.scale = math.sqrt(self.sparsity)

    @property
    def key(self) -> Hashable:
        return (*super().key, self.sparsity, self.fill)

    def _draw(self):
        values = random.ternaries(
            self.seed, self.role, self.shape, self.sparsity
        )
        if self.fill:
            self._fill(values)
        return values

    def _fill(self, values):
        rows, columns = self.shape
        capacity = -(-columns // rows)
        signs = random.signs(self.seed, f"{self.role}/fill", columns)
        load = np.zeros(rows, np.int64)
        entries = np.count_nonzero(values, axis=0)
        # The columns with the least choice first.
        for column in np.argsort(entries, kind="stable"):
            found = np.flatnonzero(values[:, column])
            row = found[np.argmin(load[found])] if len(found) else None
            if row is None or load[row] == capacity:
                row = np.argmin(load)
                values[row, column] = signs[column]
            load[row] += 1
