"""Callbacks, which run at the ends of batches and epochs."""

from keras_randadapt.callbacks.adapter_checkpoint import AdapterCheckpoint
from keras_randadapt.callbacks.pac_bayes import PACBayes
from keras_randadapt.callbacks.rank_budget import RankBudget
from keras_randadapt.callbacks.rank_monitor import RankMonitor

__all__ = [
    "AdapterCheckpoint",
    "PACBayes",
    "RankBudget",
    "RankMonitor",
]


def __dir__():
    return __all__
