"""Adapted convolutions."""

import numpy as np
from keras import ops

from keras_randadapt import _compat
from keras_randadapt.ops.fast_products import reshape
from keras_randadapt.sites.kernel_view import KernelView
from keras_randadapt.sites.layer import AdaptedLayer
from keras_randadapt.sites.layer import as_float
from keras_randadapt.sites.layer import kernel_space_product
from keras_randadapt.sites.layer import shown_bias


class AdaptedConv(AdaptedLayer):
    """A convolution, which may be grouped or dilated.

    The kernel view of a kernel `(*window, channels / groups, filters)` is
    `(prod(window) * channels / groups, filters)`. The delta is formed and
    convolved. It is small beside the activations, and Keras's own convolution
    handles strides, padding, dilation and groups.
    """

    kind = "convolution"

    @property
    def kernel(self):
        return self._merged_or_base(super().kernel)

    bias = shown_bias("bias")

    @property
    def kernel_view(self):
        *window, filters = _compat.kernel_of(self).shape
        return KernelView(int(np.prod(window)), int(filters))

    def to_view(self, kernel):
        return ops.reshape(kernel, AdaptedConv.kernel_view.fget(self))

    def from_view(self, view):
        return ops.reshape(view, _compat.kernel_of(self).shape)

    def call(self, inputs):
        inputs = as_float(inputs, self.compute_dtype)
        y = kernel_space_product(self, inputs, self._is_training(None))
        bias = self.merged_bias()
        if bias is not None:
            # The bias is broadcast over batch and space.
            shape = [1] * (self.rank + 2)
            channels = -1 if self.data_format == "channels_last" else 1
            shape[channels] = self.filters
            bias = ops.cast(bias, self.compute_dtype)
            y = ops.add(y, reshape(bias, shape))
        if self.activation is not None:
            y = self.activation(y)
        return y

    def _base_product(self, x):
        return self._float_product(x, _compat.kernel_of(self))

    def _float_product(self, x, kernel):
        padding = self.padding
        if padding == "causal":
            x = ops.pad(x, _compat.causal_padding(self))
            padding = "valid"
        return ops.conv(
            x,
            ops.convert_to_tensor(kernel),
            strides=list(self.strides),
            padding=padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )
