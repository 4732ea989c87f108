"""Optimizers for adapters."""

from keras_randadapt.optimizers.learning_rate_groups import learning_rate_groups
