"""Programs in the form that a GPU kernel with tensor cores needs, in NumPy.

Coordinates lie in a tile that has an axis for each factor; each axis is padded
to a power of two. `triton.py` has the kernel.
"""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os

import numpy as np

from keras_randadapt.ops import program as steps

# Setting this to 0 before the package is imported turns the kernel off.
_SWITCH = "KERAS_RANDADAPT_TRITON"
# The least and the largest number of elements that one program holds on chip.
# If a row is smaller than the least number, a program holds several rows.
_TILE = 4096
_LARGEST_TILE = 32768
# The least size of a product on tensor cores.
_LEAST_SIZE = 16
# The largest size of a product. The first that fits into shared memory is used.
_LARGEST_SIZES = (128, 64, 32)
_MAX_FACTORS = 3
# The bits of a float32 that tensor cores ignore.
_OTHER_BITS = np.uint32(0x1FFF)


def kernel_is_wanted():
    """Whether Triton is installed and the environment does not turn it off."""
    if os.environ.get(_SWITCH) == "0":
        return False
    return importlib.util.find_spec("triton") is not None


@dataclasses.dataclass(frozen=True, eq=False)
class TiledProgram:
    """A program in the form that the kernel needs.

    Coordinates are numbered by their position in a tile of `sizes`, whose
    axes are padded to powers of two. All stages have the same factors up to a
    scale. The first and last stages are computed in full, even where a program
    skips coordinates; unused inputs are zero and unused outputs are ignored.

    Args:
        sizes: Tuple of three integers, powers of two; 1 means no factor.
        dims: `(input_dim, output_dim)`.
        stages: The number of stages.
        scale: The factor by which the result of each stage is multiplied.
        exact: Whether tensor cores use all bits of the factors.
        factors: float32 array of shape `(s1**2 + s2**2 + s3**2,)`: the factors
            of every stage, row by row, padded with zeros.
        signs: float32 array of shape `(stages + 1, s1 * s2 * s3)`: signs before
            each stage and after the last. `None` if all are positive.
        signed: Integer with a bit set for each row of `signs` with a -1.
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
        """The launch settings that are known, by direction and dtype."""
        return {}

    def tile(self, itemsize):
        """The elements that a program of the kernel holds on chip."""
        size = math.prod(self.sizes)
        # In 16 bits two rows were measured to be faster than one
        # (docs/design/gpu-kernel.md).
        if itemsize < 4 and size == _TILE:
            return 2 * size
        return max(size, _TILE)

    def products(self, itemsize):
        """The tensor-core products that make one product of this dtype."""
        return 1 if itemsize < 4 else 2 if self.exact else 3

    def shared_bytes(self, itemsize):
        """The bytes of shared memory for a tile and the factors.

        The tile lies there while its layout changes. For three products, each
        factor is kept in two parts.
        """
        parts = 2 if self.products(itemsize) == 3 else 1
        return itemsize * (self.tile(itemsize) + parts * len(self.factors))


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """The coordinates of the input and output at each position of a tile.

    Args:
        source: int32 array `(s1 * s2 * s3,)`: the coordinate of the input at
            each position, or -1. `None` if they are in order.
        target: The same for the output.
    """

    source: np.ndarray | None
    target: np.ndarray | None

    @property
    def arrays(self):
        return self.source, self.target


def fitting(program, itemsize, room):
    """The `TiledProgram` with the largest factors that fit, or `None`."""
    for largest in _LARGEST_SIZES:
        description = _describe(program, largest)
        if description and description.shared_bytes(itemsize) <= room:
            return description
    return None


def _describe(program, largest):
    """The `TiledProgram` with factors up to a size, or `None`."""
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
        # Axes without a factor come first.
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
    """The matrices that all stages share, and the scale of each stage.

    The matrices of two stages differ by powers of two. In the first and the
    last stage, columns or rows may be left out.
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
    """The stages of a program, and the steps around and between them.

    Returns:
        `(dims, source, stages, between, target)`: the input and output
        dimension, the `_selection` before the stages, the `Kronecker` steps,
        the signs between each two of them, and the `_selection` after them.
        `None` if the program has another form.
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
    # The steps after the last stage, reversed and transposed, are a selection
    # like those before the first.
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
    """Slices of consecutive cores that are multiplied out, or `None`.

    There are as few as possible, since rotating axes costs more than
    multiply-adds. Among equals, the larger come first.
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
    """The columns by position, or `None` if they are in order and first."""
    table = np.full(tile, -1, np.int32)
    table[position[: len(columns)]] = columns
    dim = columns.max() + 1
    if np.array_equal(table[:dim], np.arange(dim)) and (table[dim:] < 0).all():
        return None
    return table
