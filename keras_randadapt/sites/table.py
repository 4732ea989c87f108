"""Adapted tables that a layer of KerasHub reads by itself."""

import functools
import math

from keras import ops

from keras_randadapt import _compat
from keras_randadapt.sites.kernel_view import KernelView
from keras_randadapt.sites.layer import AdaptedLayer
from keras_randadapt.sites.layer import shown_kernel


class AdaptedTable(AdaptedLayer):
    """A layer with a learned table, such as a `PositionEmbedding`.

    The kernel view of a table `(*positions, features)` is `(prod(positions),
    features)`. The layer's own `call` reads the attribute that holds the table
    and so finds the adapted one. A subclass that has a `call` of its own, as
    that of Stable Diffusion 3, therefore is a site too.
    """

    kind = "lookup"
    computes = ()

    @property
    def kernel_view(self):
        *positions, features = _compat.kernel_of(self).shape
        return KernelView(math.prod(positions), int(features))

    def to_view(self, kernel):
        return ops.reshape(kernel, AdaptedTable.kernel_view.fget(self))

    def from_view(self, view):
        return ops.reshape(view, _compat.kernel_of(self).shape)


@functools.lru_cache(maxsize=None)
def adapted_table(attribute):
    """The subclass of `AdaptedTable` whose table is in an attribute."""
    return type(
        "AdaptedTable",
        (AdaptedTable,),
        {"kernel_name": attribute, attribute: shown_kernel(attribute)},
    )
