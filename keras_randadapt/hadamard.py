"""Hadamard transforms of any order, as Kronecker products of small cores.

The transform of order `d = m * 2**j` (`m` odd) is a Kronecker product of
cores: first cores that absorb the odd part, then Sylvester's `[[1, 1], [1,
-1]]`.

- For `m = 1` it is Sylvester's matrix.
- Paley's constructions (1933) absorb odd factors: a core of order
  `p = g * 2**i` for a divisor `g` of `m`, with entries +-1, where `p / 2 - 1`
  is a prime of the form `4 k + 1` (Paley II, symmetric) or `p - 1` is a prime
  of the form `4 k + 3` (Paley I, *not* symmetric).
- Odd factors that no Paley core of order at most 160 covers get a Hartley core,
  `cas(2 pi i j / g)` with `cas = cos + sin`. It is symmetric and orthogonal for
  every `g`, and its entries have magnitude at most `sqrt(2)`.

The orders 768, 1280, 3072, 3584 and 25600 thus have true Hadamard matrices, and
11008 = 43 * 256 has one Hartley core; none needs padding. All matrices here are
unnormalized: `F @ F.T == order * I`, so that Hadamard entries are exact in any
dtype.

The matrix of an order is part of the adapter file format and never changes. The
grouping of cores into factors only affects speed.
"""

import functools
import itertools
import math
import operator

import numpy as np

__all__ = [
    "group_factors",
    "hadamard",
    "hadamard_cores",
    "hadamard_factors",
    "HARTLEY_COMPOSITE_LIMIT",
    "HARTLEY_CORE_LIMIT",
    "is_supported",
    "largest_order",
    "PALEY_CORE_LIMIT",
    "PASS_COST",
    "WINDOW_CORE_LIMIT",
    "window_order",
]

PALEY_CORE_LIMIT = 160
# A prime needs a core of its own size. A composite is split above the second
# limit.
HARTLEY_CORE_LIMIT = 1024
HARTLEY_COMPOSITE_LIMIT = 128
# Above this, two overlapping windows are cheaper than the core itself.
WINDOW_CORE_LIMIT = 256
# The cost of one more pass over the data, in multiply-adds an element, fitted
# to times on a CPU (docs/design/transforms.md).
PASS_COST = 31
_MAX_FACTORS = 4


def hadamard(order: int, normalize: bool = True) -> np.ndarray:
    """The dense Hadamard matrix of an order.

    For a power of two it is Sylvester's matrix in its natural order, like
    `scipy.linalg.hadamard`. The module's docstring describes the others.

    Args:
        order: Integer, at least 1.
        normalize: Whether to divide by `sqrt(order)`, which makes the matrix
            orthogonal. Otherwise `H @ H.T == order * I`, and its entries are
            +-1; each Hartley core multiplies their magnitude by up to
            `sqrt(2)`.

    Returns:
        A `float64` array of shape `(order, order)`.

    Raises:
        TypeError: If `order` is not an integer.
        ValueError: If `order` is not supported, see `is_supported`.

    Example:

    >>> hadamard(4, normalize=False)
    array([[ 1.,  1.,  1.,  1.],
           [ 1., -1.,  1., -1.],
           [ 1.,  1., -1., -1.],
           [ 1., -1., -1.,  1.]])
    """
    matrix = functools.reduce(np.kron, hadamard_factors(order))
    return matrix / math.sqrt(order) if normalize else matrix.copy()


def hadamard_factors(order: int) -> tuple[np.ndarray, ...]:
    """Kronecker factors of the Hadamard matrix of an order.

    Multiplying by the factors one after the other takes the sum of their
    orders in multiply-adds an element, instead of `order`. The factors are
    nearly balanced.

    Args:
        order: Integer, at least 1.

    Returns:
        A tuple of `float64` arrays `F_i` of shapes `(n_i, n_i)`, unnormalised
        (`F_i @ F_i.T == n_i * I`), such that
        `kron(F_1, kron(F_2, ...)) == hadamard(order, normalize=False)` and
        the product of the `n_i` is `order`.

    Raises:
        TypeError: If `order` is not an integer.
        ValueError: If `order` is not supported, see `is_supported`.
    """
    return group_factors(hadamard_cores(order))


def hadamard_cores(order: int) -> tuple[np.ndarray, ...]:
    """The cores of an order: `hadamard_factors` before any are grouped."""
    return _cores(_check_order(order))


def group_factors(
    matrices: tuple[np.ndarray, ...],
    pass_cost: float = PASS_COST,
    left_cost: float = 1,
) -> tuple[np.ndarray, ...]:
    """Multiplies Kronecker factors out into fewer that are cheaper to apply.

    Args:
        matrices: Tuple of arrays, which need not be square.
        pass_cost: The cost of a pass over the data in addition to its
            products, in multiply-adds an element.
        left_cost: The cost of a multiply-add of any factor but the last. A
            multiply-add of the last factor, which acts on numbers that lie
            side by side, costs 1.

    Returns:
        A tuple of arrays of the same Kronecker product.
    """
    shapes = tuple(matrix.shape for matrix in matrices)
    return tuple(
        functools.reduce(np.kron, matrices[group], np.ones((1, 1)))
        for group in _grouping(shapes, pass_cost, left_cost)
    )


def is_supported(order: int) -> bool:
    """Whether `hadamard(order)` exists here.

    It does unless `order` has a prime factor above 1024.
    """
    order = _as_index(order, "order")
    return order >= 1 and _decompose(*_split_twos(order)) is not None


def largest_order(limit: int) -> int:
    """The largest order up to `limit` of a true Hadamard matrix.

    Only orders whose cores all have entries +-1 and sizes up to 160 count.
    The result is above `limit / 2`, since powers of two are among them.

    Args:
        limit: Integer, at least 1.

    Returns:
        An integer.
    """
    limit = _as_index(limit, "limit")
    if limit < 1:
        raise ValueError(f"`limit` must be at least 1. Received: limit={limit}")
    return next(
        order
        for order in range(limit, 0, -1)
        if is_supported(order) and _hartley_cores(order) == ()
    )


def window_order(order: int) -> int | None:
    """The order of the windows that replace a Hadamard matrix.

    Some dimensions `d`, such as vocabulary sizes, have a large prime factor.
    Their transform consists of two transforms of order `m = window_order(d) >
    d / 2`, on the first `m` coordinates and then on the last `m`. It is
    orthogonal, because each of the two is.

    Args:
        order: Integer, at least 1.

    Returns:
        `None` if `order` has a Hadamard matrix with small cores; otherwise
        the order of the windows, `largest_order(order)`.
    """
    order = _check_positive(order)
    if is_supported(order) and all(
        core <= WINDOW_CORE_LIMIT for core in _hartley_cores(order)
    ):
        return None
    return largest_order(order)


@functools.lru_cache(maxsize=None)
def _cores(order):
    odd, twos = _split_twos(order)
    cores = _decompose(odd, twos)
    matrices = [_core(*core) for core in cores]
    matrices += [_SYLVESTER] * (twos - sum(exponent for *_, exponent in cores))
    for matrix in matrices:
        matrix.flags.writeable = False
    return tuple(matrices)


@functools.lru_cache(maxsize=None)
def _grouping(shapes, pass_cost, left_cost):
    """Slices of consecutive factors whose products are cheapest to apply."""

    def cost(slices):
        rows = (math.prod(p for p, _ in shapes[s]) for s in slices)
        columns = (math.prod(q for _, q in shapes[s]) for s in slices)
        *left, last = map(min, zip(rows, columns))
        return len(slices) * pass_cost + left_cost * sum(left) + last

    n = len(shapes)
    candidates = (
        tuple(slice(a, b) for a, b in itertools.pairwise((0, *cuts, n)))
        for parts in range(min(_MAX_FACTORS, max(n, 1)))
        for cuts in itertools.combinations(range(1, n), parts)
    )
    return min(candidates, key=cost)


@functools.lru_cache(maxsize=None)
def _decompose(odd, twos):
    """The odd cores of order `odd * 2**twos`, or `None`.

    A core is `(kind, g, i)` and has the order `g * 2**i`. The choice has the
    fewest coordinates in Hartley cores, since these are not exact in low
    precision, then the fewest cores, then the smallest ones.
    """
    if odd == 1:
        return ()
    prime = _prime_factors(odd)[-1]
    candidates = []
    # Some core has the largest prime. If that core is chosen first, every way
    # of splitting `odd` is visited once.
    for g in (g for g in range(prime, odd + 1, prime) if odd % g == 0):
        for core in _candidate_cores(g, twos):
            rest = _decompose(odd // g, twos - core[2])
            if rest is not None:
                key = sorted((core, *rest), key=lambda c: c[1] << c[2])
                candidates.append(tuple(key))
    return min(candidates, key=_preference, default=None)


def _preference(cores):
    hartley = math.prod(g for kind, g, _ in cores if kind == "hartley")
    return hartley, len(cores), sum(g << i for _, g, i in cores), cores


def _candidate_cores(g, twos):
    for i in range(2, twos + 1):
        order = g << i
        if order > PALEY_CORE_LIMIT:
            break
        # `order % 8 == 4` is the same as `order / 2 - 1 == 1` modulo 4.
        if order % 8 == 4 and _is_prime(order // 2 - 1):
            yield "paley2", g, i
        elif _is_prime(order - 1):
            yield "paley1", g, i
    limit = HARTLEY_CORE_LIMIT if _is_prime(g) else HARTLEY_COMPOSITE_LIMIT
    if g <= limit:
        yield "hartley", g, 0


def _hartley_cores(order):
    cores = _decompose(*_split_twos(order))
    return tuple(g for kind, g, _ in cores if kind == "hartley")


_SYLVESTER = np.array([[1.0, 1.0], [1.0, -1.0]])


def _core(kind, g, i):
    order = g << i
    if kind == "hartley":
        return _hartley(order)
    return _paley1(order) if kind == "paley1" else _paley2(order)


def _paley1(order):
    """`I + S` with a skew `S`: it has entries +-1 and is not symmetric."""
    skew = np.ones((order, order))
    skew[1:, 0] = -1.0
    skew[1:, 1:] = _jacobsthal(order - 1)
    np.fill_diagonal(skew, 1.0)
    return skew


def _paley2(order):
    """Paley's core from the symmetric conference matrix of `order / 2`."""
    n = order // 2
    conference = np.ones((n, n))
    conference[1:, 1:] = _jacobsthal(n - 1)
    np.fill_diagonal(conference, 0.0)
    return np.kron(conference, _SYLVESTER) + np.kron(
        np.eye(n), np.array([[1.0, -1.0], [-1.0, -1.0]])
    )


def _jacobsthal(q):
    """`chi(i - j)`, the quadratic character modulo the prime `q`."""
    residues = np.arange(q) ** 2 % q
    character = np.full(q, -1.0)
    character[residues] = 1.0
    character[0] = 0.0
    index = np.arange(q)
    return character[(index[:, None] - index) % q]


def _hartley(order):
    index = np.arange(order)
    # Reducing the product first keeps the angle exact, and a table of the
    # `order` values makes equal angles give equal entries.
    angle = 2.0 * np.pi * index / order
    return (np.cos(angle) + np.sin(angle))[np.outer(index, index) % order]


def _split_twos(order):
    twos = (order & -order).bit_length() - 1
    return order >> twos, twos


@functools.lru_cache(maxsize=None)
def _prime_factors(n):
    factors = []
    p = 2
    while p * p <= n:
        while n % p == 0:
            factors.append(p)
            n //= p
        p += 1
    return tuple(factors) + ((n,) if n > 1 else ())


def _is_prime(n):
    return n > 1 and len(_prime_factors(n)) == 1


def _as_index(value, name):
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"`{name}` must be an integer. Received: {name}={value!r} of type "
            f"{type(value).__name__}"
        ) from error


def _check_positive(order):
    order = _as_index(order, "order")
    if order < 1:
        raise ValueError(
            "`order` is the size of a square matrix and must be at least 1. "
            f"Received: order={order}"
        )
    return order


def _check_order(order):
    order = _check_positive(order)
    if not is_supported(order):
        below, above = order, order
        while not is_supported(below):
            below -= 1
        while not is_supported(above):
            above += 1
        raise ValueError(
            f"No Hadamard transform of `order` {order}: its prime factor "
            f"{_prime_factors(order)[-1]} would need a dense core of that "
            f"size, and cores stop at {HARTLEY_CORE_LIMIT}. The nearest "
            f"orders that work are {below} and {above}; pad or crop to one "
            "of them, or use a `RandomizedTransform`, which takes any "
            "dimension."
        )
    return order
