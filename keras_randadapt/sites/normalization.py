"""Adapted normalizations; only their offset is adapted."""

import math

from keras import ops

from keras_randadapt.ops.fast_products import reshape
from keras_randadapt.sites.kernel_view import KernelView
from keras_randadapt.sites.layer import AdaptedLayer


class AdaptedNorm(AdaptedLayer):
    """A normalization, whose offset `beta` is its bias; it has no kernel."""

    kind = "norm"
    kernel_name = None
    bias_name = "beta"

    @property
    def kernel_view(self):
        return KernelView(1, math.prod(self.beta.shape))

    def call(self, inputs, *args, **kwargs):
        y = self._site_base.call(self, inputs, *args, **kwargs)
        if not any(adapter.adapts_bias for adapter in self.adapter.active()):
            return y
        axes = (
            self.axis if isinstance(self.axis, (list, tuple)) else [self.axis]
        )
        shape = [1] * len(inputs.shape)
        for axis, size in zip(axes, self.beta.shape, strict=True):
            shape[axis] = size
        change = self.merged_bias() - ops.cast(self.beta, "float32")
        return y + ops.cast(reshape(change, shape), y.dtype)
