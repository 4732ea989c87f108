"""The files of a PEFT directory: their names, and what is safe to read."""

import json
import os
import reprlib

import numpy as np

from keras_randadapt.model import paths
from keras_randadapt.model import tensor_data

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEADS = "heads.safetensors"
CARD = "README.md"

#: Configs have some kilobytes.
_MOST_CONFIG_BYTES = 4_000_000

#: The dtypes of safetensors that NumPy has and that adapters come in.
_DTYPES = ("F64", "F32", "F16")
_INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")


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


def write(target, files):
    """Writes the files of an adapter, one after the other.

    Args:
        target: What `check_writable` gave. It is made if it is not there.
        files: dict from the names of files to their bytes.
    """
    os.makedirs(target, exist_ok=True)
    for filename, data in files.items():
        paths.replace(os.path.join(target, filename), data)
    heads = os.path.join(target, HEADS)
    if HEADS not in files and os.path.lexists(heads):
        # It is an earlier adapter's, and `load` would read it.
        os.unlink(heads)


def read_config(directory, name=CONFIG):
    """A config of a directory: a dict.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is too large or no object of JSON.
    """
    path = os.path.join(directory, name)
    _check_file(directory, path)
    with open(path, "rb") as file:
        data = file.read(_MOST_CONFIG_BYTES + 1)
    if len(data) > _MOST_CONFIG_BYTES:
        raise ValueError(
            f"'{path}' has more than {_MOST_CONFIG_BYTES:,} bytes, so it is no "
            "config."
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


def read_header(directory, name=WEIGHTS):
    """The dtypes and shapes of a directory's tensors, which are not read.

    Returns:
        dict from name to `(dtype, shape)`. The dtype is in the words of
        safetensors, such as `"BF16"`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    path = os.path.join(directory, name)
    if name == WEIGHTS and not os.path.exists(path):
        _refuse_pickles(directory)
    _check_file(directory, path)
    with tensor_data.opened(path, "safetensors file") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        return {
            key: (one.get_dtype(), tuple(one.get_shape()))
            for key, one in slices.items()
        }


def read_tensors(directory, name=WEIGHTS, integers=False):
    """The tensors of a directory: float32 arrays by name.

    Args:
        directory: The directory's path.
        name: The file's name.
        integers: Whether integers are read too, in their own dtype.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or of a dtype that has no float32.
    """
    header = read_header(directory, name)
    path = os.path.join(directory, name)
    known = (*_DTYPES, *(_INTEGERS if integers else ()))
    for key, (dtype, _) in header.items():
        if dtype not in (*known, "BF16"):
            raise ValueError(
                f"'{path}' holds '{key}' as {dtype}. Tensors are read in the "
                f"dtypes {[*known, 'BF16']}."
            )
    with tensor_data.opened(path, "safetensors file") as file:
        arrays = {
            key: file.get_tensor(key)
            for key, (dtype, _) in header.items()
            if dtype in known
        }
    halves = _upper_halves(path, [k for k in header if k not in arrays])
    with np.errstate(over="ignore"):
        return {
            key: halves[key] if key in halves else _float32(arrays[key])
            for key in header
        }


def _float32(array):
    return array.astype("float32") if array.dtype.kind == "f" else array


def _upper_halves(path, keys):
    """Tensors in bfloat16, which NumPy lacks, as float32.

    Args:
        path: A file of safetensors that the library has checked.
        keys: The tensors' names.
    """
    if not keys:
        return {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        found = {}
        for key in keys:
            start, end = header[key]["data_offsets"]
            file.seek(8 + length + start)
            # bfloat16 is the upper half of float32.
            upper = np.frombuffer(file.read(end - start), "<u2")
            whole = (upper.astype("<u4") << 16).view("<f4")
            found[key] = whole.reshape(header[key]["shape"])
    return found


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
