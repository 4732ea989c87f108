"""Transforms as a kernel with tensor cores wants them; pure NumPy.

Coordinates lie in a tile whose axes are padded to powers of two, one axis a
factor. `triton.py` has the kernel.
"""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os

import numpy as np

from keras_randadapt.ops import program as steps

# Set to 0 before the package is imported, it turns the kernel off.
_SWITCH = "KERAS_RANDADAPT_TRITON"
# Elements that one program holds on chip: at least so many, in several rows if
# need be, and at most so many, in one.
_TILE = 4096
_LARGEST_TILE = 32768
# The least size of a product on tensor cores.
_LEAST_SIZE = 16
# What a product's size may be at the most: the first for which there is room.
_LARGEST_SIZES = (128, 64, 32)
_MAX_FACTORS = 3
# The bits of a float32 that tensor cores do not take.
_OTHER_BITS = np.uint32(0x1FFF)


def kernel_is_wanted():
    """Whether Triton is installed and the environment does not turn it off."""
    if os.environ.get(_SWITCH) == "0":
        return False
    return importlib.util.find_spec("triton") is not None


@dataclasses.dataclass(frozen=True, eq=False)
class TiledProgram:
    """A program as the kernel wants it.

    Coordinates are numbered by their position in a tile of `sizes`, whose
    axes are padded to powers of two. All stages have the same factors, but for
    a scale and for what is left out of the first and the last: that is computed
    too, from zeros or for nobody.

    Args:
        sizes: Tuple of three integers, powers of two; 1 for no factor.
        dims: `(input_dim, output_dim)`.
        stages: How many there are.
        scale: What the result of each stage is multiplied by.
        exact: Whether all bits of the factors are leading ones.
        factors: float32 array of shape `(s1**2 + s2**2 + s3**2,)`: the factors
            of every stage, row by row, padded with zeros.
        signs: float32 array of shape `(stages + 1, s1 * s2 * s3)`: signs before
            each stage and after the last. `None` if all are positive.
        signed: Integer, a bit for each row of `signs` that has a negative one.
        tables: `Tables`.
    """

    sizes: tuple
    dims: tuple
    stages: int
    scale: float
    exact: bool
    factors: np.ndarray
    signs: np.ndarray | None
    signed: int
    tables: "Tables"

    @functools.cached_property
    def known_settings(self):
        """By direction and dtype."""
        return {}

    def tile(self, itemsize):
        """Elements that a program of the kernel holds on chip."""
        size = math.prod(self.sizes)
        # Measured, see benchmarks/README.md.
        if itemsize < 4 and size == _TILE:
            return 2 * size
        return max(size, _TILE)

    def products(self, itemsize):
        """Products of tensor cores that make one of this dtype."""
        return 1 if itemsize < 4 else 2 if self.exact else 3

    def shared_bytes(self, itemsize):
        """Of shared memory: a tile that changes its layout, and factors.

        Those of three products are kept in two parts.
        """
        parts = 2 if self.products(itemsize) == 3 else 1
        return itemsize * (self.tile(itemsize) + parts * len(self.factors))


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """Where coordinates come from and go to.

    Args:
        source: int32 array `(s1 * s2 * s3,)`: which coordinate of the input
            goes to each position, or -1. `None` if they are in order.
        target: The same for the output.
    """

    source: np.ndarray | None
    target: np.ndarray | None

    @property
    def arrays(self):
        return self.source, self.target


def fitting(program, itemsize, room):
    """The `TiledProgram` with the largest factors for which there is room."""
    for largest in _LARGEST_SIZES:
        description = _describe(program, largest)
        if description and description.shared_bytes(itemsize) <= room:
            return description
    return None


def _describe(program, largest):
    """A `TiledProgram`, or `None`; no factor is larger than that."""
    steps_apart = _taken_apart(list(program))
    if steps_apart is None:
        return None
    dims, source, stages, between, target = steps_apart
    sizes = [
        max(max(stage.matrices[i].shape) for stage in stages)
        for i in range(len(stages[0].matrices))
    ]
    groups = _groups(tuple(sizes), largest)
    if groups is None:
        return None
    sizes = [math.prod(sizes[group]) for group in groups]
    padded = [_padded(size) for size in sizes]
    tile = math.prod(padded)
    missing = _MAX_FACTORS - len(padded)
    position = np.ravel_multi_index(
        np.unravel_index(np.arange(math.prod(sizes)), sizes), padded
    )
    signs = np.ones((len(stages) + 1, tile), np.float32)
    vectors = [source[1], *between, target[1]]
    for row, vector in zip(signs, vectors, strict=True):
        row[position[: len(vector)]] = np.where(vector < 0, -1, 1)
    signed = [place for place, row in enumerate(signs) if np.any(row < 0)]
    factors, scale = _common(stages)
    factors = np.concatenate(
        [np.ones(missing, np.float32)]
        + [_flat(factors[group], size) for group, size in zip(groups, padded)]
    )
    return TiledProgram(
        # Axes that are not there come first.
        sizes=(1,) * missing + tuple(padded),
        dims=dims,
        stages=len(stages),
        scale=scale,
        exact=not np.any(factors.view(np.uint32) & _OTHER_BITS),
        factors=factors,
        signs=signs if signed else None,
        signed=sum(1 << place for place in signed),
        tables=Tables(
            source=_table(source[0], position, tile),
            target=_table(target[0], position, tile),
        ),
    )


def _common(stages):
    """Matrices that all stages have in common, and the scale of each stage.

    A stage's matrices are those of another, times powers of two; of the first
    and the last stage, columns or rows may have been left out.
    """
    matrices = []
    scale = math.prod(stage.scale for stage in stages)
    for versions in zip(*(stage.matrices for stage in stages)):
        whole = np.zeros(np.max([m.shape for m in versions], axis=0))
        for matrix in versions:
            ratio = matrix[0, 0] / versions[0][0, 0]
            rows, columns = matrix.shape
            whole[:rows, :columns] = matrix / ratio
            scale *= ratio
        matrices.append(whole)
    return matrices, scale ** (1 / len(stages))


def _taken_apart(program):
    """The stages of a program, and what is around and between them.

    Returns:
        `(dims, source, stages, between, target)`, or `None` if the program is
        of another form: its input and output dimension, the `_selection`
        before and after the stages, the `Kronecker` steps, and the signs
        between each two.
    """
    places = [
        place
        for place, step in enumerate(program)
        if isinstance(step, steps.Kronecker)
    ]
    if not places or any(isinstance(step, steps.Window) for step in program):
        return None
    before, after = program[: places[0]], program[places[-1] + 1 :]
    middle = program[places[0] : places[-1] + 1]
    if {type(step) for step in middle} - {steps.Kronecker, steps.Multiply}:
        return None
    dims = program[0].input_dim, program[-1].output_dim
    source = _selection(before, dims[0])
    # Backwards, what comes after the last stage is what comes before it.
    after = [step.transpose for step in reversed(after)]
    target = _selection(after, dims[1])
    for (columns, _), dim in zip((source, target), dims):
        if np.count_nonzero(columns >= 0) < dim:
            return None
    stages = [program[place] for place in places]
    return dims, source, stages, list(_between(middle)), target


def _selection(selecting, dim):
    """The column that goes to each coordinate, or -1, and its sign."""
    columns, signs = np.arange(dim), np.ones(dim, np.int8)
    for step in selecting:
        match step:
            case steps.Multiply():
                signs = signs * step.vector
            case steps.Take():
                columns = np.append(columns, -1)[step.index]
                signs = np.append(signs, 0)[step.index]
            case steps.Resize():
                more = max(0, step.output_dim - step.input_dim)
                columns = np.pad(columns, (0, more), constant_values=-1)
                columns = columns[: step.output_dim]
                signs = np.pad(signs, (0, more))[: step.output_dim]
    return columns, signs


def _between(middle):
    """The signs between each two stages."""
    for step, following in itertools.pairwise(middle):
        if isinstance(step, steps.Multiply):
            yield step.vector
        elif isinstance(following, steps.Kronecker):
            yield np.ones(step.output_dim, np.int8)


@functools.lru_cache(maxsize=None)
def _groups(sizes, largest):
    """Slices of consecutive cores to multiply out, or `None`.

    As few as possible, since rotating axes costs more than multiply-adds; of
    equals, the larger first.
    """
    for parts in range(1, _MAX_FACTORS + 1):
        best, least = None, (_LARGEST_TILE + 1,)
        for cuts in itertools.combinations(range(1, len(sizes)), parts - 1):
            groups = [
                slice(*ends)
                for ends in itertools.pairwise((0, *cuts, len(sizes)))
            ]
            padded = [_padded(math.prod(sizes[group])) for group in groups]
            cost = math.prod(padded), sum(padded)
            if max(padded) <= largest and cost <= least:
                best, least = groups, cost
        if best:
            return best
    return None


def _padded(size):
    return max(_LEAST_SIZE, 1 << (size - 1).bit_length())


def _flat(matrices, size):
    matrix = functools.reduce(np.kron, matrices, np.ones((1, 1)))
    rows, columns = matrix.shape
    padding = ((0, size - rows), (0, size - columns))
    return np.pad(matrix, padding).astype(np.float32).ravel()


def _table(columns, position, tile):
    """Columns by position; `None` if they are in order and come first."""
    table = np.full(tile, -1, np.int32)
    table[position[: len(columns)]] = columns
    dim = columns.max() + 1
    if np.array_equal(table[:dim], np.arange(dim)) and (table[dim:] < 0).all():
        return None
    return table
