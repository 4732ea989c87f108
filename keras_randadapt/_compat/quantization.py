"""Keras's private API for quantized layers."""

import keras
from keras import ops
from keras.src.quantizers import quantizers

from keras_randadapt._compat.layers import kernel_of
from keras_randadapt._compat.layers import owned_variables

__all__ = [
    "can_dequantize",
    "dequantized_kernel",
    "has_float_kernel",
    "is_calibrated",
    "kernel_shape",
    "paired_quantized_variables",
    "product_variables",
    "quantized_kernel_of",
    "quantized_variables",
    "recorded_layer",
    "unquantized_variables",
]

#: The modes whose kernels Keras rounds with calibration data.
CALIBRATED_MODES = ("gptq", "awq")


def kernel_shape(layer):
    """The unpacked shape of an `EinsumDense` layer's kernel.

    Returns:
        tuple of ints.
    """
    if layer.quantization_mode in ("int4", "gptq", "awq") and hasattr(
        layer, "original_kernel_shape"
    ):
        # Since 3.15 Keras flattens a packed kernel; earlier versions pack
        # along one axis.
        shape = layer.original_kernel_shape
    else:
        shape = list(layer._kernel.shape)
        if layer.quantization_mode == "int4":
            axis = layer._int4_pack_axis
            shape[axis] = layer._orig_length_along_pack_axis
    return tuple(int(n) for n in shape)


_QUANTIZED_VARIABLES = (
    "_kernel",
    "kernel_scale",
    "kernel_zero",
    "_embeddings",
    "embeddings_scale",
    "embeddings_zero",
)


def paired_quantized_variables(layer, twin):
    """The variables of a quantized kernel in two layers of one config.

    The reverse projection of a tied embedding uses the same variables. The
    other variables of an untied one are not included.

    Returns:
        list of pairs of a variable of `layer` and that of `twin`.
    """
    return [
        (getattr(layer, name), getattr(twin, name))
        for name in _QUANTIZED_VARIABLES
        if getattr(twin, name, None) is not None
    ]


def quantized_kernel_of(layer):
    """The variable of a quantized `Dense` or `EinsumDense` layer's kernel.

    In some modes Keras replaces the kernel by one of another name.
    """
    kernel = getattr(layer, "quantized_kernel", None)
    return layer._kernel if kernel is None else kernel


def unquantized_variables(layer):
    """A quantized layer's variables that its float layer has too.

    These are the bias and the factors of Keras's own LoRA, not the kernel.

    Returns:
        list of variables.
    """
    names = (
        "bias",
        "lora_kernel_a",
        "lora_kernel_b",
        "lora_embeddings_a",
        "lora_embeddings_b",
    )
    found = [getattr(layer, name, None) for name in names]
    return [value for value in found if value is not None]


def quantized_variables(layer):
    """The variables by which a quantized embedding computes.

    Returns:
        dict from the attribute's name to a `keras.Variable`.
    """
    names = (
        *_QUANTIZED_VARIABLES,
        "reverse_embeddings",
        "reverse_embeddings_scale",
        "reverse_embeddings_zero",
        "g_idx",
    )
    found = {name: getattr(layer, name, None) for name in names}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, keras.Variable)
    }


def is_calibrated(layer):
    """Whether a layer has a kernel that GPTQ or AWQ rounded.

    Keras gives the mode to layers outside of the calibrated blocks too, and
    these keep and use their float kernels.
    """
    return bool(
        layer.quantization_mode in CALIBRATED_MODES
        and getattr(layer, f"is_{layer.quantization_mode}_calibrated", False)
    )


def has_float_kernel(layer):
    """Whether a layer holds a kernel of floats, whatever its mode.

    In float8 the kernel is rounded in each call, and it is stored as it was.
    """
    kernel = kernel_of(layer)
    return kernel is not None and keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(kernel.dtype)
    )


def can_dequantize(layer):
    """Whether `dequantized_kernel` knows the layout of a layer's kernel.

    Before 3.15 Keras packs int4 kernels in another way.
    """
    if not isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):
        return False
    if layer.quantization_mode != "int4":
        return layer.quantization_mode is not None
    return _columns(layer) is not None


def dequantized_kernel(layer):
    """The kernel by which a quantized layer multiplies, as floats.

    It takes the same steps as Keras's product. `can_dequantize` must be true.

    Args:
        layer: A quantized `Dense` or `EinsumDense` layer, with or without
            adapters. Its attributes may hold tensors instead of variables.

    Returns:
        Tensor of the unpacked kernel's shape.
    """
    mode, dtype = layer.quantization_mode, layer.compute_dtype
    if mode == "float8":
        return keras.quantizers.quantize_and_dequantize(
            ops.convert_to_tensor(layer._kernel),
            ops.convert_to_tensor(layer.kernel_scale),
            "float8_e4m3fn",
            dtype,
        )
    if mode in CALIBRATED_MODES:
        if not is_calibrated(layer):
            return ops.convert_to_tensor(layer._kernel)
        return _of_groups(layer, mode)
    scale = ops.convert_to_tensor(layer.kernel_scale)
    if mode == "int8":
        if isinstance(layer, keras.layers.EinsumDense):
            scale = layer._adjust_scale_for_dequant(scale)
        return ops.divide(ops.cast(layer._kernel, dtype), scale)
    integers = keras.quantizers.unpack_int4(
        ops.convert_to_tensor(layer._kernel), _columns(layer), axis=-1
    )
    if getattr(layer, "kernel_zero", None) is None:
        kernel = ops.divide(ops.cast(integers, dtype), scale)
    else:
        kernel = quantizers.dequantize_with_sz_map(
            integers, scale, layer.kernel_zero, layer.g_idx, group_axis=0
        )
        kernel = ops.cast(kernel, dtype)
    return ops.reshape(kernel, _shape(layer, kernel))


def _of_groups(layer, mode):
    integers = ops.convert_to_tensor(layer.quantized_kernel)
    columns = layer.kernel_scale.shape[0]
    if integers.shape[0] != columns:
        integers = keras.quantizers.unpack_int4(
            integers, columns, axis=0, dtype="uint8"
        )
    kernel = ops.transpose(
        quantizers.dequantize_with_sz_map(
            integers, layer.kernel_scale, layer.kernel_zero, layer.g_idx
        )
    )
    if mode == "awq":
        kernel = ops.divide(kernel, ops.expand_dims(layer.awq_scales, -1))
    return ops.reshape(kernel, _shape(layer, kernel))


def _columns(layer):
    """The unpacked length of an int4 kernel's last axis, or `None`."""
    if isinstance(layer, keras.layers.EinsumDense):
        return getattr(layer, "_int4_unpacked_column_size", None)
    if layer._kernel.shape[0] != layer.input_spec.axes[-1]:
        return None
    return getattr(layer, "_orig_output_dim", None)


def _shape(layer, kernel):
    if isinstance(layer, keras.layers.EinsumDense):
        return kernel_shape(layer)
    return kernel.shape


_PRODUCT_VARIABLES = (
    "_kernel",
    "quantized_kernel",
    "kernel_scale",
    "kernel_zero",
    "g_idx",
    "awq_scales",
    "inputs_scale",
    "inputs_amax_history",
    "kernel_amax_history",
    "outputs_grad_scale",
    "outputs_grad_amax_history",
)


def product_variables(layer):
    """The variables by which a quantized `Dense` or `EinsumDense` multiplies.

    Returns:
        dict from the attribute's name to a `keras.Variable`.
    """
    found = {name: vars(layer).get(name) for name in _PRODUCT_VARIABLES}
    if is_calibrated(layer):
        found.pop("_kernel")
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, keras.Variable)
    }


def recorded_layer(layer):
    """A function that gives a layer what `quantize` takes from it.

    Args:
        layer: A built layer that is not quantized.

    Returns:
        Function without arguments. It may be called more than once.
    """
    attributes = dict(vars(layer))
    lists = {
        name: list(getattr(layer, name))
        for name in ("_trainable_variables", "_non_trainable_variables")
    }
    # Lists and dicts that Keras or the backend changes in place.
    contents = {
        name: value.copy()
        for name, value in attributes.items()
        if type(value) in (list, dict)
    }
    flags = [
        (variable, variable.trainable) for variable in owned_variables(layer)
    ]

    def restore():
        own = vars(layer)
        for name in own.keys() - attributes.keys():
            del own[name]
        own.update(attributes)
        for name, content in contents.items():
            if isinstance(content, list):
                own[name][:] = content
            else:
                own[name].clear()
                own[name].update(content)
        for name, variables in lists.items():
            _restore_list(layer, name, variables)
        for variable, flag in flags:
            variable.trainable = flag
        layer._tracker.lock()

    return restore


def _restore_list(layer, name, variables):
    kept = getattr(layer, name)
    kept[:] = variables
    layer._tracker.stored_ids[name.lstrip("_")] = {id(v) for v in variables}
