"""Tensors as the bytes of a safetensors file."""

import numpy as np
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
