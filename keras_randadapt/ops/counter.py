"""Random numbers inside a compiled step: equal bits on every backend.

Training needs new draws in every step. Keras's draws differ from backend to
backend, and a generator's state must be saved. Here a draw is a pure function
of a seed, of a stream (its purpose) and of the step. It therefore depends on no
earlier call, a checkpoint that stores only the step can repeat it, and nothing
is traced again. Frozen random bases come from `keras_randadapt.random` instead,
outside of any step.

The generator is Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), the one that JAX uses. It is written in
int32, whose addition wraps on every backend, because torch has no arithmetic
on uint32.
"""

from collections.abc import Sequence

from keras import ops

from keras_randadapt import random

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_MASK = 0xFFFFFFFF


def random_words(seed: int, stream: int | Sequence[int], counter, n: int):
    """Draws uniform 32-bit words.

    Args:
        seed: int in `[0, 2**64)`.
        stream: int in `[0, 2**32)`, the purpose of the draw, or a sequence of
            ints, one a draw; in eager execution several draws cost as much as
            one. Draws of different streams are independent.
        counter: Integer scalar, mostly the step: a Python int or a tensor,
            which may be traced. Only its lower 32 bits are used. Draws of
            different counters are independent.
        n: int. The number of words.

    Returns:
        int32 tensor of shape `(n,)`, or `(len(stream), n)` for a sequence of
        streams.

    Raises:
        TypeError: If `seed` is no integer.
        ValueError: If `seed`, `stream` or `n` is out of range.

    Example:

    ```python
    words = kra.ops.counter.random_words(seed=0, stream=3, counter=7, n=4)
    assert words.shape == (4,)
    ```
    """
    seed = random.check_seed(seed)
    streams = stream if isinstance(stream, Sequence) else [stream]
    if not streams or not all(0 <= s < 2**32 for s in streams):
        raise ValueError(
            "`stream` must be an integer in the range 0 <= stream < 2**32, or "
            f"a sequence of some. Received: stream={stream!r}"
        )
    if n < 1:
        raise ValueError(f"`n` must be at least 1. Received: n={n!r}")
    # Each stream has its own key, made outside of the step. The step and the
    # place in the draw can therefore use the generator's whole counter.
    key = (seed & _MASK, seed >> 32)
    keys = [_threefry_ints(key, (s, 0)) for s in streams]
    keys = ops.convert_to_tensor(
        [[_signed(word) for word in key] for key in keys], "int32"
    )
    shape = (len(streams), -(-n // 2))
    step = ops.broadcast_to(ops.cast(counter, "int32"), shape)
    place = ops.broadcast_to(ops.arange(shape[1], dtype="int32"), shape)
    words = _threefry((keys[:, :1], keys[:, 1:]), (step, place))
    words = ops.reshape(ops.stack(words, axis=-1), (shape[0], 2 * shape[1]))
    words = words[:, :n]
    return words if isinstance(stream, Sequence) else words[0]


def random_rows(seed: int, counters, n: int):
    """Draws uniform 32-bit words, one row for each of many counters.

    Args:
        seed: int in `[0, 2**64)`.
        counters: int32 tensor `(rows,)`, which may be traced. A row depends
            on its own counter alone.
        n: int. The number of words in a row.

    Returns:
        int32 tensor `(rows, n)`. The row of a counter is what `random_words`
        draws for it in stream 0.

    Raises:
        TypeError: If `seed` is no integer.
        ValueError: If `seed` or `n` is out of range.
    """
    seed = random.check_seed(seed)
    if n < 1:
        raise ValueError(f"`n` must be at least 1. Received: n={n!r}")
    key = _threefry_ints((seed & _MASK, seed >> 32), (0, 0))
    key = tuple(ops.convert_to_tensor(_signed(w), "int32") for w in key)
    rows = ops.expand_dims(ops.cast(counters, "int32"), -1)
    places = ops.expand_dims(ops.arange(-(-n // 2), dtype="int32"), 0)
    shape = ops.shape(rows + places)
    words = _threefry(
        key, (ops.broadcast_to(rows, shape), ops.broadcast_to(places, shape))
    )
    words = ops.reshape(ops.stack(words, axis=-1), (shape[0], -1))
    return words[:, :n]


def random_subset(words, k: int):
    """Turns random words into a uniformly drawn subset of fixed size.

    The subset holds the places of the `k` smallest words. Words are compared
    by their leading `32 - ceil(log2(n))` bits and, where these are equal, by
    their place. Exactly `k` are therefore chosen, and every backend chooses
    the same, because there are no ties.

    Args:
        words: int32 tensor of shape `(..., n)`; see `random_words`.
        k: int in `[0, n]`.

    Returns:
        Boolean tensor of shape `(..., n)` with exactly `k` trues along the
        last axis.

    Raises:
        ValueError: If `k` is out of range.

    Example:

    ```python
    words = kra.ops.counter.random_words(seed=0, stream=3, counter=7, n=8)
    subset = kra.ops.counter.random_subset(words, 2)
    assert int(keras.ops.sum(keras.ops.cast(subset, "int32"))) == 2
    ```
    """
    n = words.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(
            f"`k` must be in the range 0 <= k <= {n}, the number of words. "
            f"Received: k={k!r}"
        )
    if k == 0:
        return ops.zeros_like(words, dtype="bool")
    bits = (n - 1).bit_length()
    places = ops.arange(n, dtype="int32")
    keys = ops.bitwise_or(ops.bitwise_and(words, -1 << bits), places)
    chosen = ops.sort(keys, axis=-1)[..., :k]
    # The mask depends only on the sorted keys. If it depended on the words
    # too, XLA would run the generator again for every use of the mask.
    chosen = ops.bitwise_and(chosen, (1 << bits) - 1)
    return ops.any(ops.equal(chosen[..., None], places), axis=-2)


def random_below(words, bound):
    """Turns random words into uniform integers below a bound.

    Args:
        words: int32 tensor of any shape; see `random_words`.
        bound: Positive integer, or an int32 tensor of positive ones that
            broadcasts to the words. No value is more likely than another by
            more than a factor `1 + bound / 2**31`.

    Returns:
        int32 tensor of the words' shape, values in `[0, bound)`.

    Raises:
        ValueError: If `bound` is a Python integer and out of range.

    Example:

    ```python
    words = kra.ops.counter.random_words(seed=0, stream=3, counter=7, n=1)
    rank = 1 + kra.ops.counter.random_below(words, 8)[0]
    ```
    """
    if isinstance(bound, int) and not 0 < bound < 2**31:
        raise ValueError(
            "`bound` must be in the range 0 < bound < 2**31. "
            f"Received: bound={bound!r}"
        )
    return ops.mod(ops.bitwise_and(words, 2**31 - 1), bound)


def _threefry(key, counter):
    """Threefry-2x32-20 on pairs of int32 tensors."""
    k0, k1 = key
    keys = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = counter[0] + k0, counter[1] + k1
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = _rotate(x1, rotation) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + (group + 1)
    return x0, x1


def _rotate(x, left):
    # Right shifts of int32 repeat the sign bit; the mask clears the copies.
    right = ops.right_shift(x, 32 - left)
    return ops.left_shift(x, left) | ops.bitwise_and(right, (1 << left) - 1)


def _signed(word):
    return word - 2**32 if word >= 2**31 else word


def _threefry_ints(key, counter):
    """Threefry-2x32-20 on pairs of Python integers."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x0, x1 = (counter[0] + key[0]) & _MASK, (counter[1] + key[1]) & _MASK
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = (x0 + x1) & _MASK
            x1 = ((x1 << rotation | x1 >> (32 - rotation)) & _MASK) ^ x0
        x0 = (x0 + keys[(group + 1) % 3]) & _MASK
        x1 = (x1 + keys[(group + 2) % 3] + group + 1) & _MASK
    return x0, x1
