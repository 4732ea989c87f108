"""Linear maps on the last axis, as short programs of pure NumPy data.

Each backend module interprets the five kinds of step below and needs nothing
else. The adjoint of a program, which is also its gradient, is another program,
`program.transpose`.

Steps compare by identity, so that a program can be the static argument of a
compiled function without hashing its arrays.
"""

import dataclasses
import functools
import itertools
import math
import typing
import weakref
from collections.abc import Iterable
from collections.abc import Iterator

import numpy as np

from keras_randadapt.hadamard import group_factors
from keras_randadapt.hadamard import hadamard_cores
from keras_randadapt.hadamard import window_order


class Factor(typing.NamedTuple):
    """One product of a `Kronecker`.

    Attributes:
        matrix: Array of shape `(p, q)`.
        axis: Its position among the factors.
        right: The product takes `(..., q, right)` to `(..., p, right)`.
    """

    matrix: np.ndarray
    axis: int
    right: int


@dataclasses.dataclass(frozen=True, eq=False)
class Kronecker:
    """`scale * (M_1 (x) M_2 (x) ...) x`; the matrices need not be square.

    Args:
        matrices: Tuple of `float64` arrays of shapes `(p_i, q_i)`. Entries of
            Hadamard factors are +- a power of two, exact in every dtype.
        scale: Float in `[sqrt(1/2), sqrt(2)]`: the part of the normalization
            that is no power of two.
    """

    matrices: tuple
    scale: float = 1.0

    @property
    def input_dim(self):
        return math.prod(m.shape[1] for m in self.matrices)

    @property
    def output_dim(self):
        return math.prod(m.shape[0] for m in self.matrices)

    def grouped(self, pass_cost, exact, left_cost=1):
        """The products that apply this step, in order.

        Args:
            pass_cost: See `keras_randadapt.hadamard.group_factors`.
            exact: Whether to leave `scale` out, so that entries stay exact in
                low precision. The caller then multiplies by it at the end.
            left_cost: See `group_factors`.

        Returns:
            A tuple of `Factor`. Matrices that shrink the data come first and
            matrices that grow it last. Among equals, later factors come
            first.
        """
        key = pass_cost, exact, left_cost
        if key not in self._grouped:
            self._grouped[key] = self._group(*key)
        return self._grouped[key]

    @functools.cached_property
    def _grouped(self):
        return {}

    def _group(self, pass_cost, exact, left_cost):
        matrices = list(group_factors(self.matrices, pass_cost, left_cost))
        sizes = [matrix.shape[1] for matrix in matrices]
        if not exact:
            matrices[0] = matrices[0] * self.scale
        growth = [matrix.shape[0] / matrix.shape[1] for matrix in matrices]
        axes = sorted(range(len(matrices)), key=lambda i: (growth[i], -i))
        factors = []
        for i in axes:
            right = math.prod(sizes[i + 1 :])
            factors.append(Factor(matrices[i], i, right))
            sizes[i] = matrices[i].shape[0]
        return tuple(factors)

    @staticmethod
    def rotations(factors):
        """The transpositions for backends that multiply only the last axis.

        Each axis is moved to the end before its product and stays there until
        the next one is moved.

        Args:
            factors: The result of `grouped`.

        Returns:
            A list of permutations, one before each product and one after the
            last, which restores the order.
        """
        order = list(range(len(factors)))
        permutations = []
        for factor in factors:
            position = order.index(factor.axis)
            axes = list(range(len(order)))
            axes.append(axes.pop(position))
            permutations.append(axes)
            order = [order[axis] for axis in axes]
        permutations.append([order.index(axis) for axis in range(len(order))])
        return permutations

    @functools.cached_property
    def transpose(self):
        matrices = tuple(np.ascontiguousarray(m.T) for m in self.matrices)
        return _of_transpose(self, Kronecker(matrices, self.scale))


@dataclasses.dataclass(frozen=True, eq=False)
class Multiply:
    """`vector * x`; `vector` is an `int8` array of signs, shape `(dim,)`."""

    vector: np.ndarray

    @property
    def output_dim(self):
        return len(self.vector)

    input_dim = output_dim

    @property
    def transpose(self):
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class Take:
    """`y[i] = x[index[i]]`, and 0 where `index[i] == input_dim`.

    Indices below `input_dim` are distinct, so the transpose, a scatter, is a
    gather again.
    """

    index: np.ndarray
    input_dim: int

    @property
    def output_dim(self):
        return len(self.index)

    @property
    def has_zeros(self):
        return bool(np.any(self.index == self.input_dim))

    @functools.cached_property
    def transpose(self):
        inverse = np.full(self.input_dim + 1, len(self.index), np.int32)
        inverse[self.index] = np.arange(len(self.index), dtype=np.int32)
        return _of_transpose(self, Take(inverse[:-1], len(self.index)))


@dataclasses.dataclass(frozen=True, eq=False)
class Resize:
    """Appends zeros, or drops the last coordinates."""

    input_dim: int
    output_dim: int

    @functools.cached_property
    def transpose(self):
        return _of_transpose(self, Resize(self.output_dim, self.input_dim))


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """Applies `step` to coordinates `start` to `stop`, leaves the others."""

    dim: int
    start: int
    stop: int
    step: Kronecker

    @property
    def output_dim(self):
        return self.dim

    input_dim = output_dim

    @functools.cached_property
    def transpose(self):
        step = self.step.transpose
        return _of_transpose(
            self, Window(self.dim, self.start, self.stop, step)
        )


def _of_transpose(step, transpose):
    # Transposing twice returns the same object, so that a backend finds what
    # it has compiled or cached for a step.
    vars(transpose)["transpose"] = step
    return transpose


class Program:
    """Steps that are applied first to last.

    `from_key(program.key)` finds the program where only a string can be
    passed.
    """

    _by_key: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
    _counter = itertools.count()

    def __init__(self, steps: Iterable[typing.Any], key: str | None = None):
        self.steps = tuple(steps)
        # The key is a string, because `torch.compile` makes numbers that
        # change symbolic.
        self.key = str(next(self._counter)) if key is None else key
        self._by_key[self.key] = self

    def __iter__(self) -> Iterator[typing.Any]:
        return iter(self.steps)

    @property
    def input_dim(self) -> int:
        return self.steps[0].input_dim

    @property
    def output_dim(self) -> int:
        return self.steps[-1].output_dim

    @functools.cached_property
    def largest_dim(self) -> int:
        return max(max(s.input_dim, s.output_dim) for s in self.steps)

    @classmethod
    def from_key(cls, key: str) -> "Program":
        if key.endswith("'"):
            return cls.from_key(key[:-1]).transpose
        return cls._by_key[key]

    @functools.cached_property
    def transpose(self) -> "Program":
        """The program of the transposed map."""
        steps = [step.transpose for step in reversed(self.steps)]
        # The key follows from this program's key, so that another process,
        # which loads compiled code of `torch.compile` from disk, has it too.
        return _of_transpose(self, Program(steps, f"{self.key}'"))


def scaled(apply):
    """Decorates a backend's `apply(x, program)` to multiply before and after.

    The two products are extra passes over the data.
    """

    @functools.wraps(apply)
    def apply_scaled(x, program, before=None, after=None):
        if before is not None:
            x = x * before
        y = apply(x, program)
        return y if after is None else y * after

    return apply_scaled


def hadamard_steps(order, normalize=True):
    """The program of the Hadamard transform of a supported order."""
    factors = hadamard_cores(order)
    if not normalize:
        return Program([Kronecker(factors)])
    return Program(_normalized([factors]))


def randomized_steps(signs, embed, select):
    """The program of `Select (H B_k) ... (H B_1) Embed`.

    It skips the products with padding and those of coordinates that are
    dropped.

    Args:
        signs: `int8` array of shape `(k, order)`.
        embed: `Resize` or `Take` from the input to `order` coordinates.
        select: `Resize` or `Take` from `order` coordinates to the output.

    Returns:
        A program.
    """
    order = signs.shape[1]
    window = window_order(order)
    if window is None:
        # Powers of two are distributed over all stages. With two stages of an
        # odd power of two, the remaining scale is then 1.
        factors = hadamard_cores(order)
        stages = [[step] for step in _normalized([factors] * len(signs))]
    else:
        kronecker = _normalized([hadamard_cores(window)])[0]
        stages = [
            [
                Window(order, 0, window, kronecker),
                Window(order, order - window, order, kronecker),
            ]
        ] * len(signs)

    program = [embed]
    for vector, stage in zip(signs, stages):
        program += [Multiply(vector), *stage]
    program.append(select)
    program = _skip_unselected(program)
    program = [step.transpose for step in reversed(program)]
    program = _skip_unselected(program)
    return Program(
        step.transpose
        for step in reversed(program)
        if not isinstance(step, Resize) or step.input_dim != step.output_dim
    )


def _normalized(stages):
    """One `Kronecker` a stage, such that their product is orthogonal.

    Factors are divided by powers of two, such that every partial product,
    from the last factor of a stage to the first as in `Kronecker.grouped`, is
    orthogonal up to a factor `sqrt(2)`. Partial results therefore do not
    overflow in `float16`. The last stage has the remaining scale, in
    `[sqrt(1/2), sqrt(2)]`.
    """
    wanted = given = 0.0
    steps = []
    for factors in stages:
        matrices = []
        for factor in reversed(factors):
            wanted += 0.5 * math.log2(len(factor))
            exponent = round(wanted - given)
            given += exponent
            matrices.append(np.ldexp(factor, -exponent))
        steps.append(Kronecker(tuple(reversed(matrices))))
    size = math.prod(len(f) for factors in stages for f in factors)
    scale = 2.0**given / math.sqrt(size)
    steps[-1] = Kronecker(steps[-1].matrices, scale)
    return steps


def _skip_unselected(program):
    """Restricts the last transform to the coordinates that are kept.

    Applied to a transposed program, it skips the products with the zeros that
    pad the input.
    """
    *head, last, select = program
    if isinstance(last, Multiply):
        kept = last.vector[_selected(select)]
        return [*_skip_unselected([*head, select]), Multiply(kept)]
    if not isinstance(last, Kronecker) or not isinstance(select, Resize):
        return program
    matrices = list(last.matrices)
    right = last.output_dim
    for i, matrix in enumerate(matrices):
        right //= len(matrix)
        matrices[i] = matrix[: -(-select.output_dim // right)]
        if len(matrices[i]) > 1:
            break
    last = Kronecker(tuple(matrices), last.scale)
    return [*head, last, Resize(last.output_dim, select.output_dim)]


def _selected(select):
    if isinstance(select, Resize):
        return slice(select.output_dim)
    return select.index
