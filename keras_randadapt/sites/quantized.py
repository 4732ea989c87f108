"""Quantized base kernels as floats, and floats quantized like a site's."""

import keras
from keras import ops

from keras_randadapt import _compat
from keras_randadapt.sites import supported


def float_kernel(site):
    """A site's base kernel as floats, dequantized if it is quantized."""
    if site.quantization_mode is None:
        return supported.kernel_variable(site)
    return dequantized_kernel(site)


def dequantized_kernel(site):
    """A quantized site's base kernel as floats, in the unpacked shape.

    It is computed as the layer's product with unit vectors. It is therefore
    the kernel that the layer computes with, for every version of Keras and its
    way of packing and scaling.
    """
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
