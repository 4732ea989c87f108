"""Quantized base kernels as floats, and floats quantized like a site's."""

import math

import keras
from keras import ops

from keras_randadapt import _compat
from keras_randadapt.sites import calibrated
from keras_randadapt.sites import straight_through
from keras_randadapt.sites import supported


def float_kernel(site):
    """A site's base kernel as floats, dequantized if it is quantized."""
    if site.quantization_mode is None:
        return supported.kernel_variable(site)
    return dequantized_kernel(site)


def dequantized_kernel(site):
    """A quantized site's base kernel as floats, in the unpacked shape.

    Where the library does not know the layout, it is computed as the layer's
    product with unit vectors. It is the kernel that the layer computes with,
    for every version of Keras and its way of packing and scaling.
    """
    if _compat.can_dequantize(site):
        return _compat.dequantized_kernel(site)
    view = site.kernel_view
    if isinstance(site, keras.layers.Embedding):
        return site._site_base.quantized_call(site, ops.arange(view.input_dim))
    units = ops.eye(view.input_dim, dtype=site.compute_dtype)
    return site.from_view(site.multiply(units))


def requantized(site, kernel):
    """A float kernel, quantized like the site's own kernel.

    Args:
        site: An adapted layer that is quantized.
        kernel: Tensor of the unpacked kernel's shape.

    Returns:
        list of pairs of a variable of the site and its new value.
    """
    if _compat.has_float_kernel(site):
        # Keras rounds it in each call.
        return [(supported.kernel_variable(site), kernel)]
    if _compat.is_calibrated(site):
        rows = _numpy(site.g_idx).size
        return calibrated.rounded(site, _numpy(kernel).reshape(rows, -1))
    mode, _, source = site.dtype_policy.name.partition("_from_")
    config = site._site_base.get_config(site)
    twin = site._site_base.from_config({**config, "dtype": source})
    twin.build_from_config(site.get_build_config())
    supported.kernel_variable(twin).assign(kernel)
    arguments = {}
    if getattr(site, "quantization_config", None) is not None:
        arguments["config"] = site.quantization_config
    twin.quantize(mode.partition("/")[0], type_check=False, **arguments)
    return _compat.paired_quantized_variables(site, twin)


def after_rounding(site, kernel):
    """The float kernel that a site would have with `requantized` values.

    Args:
        site: An adapted layer whose kernel GPTQ or AWQ rounded.
        kernel: Tensor of the unpacked kernel's shape.

    Returns:
        float32 NumPy array of the unpacked kernel's shape.
    """
    values = requantized(site, kernel)
    names = _compat.product_variables(site)
    held = {
        name: ops.convert_to_tensor(value, variable.dtype)
        for name, one in names.items()
        for variable, value in values
        if one is variable
    }
    with straight_through.QUANTIZED_CALL_LOCK:
        with _compat.instance_attributes(site, **held):
            return _numpy(_compat.dequantized_kernel(site))


def _numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def float_sizes(layer):
    """The sizes in the float model of a quantized layer's own variables.

    Args:
        layer: Any layer, with or without adapters.

    Returns:
        dict from the `id` of a variable to the number of weights that it
        stands for: for a quantized kernel those of the float kernel, and 0
        for scales and the like, which no float model has. It is empty for
        layers that are not quantized and for classes without a known kernel.
    """
    if getattr(layer, "quantization_mode", None) is None:
        return {}
    kernels = _kernels(layer)
    if not kernels:
        return {}
    plain = _compat.unquantized_variables(layer)
    sizes = {
        id(variable): 0
        for variable in _compat.owned_variables(layer)
        if not any(variable is one for one in plain)
    }
    for variable, shape in kernels:
        sizes[id(variable)] = math.prod(shape)
    return sizes


def _kernels(layer):
    """`(variable, float shape)` pairs of a quantized layer's kernels."""
    if isinstance(layer, keras.layers.Embedding):
        shape = (layer.input_dim, layer.output_dim)
        kernels = [(_compat.kernel_of(layer), shape)]
        if not getattr(layer, "tie_weights", True):
            kernels.append((layer.reverse_embeddings, shape))
        return kernels
    if isinstance(layer, keras.layers.Dense):
        shape = (int(layer.input_spec.axes[-1]), layer.units)
    elif isinstance(layer, keras.layers.EinsumDense):
        shape = _compat.kernel_shape(layer)
    else:
        return []
    return [(_compat.quantized_kernel_of(layer), shape)]
