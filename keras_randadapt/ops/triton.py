"""A CUDA kernel for the transforms of the PyTorch backend, in Triton.

A program of `steps.py` is applied to a block of rows in one pass over memory:
the rows are read once, held on chip through all stages of signs and Hadamard
transforms, and written once. The factors of a transform are matrix products,
padded to the power-of-two sizes that Triton's tiles have; each is followed by a
rotation of the axes, after which the next one is the fastest.

Products accumulate in float32. Data of 16 bits are rounded to their dtype
between two products, as matrix products of that dtype would. Of float32 data,
tensor cores take the 11 leading bits of a number, so a second product adds the
bits that follow; the factors' entries are +- powers of two, or else (Hartley
cores) a third product adds their other bits.

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
# What a product's size may be at the most: the first for which there is room.
_LARGEST_SIZES = (128, 64, 32)
_MAX_FACTORS = 3
# Programs a multiprocessor, where each goes through many blocks of rows: a
# multiple of the 2 or 3 for which one has room.
_PROGRAMS = 6

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Those of a float32 that tensor cores do not take.
_OTHER_BITS = np.uint32(0x1FFF)


def takes(program, dtype, device):
    """Whether the kernel can apply a program to tensors of a dtype.

    Not to other dtypes, nor windows, nor orders whose tile does not fit on
    chip; and on no GPU without tensor cores for TF32.
    """
    return dtype in _DTYPES and _description(program, dtype, device) is not None


@functools.cache
def _room(device):
    """Bytes of shared memory that a program of the kernel may have."""
    if not hasattr(triton, "knobs"):
        # Too old.
        return 0
    if triton.knobs.runtime.interpret:
        return math.inf
    if torch.version.hip or not torch.cuda.is_available():
        return 0
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return 0
    return properties.shared_memory_per_block_optin


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
    description, adjoint = _description(program, x.dtype, x.device)
    factors, signs = as_tensors(
        description, (description.factors, description.signs), x.dtype, x.device
    )
    source, target = as_tensors(
        description.tables, description.tables.arrays, None, x.device
    )
    if adjoint:
        source, target = target, source
    settings, warps = launch_settings(description, adjoint, x.dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    before = None if before is None else before.contiguous()
    after = None if after is None else after.contiguous()
    programs = triton.cdiv(len(x), settings["ROWS"])
    if settings["LOOP"]:
        programs = min(programs, _PROGRAMS * _multiprocessors(x.device))
    with torch.cuda.device_of(x):
        _kernel[programs,](
            x,
            y,
            factors,
            signs,
            source,
            target,
            before,
            after,
            len(x),
            x.stride(0),
            None if description.scale == 1.0 else description.scale,
            **settings,
            num_warps=warps,
            # Prefetching into shared memory leaves room for fewer programs.
            num_stages=1,
            # Said, since Triton is about to change what it means not to say.
            enable_fp_fusion=True,
        )
    return y


@functools.cache
def _multiprocessors(device):
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_settings(description, adjoint, dtype):
    """What is constant when the kernel is compiled, and the warps to run."""
    known = description.known_settings
    if (adjoint, dtype) not in known:
        known[adjoint, dtype] = _launch_settings(description, adjoint, dtype)
    return known[adjoint, dtype]


def _launch_settings(description, adjoint, dtype):
    input_dim, output_dim = description.dims[:: -1 if adjoint else 1]
    sizes, itemsize = description.sizes, dtype.itemsize
    tile = description.tile(itemsize)
    # Factors larger than a tile are read once for many, if they leave room.
    read_once = len(description.factors) > 1.5 * tile
    settings = {
        "INPUT_DIM": input_dim,
        "OUTPUT_DIM": output_dim,
        "STAGES": description.stages,
        "SIGNED": description.signed,
        "SIZE_1": sizes[0],
        "SIZE_2": sizes[1],
        "SIZE_3": sizes[2],
        "ROWS": tile // math.prod(sizes),
        "ADJOINT": adjoint,
        "PRODUCTS": description.products(itemsize),
        "LOOP": read_once and (itemsize < 4 or tile <= 8192),
        # Triton's interpreter has no arithmetic of bfloat16.
        "EMULATED": dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
    }
    return settings, 4 if tile <= 8192 else 8


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
        tables: `_Tables`.
    """

    sizes: tuple
    dims: tuple
    stages: int
    scale: float
    exact: bool
    factors: np.ndarray
    signs: np.ndarray | None
    signed: int
    tables: "_Tables"

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
class _Tables:
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


_known_descriptions = weakref.WeakKeyDictionary()


def _description(program, dtype, device):
    """`(description, adjoint)`, or `None` if the kernel can't apply it.

    A program and its transpose have one description.
    """
    key = dtype.itemsize, _room(device)
    known = _known_descriptions.setdefault(program, {})
    if key not in known:
        found = _fitting(program, *key)
        both = enumerate((program, program.transpose))
        for adjoint, other in both:
            _known_descriptions.setdefault(other, {})[key] = found and (
                found,
                bool(adjoint),
            )
    return known[key]


def _fitting(program, itemsize, room):
    """The `_Description` with the largest factors for which there is room."""
    for largest in _LARGEST_SIZES:
        description = _describe(program, largest)
        if description and description.shared_bytes(itemsize) <= room:
            return description
    return None


def _describe(program, largest):
    """A `_Description`, or `None`; no factor is larger than that."""
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
    return _Description(
        # Axes that are not there come first.
        sizes=(1,) * missing + tuple(padded),
        dims=dims,
        stages=len(stages),
        scale=scale,
        exact=not np.any(factors.view(np.uint32) & _OTHER_BITS),
        factors=factors,
        signs=signs if signed else None,
        signed=sum(1 << place for place in signed),
        tables=_Tables(
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


# Not compiled anew for batches of another size.
@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x_pointer,
    y_pointer,
    factors,
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
    SIGNED: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    SIZE_3: tl.constexpr,
    ROWS: tl.constexpr,
    ADJOINT: tl.constexpr,
    PRODUCTS: tl.constexpr,
    LOOP: tl.constexpr,
    EMULATED: tl.constexpr,
):
    factor_1 = _factor(factors, SIZE_1, ADJOINT, EMULATED)
    factors += SIZE_1 * SIZE_1
    factor_2 = _factor(factors, SIZE_2, ADJOINT, EMULATED)
    factors += SIZE_2 * SIZE_2
    factor_3 = _factor(factors, SIZE_3, ADJOINT, EMULATED)
    if LOOP:
        blocks = tl.cdiv(rows, ROWS)
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            _block(
                block,
                factor_1,
                factor_2,
                factor_3,
                x_pointer,
                y_pointer,
                signs,
                source,
                target,
                before,
                after,
                rows,
                row_stride,
                scale,
                INPUT_DIM,
                OUTPUT_DIM,
                STAGES,
                SIGNED,
                SIZE_1,
                SIZE_2,
                SIZE_3,
                ROWS,
                ADJOINT,
                PRODUCTS,
                EMULATED,
            )
    else:
        _block(
            tl.program_id(0),
            factor_1,
            factor_2,
            factor_3,
            x_pointer,
            y_pointer,
            signs,
            source,
            target,
            before,
            after,
            rows,
            row_stride,
            scale,
            INPUT_DIM,
            OUTPUT_DIM,
            STAGES,
            SIGNED,
            SIZE_1,
            SIZE_2,
            SIZE_3,
            ROWS,
            ADJOINT,
            PRODUCTS,
            EMULATED,
        )


@triton.jit
def _block(
    block,
    factor_1,
    factor_2,
    factor_3,
    x_pointer,
    y_pointer,
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
    SIGNED: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    SIZE_3: tl.constexpr,
    ROWS: tl.constexpr,
    ADJOINT: tl.constexpr,
    PRODUCTS: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Transforms a block of rows."""
    SIZE: tl.constexpr = SIZE_1 * SIZE_2 * SIZE_3
    row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
    x = _load(
        x_pointer,
        row,
        rows,
        row_stride,
        source,
        before,
        INPUT_DIM,
        SIZE,
        EMULATED,
    )
    for i in tl.static_range(STAGES):
        x = _signed(x, signs, STAGES - i if ADJOINT else i, SIZE, SIGNED)
        # Each product is by the fastest axis, which then becomes the slowest.
        x = _product(x, factor_3, scale, ROWS, SIZE, SIZE_3, PRODUCTS)
        if SIZE_2 > 1:
            x = _product(x, factor_2, None, ROWS, SIZE, SIZE_2, PRODUCTS)
        if SIZE_1 > 1:
            x = _product(x, factor_1, None, ROWS, SIZE, SIZE_1, PRODUCTS)
    x = _signed(x, signs, 0 if ADJOINT else STAGES, SIZE, SIGNED)
    _store(x, y_pointer, row, rows, target, after, OUTPUT_DIM, SIZE)


@triton.jit
def _factor(pointer, AXIS: tl.constexpr, ADJOINT, EMULATED: tl.constexpr):
    """A factor, transposed: it is multiplied by from the right."""
    i = tl.arange(0, AXIS)
    if ADJOINT:
        offsets = i[:, None] * AXIS + i[None, :]
    else:
        offsets = i[None, :] * AXIS + i[:, None]
    return _compute_dtype(tl.load(pointer + offsets), EMULATED)


@triton.jit
def _compute_dtype(x, EMULATED: tl.constexpr):
    return x.to(tl.float32) if EMULATED else x


@triton.jit
def _load(
    pointer,
    row,
    rows,
    stride,
    table,
    scales,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Reads rows, each coordinate to its position, and scales them."""
    column = tl.arange(0, SIZE)
    if table is not None:
        # Transposed, since where the order of addresses is not known, the
        # threads of a warp go along the first axis.
        column = tl.load(table + column)
        mask = (column >= 0)[:, None] & (row < rows)[None, :]
        offsets = column[:, None] + row[None, :] * stride
        x = tl.trans(tl.load(pointer + offsets, mask=mask, other=0.0))
    else:
        mask = (row < rows)[:, None]
        if DIM < SIZE:
            mask &= (column < DIM)[None, :]
        offsets = row[:, None] * stride + column[None, :]
        x = tl.load(pointer + offsets, mask=mask, other=0.0)
    return _scaled(_compute_dtype(x, EMULATED), scales, column, DIM)


@triton.jit
def _store(
    x,
    pointer,
    row,
    rows,
    table,
    scales,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The reverse of `_load`."""
    column = tl.arange(0, SIZE)
    if table is not None:
        column = tl.load(table + column)
    x = _scaled(x, scales, column, DIM).to(pointer.dtype.element_ty)
    if table is not None:
        mask = (column >= 0)[:, None] & (row < rows)[None, :]
        offsets = column[:, None] + row[None, :] * DIM
        tl.store(pointer + offsets, tl.trans(x), mask=mask)
    else:
        mask = (row < rows)[:, None]
        if DIM < SIZE:
            mask &= (column < DIM)[None, :]
        offsets = row[:, None] * DIM + column[None, :]
        tl.store(pointer + offsets, x, mask=mask)


@triton.jit
def _scaled(x, scales, column, DIM: tl.constexpr):
    if scales is not None:
        is_column = (column >= 0) & (column < DIM)
        factor = tl.load(scales + column, mask=is_column, other=0.0)
        x *= factor.to(x.dtype)[None, :]
    return x


@triton.jit
def _signed(
    x, signs, PLACE: tl.constexpr, SIZE: tl.constexpr, SIGNED: tl.constexpr
):
    if SIGNED >> PLACE & 1:
        sign = tl.load(signs + PLACE * SIZE + tl.arange(0, SIZE))
        x *= sign.to(x.dtype)[None, :]
    return x


@triton.jit
def _product(
    x,
    factor,
    scale,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    AXIS: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Multiplies along the fastest axis, and makes it the slowest."""
    x = tl.reshape(x, (ROWS * SIZE // AXIS, AXIS))
    if PRODUCTS == 1:
        y = tl.dot(x, factor)
    else:
        leading = _leading(x)
        leading_factor = _leading(factor) if PRODUCTS > 2 else factor
        y = tl.dot(leading, leading_factor, input_precision="tf32")
        y = tl.dot(x - leading, leading_factor, y, input_precision="tf32")
        if PRODUCTS > 2:
            rest = factor - leading_factor
            y = tl.dot(leading, rest, y, input_precision="tf32")
    if scale is not None:
        y *= scale
    y = tl.reshape(y.to(x.dtype), (ROWS, SIZE // AXIS, AXIS))
    return tl.reshape(tl.permute(y, (0, 2, 1)), (ROWS, SIZE))


@triton.jit
def _leading(x):
    """What tensor cores take of a float32: sign, exponent, 10 bits."""
    bits = x.to(tl.uint32, bitcast=True) & 0xFFFFE000
    return bits.to(tl.float32, bitcast=True)
