"""Fingerprints of base kernels: sixteen numbers that tell weights apart.

An adapter is trained on one base model. Other base weights of the same shapes
would take its file, and some methods would then give a wrong kernel. A file
therefore has a fingerprint of the kernel of each site.

With `R` and `C` of four rows and four columns of random signs, the fingerprint
of a kernel view `W` is the sixteen numbers of `R W C`. Their expected sum of
squares is sixteen times that of the kernel, so the relative distance of two
fingerprints estimates that of the kernels. Rounding to 16 bits or to integers
moves it a little, and other weights move it by about the square root of two.
"""

import hashlib

import keras
import numpy as np

from keras_randadapt import random
from keras_randadapt.sites import quantized
from keras_randadapt.sites import supported

#: The numbers of one fingerprint.
SIZE = 16

_SIDE = 4

# Rows of a kernel that are taken at a time, which bounds the memory.
_ROWS = 4096

#: The relative distance up to which two kernels may be copies of the same
#: weights, by the precision of the less precise one. A copy in float32 may
#: have been stored in 16 bits, which moves it by 0.002.
_TOLERANCES = {
    "int8": 0.1,
    "int4": 0.7,
    "float8": 0.2,
    "gptq": 0.7,
    "awq": 0.7,
}
_TOLERANCE = 0.01


def precision(layer):
    """The precision of a site's base kernel: a mode or a dtype."""
    mode = getattr(layer, "quantization_mode", None)
    if mode is not None:
        return mode
    kernel = supported.kernel_variable(layer)
    if kernel is None:
        return "none"
    return keras.backend.standardize_dtype(kernel.dtype)


def of_site(layer):
    """The fingerprint of a site's base kernel.

    Args:
        layer: A layer with adapters.

    Returns:
        float32 NumPy array of 16 numbers. They are zeros for a normalization,
        which has no kernel.
    """
    if supported.kernel_variable(layer) is None:
        return np.zeros(SIZE, "float32")
    kernel = keras.ops.convert_to_numpy(
        keras.ops.cast(quantized.float_kernel(layer), "float32")
    )
    view = keras.ops.convert_to_numpy(layer.to_view(kernel))
    return of_kernel(view)


def of_kernel(view):
    """The fingerprint of a kernel view.

    Args:
        view: NumPy array `(input_dim, output_dim)`, or several such kernels
            stacked, which are then one below the other.

    Returns:
        See `of_site`.
    """
    view = view.reshape(-1, view.shape[-1])
    rows, columns = view.shape
    left = random.signs(0, "fingerprint rows", (_SIDE, rows))
    right = random.signs(0, "fingerprint columns", (columns, _SIDE))
    left, right = left.astype("float64"), right.astype("float64")
    total = np.zeros((_SIDE, _SIDE))
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        # In float64 the order of a sum is lost in the rounding at the end, so
        # every backend writes the same numbers.
        total += left[:, part] @ (view[part].astype("float64") @ right)
    return total.astype("float32").ravel()


def of_sites(layers, addresses):
    """The fingerprints of several sites: float32 `(len(addresses), 16)`."""
    found = [of_site(layers[address]) for address in addresses]
    return np.stack(found) if found else np.zeros((0, SIZE), "float32")


def digest(fingerprints):
    """A short text that is equal for equal fingerprints.

    Args:
        fingerprints: float32 array `(sites, 16)`.
    """
    data = np.ascontiguousarray(fingerprints, "<f4").tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def differing(ours, theirs, precisions):
    """The sites whose kernels are no copies of the same weights.

    Args:
        ours: float32 array `(sites, 16)`.
        theirs: Another one.
        precisions: list of pairs of names; see `precision`.

    Returns:
        list of pairs of a site's number and the relative distance.
    """
    found = []
    for i, names in enumerate(precisions):
        a, b = ours[i].astype("float64"), theirs[i].astype("float64")
        size = max(np.linalg.norm(a), np.linalg.norm(b))
        distance = np.linalg.norm(a - b) / size if size else 0.0
        allowed = max(_TOLERANCES.get(name, _TOLERANCE) for name in names)
        # A distance that is no number is not allowed either.
        if not distance <= allowed:
            found.append((i, float(distance)))
    return found
