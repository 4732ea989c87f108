"""Bases with independent entries: Gaussian, uniform and sparse ternary."""

import math
from collections.abc import Hashable

import keras
import numpy as np
from keras import ops

from keras_randadapt import arguments
from keras_randadapt import random
from keras_randadapt._types import Tensor
from keras_randadapt.bases import regular_blocks
from keras_randadapt.ops import fence
from keras_randadapt.ops import with_gradient
from keras_randadapt.ops.fast_products import matmul

# Digests by the key of a basis. They are computed whenever values are drawn,
# so that no draw is needed for a digest alone.
_digests: dict[tuple[Hashable, ...], str] = {}
# The numbers of entries that are not 0, likewise.
_entries: dict[tuple[Hashable, ...], int] = {}


class RandomMatrix:
    """A frozen random matrix `(rows, columns)`, drawn entry by entry.

    A seed determines `values()`. They are kept in memory in the smallest dtype
    that holds them, and `scale * values()` has entries of mean 0 and variance
    1. Products use `values()` without the scale; an adapter multiplies a
    smaller tensor by `scale`.

    `matvec` and `adjoint` read the values from a variable if `bind` was
    called, and otherwise draw them again. For the backward pass they keep only
    the values, before any cast.

    Args:
        rows: int.
        columns: int.
        seed: int in `[0, 2**64)`.
        role: string. The purpose of the basis. Each role has other values.
    """

    dtype = "float32"
    _scale = 1.0

    def __init__(self, rows: int, columns: int, seed: int, role: str):
        self.shape = (
            arguments.check_rank(rows, "rows"),
            arguments.check_rank(columns, "columns"),
        )
        self.seed = random.check_seed(seed)
        self.role = role
        self._variable = None

    @property
    def scale(self) -> float:
        """The factor that gives the values variance 1."""
        return self._scale

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
    def key(self) -> tuple[Hashable, ...]:
        """A hashable key that two bases share only if they are equal."""
        return (type(self).__name__, *self.shape, self.seed, self.role)

    @property
    def cost(self) -> int:
        """The multiply-adds of one `matvec` of one vector."""
        return math.prod(self.shape)

    def bind(self, variable: keras.Variable) -> None:
        """Makes products read the values from this variable."""
        self._variable = variable

    def operands(self) -> tuple[Tensor, ...]:
        """The tensors that products take as `operands`, which are the values.

        `with_gradient` and compiled functions must be given every tensor that
        they use.
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
            operands: Optional result of `operands()`.

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
        """The product with the transpose; it swaps the shapes of `matvec`."""
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
    """The operands, fenced if a backward pass would cast them to floats.

    Without the fence a compiler would keep the cast values, which are larger.
    See `keras_randadapt.ops.fence`. Floats need no cast and no fence.
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
    """Independent entries from `U(-1, 1)`, with the scale `sqrt(3)`.

    Scaled entries are from `U(-sqrt(3), sqrt(3))` and have variance 1. See
    `RandomMatrix`.
    """

    _scale = math.sqrt(3.0)

    def _draw(self):
        # The values are multiples of 2**-23 and exact in float32.
        return 2 * random.uniforms(self.seed, self.role, self.shape) - 1


class SparseTernary(RandomMatrix):
    """Independent entries -1, 0 and 1, most of them 0, kept as int8.

    `P(+1) = P(-1) = 1 / (2 sparsity)`, and the scale is `sqrt(sparsity)`
    (Achlioptas, 2003, with `sparsity=3`; Li, Hastie and Church, 2006). See
    `RandomMatrix`.

    Args:
        rows: int.
        columns: int.
        seed: int in `[0, 2**64)`.
        role: string.
        sparsity: Number, at least 1. One entry in `sparsity` is not 0.
        fill: `False`, `"full_rank"` or `True`. Without it, a fraction `(1 - 1
            / sparsity) ** rows` of the columns is empty, which in a matrix of
            few rows may be most of them.

            `"full_rank"` changes at most one entry in each line across the
            longer side, so that the matrix has full rank. Cut the longer side
            into square blocks; the last may be smaller, and is square with
            the first lines of the shorter side. Then each block is regular.
            No row and no column is empty, the first block alone gives the
            matrix full rank, and the columns can be assigned to rows evenly.
            The scale is then `sqrt(size / entries)`, so that the mean square
            of the scaled entries is 1, however many entries were added.

            `True` is the earlier scheme. It adds entries so that columns can
            be assigned to rows evenly: each column to a row where it has an
            entry, and at most `ceil(columns / rows)` columns to a row. The
            scale stays `sqrt(sparsity)`, and the rank may be smaller than
            both dimensions.

    Raises:
        ValueError: If `fill` is something else.
    """

    dtype = "int8"

    def __init__(
        self,
        rows: int,
        columns: int,
        seed: int,
        role: str,
        sparsity: float = 3.0,
        fill: bool | str = False,
    ):
        super().__init__(rows, columns, seed, role)
        self.sparsity = float(sparsity)
        if isinstance(fill, str):
            arguments.check_choice(fill, ("full_rank",), "fill")
            self.fill: bool | str = fill
        else:
            self.fill = bool(fill)

    @property
    def key(self) -> tuple[Hashable, ...]:
        return (*super().key, self.sparsity, self.fill)

    @property
    def scale(self) -> float:
        if self.fill != "full_rank":
            return math.sqrt(self.sparsity)
        if self.key not in _entries:
            self.values()
        return math.sqrt(math.prod(self.shape) / _entries[self.key])

    def _draw(self):
        values = random.ternaries(
            self.seed, self.role, self.shape, self.sparsity
        )
        if self.fill == "full_rank":
            regular_blocks.make_regular(values, self.seed, self.role)
            _entries[self.key] = int(np.count_nonzero(values))
        elif self.fill:
            self._fill(values)
        return values

    def _fill(self, values):
        rows, columns = self.shape
        capacity = -(-columns // rows)
        signs = random.signs(self.seed, f"{self.role}/fill", columns)
        load = np.zeros(rows, np.int64)
        entries = np.count_nonzero(values, axis=0)
        # Columns with the fewest entries have the least choice and come first.
        for column in np.argsort(entries, kind="stable"):
            found = np.flatnonzero(values[:, column])
            row = found[np.argmin(load[found])] if len(found) else None
            if row is None or load[row] == capacity:
                row = np.argmin(load)
                values[row, column] = signs[column]
            load[row] += 1
