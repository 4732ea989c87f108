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
        size = max((len(one[1]) for one in found), default=0)
        # No tenant changes between two batches of one request.
        with table.kept() as kept:
            found += _answers(kept, answer, inputs, names, batch_size, size)
    if not found:
        raise ValueError("There is no example to compute anything for.")
    outputs = [one for one, _ in found]
    return keras.tree.map_structure(lambda *a: np.concatenate(a), *outputs)


def _parts(x, adapters):
    """Pairs of inputs and names."""
    if adapters is not None:
        if _is_pipeline(x):
            raise ValueError(
                "`adapters` goes with arrays. The batches of a data pipeline "
                "have their names in an entry 'adapter' of their inputs. "
                f"Received: x={x!r}"
            )
        return [(x, adapters)]
    if isinstance(x, Mapping):
        return [split(x)]
    if isinstance(x, keras.utils.PyDataset):
        # Its items may never end, so that a loop over them would not either.
        if x.num_batches is None:
            raise ValueError(
                "`x` must have an end: its `num_batches` is `None`."
            )
        return (split(x[i]) for i in range(x.num_batches))
    return (split(batch) for batch in x)


def _is_pipeline(x):
    return not isinstance(x, (Mapping, list, tuple)) and (
        not hasattr(x, "shape")
    )


def _answers(kept, answer, x, adapters, batch_size, size):
    """Pairs of the outputs of a batch and its names, filled up.

    Args:
        kept: A `Kept`.
        answer: See `predict`, as the next three.
        x: Inputs.
        adapters: Names.
        batch_size: int.
        size: int, the number of examples that were computed at once so far.
    """
    count = examples(x)
    adapters = names_of(adapters, count)
    kept.check(adapters)
    found = []
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        inputs = keras.tree.map_structure(lambda a: as_array(a)[part], x)
        names = adapters[part]
        size = max(size, len(names))
        missing = size - len(names)
        if missing:
            # A smaller batch is filled up, so that it is not compiled for its
            # own size.
            inputs = keras.tree.map_structure(
                lambda a: np.concatenate([a, a[:1].repeat(missing, 0)]), inputs
            )
            names = names + [""] * missing
        out = answer(inputs, kept.rows(names))
        if missing:
            out = keras.tree.map_structure(lambda a: a[:-missing], out)
        found.append((out, names))
    return found


def split(batch):
    """The inputs and the names of a batch that has both.

    Args:
        batch: dict with an entry `"adapter"`, or a tuple that begins with one,
            as data for `fit` have it.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Mapping) or "adapter" not in batch:
        raise ValueError(
            "Give `adapters`, one name for each example, or inputs that are a "
            "dict with an entry 'adapter'."
        )
    inputs = dict(batch)
    names = as_array(inputs.pop("adapter")).ravel().tolist()
    return inputs, names


def as_array(values):
    """A NumPy array of an array or a tensor, wherever that is."""
    if keras.ops.is_tensor(values):
        return keras.ops.convert_to_numpy(values)
    return np.asarray(values)


def examples(x):
    """The number of examples of inputs, which is the same for all of them."""
    sizes = {
        int(shape[0]) if (shape := np.shape(a)) else 0
        for a in keras.tree.flatten(x)
    }
    if len(sizes) != 1:
        raise ValueError(
            "All inputs must have the same number of examples. "
            f"Received: {sorted(sizes)}"
        )
    return sizes.pop()
