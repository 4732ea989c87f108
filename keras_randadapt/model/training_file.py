"""The file from which an interrupted training goes on.

It is one safetensors file, written as a whole. It has an adapter file for each
adapter that is trained, the variables of the optimizer, the states of random
generators and step counters, and in its metadata whatever the callback has to
know. It is a few times as large as the adapter files.
"""

import json
import reprlib

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.model import file_format
from keras_randadapt.model import paths
from keras_randadapt.model import save as save_lib
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import tensor_data

VERSION = 1
_KEY = file_format.TRAINING_KEY


def write(model, target, told):
    """Writes the state of a training.

    Args:
        model: An adapted, compiled model.
        target: What `paths.check_writable` gave.
        told: dict of JSON values for `read` to give back.
    """
    _compat.sync_jax_state(model)
    state = state_lib.state_of(model)
    tensors = {
        f"adapter/{name}": np.frombuffer(save_lib.file_of(model, name), "uint8")
        for name in state.trained
    }
    names = {}
    for group, variables in _groups(model).items():
        names[group] = [_named(variable) for variable in variables]
        for i, variable in enumerate(variables):
            tensors[f"{group}/{i}"] = _stored(variable)
    metadata = {
        "version": VERSION,
        "backend": keras.config.backend(),
        "variables": names,
        "told": told,
    }
    text = json.dumps(metadata, sort_keys=True)
    data = tensor_data.data_of(tensors, {_KEY: text})
    paths.replace(target, data)


def read(filepath):
    """What a file has: adapter files by name, tensors and metadata.

    Raises:
        ValueError: If the file is damaged or no such file.
    """
    with tensor_data.opened(filepath, "training file") as file:
        text = (file.metadata() or {}).get(_KEY)
        if text is None:
            raise ValueError(
                f"'{filepath}' is no file that `AdapterCheckpoint` wrote "
                "to resume a training from."
            )
        metadata = json.loads(text)
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    version = metadata.get("version") if isinstance(metadata, dict) else None
    if version != VERSION:
        raise ValueError(
            f"'{filepath}' has version {reprlib.repr(version)}; this release "
            f"of keras_randadapt reads version {VERSION}."
        )
    adapters = {
        key.removeprefix("adapter/"): tensor.tobytes()
        for key, tensor in tensors.items()
        if key.startswith("adapter/")
    }
    return adapters, tensors, metadata


def check(filepath, model, tensors, metadata):
    """Raises `ValueError` if a file's variables are not those of a model."""
    if metadata["backend"] != keras.config.backend():
        raise ValueError(
            f"'{filepath}' was written on {metadata['backend']}, and its "
            "optimizer and random generators go on only there. Load the "
            "adapter file on this backend instead."
        )
    for group, variables in _groups(model).items():
        theirs = metadata["variables"].get(group, [])
        ours = [_named(variable) for variable in variables]
        if theirs == ours:
            continue
        if len(theirs) != len(ours):
            words = f"{len(theirs)} of them, and this training has {len(ours)}"
        else:
            i = next(i for i, pair in enumerate(zip(theirs, ours)) if _no(pair))
            words = f"{theirs[i]} where this training has {ours[i]}"
        raise ValueError(
            f"'{filepath}' is of another training: in the {_WORDS[group]} it "
            f"has {words}. Make and compile the model as before."
        )
    for group, variables in _groups(model).items():
        for i, variable in enumerate(variables):
            if f"{group}/{i}" not in tensors:
                raise ValueError(f"'{filepath}' is damaged: '{group}/{i}'.")


def restore(change, tensors):
    """Gives a model's optimizer and generators the values of a file.

    Args:
        change: A `transaction.Change`.
        tensors: What `read` gave, after `check`.
    """
    for group, variables in _groups(change.model).items():
        for i, variable in enumerate(variables):
            change.assign(
                variable, _restored(tensors[f"{group}/{i}"], variable)
            )


_WORDS = {
    "optimizer": "optimizer's variables",
    "random": "random generators and counters",
}


def _groups(model):
    """The variables that no adapter file has, by the name of their group."""
    optimizer = getattr(model, "optimizer", None)
    told = {id(v) for v in model.weights} | {
        id(v) for metric in model.metrics for v in metric.variables
    }
    random = [v for v in model.variables if id(v) not in told]
    random += model._randadapt.step_counters()
    return {
        "optimizer": [] if optimizer is None else list(optimizer.variables),
        "random": random,
    }


def _named(variable):
    """What tells a variable from others; automatic numbers do not."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return [dtype, list(variable.shape)]


def _no(pair):
    return pair[0] != pair[1]


def _stored(variable):
    array = np.asarray(keras.ops.convert_to_numpy(variable))
    if array.dtype.name == "bfloat16":
        # NumPy's own dtypes lack it.
        return array.view("uint16")
    return array.copy(order="C")


def _restored(array, variable):
    if keras.backend.standardize_dtype(variable.dtype) == "bfloat16":
        # The bits are the upper half of those of a float32.
        return (array.astype("uint32") << 16).view("float32")
    return array
