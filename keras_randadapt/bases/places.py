"""Places of a matrix's entries that a seed gives."""

from collections.abc import Hashable

import keras
import numpy as np
from keras import ops

from keras_randadapt import random
from keras_randadapt._types import Tensor

# The digests of the places so far, so that none are drawn for a digest alone.
_digests: dict[tuple[Hashable, ...], str] = {}


class Places:
    """Distinct places in a matrix, in ascending order.

    A place is a number in `[0, rows * columns)`; entry `(i, j)` has the place
    `i * columns + j`.

    Args:
        rows: int. The number of rows of the matrix.
        columns: int. The number of its columns.
        count: int. The number of places.
        seed: int in `[0, 2**64)`.
        role: string. The purpose of the places. Each role has others.
    """

    dtype = "int32"

    def __init__(
        self, rows: int, columns: int, count: int, seed: int, role: str
    ):
        self.shape = (count,)
        self.rows, self.columns = rows, columns
        self.seed = random.check_seed(seed)
        self.role = role
        self._variable: keras.Variable | None = None

    @property
    def key(self) -> tuple[Hashable, ...]:
        """A hashable key that two objects share only if they are equal."""
        sizes = (self.rows, self.columns, *self.shape)
        return (type(self).__name__, *sizes, self.seed, self.role)

    def values(self) -> np.ndarray:
        """The places, as an int32 array."""
        role = f"{self.role}/{self.rows}x{self.columns}"
        order = random.permutation(self.seed, role, self.rows * self.columns)
        return self._noted(np.sort(order[: self.shape[0]]).astype("int32"))

    def digest(self) -> str:
        """A short hash of the places."""
        if self.key not in _digests:
            self.values()
        return _digests[self.key]

    def bind(self, variable: keras.Variable) -> None:
        """Makes `tensor` read the places from this variable."""
        self._variable = variable

    def tensor(self) -> Tensor:
        """The places as an int32 tensor."""
        if self._variable is None:
            return ops.convert_to_tensor(self.values())
        return ops.convert_to_tensor(self._variable)

    def _noted(self, values):
        if self.key not in _digests:
            _digests[self.key] = random.digest(values)
        return values


class RegularPlaces(Places):
    """The diagonal, and whole rows and columns at regular distances.

    Args:
        rows: int. The number of rows of the matrix.
        columns: int. The number of its columns.
        lines: int. The number of whole rows, and of whole columns.
    """

    def __init__(self, rows: int, columns: int, lines: int):
        chosen_rows, chosen_columns = (
            _spread(lines, rows),
            _spread(lines, columns),
        )
        diagonal = np.arange(min(rows, columns))
        off = ~np.isin(diagonal, chosen_rows) & ~np.isin(
            diagonal, chosen_columns
        )
        count = (
            len(chosen_rows) * columns
            + len(chosen_columns) * rows
            - len(chosen_rows) * len(chosen_columns)
            + int(off.sum())
        )
        super().__init__(rows, columns, count, 0, f"lines/{lines}")
        self._lines = chosen_rows, chosen_columns

    def values(self) -> np.ndarray:
        mask = np.zeros((self.rows, self.columns), bool)
        mask[self._lines[0]] = True
        mask[:, self._lines[1]] = True
        np.fill_diagonal(mask, True)
        return self._noted(np.flatnonzero(mask).astype("int32"))


def _spread(count, size):
    """`count` distinct numbers below `size`, at regular distances."""
    return np.arange(count) * size // max(count, 1)
