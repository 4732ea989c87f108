"""What users give to a bank: tenants, and batches with names."""

import os
from collections.abc import Mapping

import keras
import numpy as np

from keras_randadapt.model import paths


def listed(adapters):
    if adapters is None:
        return {}
    if isinstance(adapters, Mapping):
        return dict(adapters)
    folder = paths.check_path(adapters)
    if not os.path.isdir(folder):
        raise ValueError(
            "`adapters` must be a dict from name to file, or a folder. "
            f"Received: adapters={adapters!r}"
        )
    return {
        os.path.splitext(file)[0]: os.path.join(folder, file)
        for file in sorted(os.listdir(folder))
        if file.endswith(".safetensors")
    }


def check_name(name):
    """Raises an error unless a tenant can have this name."""
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string. Received: name={name!r}")
    if not name:
        raise ValueError(
            "`name` must not be empty: the empty name is the base model's."
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`name` must be text that UTF-8 can write. Received: name={name!r}"
        ) from error


def names_of(adapters, count):
    """The names of so many examples; see `strings`."""
    names = strings(adapters)
    check_count(names, count)
    return names


def check_count(names, count):
    if not count:
        raise ValueError("There is no example to compute anything for.")
    if len(names) != count:
        raise ValueError(
            "`adapters` must have a name for each example. Received: "
            f"{len(names)} names for {count} examples."
        )


def strings(adapters):
    """Names as strings; `""` is the base model.

    Args:
        adapters: What a user gave: strings, bytes or `None`.
    """
    if isinstance(adapters, (str, bytes)):
        raise TypeError(
            "`adapters` must be a list with a name for each example. "
            f"Received: adapters={adapters!r}"
        )
    return [_name(one) for one in adapters]


def _name(name):
    if name is None:
        return ""
    if isinstance(name, bytes):
        return name.decode()
    if not isinstance(name, str):
        raise TypeError(
            "`adapters` must hold names, which are strings, or `None`. "
            f"Received: {name!r}"
        )
    return name


def predict(table, answer, x, adapters, batch_size):
    """The outputs for examples, a batch at a time.

    Args:
        table: A `Table`.
        answer: Function of a batch and the rows of its examples, which gives
            NumPy arrays.
        x: See `AdapterBank.predict`.
        adapters: Names or `None`.
        batch_size: int.
    """
    found = []
    for inputs, names in _parts(x, adapters):
        # No tenant changes between two batches of one request.
        with table.kept() as kept:
            found += _answers(kept, answer, inputs, names, batch_size)
    if not found:
        raise ValueError("There is no example to compute anything for.")
    return keras.tree.map_structure(lambda *a: np.concatenate(a), *found)


def _parts(x, adapters):
    """Pairs of inputs and names."""
    if adapters is not None:
        return [(x, adapters)]
    if isinstance(x, Mapping):
        return [split(x)]
    return (split(batch) for batch in x)


def _answers(kept, answer, x, adapters, batch_size):
    count = examples(x)
    adapters = names_of(adapters, count)
    kept.check(adapters)
    found = []
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        inputs = keras.tree.map_structure(lambda a: np.asarray(a)[part], x)
        names = adapters[part]
        missing = batch_size - len(names) if start else 0
        if missing:
            # The last batch is filled up, so that it is not compiled for its
            # own size.
            inputs = keras.tree.map_structure(
                lambda a: np.concatenate([a, a[:1].repeat(missing, 0)]), inputs
            )
        out = answer(inputs, kept.rows(names + [""] * missing))
        if missing:
            out = keras.tree.map_structure(lambda a: a[:-missing], out)
        found.append(out)
    return found


def split(batch):
    """The inputs and the names of a batch that has both."""
    if not isinstance(batch, Mapping) or "adapter" not in batch:
        raise ValueError(
            "Give `adapters`, one name for each example, or inputs that are a "
            "dict with an entry 'adapter'."
        )
    inputs = dict(batch)
    names = np.asarray(inputs.pop("adapter")).ravel().tolist()
    return inputs, names


def examples(x):
    sizes = {int(np.shape(a)[0]) for a in keras.tree.flatten(x)}
    if len(sizes) != 1:
        raise ValueError(
            "All inputs must have the same number of examples. "
            f"Received: {sorted(sizes)}"
        )
    return sizes.pop()
