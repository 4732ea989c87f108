"""The leading part of a larger random matrix."""

from collections.abc import Hashable

import numpy as np

from keras_randadapt._types import Tensor
from keras_randadapt.bases.random_matrix import RandomMatrix


class Slice(RandomMatrix):
    """The first rows and columns of another matrix, whose values it reads.

    Args:
        whole: A `RandomMatrix`.
        rows: int.
        columns: int.
    """

    def __init__(self, whole: RandomMatrix, rows: int, columns: int):
        super().__init__(rows, columns, whole.seed, whole.role)
        if rows > whole.shape[0] or columns > whole.shape[1]:
            raise ValueError(
                f"A slice of shape {self.shape} is larger than the matrix, "
                f"{whole.shape}."
            )
        self.whole = whole
        self.dtype = whole.dtype

    @property
    def scale(self) -> float:
        return self.whole.scale

    @property
    def key(self) -> tuple[Hashable, ...]:
        return ("Slice", *self.shape, *self.whole.key)

    def operands(self) -> tuple[Tensor, ...]:
        (values,) = self.whole.operands()
        return (values[: self.shape[0], : self.shape[1]],)

    def _draw(self) -> np.ndarray:
        return self.whole.values()[: self.shape[0], : self.shape[1]]
