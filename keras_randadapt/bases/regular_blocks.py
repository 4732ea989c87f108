"""Sparse ternary matrices of full rank, by few changed entries.

A matrix of integers is regular if its determinant is odd. Whether it is odd
depends only on which entries are odd, so Gaussian elimination modulo 2 decides
it exactly: no rounding differs from machine to machine. This module is a part
of the file format, as `keras_randadapt.random` is.
"""

import numpy as np

from keras_randadapt import random

_WORD = 64


def make_regular(values: np.ndarray, seed: int, role: str) -> None:
    """Makes the square blocks of a matrix regular, in place.

    The longer side is cut into blocks of the length of the shorter side. The
    last block may be smaller; it is square with the first lines of the shorter
    side. Each block gets an odd determinant.

    This gives a RandLoRA full rank. Let `n` be its number of terms, `s` the
    smaller dimension of the site, and let `B = [B_1 ... B_n]` and `A` be made
    regular. Let `gamma_j` be 1 at the columns of the `j`-th block of `A` and 0
    elsewhere. The delta is then `B` times the blocks of `A` on a diagonal,
    with `lambda` in between. In its determinant as a polynomial of `lambda`,
    the term of the first `s` entries of `lambda` is the determinants of the
    blocks times a minor of the first `s` columns of `B`. These columns are
    independent, so some such term is not zero, and the delta has rank `s` for
    all vectors but a set of measure zero.

    Args:
        values: int8 array `(rows, columns)` of -1, 0 and 1.
        seed: int in `[0, 2**64)`.
        role: string, the role of the matrix.
    """
    short, long = sorted(values.shape)
    lines = values if values.shape[0] == short else values.T
    role = f"{role}/full_rank"
    # An integer below 2**24 for each line.
    picks = (random.uniforms(seed, role, long) * np.float32(2**24)).astype(
        np.int64
    )
    signs = random.signs(seed, role, long)
    whole = long - long % short
    blocks = lines[:, :whole].reshape(short, -1, short).swapaxes(0, 1)
    blocks = np.ascontiguousarray(blocks)
    _make_all_regular(
        blocks,
        picks[:whole].reshape(-1, short),
        signs[:whole].reshape(-1, short),
    )
    lines[:, :whole] = blocks.swapaxes(0, 1).reshape(short, whole)
    rest = long - whole
    if rest:
        block = np.ascontiguousarray(lines[:rest, whole:])[None]
        _make_all_regular(block, picks[None, whole:], signs[None, whole:])
        lines[:rest, whole:] = block[0]


def _make_all_regular(blocks, picks, signs):
    """Gives each block an odd determinant, in place.

    Where the elimination finds no pivot in a column, one entry is changed in
    a row that has had no pivot yet. Row operations have left such a row's unit
    vector alone, so the entry becomes the pivot and nothing else changes.

    Args:
        blocks: int8 array `(count, size, size)`.
        picks: int64 array `(count, size)` of integers below `2**24`, which
            choose the rows of changed entries.
        signs: int8 array `(count, size)`, the new entries.
    """
    count, size, _ = blocks.shape
    bits = _packed(blocks)
    free = np.ones((count, size), bool)
    every = np.arange(count)
    for column in range(size):
        word, bit = divmod(column, _WORD)
        mask = np.uint64(1 << bit)
        odd = free & ((bits[:, :, word] & mask) != 0)
        for block in np.flatnonzero(~odd.any(axis=1)):
            row = _row_to_change(
                blocks[block, :, column], free[block], picks[block, column]
            )
            entry = blocks[block, row, column]
            blocks[block, row, column] = 0 if entry else signs[block, column]
            odd[block, row] = True
        pivots = np.argmax(odd, axis=1)
        free[every, pivots] = False
        odd[every, pivots] = False
        block, row = np.nonzero(odd)
        bits[block, row, word:] ^= bits[block, pivots[block], word:]


def _row_to_change(entries, free, pick):
    """A row without a pivot, where there is one, that has no entry yet."""
    rows = np.flatnonzero(free & (entries == 0))
    if not len(rows):
        rows = np.flatnonzero(free)
    return rows[int(pick) * len(rows) >> 24]


def _packed(blocks):
    """The parities of the entries, 64 columns to an integer."""
    count, size, _ = blocks.shape
    words = -(-size // _WORD)
    octets = np.zeros((count, size, 8 * words), np.uint8)
    packed = np.packbits(blocks != 0, axis=2, bitorder="little")
    octets[:, :, : packed.shape[2]] = packed
    # The byte order is that of the shifts, whatever the machine's is.
    return octets.view("<u8").astype(np.uint64)
