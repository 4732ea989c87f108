"""Frozen random matrices that a seed gives and no file stores."""

from keras_randadapt.bases.randomized_hadamard import RandomizedHadamard
