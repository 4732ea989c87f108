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
from keras_randadapt.sites.layer import shown_kernel


class _AdaptedConvolution(AdaptedLayer):
    """A convolution of any class.

    The delta is formed and convolved. It is small beside the activations, and
    Keras's own convolution handles strides, padding, dilation and groups.
    """

    kind = "convolution"
    bias = shown_bias("bias")

    def from_view(self, view):
        return ops.reshape(view, _compat.kernel_of(self).shape)

    def call(self, inputs):
        inputs = as_float(inputs, self.compute_dtype)
        y = kernel_space_product(self, inputs, self._is_training(None))
        return activated(self, y, self.merged_bias())

    def _base_product(self, x):
        return self._float_product(x, _compat.kernel_of(self))


class AdaptedConv(_AdaptedConvolution):
    """A `Conv1D`, `Conv2D` or `Conv3D`, which may be grouped or dilated.

    The kernel view of a kernel `(*window, channels / groups, filters)` is
    `(prod(window) * channels / groups, filters)`.
    """

    @property
    def kernel(self):
        return self._merged_or_base(super().kernel)

    @property
    def kernel_view(self):
        *window, filters = _compat.kernel_of(self).shape
        return KernelView(int(np.prod(window)), int(filters))

    @property
    def channels_of_view(self):
        return int(_compat.kernel_of(self).shape[-2]), None

    def to_view(self, kernel):
        return ops.reshape(kernel, AdaptedConv.kernel_view.fget(self))

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


class AdaptedDepthwiseConv(_AdaptedConvolution):
    """A `DepthwiseConv1D` or `DepthwiseConv2D`.

    The kernel view of a kernel `(*window, channels, multiplier)` is
    `(prod(window), channels * multiplier)`. A view for each channel would have
    `multiplier` columns, which is 1 in most models and leaves no rank.
    """

    kernel = shown_kernel("kernel")

    @property
    def kernel_view(self):
        *window, channels, multiplier = _compat.kernel_of(self).shape
        return KernelView(int(np.prod(window)), int(channels * multiplier))

    @property
    def channels_of_view(self):
        # Each group has one channel.
        return 1, None

    def to_view(self, kernel):
        return ops.reshape(kernel, AdaptedDepthwiseConv.kernel_view.fget(self))

    def _float_product(self, x, kernel):
        return ops.depthwise_conv(
            x,
            kernel,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


class AdaptedConvTranspose(_AdaptedConvolution):
    """A `Conv1DTranspose`, `Conv2DTranspose` or `Conv3DTranspose`.

    The kernel view of a kernel `(*window, filters, channels)` is `(channels,
    prod(window) * filters)`: the layer multiplies each position of its input by
    it, and adds up what overlaps.
    """

    kernel = shown_kernel("kernel")

    @property
    def kernel_view(self):
        *window, channels = _compat.kernel_of(self).shape
        return KernelView(int(channels), int(np.prod(window)))

    @property
    def channels_of_view(self):
        return None, self.filters

    def to_view(self, kernel):
        view = AdaptedConvTranspose.kernel_view.fget(self)
        last = len(kernel.shape) - 1
        return ops.reshape(ops.transpose(kernel, (last, *range(last))), view)

    def from_view(self, view):
        *window, channels = _compat.kernel_of(self).shape
        kernel = ops.reshape(view, (channels, *window))
        return ops.transpose(kernel, (*range(1, len(window) + 1), 0))

    def _float_product(self, x, kernel):
        return ops.conv_transpose(
            x,
            kernel,
            strides=list(self.strides),
            padding=self.padding,
            output_padding=self.output_padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


def activated(layer, y, bias):
    """What a convolution makes of its product: bias and activation.

    Args:
        layer: A convolution of any class.
        y: Tensor, the product.
        bias: Optional tensor `(channels,)` of any dtype.

    Returns:
        Tensor like `y`.
    """
    if bias is not None:
        # The bias is broadcast over batch and space.
        shape = [1] * (layer.rank + 2)
        channels = -1 if layer.data_format == "channels_last" else 1
        shape[channels] = bias.shape[0]
        bias = ops.cast(bias, layer.compute_dtype)
        y = ops.add(y, reshape(bias, shape))
    if layer.activation is not None:
        y = layer.activation(y)
    return y
