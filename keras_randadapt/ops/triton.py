"""A CUDA kernel for the transforms, in Triton, independent of a framework.

The kernel applies a `Program` to a block of rows in one pass over memory: it
reads the rows once, holds them on chip through all stages of signs and Hadamard
transforms, and writes them once. The factors of a transform are matrix
products, padded to the power-of-two sizes of Triton's tiles. After each product
the axes are rotated, such that the axis of the next product is the fastest.

Products accumulate in float32. Data of 16 bits are rounded to their dtype
between two products, as in matrix products of that dtype. Tensor cores use only
the 11 leading bits of a float32, so a second product adds the following bits of
the data. The entries of Hadamard factors are +- powers of two and need no other
bits; for Hartley cores a third product adds the factors' other bits.

With `TRITON_INTERPRET=1`, set before Triton is imported, the kernel runs
slowly on a CPU, which tests use. `triton_torch.py` launches it.
"""

import contextlib
import math
import os
import sys
import weakref

from keras_randadapt.ops import tiles


@contextlib.contextmanager
def _own_functions():
    """A library that is loaded in this block prefers its own functions.

    TensorFlow's wheels export their LLVM to every library that is loaded later.
    Triton has another LLVM and would crash (tensorflow/tensorflow#124205).
    """
    flags = sys.getdlopenflags()
    # Without TensorFlow the flag is left alone, since it would pass over a
    # preloaded allocator.
    if "tensorflow" in sys.modules:
        sys.setdlopenflags(flags | os.RTLD_DEEPBIND)
    try:
        yield
    finally:
        sys.setdlopenflags(flags)


with _own_functions():
    import triton
    import triton.language as tl

DTYPES = ("float32", "bfloat16", "float16")
#: The first compute capability with tensor cores for TF32.
FIRST_MAJOR = 8
# Prefetching into shared memory leaves room for fewer programs.
STAGES_AHEAD = 1

# The programs for each multiprocessor, if a program loops over many blocks of
# rows. A multiprocessor has room for 2 or 3 programs; this is a multiple.
_PROGRAMS = 6


def is_supported():
    """Whether this Triton is not too old."""
    return hasattr(triton, "knobs")


def is_interpreted():
    return triton.knobs.runtime.interpret


def programs(rows, settings, multiprocessors):
    """The number of programs of the kernel to launch for some rows."""
    blocks = triton.cdiv(rows, settings["ROWS"])
    if settings["LOOP"]:
        return min(blocks, _PROGRAMS * multiprocessors)
    return blocks


def launch_settings(tiled, adjoint, dtype):
    """The constants with which the kernel is compiled, and its warps.

    Args:
        tiled: `tiles.TiledProgram`.
        adjoint: Whether to apply its transpose.
        dtype: One of `DTYPES`.
    """
    known = tiled.known_settings
    if (adjoint, dtype) not in known:
        known[adjoint, dtype] = _launch_settings(tiled, adjoint, dtype)
    return known[adjoint, dtype]


def _launch_settings(tiled, adjoint, dtype):
    input_dim, output_dim = tiled.dims[:: -1 if adjoint else 1]
    sizes, itemsize = tiled.sizes, _itemsize(dtype)
    tile = tiled.tile(itemsize)
    # Factors that are larger than a tile are read once for many tiles, if they
    # leave room.
    read_once = len(tiled.factors) > 1.5 * tile
    settings = {
        "INPUT_DIM": input_dim,
        "OUTPUT_DIM": output_dim,
        "STAGES": tiled.stages,
        "SIGNED": tiled.signed,
        "SIZE_1": sizes[0],
        "SIZE_2": sizes[1],
        "SIZE_3": sizes[2],
        "ROWS": tile // math.prod(sizes),
        "ADJOINT": adjoint,
        "PRODUCTS": tiled.products(itemsize),
        "LOOP": read_once and (itemsize < 4 or tile <= 8192),
        # Triton's interpreter has no arithmetic of bfloat16.
        "EMULATED": dtype == "bfloat16" and is_interpreted(),
    }
    return settings, 4 if tile <= 8192 else 8


def _itemsize(dtype):
    return 4 if dtype == "float32" else 2


_known_tiled: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def tiled_program(program, dtype, room):
    """`(tiles.TiledProgram, adjoint)`, or `None` if there is none that fits.

    There is none for other dtypes than `DTYPES`, for windows, and for orders
    whose tile does not fit on chip. A program and its transpose share one.

    Args:
        program: A `program.Program`.
        dtype: String.
        room: Bytes of shared memory that a program of the kernel may have.
    """
    if dtype not in DTYPES:
        return None
    key = _itemsize(dtype), room
    known = _known_tiled.setdefault(program, {})
    if key not in known:
        found = tiles.fitting(program, *key)
        both = enumerate((program, program.transpose))
        for adjoint, other in both:
            _known_tiled.setdefault(other, {})[key] = found and (
                found,
                bool(adjoint),
            )
    return known[key]


# `rows` is not specialized, so that batches of another size use the same
# compiled kernel.
@triton.jit(do_not_specialize=["rows"])
def kernel(
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
        # Each product is along the fastest axis, which then becomes slowest.
        x = _product(x, factor_3, scale, ROWS, SIZE, SIZE_3, PRODUCTS)
        if SIZE_2 > 1:
            x = _product(x, factor_2, None, ROWS, SIZE, SIZE_2, PRODUCTS)
        if SIZE_1 > 1:
            x = _product(x, factor_1, None, ROWS, SIZE, SIZE_1, PRODUCTS)
    x = _signed(x, signs, 0 if ADJOINT else STAGES, SIZE, SIGNED)
    _store(x, y_pointer, row, rows, target, after, OUTPUT_DIM, SIZE)


@triton.jit
def _factor(pointer, AXIS: tl.constexpr, ADJOINT, EMULATED: tl.constexpr):
    """A factor, transposed, because the data are multiplied from the right."""
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
        # The tile is loaded transposed. If Triton does not know the order of
        # addresses, the threads of a warp go along the first axis.
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
    """The part of a float32 that tensor cores use: sign, exponent, 10 bits."""
    bits = x.to(tl.uint32, bitcast=True) & 0xFFFFE000
    return bits.to(tl.float32, bitcast=True)
