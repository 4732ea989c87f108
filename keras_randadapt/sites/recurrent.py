"""Adapted recurrent layers, whose cell has two kernels."""

import keras
from keras import ops

from keras_randadapt import _compat
from keras_randadapt.sites import lanes
from keras_randadapt.sites.kernel_site import KernelSite
from keras_randadapt.sites.layer import AdaptedLayer

#: The cells whose kernels are known.
_CELLS = (
    keras.layers.LSTMCell,
    keras.layers.GRUCell,
    keras.layers.SimpleRNNCell,
)


class AdaptedRecurrent(AdaptedLayer):
    """An `LSTM`, `GRU`, `SimpleRNN` or an `RNN` of such a cell.

    The adapted kernels are formed once a call, outside of the loop over time.
    The layer's own code then runs with a cell that has them, so that a
    backend's fused loop stays in use.
    """

    def call(self, *args, **kwargs):
        training = self._is_training(kwargs.get("training"))
        formed = {}
        for site in sites_of(self):
            if site.is_adapted and site.adapter.active():
                formed[site.attribute] = site.merged_kernel(training)
                bias = site.merged_bias()
                if bias is not site.bias:
                    formed["bias"] = ops.cast(bias, site.compute_dtype)
        if not formed:
            return self._site_base.call(self, *args, **kwargs)
        # Shadows and not the layers: another thread may be calling them.
        cell = lanes.shadow(self.cell, formed)
        layer = lanes.shadow(self, {"cell": cell}, self._site_base)
        return self._site_base.call(layer, *args, **kwargs)

    def base_variables(self):
        return super().base_variables() + _compat.owned_variables(self.cell)


class RecurrentKernel(KernelSite):
    """The kernel of the inputs or of the states, `(rows, gates * units)`."""

    layer_mixin = AdaptedRecurrent

    #: The adapted kernel is formed before there are inputs to drop.
    takes_dropout = False

    @property
    def compute_dtype(self):
        return self.owner.compute_dtype


def sites_of(layer):
    """The two sites of a recurrent layer; none for all other layers.

    Args:
        layer: A built layer, with or without adapters.

    Returns:
        list of `KernelSite`s. The first one has the bias.
    """
    if not isinstance(layer, keras.layers.RNN):
        return []
    if not isinstance(layer.cell, _CELLS):
        return []
    return [
        RecurrentKernel(layer, "kernel", "bias", layer.cell),
        RecurrentKernel(layer, "recurrent_kernel", owner=layer.cell),
    ]
