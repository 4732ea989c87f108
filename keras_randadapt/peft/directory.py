"""The files of a PEFT directory: their names, and what is safe to read."""

import json
import os
import reprlib

import numpy as np
import safetensors

from keras_randadapt.model import paths

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEADS = "heads.safetensors"
CARD = "README.md"

#: Configs have some kilobytes.
_MOST_CONFIG_BYTES = 4_000_000

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


def check_path(directory):
    """The path of a directory as a string.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is empty or holds a null character.
    """
    try:
        path = os.fsdecode(directory)
    except TypeError as error:
        raise TypeError(
            "`directory` must be a string or a path. "
            f"Received: directory={directory!r} (of type "
            f"{type(directory).__name__})"
        ) from error
    if not path or "\0" in path:
        raise ValueError(
            f"`directory` must name a directory. Received: "
            f"directory={directory!r}"
        )
    return path


def check_writable(directory):
    """Validates a directory to write to, which need not be there.

    Returns:
        Its path, with symbolic links resolved.

    Raises:
        ValueError: If it, or one of the files to write, is something else.
        FileNotFoundError: If there is no folder for it.
    """
    path = os.path.realpath(check_path(directory))
    if os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(
            f"'{path}' is no directory, and an adapter of PEFT is one. "
            f"Received: directory={str(directory)!r}"
        )
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        raise FileNotFoundError(
            f"There is no folder '{parent}' to put the directory into. "
            f"Received: directory={str(directory)!r}"
        )
    for name in (CONFIG, WEIGHTS, HEADS, CARD):
        file = os.path.join(path, name)
        if os.path.lexists(file) and not os.path.isfile(file):
            raise ValueError(
                f"'{file}' is a folder, a pipe or a device, and no file can "
                "take its place."
            )
    return path


def read_config(directory):
    """The config of a directory: a dict.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is too large or no object of JSON.
    """
    path = os.path.join(directory, CONFIG)
    _check_file(directory, path)
    with open(path, "rb") as file:
        data = file.read(_MOST_CONFIG_BYTES + 1)
    if len(data) > _MOST_CONFIG_BYTES:
        raise ValueError(
            f"'{path}' has more than {_MOST_CONFIG_BYTES:,} bytes, so it is no "
            "config of PEFT."
        )
    try:
        config = json.loads(data)
    except (
        ValueError,
        # An object that is nested a thousand deep.
        RecursionError,
    ) as error:
        raise ValueError(f"'{path}' is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"'{path}' must hold an object. Received: {reprlib.repr(config)}"
        )
    return config


def read_tensors(directory, name=WEIGHTS):
    """The tensors of a directory: float32 arrays by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or of a dtype that has no float32.
    """
    path = os.path.join(directory, name)
    if name == WEIGHTS and not os.path.exists(path):
        _refuse_pickles(directory)
    _check_file(directory, path)
    # The library checks sizes and offsets against the file before anything is
    # allocated.
    try:
        with open(path, "rb") as file:
            data = file.read()
        parsed = safetensors.deserialize(data)
    except (safetensors.SafetensorError, RecursionError) as error:
        raise ValueError(
            f"'{path}' is no safetensors file, or is damaged or cut short: "
            f"{error}"
        ) from error
    return {
        key: _array(path, key, one["dtype"], one["shape"], one["data"])
        for key, one in parsed
    }


def _array(path, key, dtype, shape, data):
    if dtype not in _DTYPES:
        raise ValueError(
            f"'{path}' holds '{key}' as {dtype}. Adapters are read in the "
            "dtypes F64, F32, F16 and BF16."
        )
    array = np.frombuffer(bytes(data), _DTYPES[dtype]).reshape(shape)
    if dtype == "BF16":
        # NumPy has no bfloat16, which is the upper half of float32.
        return (array.astype("<u4") << 16).view("<f4")
    with np.errstate(over="ignore"):
        return array.astype("float32")


def _refuse_pickles(directory):
    if os.path.exists(os.path.join(directory, "adapter_model.bin")):
        raise ValueError(
            f"'{directory}' has its weights in 'adapter_model.bin', a pickle, "
            "which could run code when it is read. Save the adapter again with "
            "PEFT's `save_pretrained(..., safe_serialization=True)`."
        )


def _check_file(directory, path):
    if not os.path.isdir(directory):
        if os.path.exists(directory):
            raise ValueError(
                f"'{directory}' is no directory; give the directory that has "
                f"'{CONFIG}'."
            )
        raise FileNotFoundError(f"There is no directory '{directory}'.")
    paths.check_readable(path)
