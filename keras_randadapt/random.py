"""Frozen random draws that a 64-bit seed rebuilds bit for bit.

Everything an adapter does not store comes from here, so this module is part
of the file format: the same `(seed, role, shape)` must give the same bits on
every machine, byte order, NumPy version and Keras backend, for ever. Three
rules ensure this.

- The key of a draw is a hash of its purpose, never of the number of earlier
  draws, so draws can be made in any order and repeated.
- Bits come from the raw output of NumPy's Philox bit generator. NumPy promises
  that stream, and makes no such promise for `Generator` methods (NEP 19).
- Bits become numbers by integer operations and by the five IEEE 754
  operations that are correctly rounded everywhere (`+ - * /` and `sqrt`).
  `log` and `cos` differ between C libraries in the last bit.

If a draw ever has to change, `_VERSION` must change too.
"""

import hashlib
import math
import operator

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "check_seed",
    "digest",
    "normals",
    "permutation",
    "signs",
    "ternaries",
    "uniforms",
]

_VERSION = 1
# The elements that are computed in float64 at a time. This bounds the memory of
# a large draw and keeps temporaries in cache. The draws do not depend on it.
_CHUNK = 1 << 16

# The coefficients of the rational approximations of Wichura (1988), Algorithm
# AS 241, PPND16, in ascending powers.
_CENTRE = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
_MIDDLE = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
# The algorithm's third pair is for probabilities below exp(-25). It is not
# needed, since the smallest probability here is 2**-33.

_LN2 = 0.6931471805599453094
_SQRT_HALF = 0.70710678118654752440


def signs(seed: int, role: str, shape: int | tuple[int, ...]) -> np.ndarray:
    """Draws independent signs, each +1 or -1 with probability 1/2.

    Args:
        seed: Integer, `0 <= seed < 2**64`.
        role: String that says what the draw is for. Draws with different
            roles are independent.
        shape: Integer or tuple of integers.

    Returns:
        An `int8` array of `shape`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If `seed` or `shape` is out of range.

    Example:

    >>> signs(0, "example", 8)
    array([ 1,  1, -1, -1, -1,  1,  1,  1], dtype=int8)
    """
    bits, shape = _bits(seed, role, shape)
    return (1 - 2 * bits.astype(np.int8)).reshape(shape)


def permutation(seed: int, role: str, n: int) -> np.ndarray:
    """Draws a uniform permutation of `0, ..., n - 1`.

    The permutation sorts `n` random 64-bit keys; a tie (probability below
    `n**2 / 2**65`) keeps the order of the indices.

    Args:
        seed: Integer, `0 <= seed < 2**64`.
        role: String that says what the draw is for.
        n: Integer, the number of elements.

    Returns:
        An `int64` array of shape `(n,)`.
    """
    n = _check_dimension(n, n, "n")
    words = _raw("permutation", seed, role, (n,), n)
    return np.argsort(words, kind="stable").astype(np.int64)


def uniforms(seed: int, role: str, shape: int | tuple[int, ...]) -> np.ndarray:
    """Draws independent uniforms on `[0, 1)`, multiples of `2**-24`.

    Args:
        seed: Integer, `0 <= seed < 2**64`.
        role: String that says what the draw is for.
        shape: Integer or tuple of integers.

    Returns:
        A `float32` array of `shape`.
    """
    words, shape = _words32("uniforms", seed, role, shape)
    scale = np.float32(2.0**-24)
    return ((words >> np.uint32(8)).astype(np.float32) * scale).reshape(shape)


def normals(seed: int, role: str, shape: int | tuple[int, ...]) -> np.ndarray:
    """Draws independent standard normals.

    Each draw is the normal quantile (Wichura, "Algorithm AS 241", Applied
    Statistics 37, 1988) of a uniform `(k + 1/2) / 2**32`, computed in
    `float64` and rounded. The largest possible magnitude is 6.34.

    Args:
        seed: Integer, `0 <= seed < 2**64`.
        role: String that says what the draw is for.
        shape: Integer or tuple of integers.

    Returns:
        A `float32` array of `shape`.
    """
    words, shape = _words32("normals", seed, role, shape)
    out = np.empty(words.size, np.float32)
    for start in range(0, words.size, _CHUNK):
        chunk = words[start : start + _CHUNK].astype(np.float64)
        out[start : start + _CHUNK] = _quantile((chunk + 0.5) * 2.0**-32)
    return out.reshape(shape)


def ternaries(
    seed: int, role: str, shape: int | tuple[int, ...], sparsity: float
) -> np.ndarray:
    """Draws independent values in `{-1, 0, 1}`, mostly zero.

    `P(+1) = P(-1) = 1 / (2 * sparsity)`, as in the sparse projections of
    Achlioptas (2003) with `sparsity=3` and of Li, Hastie and Church (2006) with
    `sparsity=sqrt(n)`. The values have variance `1 / sparsity`; the caller
    scales them. For one seed, role and shape, the entries that are nonzero at a
    larger sparsity are also nonzero at a smaller one.

    Args:
        seed: Integer, `0 <= seed < 2**64`.
        role: String that says what the draw is for.
        shape: Integer or tuple of integers.
        sparsity: Number, at least 1 and at most `2**31`.

    Returns:
        An `int8` array of `shape`.
    """
    if isinstance(sparsity, bool) or not isinstance(
        sparsity, (int, float, np.integer, np.floating)
    ):
        raise TypeError(
            "`sparsity` must be a number. "
            f"Received: sparsity={sparsity!r} of type {type(sparsity).__name__}"
        )
    if not 1 <= sparsity <= 2**31:
        raise ValueError(
            "`sparsity` must be at least 1 (no zeros) and at most 2**31; "
            "3 keeps a third of the entries. "
            f"Received: sparsity={sparsity!r}"
        )
    words, shape = _words32("ternaries", seed, role, shape)
    # This is half the number of 32-bit words that give a nonzero value.
    count = min(math.floor(2.0**31 / float(sparsity) + 0.5), 2**31)
    out = np.zeros(words.size, np.int8)
    out[words < np.uint32(count)] = 1
    out[words >= np.uint32(2**32 - count)] = -1
    return out.reshape(shape)


def digest(array: ArrayLike) -> str:
    """Hashes an array's dtype, shape and values.

    The hash does not depend on the machine's byte order or on the array's
    memory layout. It tells whether a rebuilt draw is the one that was saved.

    Args:
        array: A NumPy array, or anything `np.asarray` takes.

    Returns:
        A string of 16 hexadecimal digits.
    """
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise TypeError(
            "`array` must hold numbers, not Python objects. "
            f"Received: dtype={array.dtype}"
        )
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    header = f"{array.dtype.kind}{array.dtype.itemsize}:{array.shape}:"
    payload = array.tobytes(order="C")
    return hashlib.sha256(header.encode() + payload).hexdigest()[:16]


def _raw(kind, seed, role, shape, count):
    """The first `count` 64-bit words of the stream of one draw."""
    seed = check_seed(seed)
    if not isinstance(role, str):
        raise TypeError(
            "`role` must be a string that says what the draw is for. "
            f"Received: role={role!r} of type {type(role).__name__}"
        )
    # `role` comes last, because only it may contain a newline. No two draws
    # therefore have the same text.
    dimensions = "x".join(map(str, shape))
    text = f"keras_randadapt {_VERSION}\n{kind}\n{seed}\n{dimensions}\n{role}"
    key = hashlib.sha256(text.encode("utf-8")).digest()[:16]
    low = int.from_bytes(key[:8], "little")
    high = int.from_bytes(key[8:], "little")
    generator = np.random.Philox(key=np.array([low, high], np.uint64))
    return generator.random_raw(count)


def _bits(seed, role, shape):
    """A `uint8` 0 or 1 for each element; bit `i` of a word is element `i`."""
    shape = _check_shape(shape)
    size = math.prod(shape)
    words = _raw("signs", seed, role, shape, -(-size // 64))
    octets = words.astype("<u8").view(np.uint8)
    return np.unpackbits(octets, count=size, bitorder="little"), shape


def _words32(kind, seed, role, shape):
    """A `uint32` for each element; the low half of a 64-bit word is first."""
    shape = _check_shape(shape)
    size = math.prod(shape)
    words = _raw(kind, seed, role, shape, -(-size // 2))
    halves = words.astype("<u8").view("<u4")[:size]
    return halves.astype(np.uint32, copy=False), shape


def _quantile(p):
    """Normal quantile of a `float64` array in `[2**-33, 1 - 2**-33]`."""
    q = p - 0.5
    r = 0.180625 - q * q
    z = q * _rational(_CENTRE, r)
    tail = np.abs(q) > 0.425
    q, p = q[tail], p[tail]
    r = np.sqrt(-_log(np.minimum(p, 1.0 - p)))
    z[tail] = np.copysign(_rational(_MIDDLE, r - 1.6), q)
    return z


def _rational(coefficients, x):
    numerator, denominator = coefficients
    return _horner(numerator, x) / _horner(denominator, x)


def _horner(coefficients, x):
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


def _log(x):
    """`log(x)` of positive `float64`, from correctly rounded operations only.

    With `x = m * 2**e` and `sqrt(1/2) <= m < sqrt(2)`,
    `log(x) = e * log(2) + 2 * atanh((m - 1) / (m + 1))`; the argument of
    `atanh` is at most 0.172 and 13 terms of its series reach `2**-53`.
    """
    m, e = np.frexp(x)
    small = m < _SQRT_HALF
    m = np.where(small, m + m, m)
    e = (e - small).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    series = _horner([1.0 / (2 * k + 1) for k in range(13)], s * s)
    return e * _LN2 + 2.0 * s * series


def check_seed(seed: int) -> int:
    """The seed as a Python integer; raises an error if it cannot be one."""
    if isinstance(seed, (bool, np.bool_)):
        raise TypeError(
            f"`seed` must be an integer. Received: seed={seed!r} of type bool"
        )
    try:
        value = operator.index(seed)
    except TypeError as error:
        raise TypeError(
            "`seed` must be an integer, because it is all that is stored of "
            f"a random basis. Received: seed={seed!r} of type "
            f"{type(seed).__name__}"
        ) from error
    if not 0 <= value < 2**64:
        raise ValueError(
            "`seed` must be in the range 0 <= seed < 2**64. "
            f"Received: seed={seed!r}"
        )
    return value


def _check_shape(shape):
    dimensions = shape if isinstance(shape, (tuple, list)) else (shape,)
    return tuple(_check_dimension(d, shape, "shape") for d in dimensions)


def _check_dimension(dimension, received, name):
    try:
        if isinstance(dimension, (bool, np.bool_)):
            raise TypeError
        value = operator.index(dimension)
    except TypeError as error:
        allowed = "an integer" + (
            " or a tuple of integers" if name == "shape" else ""
        )
        raise TypeError(
            f"`{name}` must be {allowed}; an unknown dimension (None) has to "
            f"be resolved first. Received: {name}={received!r}"
        ) from error
    if value < 0:
        raise ValueError(
            f"`{name}` must not be negative. Received: {name}={received!r}"
        )
    return value
