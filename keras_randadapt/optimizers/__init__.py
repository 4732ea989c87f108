"""Optimizers for adapters."""

from keras_randadapt.optimizers.galore import GaLore
from keras_randadapt.optimizers.learning_rate_groups import learning_rate_groups
from keras_randadapt.optimizers.masked_gradient import MaskedGradient
from keras_randadapt.optimizers.proximal_l1 import ProximalL1
from keras_randadapt.optimizers.rank_allocation import RankAllocation
from keras_randadapt.optimizers.wrapper import OptimizerWrapper
