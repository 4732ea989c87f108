"""Penalties on the weights of adapters."""

from keras_randadapt.regularizers.orthogonality import Orthogonality
