"""Calls the compiled CPU transforms of `_native.c`, with NumPy and ctypes.

`_native.c` applies a `Program` to a block of rows in one pass over memory. It
computes Hadamard matrices of powers of two by additions (the fast
Walsh-Hadamard transform) and multiplies other cores as small matrices. It is
built when the package is installed, if there is a C compiler. Without it, and
in code that may be exported, the backends make matrix products.
"""

import ctypes
import dataclasses
import functools
import importlib.util
import math
import os
import warnings
import weakref

import numpy as np

from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.hadamard import _SYLVESTER
from keras_randadapt.ops import program as steps

_MODULE = "keras_randadapt.ops._native"
# Setting this to 0 before the package is imported turns the compiled code off.
_SWITCH = "KERAS_RANDADAPT_NATIVE"
# The version of the program format that `_native.c` and this file share. It
# detects a file that an older version of the package has left behind.
_FORMAT = 1
# Operations of `_native.c`.
_RADIX, _RUN, _DENSE, _GATHER, _SCATTER, _RESIZE, _SCALE = range(7)
# The floats of one vector instruction.
_LANES = 8
_LARGEST_RUN = 64
_LARGEST_RADIX = 16
# Coordinates at this distance or more fall into one set of the first-level
# cache, which holds 8 of them.
_CONFLICT = 1024
# A matrix library is faster above this many multiply-adds an element.
_LARGEST_CORE = 64
_HEADER, _WORDS = 4, 10


def path():
    """The path of the compiled code, or `None`."""
    if os.environ.get(_SWITCH, "1") == "0":
        return None
    spec = importlib.util.find_spec(_MODULE)
    return spec and spec.origin


@functools.cache
def library():
    """The compiled code, or `None`."""
    origin = path()
    if origin is None:
        return None
    try:
        loaded = ctypes.CDLL(origin)
        if loaded.randadapt_format() != _FORMAT:
            raise OSError("it is of another version of the package")
    except (OSError, AttributeError) as error:
        warnings.warn(
            f"{origin} cannot be used, and Hadamard transforms on a CPU "
            f"will be slower; install the package anew. Received: {error}",
            AdapterWarning,
        )
        return None
    pointer = ctypes.c_void_p
    loaded.randadapt_apply.argtypes = [
        *[pointer] * 6,
        ctypes.c_int64,
        ctypes.c_int32,
        pointer,
    ]
    return loaded


@dataclasses.dataclass(frozen=True, eq=False)
class NativeProgram:
    """A program in the format of `_native.c`.

    Args:
        integers: int32 array: dimensions, operations, and the indices of
            gathers and scatters.
        floats: float32 array: matrices, signs and scales.
    """

    integers: np.ndarray
    floats: np.ndarray

    @functools.cached_property
    def addresses(self):
        return self.integers.ctypes.data, self.floats.ctypes.data


def translate(program):
    """The `NativeProgram` of a program, or `None`.

    It is `None` if there is no compiled code, and for windows and for cores
    that a matrix library multiplies faster.
    """
    if library() is None:
        return None
    if program not in _known_programs:
        _known_programs[program] = _Translation().of(program)
    return _known_programs[program]


_known_programs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def apply(
    native, x, y, rows, before=None, after=None, threads=1, parallel=None
):
    """`after * T (before * x)` for the rows of a matrix.

    Args:
        native: A `NativeProgram`.
        x: Address of `rows` rows of float32, one after the other.
        y: Address for the results.
        rows: Integer.
        before: Address of a vector, or `None`.
        after: Address of a vector, or `None`.
        threads: Integer, the largest number of threads.
        parallel: Optional address of OpenMP's function `GOMP_parallel`, whose
            threads are then used.
    """
    status = library().randadapt_apply(
        *native.addresses, x, before, after, y, rows, threads, parallel
    )
    if status:
        raise MemoryError("No memory for the rows of a Hadamard transform.")


class _Translation:
    def __init__(self):
        self.operations = []
        self.integers = []
        self.floats = []
        self.float_count = 0
        # The signs of steps that no operation has multiplied by yet.
        self.vector = None

    def of(self, program):
        for step in program:
            if not self._add(step):
                return None
        if self.vector is not None or not self.operations:
            self._scale(program.output_dim)
        largest = max(max(o[1:3]) for o in self.operations)
        header = [
            program.input_dim,
            program.output_dim,
            largest,
            len(self.operations),
        ]
        # Indices come after the operations.
        start = _HEADER + _WORDS * len(self.operations)
        for operation in self.operations:
            if operation[0] in (_GATHER, _SCATTER):
                operation[7] += start
        integers = [np.array(header), *map(np.array, self.operations)]
        integers = np.concatenate([*integers, *self.integers])
        floats = np.concatenate([*self.floats, [0.0]])
        return NativeProgram(
            integers.astype(np.int32), floats.astype(np.float32)
        )

    def _add(self, step):
        match step:
            case steps.Kronecker():
                return self._add_kronecker(step)
            case steps.Multiply():
                signs = 1.0 if self.vector is None else self.vector
                self.vector = signs * step.vector
            case steps.Take():
                return self._add_take(step)
            case steps.Resize():
                dims = step.input_dim, step.output_dim
                self._operation(_RESIZE, dims)
                if self.vector is not None:
                    missing = max(0, dims[1] - dims[0])
                    self.vector = np.pad(self.vector, (0, missing))[: dims[1]]
            case _:
                return False
        return True

    def _add_take(self, step):
        scatter = step.has_zeros
        index = step.transpose.index if scatter else step.index
        if scatter and step.transpose.has_zeros:
            return False
        dims = step.input_dim, step.output_dim
        if self.vector is not None:
            self.vector = np.append(self.vector, 0)[step.index]
        place = sum(map(len, self.integers))
        self._operation(_SCATTER if scatter else _GATHER, dims, numbers=place)
        self.integers.append(index)
        return True

    def _add_kronecker(self, step):
        factors = _factors(step)
        if factors is None:
            return False
        # Factors that shrink the data come first, as in `Kronecker.grouped`.
        sizes = [q for _, q, _ in factors]
        order = sorted(
            range(len(factors)),
            key=lambda i: (factors[i][0] / factors[i][1], -i),
        )
        scale = step.scale * math.prod(s for *_, s in factors if np.isscalar(s))
        for i in order:
            rows, columns, matrix = factors[i]
            right = math.prod(sizes[i + 1 :])
            outer = math.prod(sizes[:i])
            sizes[i] = rows
            if np.isscalar(matrix):
                self._add_sylvester(rows, outer, right, scale)
            else:
                self._add_matrix(matrix * scale, outer, right)
            scale = 1.0
        return True

    def _add_sylvester(self, size, outer, right, scale):
        """The Hadamard matrix of a power of two, at least 8."""
        dim = size * outer * right
        if right == 1:
            run = min(size, _LARGEST_RUN)
            self._scaled(_RUN, dim, outer * size // run, run, 1, scale)
            size, right, scale = size // run, run, 1.0
        while size > 1:
            # The parts are equal: 8 and 8 rather than 16 and 4.
            bits = size.bit_length() - 1
            largest = _LARGEST_RADIX if right < _CONFLICT else 8
            parts = -(-bits // (largest.bit_length() - 1))
            radix = 1 << -(-bits // parts)
            size //= radix
            self._scaled(_RADIX, dim, outer * size, radix, right, scale)
            right, scale = right * radix, 1.0

    def _add_matrix(self, matrix, outer, right):
        rows, columns = matrix.shape
        if self.vector is not None:
            self._scale(outer * columns * right)
        if right == 1:
            padding = (0, -rows % _LANES), (0, 0)
            numbers = np.pad(matrix, padding).T
        else:
            numbers = matrix
        dims = outer * columns * right, outer * rows * right
        self._operation(
            _DENSE,
            dims,
            (outer, rows, columns, right),
            numbers=self._numbers(numbers),
        )

    def _scale(self, dim):
        self._scaled(_SCALE, dim, 1, dim, 1, 1.0)

    def _scaled(self, kind, dim, outer, size, right, scale):
        """An operation that multiplies by the signs and a number first."""
        vector = number = -1
        if self.vector is not None:
            vector = self._numbers(self.vector * scale)
        elif scale != 1.0:
            number = self._numbers(np.array(scale))
        self.vector = None
        self._operation(
            kind,
            (dim, dim),
            (outer, size, size, right),
            vector=vector,
            scale=number,
        )

    def _operation(
        self, kind, dims, sizes=(1, 1, 1, 1), numbers=-1, vector=-1, scale=-1
    ):
        self.operations.append([kind, *dims, *sizes, numbers, vector, scale])

    def _numbers(self, array):
        place = self.float_count
        self.floats.append(array.ravel())
        self.float_count += array.size
        return place


def _factors(step):
    """The factors of a step, as tuples `(rows, columns, matrix)`, or `None`.

    If the last one is the Hadamard matrix of a power of two, its scale stands
    for the matrix.
    """
    matrices = list(step.matrices)
    size, scale = 1, 1.0
    while matrices and _is_sylvester(matrices[-1]):
        scale *= matrices.pop()[0, 0]
        size *= 2
    if size < _LANES:
        matrices, size = list(step.matrices), 1
    groups = []
    while matrices:
        matrix = matrices.pop()
        if groups:
            product = np.kron(matrix, groups[-1])
            too_small = size == len(groups) == 1 and (
                max(groups[-1].shape) < _LANES
            )
            if too_small or min(product.shape) == 1:
                groups[-1] = product
                continue
        groups.append(matrix)
    factors = [(*matrix.shape, matrix) for matrix in reversed(groups)]
    if any(min(rows, columns) > _LARGEST_CORE for rows, columns, _ in factors):
        return None
    return [*factors, (size, size, scale)] if size > 1 else factors


def _is_sylvester(matrix):
    return matrix.shape == (2, 2) and np.array_equal(
        matrix, matrix[0, 0] * _SYLVESTER
    )
