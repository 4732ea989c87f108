"""Fast structured linear operations on the last axis, for every backend."""

from keras_randadapt.ops import counter
from keras_randadapt.ops.gradients import fence
from keras_randadapt.ops.gradients import with_gradient
from keras_randadapt.ops.plan import RandomizedTransform
from keras_randadapt.ops.transforms import fwht
from keras_randadapt.ops.transforms import randomized_transform

__all__ = [
    "counter",
    "fence",
    "fwht",
    "randomized_transform",
    "RandomizedTransform",
    "with_gradient",
]


def __dir__():
    return __all__
