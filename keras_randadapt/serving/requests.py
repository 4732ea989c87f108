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


def check_count(adapters, count):
    if not count:
        raise ValueError("There is no example to compute anything for.")
    if len(adapters) != count:
        raise ValueError(
            "`adapters` must have a name for each example. Received: "
            f"{len(adapters)} names for {count} examples."
        )
