"""`Folds`: how a site folds its adapters into its kernel view and its bias."""

from typing import Any

from keras import ops

from keras_randadapt import _compat
from keras_randadapt.sites import product


class Folds:
    """The part of a site that knows the merged kernel and the merged bias.

    A site has `adapter`, its `AdapterStack`, and the functions `to_view` and
    `from_view` of a kernel.
    """

    #: The attribute that holds the site's bias.
    bias_name = "bias"

    #: The number of channels of one position of the input and of the output,
    #: where a row or a column of the kernel view is for one position of a
    #: window; see `Site`.
    channels_of_view: Any = (None, None)

    def _merged_kernel_view(self, kernel, training=False):
        """The kernel view with every active adapter folded in, float32."""
        base = ops.cast(self.to_view(_compat.unrounded(kernel)), "float32")
        return product.fold(self.adapter.active(), base, training)

    def bias_to_view(self, bias):
        """A bias as a vector, in the order of the columns if it has one each.

        The columns are those of the kernel view.
        """
        return ops.reshape(bias, (-1,))

    def bias_from_view(self, vector):
        return ops.reshape(vector, own_bias(self).shape)

    def merged_bias(self):
        """The bias with every active adapter folded in, in its own shape.

        It is float32, and the caller casts it to the compute dtype. If no
        adapter adapts biases it is the variable itself, and without a bias it
        is `None`.
        """
        bias = own_bias(self)
        adapters = [a for a in self.adapter.active() if a.adapts_bias]
        if bias is None or not adapters:
            return bias
        base = ops.cast(self.bias_to_view(_compat.unrounded(bias)), "float32")
        vector = base
        for adapter in adapters:
            vector = adapter.merged_bias(vector, base)
        return self.bias_from_view(vector)


def own_bias(site):
    """The bias variable of a site, without adapters, or `None`."""
    return vars(site).get(site.bias_name)
