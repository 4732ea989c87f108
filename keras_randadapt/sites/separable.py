"""Adapted separable convolutions, which have two kernels."""

import keras
from keras import ops

from keras_randadapt import _compat
from keras_randadapt.sites import convolution
from keras_randadapt.sites.kernel_site import KernelSite
from keras_randadapt.sites.layer import AdaptedLayer
from keras_randadapt.sites.layer import as_float
from keras_randadapt.sites.layer import kernel_space_product


class AdaptedSeparableConv(AdaptedLayer):
    """A `SeparableConv1D` or `SeparableConv2D`; see `sites_of`.

    Its two products are computed one after the other, as Keras's backends do.
    """

    kind = "convolution"

    @property
    def depthwise_kernel(self):
        return _shown(self, "depthwise_kernel")

    @property
    def pointwise_kernel(self):
        return _shown(self, "pointwise_kernel")

    @property
    def bias(self):
        bias = _adapted_bias(self)
        if bias is None or bias is vars(self)["bias"]:
            return bias
        return ops.cast(bias, self.compute_dtype)

    def call(self, inputs):
        sites = sites_of(self)
        if not any(_is_active(site) for site in sites):
            return self._site_base.call(self, inputs)
        y = as_float(inputs, self.compute_dtype)
        training = self._is_training(None)
        for site in sites:
            if _is_active(site):
                y = kernel_space_product(site, y, training)
            else:
                y = site._base_product(y)
        return convolution.activated(self, y, _adapted_bias(self))


class _Kernel(KernelSite):
    """One of the kernels; it computes what Keras computes with it."""

    layer_mixin = AdaptedSeparableConv
    kind = "convolution"

    def from_view(self, view):
        return ops.reshape(view, self._kernel.shape)

    def _base_product(self, x):
        return self._float_product(x, _compat.kernel_of(self))


class DepthwiseKernel(_Kernel):
    """The first kernel; its view is that of a depthwise convolution."""

    kernel_view = convolution.AdaptedDepthwiseConv.kernel_view
    channels_of_view = convolution.AdaptedDepthwiseConv.channels_of_view
    to_view = convolution.AdaptedDepthwiseConv.to_view

    def _float_product(self, x, kernel):
        return ops.depthwise_conv(
            x,
            kernel,
            strides=self.layer.strides,
            padding=self.layer.padding,
            dilation_rate=self.layer.dilation_rate,
            data_format=self.layer.data_format,
        )


class PointwiseKernel(_Kernel):
    """The second kernel, of one position; it has the bias."""

    kernel_view = convolution.AdaptedConv.kernel_view
    channels_of_view = convolution.AdaptedConv.channels_of_view
    to_view = convolution.AdaptedConv.to_view

    def _float_product(self, x, kernel):
        return ops.conv(
            x,
            kernel,
            strides=1,
            padding="valid",
            data_format=self.layer.data_format,
        )


def sites_of(layer):
    """The two sites of a separable convolution; none for all other layers.

    Args:
        layer: A built layer, with or without adapters.

    Returns:
        list of `KernelSite`s, in the order of the products.
    """
    classes = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
    if not isinstance(layer, classes):
        return []
    return [
        DepthwiseKernel(layer, "depthwise_kernel"),
        PointwiseKernel(layer, "pointwise_kernel", "bias"),
    ]


def _is_active(site):
    return site.is_adapted and bool(site.adapter.active())


def _shown(layer, attribute):
    (site,) = [one for one in sites_of(layer) if one.attribute == attribute]
    return site.merged_kernel() if _is_active(site) else site._kernel


def _adapted_bias(layer):
    *_, site = sites_of(layer)
    return site.merged_bias() if _is_active(site) else site.bias
