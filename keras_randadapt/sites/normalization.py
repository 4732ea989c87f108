"""Adapted normalizations; only their offset is adapted."""

import math

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

    @property
    def _dtype_of_shown_bias(self):
        # Keras computes normalizations in float32, also in 16-bit models.
        return own_bias(self).dtype

    @property
    def kernel_view(self):
        return KernelView(1, math.prod(vars(self)["beta"].shape))
