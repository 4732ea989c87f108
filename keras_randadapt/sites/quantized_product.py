"""The products of quantized `Dense` and `EinsumDense` layers.

The values are Keras's own. In the backward pass Keras's integer modes keep the
unpacked kernel, and GPTQ, AWQ and float8 keep the kernel as floats: a model
that trains would hold several times the bytes that its quantization saves. The
backward pass here unpacks the kernel again. In float8 Keras also rounds the
gradient, with scales that only a base in training moves; here the gradient goes
straight through.
"""

from keras import ops

from keras_randadapt import _compat
from keras_randadapt.ops import fence
from keras_randadapt.ops import with_gradient
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.sites.straight_through import QUANTIZED_CALL_LOCK


def base_product(site, x):
    """The product of a quantized site before bias and activation.

    Args:
        site: A quantized site that is one matrix product.
        x: The layer's input.

    Returns:
        Tensor, the product with the quantized kernel.
    """
    if not _compat.can_dequantize(site):
        return _call(site, {}, x)
    variables = _compat.product_variables(site)

    def held(values):
        # The backward pass runs later, when the variables may have other
        # values, or no values in JAX.
        return dict(zip(variables, values, strict=True))

    def forward(rows, *values):
        y = _call(site, held(values), site.unflatten_input(rows, x))
        return site.flatten_output(y)

    def backward(values, upstream):
        values = fence(upstream, *values)
        with QUANTIZED_CALL_LOCK:
            with _compat.instance_attributes(site, **held(values)):
                kernel = _compat.dequantized_kernel(site)
        view = ops.cast(site.to_view(kernel), upstream.dtype)
        of_rows = matmul(upstream, ops.transpose(view))
        return of_rows, *[None for _ in values]

    values = [ops.convert_to_tensor(one) for one in variables.values()]
    rows = site.flatten_input(x)
    columns = with_gradient(forward, backward, rows, *values, drop=1)
    return site.unflatten_output(columns, x)


def bias_as_added(site, bias):
    """A bias as the layer adds it: Keras's float8 product rounds it."""
    if site.quantization_mode == "float8" and site.compute_dtype == "float32":
        return ops.cast(bias, "bfloat16")
    return bias


def _call(site, held, x):
    own = site._site_base.quantized_call
    plain = {"bias": None, "activation": None}
    with QUANTIZED_CALL_LOCK:
        with _compat.instance_attributes(site, **plain, **held):
            return own(site, x)
