"""Adapted normalizations; only their offset is adapted."""

import math

from keras_randadapt.sites import per_example
from keras_randadapt.sites.kernel_view import KernelView
from keras_randadapt.sites.layer import AdaptedLayer
from keras_randadapt.sites.layer import own_bias
from keras_randadapt.sites.layer import shown_bias


class AdaptedNorm(AdaptedLayer):
    """A normalization, whose offset `beta` is its bias; it has no kernel.

    Keras's own `call` reads `beta` and so finds the adapted one.
    """

    kind = "norm"
    kernel_name = None
    bias_name = "beta"
    beta = shown_bias("beta")

    def call(self, *args, **kwargs):
        y = super().call(*args, **kwargs)
        if not self.adapter.per_example:
            return y
        self.adapter.check_examples(self, y)
        self._check_axes(len(y.shape))
        for adapter in self.adapter.active():
            if isinstance(adapter, per_example.PerExample):
                y = adapter.adapt_norm(y)
        return y

    def _check_axes(self, ndim):
        axes = self.axis if isinstance(self.axis, list) else [self.axis]
        last = list(range(ndim - len(axes), ndim))
        if sorted(axis % ndim for axis in axes) != last:
            per_example.refuse(
                f"The layer '{self.path}' normalizes the axis {self.axis} of "
                f"{ndim}. In a bank that must be the last one."
            )

    @property
    def _dtype_of_shown_bias(self):
        # Keras computes normalizations in float32, also in 16-bit models.
        return own_bias(self).dtype

    @property
    def kernel_view(self):
        return KernelView(1, math.prod(vars(self)["beta"].shape))
