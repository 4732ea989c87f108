"""Optimizers for adapters."""

import importlib

from keras_randadapt.optimizers.galore import GaLore
from keras_randadapt.optimizers.global_clip import ClipByGlobalNorm
from keras_randadapt.optimizers.masked_gradient import MaskedGradient
from keras_randadapt.optimizers.proximal_l1 import ProximalL1
from keras_randadapt.optimizers.rank_allocation import RankAllocation
from keras_randadapt.optimizers.wrapper import OptimizerWrapper

__all__ = [
    "ClipByGlobalNorm",
    "GaLore",
    "learning_rate_groups",
    "MaskedGradient",
    "OptimizerWrapper",
    "ProximalL1",
    "RankAllocation",
]


def __dir__():
    return __all__


def __getattr__(name):
    # The function needs the state of an adapted model, so its module is in
    # `model`, which imports this package.
    if name == "learning_rate_groups":
        module = importlib.import_module(
            "keras_randadapt.model.learning_rate_groups"
        )
        return module.learning_rate_groups
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
