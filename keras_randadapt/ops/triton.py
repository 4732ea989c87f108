"""A CUDA kernel for the transforms of the PyTorch backend, in Triton.

A program of `steps.py` is applied to a block of rows in one pass over memory:
the rows are read once, held on chip through all stages of signs and Hadamard
transforms, and written once. The factors of a transform are matrix products,
padded to the power-of-two sizes that Triton's tiles have; each is followed by a
rotation of the axes, after which the next one is the fastest.

Products accumulate in float32, whatever the dtype of the data. Tensor cores
take the 11 leading bits of a number: as many as float16 has, and more than
bfloat16. For float32 data a second product adds the bits that follow; the
factors' entries are +- powers of two, or else (Hartley cores) a third product
adds their other bits.

Under `TRITON_INTERPRET=1`, set before Triton is imported, the kernel runs on a
CPU; slowly, for tests.
"""

import dataclasses
import functools
import itertools
import math
import weakref

import numpy as np
import torch
import triton
import triton.language as tl

from keras_randadapt.ops import steps
from keras_randadapt.ops.torch import as_tensors

# Elements that one program holds on chip: at least so many, in several rows if
# need be, and at most so many, in one.
_TILE = 4096
_LARGEST_TILE = 32768
# The least size of a product on tensor cores.
_LEAST_SIZE = 16
# What rotating the axes after a product costs, in multiply-adds an element.
_ROTATION_COST = 32
_MAX_FACTORS = 3

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Those of a float32 that tensor cores do not take.
_OTHER_BITS = np.uint32(0x1FFF)


def takes(program, dtype, device):
    """Whether the kernel can apply a program to tensors of a dtype.

    Not to other dtypes, nor windows, nor orders whose tile does not fit on
    chip; and on no GPU without tensor cores for TF32.
    """
    if dtype not in _DTYPES or _description(program) is None:
        return False
    description, _ = _description(program)
    return math.prod(description.sizes) <= _room(device)


@functools.cache
def _room(device):
    """The elements of a tile for which a device has room."""
    if not hasattr(triton, "knobs"):
        # Too old.
        return 0
    if triton.knobs.runtime.interpret:
        return _LARGEST_TILE
    if torch.version.hip or not torch.cuda.is_available():
        return 0
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return 0
    # Products exchange whole tiles through shared memory, padded by a quarter
    # at most. Hopper's read large factors from there too, for which the rest of
    # what it has is enough (`tests/ops/test_triton.py`).
    return properties.shared_memory_per_block_optin // 5


def apply(x, program, before=None, after=None):
    """`after * T (before * x)` for the rows of a matrix.

    Args:
        x: Tensor of shape `(rows, input_dim)`.
        program: One that `takes` takes.
        before: `None`, or tensor of shape `(input_dim,)`.
        after: `None`, or tensor of shape `(output_dim,)`.

    Returns:
        Tensor of shape `(rows, output_dim)`, of the dtype of `x`. It has no
        gradient.
    """
    y = x.new_empty(len(x), program.output_dim)
    if len(x) == 0:
        return y
    description, adjoint = _description(program)
    matrices, signs, source, target = as_tensors(
        description, description.arrays, None, x.device
    )
    if adjoint:
        source, target = target, source
    settings, warps = launch_settings(description, adjoint, x.dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    before = None if before is None else before.contiguous()
    after = None if after is None else after.contiguous()
    blocks = triton.cdiv(len(x), settings["ROWS"])
    with torch.cuda.device_of(x):
        _kernel[blocks,](
            x,
            y,
            matrices,
            signs,
            source,
            target,
            before,
            after,
            len(x),
            x.stride(0),
            description.scale,
            **settings,
            num_warps=warps,
            # Said, since Triton is about to change what it means not to say.
            enable_fp_fusion=True,
        )
    return y


def launch_settings(description, adjoint, dtype):
    """What is constant when the kernel is compiled, and the warps to run."""
    sizes = description.sizes
    input_dim, output_dim = description.dims[:: -1 if adjoint else 1]
    tile = math.prod(sizes)
    tile_rows = max(1, _TILE // tile)
    settings = {
        "INPUT_DIM": input_dim,
        "OUTPUT_DIM": output_dim,
        "STAGES": len(description.matrices),
        "SIZE_1": sizes[0],
        "SIZE_2": sizes[1],
        "SIZE_3": sizes[2],
        "ROWS": tile_rows,
        "ADJOINT": adjoint,
        "PRODUCTS": (
            1 if dtype.itemsize < 4 else 2 if description.exact else 3
        ),
    }
    return settings, min(16, max(4, tile * tile_rows // 1024))


@torch.library.custom_op("keras_randadapt::transform", mutates_args=())
def transform(
    x: torch.Tensor,
    key: str,
    before: torch.Tensor | None,
    after: torch.Tensor | None,
) -> torch.Tensor:
    """`apply`, as one node of the graph that `torch.compile` makes.

    The kernel's constants are neither constants of that graph nor arguments:
    they are found at run time, by the key of the program.
    """
    return apply(x, steps.Program.from_key(key), before, after)


# A compiled graph knows programs by their keys alone, so they must live on.
_compiled_programs = set()


@transform.register_fake
def _(x, key, before, after):
    program = steps.Program.from_key(key)
    _compiled_programs.add(program)
    return x.new_empty(x.shape[0], program.output_dim)


@dataclasses.dataclass(frozen=True, eq=False)
class _Description:
    """A program as the kernel wants it.

    Coordinates are numbered by their position in a tile of `sizes`, whose
    axes are padded to powers of two.

    Args:
        sizes: Tuple of three integers, powers of two; 1 for no factor.
        dims: `(input_dim, output_dim)`.
        scale: What the result is multiplied by.
        exact: Whether all bits of the matrices are leading ones.
        matrices: float32 array of shape `(stages, s1**2 + s2**2 + s3**2)`:
            the factors of each stage, row by row, padded with zeros.
        signs: int8 array of shape `(stages + 1, s1 * s2 * s3)`: signs before
            each stage and after the last, 0 where no coordinate is. `None`
            if all are positive.
        source: int32 array `(s1 * s2 * s3,)`: which coordinate of the input
            goes to each position, or -1. `None` if they are in order.
        target: The same for the output.
    """

    sizes: tuple
    dims: tuple
    scale: float
    exact: bool
    matrices: np.ndarray
    signs: np.ndarray | None
    source: np.ndarray | None
    target: np.ndarray | None

    @property
    def arrays(self):
        """What the kernel needs on the device."""
        return self.matrices, self.signs, self.source, self.target


_known_descriptions = weakref.WeakKeyDictionary()


def _description(program):
    """`(description, adjoint)`, or `None` if the kernel can't apply it.

    A program and its transpose have one description.
    """
    if program not in _known_descriptions:
        description = _describe(program)
        for adjoint, key in enumerate((program, program.transpose)):
            _known_descriptions[key] = description and (
                description,
                bool(adjoint),
            )
    return _known_descriptions[program]


def _describe(program):
    """A `_Description`, or `None`."""
    steps_apart = _taken_apart(list(program))
    if steps_apart is None:
        return None
    dims, source, stages, between, target = steps_apart
    sizes = [
        max(max(stage.matrices[i].shape) for stage in stages)
        for i in range(len(stages[0].matrices))
    ]
    groups = _groups(tuple(sizes))
    if groups is None:
        return None
    sizes = [math.prod(sizes[group]) for group in groups]
    padded = [_padded(size) for size in sizes]
    tile = math.prod(padded)
    missing = _MAX_FACTORS - len(padded)
    position = np.ravel_multi_index(
        np.unravel_index(np.arange(math.prod(sizes)), sizes), padded
    )
    signs = np.zeros((len(stages) + 1, tile), np.int8)
    vectors = [source[1], *between, target[1]]
    for row, vector in zip(signs, vectors, strict=True):
        row[position[: len(vector)]] = vector
    if not np.any(signs < 0):
        signs = None
    matrices = np.stack(
        [
            np.concatenate(
                [np.ones(missing, np.float32)]
                + [
                    _flat(stage.matrices[group], size)
                    for group, size in zip(groups, padded)
                ]
            )
            for stage in stages
        ]
    )
    return _Description(
        # Axes that are not there come first.
        sizes=(1,) * missing + tuple(padded),
        dims=dims,
        scale=math.prod(stage.scale for stage in stages),
        exact=not np.any(matrices.view(np.uint32) & _OTHER_BITS),
        matrices=matrices,
        signs=signs,
        source=_table(source[0], position, tile),
        target=_table(target[0], position, tile),
    )


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
def _groups(sizes):
    """Slices of consecutive cores to multiply out, or `None`."""
    best, least = None, math.inf
    for parts in range(1, _MAX_FACTORS + 1):
        for cuts in itertools.combinations(range(1, len(sizes)), parts - 1):
            groups = [
                slice(*ends)
                for ends in itertools.pairwise((0, *cuts, len(sizes)))
            ]
            padded = [_padded(math.prod(sizes[group])) for group in groups]
            tile = math.prod(padded)
            cost = tile * sum(size + _ROTATION_COST for size in padded)
            # Larger matrices don't fit into shared memory.
            if tile <= _LARGEST_TILE and max(padded) <= 128 and cost < least:
                best, least = groups, cost
    return best


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


@triton.jit
def _kernel(
    x_pointer,
    y_pointer,
    matrices,
    signs,
    source,
    target,
    before,
    after,
    rows,
    row_stride,
    scale,
    INPUT_DIM: tl.constexpr,
    OUTPUT_DIM: tl.constexpr,
    STAGES: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    SIZE_3: tl.constexpr,
    ROWS: tl.constexpr,
    ADJOINT: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    SIZE: tl.constexpr = SIZE_1 * SIZE_2 * SIZE_3
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    position = tl.arange(0, SIZE)
    is_row = (row < rows)[:, None]

    column = position
    if source is not None:
        column = tl.load(source + position)
    is_column = (column >= 0) & (column < INPUT_DIM)
    x = tl.load(
        x_pointer + row[:, None] * row_stride + column[None, :],
        mask=is_row & is_column[None, :],
        other=0.0,
    ).to(tl.float32)
    if before is not None:
        factor = tl.load(before + column, mask=is_column, other=0.0)
        x *= factor.to(tl.float32)[None, :]

    for i in tl.static_range(STAGES):
        stage = STAGES - 1 - i if ADJOINT else i
        if signs is not None:
            place = STAGES - i if ADJOINT else i
            sign = tl.load(signs + place * SIZE + position)
            x *= sign.to(tl.float32)[None, :]
        # Each product is by the fastest axis, which then becomes the slowest.
        factor = matrices + stage * (
            SIZE_1 * SIZE_1 + SIZE_2 * SIZE_2 + SIZE_3 * SIZE_3
        )
        if SIZE_3 > 1:
            factor_3 = factor + SIZE_1 * SIZE_1 + SIZE_2 * SIZE_2
            x = _product(x, factor_3, ROWS, SIZE, SIZE_3, ADJOINT, PRODUCTS)
        if SIZE_2 > 1:
            factor_2 = factor + SIZE_1 * SIZE_1
            x = _product(x, factor_2, ROWS, SIZE, SIZE_2, ADJOINT, PRODUCTS)
        if SIZE_1 > 1:
            x = _product(x, factor, ROWS, SIZE, SIZE_1, ADJOINT, PRODUCTS)

    if signs is not None:
        place = 0 if ADJOINT else STAGES
        sign = tl.load(signs + place * SIZE + position)
        x *= sign.to(tl.float32)[None, :]
    x *= scale
    column = position
    if target is not None:
        column = tl.load(target + position)
    is_column = (column >= 0) & (column < OUTPUT_DIM)
    if after is not None:
        factor = tl.load(after + column, mask=is_column, other=0.0)
        x *= factor.to(tl.float32)[None, :]
    tl.store(
        y_pointer + row[:, None] * OUTPUT_DIM + column[None, :],
        x.to(y_pointer.dtype.element_ty),
        mask=is_row & is_column[None, :],
    )


@triton.jit
def _product(
    x,
    factor,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    AXIS: tl.constexpr,
    ADJOINT: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Multiplies along the fastest axis, and makes it the slowest."""
    i = tl.arange(0, AXIS)
    if ADJOINT:
        offsets = i[:, None] * AXIS + i[None, :]
    else:
        offsets = i[None, :] * AXIS + i[:, None]
    x = tl.reshape(x, (ROWS * SIZE // AXIS, AXIS))
    factor = tl.load(factor + offsets)
    leading = _rounded(x)
    y = tl.dot(leading, _rounded(factor), input_precision="tf32")
    if PRODUCTS > 1:
        y = tl.dot(x - leading, _rounded(factor), y, input_precision="tf32")
    if PRODUCTS > 2:
        rest = factor - _rounded(factor)
        y = tl.dot(leading, rest, y, input_precision="tf32")
    x = tl.permute(tl.reshape(y, (ROWS, SIZE // AXIS, AXIS)), (0, 2, 1))
    return tl.reshape(x, (ROWS, SIZE))


@triton.jit
def _rounded(x):
    """What tensor cores take of a float32: sign, exponent, 10 bits."""
    bits = x.to(tl.uint32, bitcast=True) + 0x1000 & 0xFFFFE000
    # The bits of a NaN may overflow.
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
