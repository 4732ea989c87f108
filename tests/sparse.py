"""A slow, plain reference for sparse bases that are filled to full rank."""

import numpy as np

from keras_randadapt import random

#: A prime, so that integers modulo it are a field.
_PRIME = 2**31 - 1


def unit(shape, seed, role, sparsity):
    """The matrix with entries of mean square 1, float64."""
    values = filled(shape, seed, role, sparsity).astype("float64")
    return values / np.sqrt(np.mean(values**2))


def filled(shape, seed, role, sparsity):
    """Draws, and then entries changed where a determinant would be even."""
    values = random.ternaries(seed, role, shape, sparsity).astype("int64")
    short, long = sorted(shape)
    lines = values if shape[0] == short else values.T
    role = f"{role}/full_rank"
    picks = random.uniforms(seed, role, long)
    signs = random.signs(seed, role, long)
    for start in range(0, long, short):
        size = min(short, long - start)
        # Rows that hold a pivot, each with its odd row of reduced entries.
        block = lines[:size, start : start + size]
        reduced = [[int(entry) % 2 for entry in row] for row in block]
        waiting = list(range(size))
        for column in range(size):
            odd = [row for row in waiting if reduced[row][column]]
            if not odd:
                empty = [row for row in waiting if block[row, column] == 0]
                among = empty or waiting
                pick = int(float(picks[start + column]) * len(among))
                row = among[pick]
                new = 0 if block[row, column] else signs[start + column]
                block[row, column] = new
                reduced[row][column] = 1
                odd = [row]
            pivot, *others = odd
            waiting.remove(pivot)
            for row in others:
                reduced[row] = [
                    a ^ b for a, b in zip(reduced[row], reduced[pivot])
                ]
    return values


def rank_of(matrix):
    """The rank of a matrix of integers, computed modulo a large prime.

    It is never above the rank of the matrix, and no rounding is involved.
    """
    rows = np.array(matrix, "int64") % _PRIME
    rank = 0
    for column in range(rows.shape[1]):
        below = np.flatnonzero(rows[rank:, column])
        if not len(below):
            continue
        pivot = rank + below[0]
        rows[[rank, pivot]] = rows[[pivot, rank]]
        inverse = pow(int(rows[rank, column]), -1, _PRIME)
        rows[rank] = rows[rank] * inverse % _PRIME
        factors = rows[rank + 1 :, column : column + 1].copy()
        rows[rank + 1 :] = (rows[rank + 1 :] - factors * rows[rank]) % _PRIME
        rank += 1
        if rank == len(rows):
            break
    return rank


def times(*matrices):
    """The product of matrices of integers, modulo the prime of `rank_of`."""
    product = np.array(matrices[0], "int64") % _PRIME
    for matrix in matrices[1:]:
        matrix = np.array(matrix, "int64") % _PRIME
        total = np.zeros((len(product), matrix.shape[1]), "int64")
        # One term at a time, because a sum of products would overflow.
        for column, row in zip(product.T, matrix):
            total = (total + column[:, None] * row % _PRIME) % _PRIME
        product = total
    return product
