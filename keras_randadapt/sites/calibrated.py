"""Floats rounded to the grids of GPTQ and AWQ, without calibration data.

The grid of Keras's kernels is `scale * (integer - zero)`, with a scale and a
zero for each output and each group of inputs; AWQ then divides each input's row
by a factor. The calibration of Keras chooses integers by what they do to the
outputs for its data. Here the nearest integers are taken.
"""

import keras
import numpy as np


def rounded(site, view):
    """A kernel view rounded anew, with fresh scales and zeros.

    Args:
        site: A site whose kernel GPTQ or AWQ rounded.
        view: float NumPy array `(input_dim, output_dim)`, in the order of the
            layer's flattened kernel.

    Returns:
        list of pairs of a variable of the site and its new value.
    """
    matrix = np.asarray(view, "float64").T
    bits = getattr(site.dtype_policy, "weight_bits", 4)
    most = 2**bits - 1
    if site.quantization_mode == "awq":
        matrix = matrix * _numpy(site.awq_scales)
    group_of = _numpy(site.g_idx).astype("int64")
    shape = tuple(site.kernel_scale.shape)
    scale, zero = np.ones(shape), np.zeros(shape)
    integers = np.zeros(matrix.shape)
    for group in np.unique(group_of):
        rows = group_of == group
        part = matrix[:, rows]
        # The grid must have a zero, which padding and masks need.
        low = np.minimum(part.min(axis=1), 0.0)
        high = np.maximum(part.max(axis=1), 0.0)
        step = np.where(high > low, (high - low) / most, 1.0)
        scale[:, group] = step
        zero[:, group] = np.round(-low / step)
        found = np.round(part / step[:, None]) + zero[:, group][:, None]
        integers[:, rows] = np.clip(found, 0, most)
    integers = integers.astype("uint8")
    if integers.shape[0] != site.quantized_kernel.shape[0]:
        integers = keras.ops.convert_to_numpy(
            keras.quantizers.pack_int4(integers, axis=0, dtype="uint8")[0]
        )
    return [
        (site.quantized_kernel, integers),
        (site.kernel_scale, scale.astype("float32")),
        (site.kernel_zero, zero.astype("uint8")),
    ]


def _numpy(variable):
    return keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))
