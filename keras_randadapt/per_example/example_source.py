"""Draws training examples from all kinds of data that `fit` takes.

A source draws `samples` examples and returns them as batches. A batch is a nest
`(x, y, sample_weight)` of NumPy arrays with a leading axis; examples of equal
shapes are in one batch.
"""

import contextlib
import itertools
import random
import sys

import keras
import numpy as np

# A data set that must have a length but never ends has at least this length.
_ENDLESS = 1 << 40


def source_of(x, y=None, sample_weight=None):
    """The source for the data arguments of `fit`.

    Args:
        x: Arrays in any nest, a `PyDataset`, a `tf.data.Dataset`, a torch
            `DataLoader`, any other iterable of batches, or an iterator.
        y: Like `x`; only with arrays.
        sample_weight: Like `x`; only with arrays.

    Raises:
        TypeError: If `x` is of another type.
        ValueError: If arrays differ in length or are empty, or if `y` or
            `sample_weight` come with a pipeline.
    """
    is_text = isinstance(x, (str, bytes))
    if not is_text and _is_arrays(x):
        return ArraySource(x, y, sample_weight)
    is_dataset = isinstance(x, keras.utils.PyDataset)
    if is_text or not (is_dataset or hasattr(x, "__iter__")):
        raise TypeError(
            "`x` must be arrays, a `keras.utils.PyDataset`, a "
            "`tf.data.Dataset`, a torch `DataLoader` or another iterable of "
            f"batches. Received: x={_short(x)} (of type {type(x).__name__})"
        )
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise ValueError(
                f"`{name}` goes with arrays only: batches of a "
                f"{type(x).__name__} must hold it themselves, as "
                f"`(x, y, sample_weight)`. Received: {name}={_short(value)}"
            )
    if is_dataset:
        if x.num_batches is None:
            batches = (x[i] for i in itertools.count())
            return StreamSource(batches)
        return PipelineSource(_PyDatasetBatches(x), bounded=True)
    if hasattr(x, "__next__"):
        return StreamSource(x)
    length = _length(x)
    if length == float("inf"):
        return StreamSource(iter(x))
    return PipelineSource(x, bounded=length is not None)


class ArraySource:
    """Draws examples from arrays, with replacement."""

    def __init__(self, x, y=None, sample_weight=None):
        self.data = tuple(
            _map_leaves(_as_given, part) for part in (x, y, sample_weight)
        )
        lengths = {}
        for name, part in zip(("x", "y", "sample_weight"), self.data):
            for leaf in _leaves(part):
                if not leaf.shape:
                    raise ValueError(
                        f"`{name}` must hold arrays with an axis of examples. "
                        f"Received: {name}={_short(leaf)}"
                    )
                lengths.setdefault(len(leaf), name)
        if len(lengths) != 1 or 0 in lengths:
            found = ", ".join(f"{n} in `{name}`" for n, name in lengths.items())
            raise ValueError(
                "`x`, `y` and `sample_weight` must hold equally many examples "
                f"and at least one. Received: {found or 'none'}"
            )
        (self.length,) = lengths

    def draw(self, generator, samples, max_batches=None):
        """Batches with `samples` examples in total."""
        indices = generator.integers(0, self.length, samples)
        return [_map_leaves(lambda leaf: leaf[indices], self.data)]

    def every(self):
        """Batches with every example once."""
        return [self.data]

    def peek(self):
        """A batch of one example, or `None` if reading it would consume it."""
        return _map_leaves(lambda leaf: leaf[:1], self.data)


class PipelineSource:
    """Draws uniformly from batches that can be iterated again, in one pass.

    Every slot is a reservoir of one example. The draws are therefore
    independent and with replacement, and the number of examples need not be
    known. If `n` examples have been seen, including a batch of `m`, a slot
    takes each of the `m` with probability `1 / n` and otherwise keeps its own.

    Args:
        batches: An iterable that is no iterator.
        bounded: Whether the iterable is known to end.
    """

    def __init__(self, batches, bounded):
        self.batches = batches
        self.bounded = bounded

    def draw(self, generator, samples, max_batches=None):
        slots = [None] * samples
        seen = 0
        batches = iter(self.batches)
        if not self.bounded and max_batches is not None:
            batches = itertools.islice(batches, max_batches)
        for batch in batches:
            batch = _unpack(batch)
            size = _size(batch)
            seen += size
            if not size:
                continue
            chosen = generator.integers(0, seen, samples) - (seen - size)
            for slot in np.flatnonzero(chosen >= 0):
                slots[slot] = _take(batch, chosen[slot])
        if not seen:
            raise ValueError(
                "`x` must hold training examples, but gave no batch."
            )
        return _stack(slots)

    def every(self):
        return map(_unpack, self.batches)

    def peek(self):
        if isinstance(self.batches, _PyDatasetBatches):
            first = _unpack(self.batches.dataset[0])
            return _map_leaves(lambda leaf: leaf[:1], first)
        return None


class StreamSource:
    """Takes the next examples of a generator, iterator or endless pipeline."""

    def __init__(self, batches):
        self.batches = iter(batches)
        self.left = []

    def draw(self, generator, samples, max_batches=None):
        while len(self.left) < samples:
            try:
                batch = _unpack(next(self.batches))
            except StopIteration:
                raise ValueError(
                    "`x` is a generator or iterator that came to its end: "
                    "every estimation takes `samples` examples from it. Pass "
                    "arrays or a data set that can be gone through again, or "
                    "make it endless. "
                    f"Received: x={_short(self.batches)}, samples={samples}"
                ) from None
            self.left.extend(_take(batch, i) for i in range(_size(batch)))
        drawn, self.left = self.left[:samples], self.left[samples:]
        return _stack(drawn)

    def every(self):
        raise ValueError(
            "`x` is a generator, an iterator or an endless pipeline, of which "
            "not every example can be read. Pass arrays or a data set that "
            f"ends. Received: x={_short(self.batches)}"
        )

    def peek(self):
        return None


class _PyDatasetBatches:
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return (self.dataset[i] for i in range(self.dataset.num_batches))


def preprocess(model, batch):
    """A batch, preprocessed if the model is a KerasHub task."""
    if not hasattr(model, "preprocess_samples"):
        return batch
    batch = model.preprocess_samples(*map(_texts_as_lists, batch))
    return _unpack(batch)


@contextlib.contextmanager
def own_random_state(seed, pipeline=None):
    """Seeds global random generators during a block, then restores them.

    Pipelines shuffle and augment with the global generators of Python, NumPy
    and torch. Iterating over them must not change the course of training.

    Args:
        seed: int in `[0, 2**32)`.
        pipeline: The iterated object. If it is a torch `DataLoader`, its own
            generators are restored too.
    """
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch = sys.modules.get("torch")
    generators = []
    if torch is not None:
        for owner in (pipeline, getattr(pipeline, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                generators.append(generator)
        states = [generator.get_state() for generator in generators]
        # Only the CPU's generator is seeded, because pipelines run there.
        torch_state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch is not None:
            torch.set_rng_state(torch_state)
            for generator, state in zip(generators, states):
                generator.set_state(state)


# Nests and arrays.


def _is_arrays(x):
    if isinstance(x, (dict, list, tuple)):
        return True
    # Tensors of every backend have a `shape`, but data sets do not.
    return hasattr(x, "__array__") or hasattr(x, "shape")


def _is_leaf(nest):
    """Whether this is one array, or a list of texts or numbers."""
    if isinstance(nest, dict):
        return False
    if isinstance(nest, (list, tuple)):
        return all(isinstance(v, (str, bytes, int, float)) for v in nest)
    return True


def _map_leaves(function, nest):
    if nest is None:
        return None
    if _is_leaf(nest):
        return function(nest)
    if isinstance(nest, dict):
        return {k: _map_leaves(function, v) for k, v in nest.items()}
    return tuple(_map_leaves(function, v) for v in nest)


def _leaves(nest):
    found = []
    _map_leaves(found.append, nest)
    return found


def _as_array(leaf):
    if hasattr(leaf, "detach"):
        # It is a torch tensor, which may be on any device.
        leaf = leaf.detach().cpu()
    array = np.asarray(leaf)
    # The dtypes of texts contain their lengths, which differ.
    return array.astype(object) if array.dtype.kind in "SU" else array


def _as_given(leaf):
    """An array in the dtype of `fit`, which casts floats to `floatx`."""
    array = _as_array(leaf)
    if array.dtype.kind == "f":
        return array.astype(keras.config.floatx())
    return array


def _unpack(batch):
    parts = keras.utils.unpack_x_y_sample_weight(batch)
    return tuple(_map_leaves(_as_array, part) for part in parts)


def _size(batch):
    leaves = _leaves(batch)
    if not all(leaf.shape for leaf in leaves):
        raise ValueError(
            "`x` must give batches, whose arrays all have an axis of "
            "examples: batch the data set. Received a batch of shapes "
            f"{[leaf.shape for leaf in leaves]}"
        )
    return len(leaves[0])


def _take(batch, index):
    # The arrays are copied, since a view would keep its batch in memory.
    def take(leaf):
        return np.array(leaf[index], dtype=leaf.dtype)

    return _map_leaves(take, batch)


def _stack(examples):
    groups = {}
    for example in examples:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in _leaves(example))
        groups.setdefault(shapes, []).append(example)
    return [_stack_equal(group) for group in groups.values()]


def _stack_equal(examples):
    flat = [_leaves(example) for example in examples]
    stacked = iter([np.stack(leaves) for leaves in zip(*flat)])
    return _map_leaves(lambda _: next(stacked), examples[0])


def _texts_as_lists(nest):
    """A nest with lists of `str`, which KerasHub's preprocessors take."""

    def convert(leaf):
        if leaf.dtype != object:
            return leaf
        return [_decode(text) for text in leaf.tolist()]

    return _map_leaves(convert, nest)


def _decode(text):
    return text.decode("utf-8") if isinstance(text, bytes) else text


def _length(x):
    """The number of batches: an int, infinity, or `None` if unknown."""
    if hasattr(x, "cardinality"):
        # In tf.data, -1 means endless and -2 means unknown.
        length = int(x.cardinality())
        return {-1: float("inf"), -2: None}.get(length, length)
    try:
        length = len(x)
    except TypeError:
        return None
    return float("inf") if length >= _ENDLESS else length


def _short(value):
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
