"""Models in every quantization that Keras has, without its calibration.

Keras's GPTQ and AWQ take minutes on a model of a few numbers. The layers here
are left as they leave them: their product is Keras's own.
"""

import keras
import numpy as np

from tests import zoo

VOCABULARY, DIM, LENGTH = 17, 8, 6

#: The modes; int4 in blocks has one scale for four rows.
MODES = ("int8", "int4", "int4 blocks", "float8", "gptq", "gptq 8", "awq")

#: The names of the layers that are quantized, by which the model can learn.
SITES = ("query", "up", "down")

_CONFIGS = {
    "int4 blocks": "Int4QuantizationConfig",
    "gptq": "GPTQConfig",
    "awq": "AWQConfig",
}


def has(mode):
    """Whether the installed Keras has a mode."""
    name = _CONFIGS.get(mode.removesuffix(" 8"))
    return name is None or hasattr(keras.quantizers, name)


def model():
    """A model of ids with one EinsumDense and two Dense layers, and a head."""
    ids = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, DIM, name="embedding")(ids)
    x = keras.layers.EinsumDense(
        "abc,cde->abde", (None, 2, 5), bias_axes="de", name="query"
    )(x)
    x = keras.layers.Reshape((LENGTH, 10))(x)
    x = keras.layers.Dense(12, activation="tanh", name="up")(x)
    x = keras.layers.Dense(7, name="down")(x)
    head = keras.layers.Dense(VOCABULARY, name="head")
    return zoo.set_weights(keras.Model(ids, head(x)))


def quantized(mode, names=SITES):
    """A quantized `model()`. Layers with other names stay floats."""
    made = model()
    for name in names:
        quantize(made.get_layer(name), mode)
    if keras.config.backend() == "torch":
        made._post_quantize(mode)
    return made


def quantize(layer, mode):
    """Quantizes a layer to a mode of `MODES`."""
    if mode == "int4 blocks":
        config = keras.quantizers.Int4QuantizationConfig(block_size=4)
        layer.quantize(config=config)
    elif mode.startswith(("gptq", "awq")):
        _calibrate(layer, mode.partition(" ")[0], 8 if " 8" in mode else 4)
    else:
        layer.quantize(mode)


def _calibrate(layer, mode, bits):
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    cls = getattr(keras.quantizers, _CONFIGS[mode])
    layer.quantize(
        mode,
        config=cls(
            dataset=["a"], tokenizer=str, weight_bits=bits, group_size=4
        ),
    )
    columns, groups = layer.kernel_scale.shape
    rows = kernel.size // columns
    matrix = kernel.reshape(rows, columns).T
    generator = np.random.default_rng(rows)
    # Rows that matter most come first in GPTQ's groups.
    group = generator.permutation(np.arange(rows) // 4)
    scales = np.ones(rows, "float32")
    if mode == "awq":
        scales = generator.uniform(0.5, 2.0, rows).astype("float32")
        layer.awq_scales.assign(scales)
        matrix = matrix * scales
    integers = np.zeros(matrix.shape)
    for g in range(groups):
        part = matrix[:, group == g]
        low = np.minimum(part.min(1, keepdims=True), 0)
        high = np.maximum(part.max(1, keepdims=True), 0)
        scale = (high - low) / (2**bits - 1)
        zero = np.round(-low / scale)
        found = np.clip(np.round(part / scale) + zero, 0, 2**bits - 1)
        integers[:, group == g] = found
        _set_column(layer.kernel_scale, g, scale)
        _set_column(layer.kernel_zero, g, zero)
    packed = integers.astype("uint8")
    if bits == 4:
        packed = keras.quantizers.pack_int4(packed, axis=0, dtype="uint8")[0]
    layer.quantized_kernel.assign(packed)
    layer.g_idx.assign(group.astype("float32"))
    del layer._kernel
    setattr(layer, f"is_{mode}_calibrated", True)
    # Keras's calibration leaves the method behind as an attribute.
    layer.call = layer.call


def _set_column(variable, column, values):
    found = np.array(keras.ops.convert_to_numpy(variable))
    found[:, column] = values[:, 0]
    variable.assign(found)


def ids(count=8, seed=0):
    """Inputs of the model: `(count, LENGTH)`."""
    return zoo.integers(count, LENGTH, high=VOCABULARY, seed=seed)
