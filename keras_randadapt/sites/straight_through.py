"""Gradients through quantized layers that round their inputs.

Keras's quantized `Dense` and `EinsumDense` layers carry the gradient past the
rounding of their inputs, and the reverse product of a quantized
`ReversibleEmbedding` stops it: adapters below such a head would never learn.
While a model is adapted, its layers of this kind therefore have a class that
carries the gradient too. The values are Keras's own.
"""

import functools
import threading

import keras
from keras import ops

from keras_randadapt import _compat
from keras_randadapt.ops import with_gradient

#: A quantized product sets the layer's bias and activation aside during a call,
#: and two threads must not see each other's changes.
QUANTIZED_CALL_LOCK = threading.RLock()


class CarriesGradient:
    """A mixin for quantized `ReversibleEmbedding` layers that are no sites."""

    _site_base = None

    @classmethod
    def from_config(cls, config):
        return cls._site_base.from_config(config)

    def quantized_call(self, inputs, reverse=False):
        with QUANTIZED_CALL_LOCK:
            if not reverse:
                return self._site_base.quantized_call(self, inputs)
            logits = reverse_product(self, inputs)
        return soft_capped(self, logits)


def carrying_class(base):
    """The class of a layer of class `base` that carries the gradient.

    It keeps the name and the module, as the class of a site does.
    """
    return _carrying_class(base)


def stops_gradient(layer):
    """Whether the quantized reverse product of a layer stops the gradient."""
    return isinstance(
        layer, keras.layers.ReversibleEmbedding
    ) and layer.quantization_mode in ("int8", "int4")


def reverse_product(layer, inputs):
    """The quantized logits before the soft cap, with a gradient for `inputs`.

    The gradient is straight through the rounding of the inputs: that of a
    product with the dequantized kernel.

    Args:
        layer: A quantized `ReversibleEmbedding` of a class with `_site_base`.
        inputs: Tensor `(..., output_dim)`.

    Returns:
        Tensor `(..., input_dim)`.
    """
    inputs = ops.convert_to_tensor(inputs)
    variables = _compat.quantized_variables(layer)
    dtype = inputs.dtype

    def call(values, *args, **kwargs):
        # The backward pass runs later, when the variables may have other
        # values, or no values in JAX.
        held = dict(zip(variables, values, strict=True))
        with QUANTIZED_CALL_LOCK:
            with _compat.instance_attributes(
                layer, logit_soft_cap=None, **held
            ):
                return layer._site_base.quantized_call(layer, *args, **kwargs)

    def forward(x, *values):
        return call(values, x, reverse=True)

    def backward(values, upstream):
        if layer.tie_weights:
            rows = call(values, ops.arange(layer.input_dim))
        else:
            units = ops.eye(layer.output_dim, dtype=layer.compute_dtype)
            rows = ops.transpose(call(values, units, reverse=True))
        rows = ops.cast(rows, upstream.dtype)
        of_inputs = ops.cast(ops.matmul(upstream, rows), dtype)
        return of_inputs, *[None for _ in values]

    values = [ops.convert_to_tensor(one) for one in variables.values()]
    return with_gradient(forward, backward, inputs, *values, drop=1)


def soft_capped(layer, logits):
    """The logits after the layer's soft cap, if it has one."""
    cap = layer.logit_soft_cap
    if cap is None:
        return logits
    return ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)


@functools.lru_cache(maxsize=None)
def _carrying_class(base):
    return type(
        base.__name__,
        (CarriesGradient, base),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_site_base": base,
        },
    )
