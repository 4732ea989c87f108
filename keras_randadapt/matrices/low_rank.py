"""Products of two thin matrices: exact, shortened, or closest of a rank.

A matrix is given as a tuple. It holds the matrix itself, or two factors with
fewer columns and rows than the matrix has.
"""

import dataclasses

import numpy as np

from keras_randadapt import random

# float32 rounds a number by half of this part of it at most. A matrix loses no
# more by float32 than by leaving out this part of its norm.
_ROUNDING = 2.0**-23
# Values of a product that are below this part of its factors' norms come from
# the rounding of float64. They appear where factors cancel.
_NOISE = 1e-14
# Half the difference in binary digits that the vectors of a rank may have. The
# factors of VeRA differ by more, and float16 would round the smaller one.
_UNBALANCED = 4
# From this size of the smaller dimension on, a decomposition takes seconds,
# and the randomized one is used where the rank is a small part of it.
_LARGE = 512
_SMALL_PART = 4
# Halko, Martinsson and Tropp advise 5 or 10 more columns than the rank, and
# one or two iterations. Flat spectra need more of them, and they are cheap.
_OVERSAMPLING = 10
_ITERATIONS = 4


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A product of two matrices that stands for another matrix.

    Attributes:
        left: float64 array `(rows, rank)`. The rank may be 0.
        right: float64 array `(rank, columns)`. Both may have an axis of
            experts in front.
        lost: The share of the other matrix's energy, the squared Frobenius
            norm, that the product lacks.
    """

    left: np.ndarray
    right: np.ndarray
    lost: float

    @property
    def rank(self):
        return self.left.shape[-1]


def shape_of(parts):
    """`(rows, columns)` of a matrix that is given as a tuple."""
    return parts[0].shape[0], parts[-1].shape[1]


def dense(parts):
    """The matrix itself."""
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]


def added(terms):
    """The sum of several matrices of one shape, given as tuples.

    Args:
        terms: list of `(weight, parts)` pairs.

    Returns:
        A tuple of two factors if they are thin, or of the sum itself.
    """
    rows, columns = shape_of(terms[0][1])
    factors = [(parts[0], w * parts[-1]) for w, parts in terms]
    rank = sum(left.shape[1] for left, _ in factors)
    if all(len(parts) == 2 for _, parts in terms) and rank < min(rows, columns):
        return stacked(terms)
    total = np.zeros((rows, columns))
    for weight, parts in terms:
        total += weight * dense(parts)
    return (total,)


def stacked(terms):
    """The factors of a sum: those of its terms, side by side.

    Args:
        terms: list of `(weight, (left, right))` pairs.
    """
    left = np.concatenate([parts[0] for _, parts in terms], axis=1)
    right = np.concatenate([w * parts[1] for w, parts in terms], axis=0)
    return left, right


def without_zeros(parts):
    """Two factors as they are, without the ranks that add nothing.

    Where the two vectors of a rank differ much in size, powers of two move a
    part of the size from one to the other, which rounds nothing.

    Args:
        parts: `(left, right)`.

    Returns:
        A `LowRank` that loses nothing.
    """
    left, right = parts
    on = np.any(left != 0, axis=0) & np.any(right != 0, axis=1)
    left, right = left[:, on], right[on]
    sizes = np.abs(left).max(axis=0), np.abs(right).max(axis=1)
    shift = np.round((np.log2(sizes[1]) - np.log2(sizes[0])) / 2)
    shift[np.abs(shift) < _UNBALANCED] = 0
    return LowRank(left * 2**shift, right * 2 ** -shift[:, None], 0.0)


def shortest(parts, energy=1.0):
    """The product of the smallest rank that keeps a share of the energy.

    Args:
        parts: A matrix as a tuple.
        energy: float in `(0, 1]`. The share to keep. 1 means all but what
            float32 rounds.

    Returns:
        A `LowRank`.
    """
    u, s, v = _svd(parts)
    squares = s**2
    total = squares.sum()
    # `tail[k]` is what a product of rank k lacks.
    tail = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    allowed = max(1.0 - energy, _ROUNDING**2) * total
    rank = int(np.argmax(tail <= allowed))
    return _product(u, s, v, rank, total)


def closest(parts, rank):
    """The closest product of a rank, or of the matrix's own if it is lower.

    Factors of at most this rank stay as they are. A large matrix is decomposed
    by the randomized algorithm, always with the same random numbers.

    Args:
        parts: A matrix as a tuple.
        rank: int.

    Returns:
        A `LowRank`.

    References:
        - Halko, Martinsson and Tropp, "Finding structure with randomness",
          SIAM Review 2011, algorithms 4.4 and 5.1.
    """
    if len(parts) == 2 and parts[0].shape[1] <= rank:
        return without_zeros(parts)
    smaller = min(shape_of(parts))
    sampled = _SMALL_PART * (rank + _OVERSAMPLING) <= smaller
    if len(parts) == 1 and smaller >= _LARGE and sampled:
        u, s, v = _randomized_svd(parts[0], rank)
        total = np.sum(parts[0] ** 2)
    else:
        u, s, v = _svd(parts)
        total = np.sum(s**2)
    rank = min(rank, int(np.sum(s > _ROUNDING * np.sqrt(total))))
    return _product(u, s, v, rank, total)


def _product(u, s, v, rank, total):
    # Both factors get the root of each singular value, so that neither leaves
    # the range of float32 and both train alike.
    root = np.sqrt(s[:rank])
    kept = np.sum(s[:rank] ** 2)
    lost = max(0.0, float((total - kept) / total)) if total else 0.0
    return LowRank(u[:, :rank] * root, root[:, None] * v[:rank], lost)


def _svd(parts):
    """The singular value decomposition, without forming a thin product."""
    if len(parts) == 1:
        return np.linalg.svd(parts[0], full_matrices=False)
    left, right = parts
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, v = np.linalg.svd(r_left @ r_right.T)
    noise = _NOISE * np.linalg.norm(left) * np.linalg.norm(right)
    s = np.where(s > noise, s, 0.0)
    return q_left @ u, s, v @ q_right.T


def _randomized_svd(matrix, rank):
    """The first `rank` singular values and vectors, nearly."""
    columns = matrix.shape[1]
    shape = (columns, rank + _OVERSAMPLING)
    test = random.normals(0, "randomized_svd", shape).astype("float64")
    q, _ = np.linalg.qr(matrix @ test)
    for _ in range(_ITERATIONS):
        q, _ = np.linalg.qr(matrix.T @ q)
        q, _ = np.linalg.qr(matrix @ q)
    u, s, v = np.linalg.svd(q.T @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], v[:rank]
