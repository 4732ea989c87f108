"""A long list of random vectors that is drawn again whenever it is used."""

import hashlib
import math

import numpy as np
from keras import ops

from keras_randadapt import random
from keras_randadapt._types import Tensor
from keras_randadapt.ops import counter
from keras_randadapt.ops import with_gradient

# The number of entries that are drawn at a time. It bounds the memory.
CHUNK = 1 << 20


class RegeneratedUniform:
    """`count` frozen random vectors of one size that take no memory.

    Entries are independent and uniform on the 256 values `(2 b - 255) / 256`
    of a byte `b`. A sum of many of them is like a sum of values from
    `U(-1, 1)`. `keras_randadapt.ops.counter` draws them inside the compiled
    step, a few vectors at a time, in the forward pass and again in the
    backward pass. The bits are the same on every backend and for every number
    of vectors at a time.

    Args:
        count: int. The number of vectors.
        size: int. The size of each.
        seed: int in `[0, 2**64)`.
        role: string. The purpose of the vectors. Each role has other vectors.
        chunk: int. The largest number of entries that are drawn at a time. At
            least one vector is drawn.
    """

    #: The variance of the entries.
    variance = (256**2 - 1) / 256**2 / 3

    def __init__(
        self, count: int, size: int, seed: int, role: str, chunk: int = CHUNK
    ):
        self.count = int(count)
        self.size = int(size)
        self.seed = random.check_seed(seed)
        self.role = role
        self._words = -(-self.size // 4)
        self._at_a_time = max(1, min(self.count, chunk // (4 * self._words)))
        text = f"RegeneratedUniform\n{seed}\n{role}\n{count}\n{size}"
        key = hashlib.sha256(text.encode()).digest()[:8]
        self._key = int.from_bytes(key, "little")

    def combine(self, coefficients: Tensor) -> Tensor:
        """The sum of the vectors, each times its coefficient.

        Args:
            coefficients: float32 tensor `(count,)`, or `(n, count)` for
                several sums, which have no gradient.

        Returns:
            float32 tensor `(size,)`, or `(n, size)`.
        """
        if len(coefficients.shape) == 2:
            return self._combine(coefficients)
        return with_gradient(
            self._combine,
            lambda kept, upstream: (self._correlate(upstream),),
            coefficients,
            drop=1,
        )

    def correlate(self, vector: Tensor) -> Tensor:
        """The scalar product of a vector with each: the adjoint of `combine`.

        Args:
            vector: float32 tensor `(size,)`.

        Returns:
            float32 tensor `(count,)`.
        """
        return with_gradient(
            self._correlate,
            lambda kept, upstream: (self._combine(upstream),),
            vector,
            drop=1,
        )

    def dense(self) -> np.ndarray:
        """The vectors as rows of a float32 NumPy array, for tests."""
        rows = self._rows(0, self.count)
        return np.array(ops.convert_to_numpy(rows))

    def digest(self) -> str:
        """A short hash of the key from which the vectors are drawn."""
        return random.digest(np.array([self._key], "uint64"))

    def _combine(self, coefficients):
        n = self._at_a_time
        chunks = math.ceil(self.count / n)
        several = [ops.shape(coefficients)[0]] * (len(coefficients.shape) - 1)
        more = [(0, 0)] * len(several)
        padded = ops.pad(coefficients, [*more, (0, chunks * n - self.count)])
        padded = ops.reshape(padded, (*several, chunks, n))

        def add(i, total):
            row = ops.take(padded, i, axis=-2)
            return total + ops.matmul(row, self._rows(i * n, n))

        zeros = ops.zeros((*several, self.size), "float32")
        return ops.fori_loop(0, chunks, add, zeros)

    def _correlate(self, vector):
        n = self._at_a_time
        chunks = math.ceil(self.count / n)

        def correlate(i):
            return ops.matmul(self._rows(i * n, n), vector)

        found = ops.map(correlate, ops.arange(chunks, dtype="int32"))
        return ops.reshape(found, (-1,))[: self.count]

    def _rows(self, start, n):
        """The vectors from `start`, which may be traced, as `(n, size)`."""
        places = ops.arange(n, dtype="int32") + start
        words = counter.random_rows(self._key, places, self._words)
        # Each word gives four entries, the lowest byte first.
        shifts = ops.arange(0, 32, 8, dtype="int32")
        data = ops.bitwise_and(
            ops.right_shift(ops.expand_dims(words, -1), shifts), 255
        )
        values = ops.cast(2 * data - 255, "float32") / 256.0
        return ops.reshape(values, (n, 4 * self._words))[:, : self.size]
