"""Penalties on the weights of adapters."""

from keras_randadapt.regularizers.orthogonality import Orthogonality

__all__ = [
    "Orthogonality",
]


def __dir__():
    return __all__
