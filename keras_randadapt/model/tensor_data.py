"""Tensors as the bytes of a safetensors file, and such files."""

import contextlib
import json

import numpy as np
import safetensors
import safetensors.numpy


def data_of(tensors, metadata):
    """The bytes of a safetensors file.

    Args:
        tensors: dict from name to NumPy array.
        metadata: dict of strings.
    """
    return safetensors.numpy.save(in_order(tensors), metadata=metadata)


def write(path, tensors, metadata):
    """Writes a safetensors file that is too large to be held twice."""
    safetensors.numpy.save_file(in_order(tensors), path, metadata=metadata)


def in_order(tensors):
    """The same tensors, with their numbers in the order of the file.

    The library writes the memory of an array whatever its strides are, so that
    a transposed one would come back with its numbers mixed.
    """
    # `ascontiguousarray` would make a vector of a scalar.
    return {key: np.asarray(one, order="C") for key, one in tensors.items()}


@contextlib.contextmanager
def opened(path, kind):
    """A file of safetensors, to read its metadata and tensors in a block.

    Args:
        path: string.
        kind: What the file should be, such as `"adapter file"`.

    Raises:
        ValueError: If the file is no such file or is damaged, or if JSON that
            is read in the block is.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            yield file
    except (
        safetensors.SafetensorError,
        json.JSONDecodeError,
        # JSON that is nested a thousand deep.
        RecursionError,
    ) as error:
        raise ValueError(
            f"'{path}' is no {kind}, or is damaged or cut short: {error}"
        ) from error
